"""Our heavy degradation: faces of which only 8 to 16 pixels are left."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .base import Degradation, check_probability, check_range


@dataclass(frozen=True)
class HeavyRecipe:
    """One image's settings; `side` in pixels, `sigma` in pixels of the small image, noise of the [0, 1] range."""

    side: int
    sigma: float
    down: str
    up: str
    noise: float
    noise_seed: int
    quality: int | None


class HeavyDegradation(Degradation):
    """Shrinks the whole crop to a few pixels, adds noise and JPEG *there*, and enlarges it again.

    ``face_px``: the shorter side of the shrunken crop in pixels, log-uniform. ``blur``: with probability ``blur_p``, a
    Gaussian blur before shrinking, its sigma uniform in pixels of the *small* image (so that it means the same at any
    crop size). ``noise``: standard deviation out of 255, uniform. ``jpeg``: quality, applied with probability
    ``jpeg_p``. Shrinking is by area, antialiased bilinear or antialiased bicubic; enlarging by bicubic, bilinear or
    nearest, each as likely as the others.
    """

    DOWN = ("area", "bilinear", "bicubic")
    UP = ("bicubic", "bilinear", "nearest")

    def __init__(
        self,
        face_px: tuple[float, float] = (8, 16),
        noise: tuple[float, float] = (0, 30),
        jpeg: tuple[int, int] = (30, 95),
        jpeg_p: float = 0.7,
        blur: tuple[float, float] = (0.2, 0.8),
        blur_p: float = 0.5,
    ):
        self.face_px = check_range("face_px", face_px, 1)
        self.noise = check_range("noise", noise, 0.0, 255.0)
        self.jpeg = check_range("jpeg", jpeg, 1, 100)
        self.jpeg_p = check_probability("jpeg_p", jpeg_p)
        self.blur = check_range("blur", blur, 0.0)
        self.blur_p = check_probability("blur_p", blur_p)

    def draw(self, dice: ops.Dice, height: int, width: int) -> HeavyRecipe:
        """See `Degradation.draw`."""
        return HeavyRecipe(
            side=round(dice.log_uniform(*self.face_px)),
            sigma=dice.uniform(*self.blur) if dice.chance(self.blur_p) else 0.0,
            down=dice.choice(self.DOWN),
            up=dice.choice(self.UP),
            noise=dice.uniform(*self.noise) / 255.0,
            noise_seed=dice.seed(),
            quality=dice.integer(*map(int, self.jpeg)) if dice.chance(self.jpeg_p) else None,
        )

    def apply(self, images: Tensor, recipes: Sequence[HeavyRecipe]) -> Tensor:
        """See `Degradation.apply`."""
        poor = [self._shrink(image, recipe) for image, recipe in zip(images, recipes, strict=True)]
        poor = [ops.add_noise(p, r.noise, r.noise_seed) for p, r in zip(poor, recipes, strict=True)]
        poor = ops.jpeg(poor, [recipe.quality for recipe in recipes])
        poor = [_resize(p, images.shape[-2:], r.up) for p, r in zip(poor, recipes, strict=True)]
        return ops.to_8bit(torch.stack(poor))

    @staticmethod
    def _shrink(image: Tensor, recipe: HeavyRecipe) -> Tensor:
        """Blur and shrink in one: their matrices multiply first, so the full-size image is read only once."""
        factor = min(image.shape[-2:]) / recipe.side
        low = [max(1, round(side / factor)) for side in image.shape[-2:]]
        return _resize(image, low, recipe.down, recipe.sigma * factor)


def _resize(image: Tensor, size: Sequence[int], mode: str, blur: float = 0.0) -> Tensor:
    matrices = []
    for length, target in zip(image.shape[-2:], size, strict=True):
        matrix = ops.resize_matrix(length, target, mode, antialias=True)
        matrices.append(matrix @ ops.gaussian_matrix(length, blur) if blur else matrix)
    return ops.separable(image, *matrices)
