"""The outer loop: learn, over many people, where to begin and how far to step."""

from . import anil, fomaml, lslr, maml, meta_sgd, multi_step, reptile  # noqa: F401  (they register themselves)
from .engines import ENGINES
from .problem import OUTER_LOOPS, MetaGradient, OuterLoop, Problem, Progress, outer_loop

__all__ = ["ENGINES", "OUTER_LOOPS", "MetaGradient", "OuterLoop", "Problem", "Progress", "outer_loop"]
