"""Meta-SGD (Li et al. 2017): a rate for every number of the adapter, learned beside where it begins.

θ_{k+1} = θ_k − α ∘ ∇L_support(θ_k); the outer gradient is MAML's, with respect to θ_0 and the vector α. Rates are kept
as logarithms: they cannot change sign, unlike the paper's.
"""

from .problem import Engine, MetaGradient, Problem, Progress, outer_loop, through_the_steps


@outer_loop("meta_sgd", elementwise=True)
def meta_sgd(problem: Problem, engine: Engine, progress: Progress) -> MetaGradient:
    return through_the_steps(problem, engine, progress.second_order)
