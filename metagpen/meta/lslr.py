"""LSLR, per-layer per-step learning rates (Antoniou, Edwards & Storkey 2019, "How to train your MAML", section 4).

θ_{k+1}^i = θ_k^i − α_{i,k} ∇_{θ^i} L_support(θ_k) for tensor i and step k; the outer gradient is MAML's, with respect
to θ_0 and every α_{i,k}.
"""

from .problem import Engine, MetaGradient, Problem, Progress, outer_loop, through_the_steps


@outer_loop("lslr", per_step=True)
def lslr(problem: Problem, engine: Engine, progress: Progress) -> MetaGradient:
    return through_the_steps(problem, engine, progress.second_order)
