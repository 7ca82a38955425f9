"""ANIL, "almost no inner loop" (Raghu et al. 2020), for a restorer: only the latent adapter moves inside.

ANIL moves only a classifier's head in the inner loop and learns the body in the outer loop alone. Here the latent
adapter is what moves, and where the encoder tail's deltas begin is learned for everybody. The outer gradient is MAML's.
"""

from .problem import Engine, MetaGradient, Problem, Progress, outer_loop, through_the_steps


@outer_loop("anil", moving=("latent.",))
def anil(problem: Problem, engine: Engine, progress: Progress) -> MetaGradient:
    return through_the_steps(problem, engine, progress.second_order)
