"""Multi-step loss (Antoniou, Edwards & Storkey 2019, "How to train your MAML", section 4), with LSLR's rates.

Outer loss: Σ_k v_k L_query(θ_k), k = 1 … T. The weights v begin equal and move, over the first part of the training,
to the last step alone; the earlier steps keep a little, so that stopping early stays good too.
"""

from .problem import Engine, MetaGradient, Problem, Progress, outer_loop, through_the_steps

ANNEALED = 0.5  # of the training; from then on the weights stay
KEPT = 0.03  # what an earlier step keeps


@outer_loop("multi_step", per_step=True)
def multi_step(problem: Problem, engine: Engine, progress: Progress) -> MetaGradient:
    weights = step_weights(len(problem.support), progress.done)
    return through_the_steps(problem, engine, progress.second_order, weights)


def step_weights(steps: int, done: float) -> list[float]:
    """Weights v_1 … v_T, of sum 1, when a share `done` of the training is over."""
    annealed = min(1.0, done / ANNEALED)
    kept = min(KEPT, 1 / steps)
    earlier = (1 - annealed) / steps + annealed * kept
    return [earlier] * (steps - 1) + [1 - earlier * (steps - 1)]
