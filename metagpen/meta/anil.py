"""ANIL, "almost no inner loop" (Raghu et al. 2020), for a restorer: only the latent adapter moves inside.

ANIL moves only a classifier's head in the inner loop and learns the body in the outer loop alone. Here the latent
adapter is what moves, and where the other tensors begin is learned for everybody:

φ_{k+1} = φ_k − α ∇_φ L_support(φ_k, ψ_0) for the latents φ alone, then ∂L_query(φ_T, ψ_0)/∂(φ_0, ψ_0, α) as in MAML.
"""

from .problem import Engine, MetaGradient, Problem, Progress, outer_loop, through_the_steps


@outer_loop("anil", moving=("latent.",))
def anil(problem: Problem, engine: Engine, progress: Progress) -> MetaGradient:
    return through_the_steps(problem, engine, progress.second_order)
