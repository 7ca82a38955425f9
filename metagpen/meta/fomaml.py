"""First-order MAML (Finn, Abbeel & Levine 2017, section 5.2): inner gradients count as constants.

θ_{k+1} = θ_k − α g_k with g_k = ∇L_support(θ_k) held fixed, so that
∂L_query(θ_T)/∂θ_0 = ∇L_query(θ_T)    and    ∂L_query(θ_T)/∂α = −Σ_k g_k · ∇L_query(θ_T).
A step costs no more than plain adaptation.
"""

from .problem import Engine, MetaGradient, Problem, Progress, outer_loop, through_the_steps


@outer_loop("fomaml")
def fomaml(problem: Problem, engine: Engine, progress: Progress) -> MetaGradient:
    return through_the_steps(problem, engine, second_order=False)
