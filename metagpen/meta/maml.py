"""MAML (Finn, Abbeel & Levine 2017), second order.

Inner steps on the support:    θ_{k+1} = θ_k − α ∇L_support(θ_k),  k = 0 … T − 1
Outer gradient:                ∇_{θ_0, α} (1/P) Σ_p L_query(θ_T^p), through every inner gradient (Hessians included)

Of the term `latent_norm`, which pulls towards where a person began, that beginning counts as a constant.
"""

from .problem import Engine, MetaGradient, Problem, Progress, outer_loop, through_the_steps


@outer_loop("maml")
def maml(problem: Problem, engine: Engine, progress: Progress) -> MetaGradient:
    return through_the_steps(problem, engine, progress.second_order)
