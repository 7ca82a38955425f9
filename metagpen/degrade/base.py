"""What a degradation is, and a mixture of several."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..devices import one_thread
from ..errors import ConfigError
from .ops import Dice


class Degradation(ABC):
    """Turns sharp faces into poor ones: ``degrade(images, generator)``.

    A degradation works in two moves. `draw` decides everything random about one image and writes it down as a small
    *recipe*; `apply` carries the recipes out. Every draw comes from the generator handed in, so its seed reproduces
    a batch exactly, and an image with its recipe gives the same result alone or within a batch.
    """

    #: The output is this many times smaller than the input, per side.
    scale: int = 1

    @abstractmethod
    def draw(self, dice: Dice, height: int, width: int) -> Any:
        """A recipe for one image of this size."""

    @abstractmethod
    def apply(self, images: Tensor, recipes: Sequence[Any]) -> Tensor:
        """Carries out one recipe per image: ``[B, 3, H, W]`` to ``[B, 3, H/scale, W/scale]``, both in [0, 1]."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Degrades ``[B, 3, H, W]`` RGB images in [-1, 1]; same range, dtype and device, size divided by `scale`.

        Not differentiable. Sides that `scale` does not divide are cropped at the right and bottom first.
        Raises `ConfigError` for another shape or a missing generator.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ConfigError(f"a degradation takes RGB images [B, 3, H, W], not a tensor {list(images.shape)}")
        if not images.is_floating_point():
            raise ConfigError(f"a degradation takes floats in [-1, 1], not {images.dtype}")
        sides = images.shape[-2:]
        if min(sides) < self.scale:
            raise ConfigError(f"images of {list(sides)} pixels are too small for scale {self.scale}")
        return self.carry_out(images, self.recipes(len(images), *sides, generator))

    def recipes(self, count: int, height: int, width: int, generator: torch.Generator) -> list[Any]:
        """What is to happen to so many images of this size: all that is random, and nothing that takes time."""
        dice = Dice(generator)
        return [self.draw(dice, height - height % self.scale, width - width % self.scale) for _ in range(count)]

    @torch.no_grad()
    def carry_out(self, images: Tensor, recipes: Sequence[Any]) -> Tensor:
        """The other half of a call: images [B, 3, H, W] in [-1, 1] and a recipe for each. By one thread of the CPU,
        so that the same recipe gives the same image in a process of any number of threads."""
        height, width = (side - side % self.scale for side in images.shape[-2:])
        if not recipes:
            return images[..., : height // self.scale, : width // self.scale].clone()
        sharp = images[..., :height, :width].float().add(1.0).div_(2.0)
        with one_thread():
            poor = self.apply(sharp, recipes)
        return poor.clamp_(0.0, 1.0).mul_(2.0).sub_(1.0).to(images.dtype)


class MixedDegradation(Degradation):
    """Each image gets one of several degradations, drawn by weight: ``MixedDegradation([(2.0, a), (1.0, b)])``.

    The draw is per image, in order: first which degradation, then that one's recipe. The batch is then split by
    degradation, each part carried out together, and the results put back in their places. All parts must have the
    same `scale`. Weights need not sum to 1.
    """

    def __init__(self, parts: Sequence[tuple[float, Degradation]]):
        parts = list(parts)
        if not all(isinstance(weight, int | float) for weight, _ in parts):
            raise ConfigError(f"the weights of a mixture must be numbers, not {[weight for weight, _ in parts]}")
        if not parts or any(weight < 0 for weight, _ in parts) or not sum(weight for weight, _ in parts) > 0:
            raise ConfigError("a mixture needs (weight, degradation) pairs with weights >= 0, not all of them 0")
        scales = {part.scale for _, part in parts}
        if len(scales) > 1:
            raise ConfigError(f"the parts of a mixture must share one scale, not {sorted(scales)}")
        self.weights = [float(weight) for weight, _ in parts]
        self.parts = [part for _, part in parts]
        self.scale = scales.pop()

    def draw(self, dice: Dice, height: int, width: int) -> tuple[int, Any]:
        """Which part (its index), and that part's recipe."""
        rest = dice.uniform(0.0, sum(self.weights))
        which = max(i for i, weight in enumerate(self.weights) if weight > 0)
        for i, weight in enumerate(self.weights):
            if rest < weight:
                which = i
                break
            rest -= weight
        return which, self.parts[which].draw(dice, height, width)

    def apply(self, images: Tensor, recipes: Sequence[tuple[int, Any]]) -> Tensor:
        """See `Degradation.apply`."""
        height, width = (side // self.scale for side in images.shape[-2:])
        result = images.new_empty(len(images), 3, height, width)
        for which, part in enumerate(self.parts):
            members = [i for i, (drawn, _) in enumerate(recipes) if drawn == which]
            if members:
                result[members] = part.apply(images[members], [recipes[i][1] for i in members]).to(result)
        return result


def check_range(name: str, values: Sequence[float], low: float, high: float = float("inf")) -> tuple[float, float]:
    """The pair (least, most) if low <= least <= most <= high; `ConfigError` that names the setting otherwise."""
    try:
        least, most = values
        fine = low <= least <= most <= high
    except (TypeError, ValueError):
        fine = False
    if not fine:
        raise ConfigError(f"{name} must be two numbers (least, most) from {low:g} to {high:g}, not {values!r}")
    return least, most


def check_probability(name: str, value: float) -> float:
    """Itself, from 0 to 1; `ConfigError` that names the setting otherwise."""
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"{name} must be a number from 0 to 1, not {value!r}")
    return value
