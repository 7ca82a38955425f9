"""No degradation: photos that are fine as they are, which a restorer should leave alone."""

from collections.abc import Sequence

from torch import Tensor

from . import ops
from .base import Degradation


class NoDegradation(Degradation):
    """The photo itself, in the 256 levels of a file."""

    def draw(self, dice: ops.Dice, height: int, width: int) -> None:
        """See `Degradation.draw`: there is nothing to decide."""

    def apply(self, images: Tensor, recipes: Sequence[None]) -> Tensor:
        """See `Degradation.apply`."""
        return ops.to_8bit(images)
