"""BSRGAN's degradation (Zhang et al., "Designing a Practical Degradation Model…", ICCV 2021): steps in random order.

Settings and probabilities are the published ones (`degradation_bsrgan` of cszn/BSRGAN). Three things differ, on
purpose: one generator draws everything (theirs mixes two), the shifted Gaussian is evaluated where it is wanted instead
of being interpolated with a SciPy function that no longer exists, and the camera-ISP step keeps its place in the order
but does nothing, as in theirs without an ISP model, which none is published for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from . import ops
from .base import Degradation
from .ops import Dice

INTERPOLATIONS = ("bilinear", "bicubic", "area")
LARGEST_KERNEL = 25


@dataclass(frozen=True)
class Blur:
    """A Gaussian: sigmas in pixels of the image at that moment, along axes turned by `angle`."""

    size: int
    sigma_x: float
    sigma_y: float
    angle: float
    shift: float = 0.0

    def kernel(self) -> Tensor:
        """[25, 25], so that kernels of all sizes stack."""
        kernel = ops.gaussian_kernel(self.size, self.sigma_x, self.sigma_y, self.angle, self.shift)
        return ops.pad_kernel(kernel, LARGEST_KERNEL)


@dataclass(frozen=True)
class Shrink:
    """Resize by 1/factor."""

    factor: float
    mode: str
    antialias: bool = False


@dataclass(frozen=True)
class BlurAndSkip:
    """Blur with a kernel shifted to the middle of each step x step block, then keep one pixel of each block."""

    blur: Blur
    step: int


@dataclass(frozen=True)
class ShrinkToScale:
    """Resize to exactly 1/scale of the original."""

    mode: str


@dataclass(frozen=True)
class Noise:
    """Gaussian noise: standard deviation of the [0, 1] range, or a 3x3 covariance (nested tuples)."""

    kind: str
    sigma: float
    seed: int
    covariance: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class Jpeg:
    """JPEG of this quality; None leaves the image alone."""

    quality: int | None


@dataclass(frozen=True)
class CameraISP:
    """A place in the order that does nothing (no ISP model is published)."""


@dataclass(frozen=True)
class BSRGANRecipe:
    """One image's steps in order: an optional first halving, the seven in random order, the final JPEG."""

    steps: tuple


class BSRGANDegradation(Degradation):
    """Two blurs, two downsamplings, noise, JPEG and a camera step in random order, then a final JPEG.

    The exact downsampling to 1/scale never comes before the random one. ``scale`` is a whole number from 1;
    the output is ``[B, 3, H/scale, W/scale]``. With scale 1 the size stays and only the quality falls.
    """

    def __init__(self, scale: int = 1):
        if isinstance(scale, bool) or not isinstance(scale, int) or scale < 1:
            raise ConfigError(f"scale must be a whole number from 1, not {scale!r}")
        self.scale = scale

    def draw(self, dice: Dice, height: int, width: int) -> BSRGANRecipe:
        """See `Degradation.draw`."""
        scale, first = self.scale, []
        if scale == 4 and dice.chance(0.25):
            first = [_first_halving(dice)]
            scale = 2
        order = dice.order(7)
        early, late = order.index(2), order.index(3)
        if early > late:
            order[early], order[late] = order[late], order[early]
        draws = (_blur, _blur, _downsample, _downsample_to_scale, _noise, _maybe_jpeg, _camera)
        steps = [draws[i](dice, scale) for i in order]
        return BSRGANRecipe(tuple(first + steps + [_jpeg(dice)]))

    def apply(self, images: Tensor, recipes: Sequence[BSRGANRecipe]) -> Tensor:
        """Carries the recipes out step by step; images that are at the same kind of step run together."""
        target = tuple(side // self.scale for side in images.shape[-2:])
        current = list(images)
        # Recipes of different length are aligned at their ends, so that the final JPEGs fall together.
        for remaining in range(max(len(recipe.steps) for recipe in recipes), 0, -1):
            due = {i: r.steps[-remaining] for i, r in enumerate(recipes) if len(r.steps) >= remaining}
            for kind in dict.fromkeys(map(type, due.values())):
                steps = {i: step for i, step in due.items() if type(step) is kind}
                done = _carry_out([current[i] for i in steps], list(steps.values()), target)
                for i, image in zip(steps, done, strict=True):
                    current[i] = image
        return torch.stack(current)


# drawing one step's settings


def _kernel_size(dice: Dice) -> int:
    return 2 * dice.integer(2, 11) + 3


def _blur(dice: Dice, scale: int) -> Blur:
    if dice.chance(0.5):
        largest = 4.0 + scale  # of the covariance's eigenvalues
        size, angle = _kernel_size(dice), dice.uniform(0.0, math.pi)
        return Blur(size, *(math.sqrt(dice.uniform(0.0, largest)) for _ in range(2)), angle)
    size, sigma = _kernel_size(dice), dice.uniform(0.0, 2.0 + 0.2 * scale)
    return Blur(size, sigma, sigma, 0.0)


def _first_halving(dice: Dice) -> Shrink:
    if dice.chance(0.5):
        return Shrink(2.0, dice.choice(INTERPOLATIONS))
    return Shrink(2.0, "bicubic", antialias=True)


def _downsample(dice: Dice, scale: int) -> Shrink | BlurAndSkip:
    if dice.chance(0.75):
        return Shrink(dice.uniform(1.0, 2.0 * scale), dice.choice(INTERPOLATIONS))
    sigma = dice.uniform(0.1, 0.6 * scale)
    return BlurAndSkip(Blur(LARGEST_KERNEL, sigma, sigma, 0.0, shift=(scale - 1) / 2), scale)


def _downsample_to_scale(dice: Dice, scale: int) -> ShrinkToScale:
    return ShrinkToScale(dice.choice(INTERPOLATIONS))


def _noise(dice: Dice, scale: int) -> Noise:
    sigma, kind = dice.integer(2, 25) / 255.0, dice.uniform(0.0, 1.0)
    if kind < 0.4:
        return Noise("grey", sigma, dice.seed())
    if kind >= 0.6:
        return Noise("colour", sigma, dice.seed())
    # |L^2 U' D U| with L the largest level, D uniform and U an orthonormal basis of a random matrix's columns. The
    # entrywise absolute value of a positive 3x3 matrix stays positive, so it is a covariance.
    spread = torch.diag(torch.tensor([dice.uniform(0.0, 1.0) for _ in range(3)], dtype=torch.float64))
    random = torch.tensor([[dice.uniform(0.0, 1.0) for _ in range(3)] for _ in range(3)], dtype=torch.float64)
    basis = torch.linalg.svd(random).U
    covariance = ((25 / 255.0) ** 2 * basis.mT @ spread @ basis).abs()
    return Noise("covariance", sigma, dice.seed(), tuple(map(tuple, covariance.tolist())))


def _jpeg(dice: Dice) -> Jpeg:
    return Jpeg(dice.integer(30, 95))


def _maybe_jpeg(dice: Dice, scale: int) -> Jpeg:
    return _jpeg(dice) if dice.chance(0.9) else Jpeg(None)


def _camera(dice: Dice, scale: int) -> CameraISP:
    return CameraISP()


# carrying out one step


def _carry_out(images: list[Tensor], steps: list, target: tuple[int, int]) -> list[Tensor]:
    """The steps are all of one kind, one per image; the images ``[3, h, w]`` may differ in size."""
    kind = type(steps[0])
    if kind is Blur:
        return _blur_by_size(images, [step.kernel() for step in steps])
    if kind is BlurAndSkip:
        blurred = _blur_by_size(images, [step.blur.kernel() for step in steps])
        return [b[:, :: step.step, :: step.step].clamp(0, 1) for b, step in zip(blurred, steps, strict=True)]
    if kind is Shrink:
        return [_shrink(image, step) for image, step in zip(images, steps, strict=True)]
    if kind is ShrinkToScale:
        return [ops.resize(i, target, step.mode).clamp(0, 1) for i, step in zip(images, steps, strict=True)]
    if kind is Noise:
        return [_add_noise(image, step) for image, step in zip(images, steps, strict=True)]
    if kind is Jpeg:
        return ops.jpeg(images, [step.quality for step in steps])
    return images  # CameraISP


def _blur_by_size(images: list[Tensor], kernels: list[Tensor]) -> list[Tensor]:
    result = list(images)
    for size in {image.shape for image in images}:
        members = [i for i, image in enumerate(images) if image.shape == size]
        blurred = ops.blur(torch.stack([images[i] for i in members]), torch.stack([kernels[i] for i in members]))
        for i, image in zip(members, blurred, strict=True):
            result[i] = image
    return result


def _shrink(image: Tensor, step: Shrink) -> Tensor:
    size = tuple(max(1, int(side / step.factor)) for side in image.shape[-2:])
    return ops.resize(image, size, step.mode, step.antialias).clamp(0, 1)


def _add_noise(image: Tensor, step: Noise) -> Tensor:
    covariance = None if step.covariance is None else torch.tensor(step.covariance, dtype=torch.float64)
    return ops.add_noise(image, step.sigma, step.seed, step.kind, covariance)
