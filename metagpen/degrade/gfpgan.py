"""The degradation that GFPGAN and GPEN were trained with (Wang et al., CVPR 2021; Yang et al., CVPR 2021)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from . import ops
from .base import Degradation, check_probability, check_range


@dataclass(frozen=True)
class GFPGANRecipe:
    """One image's settings; sigmas in pixels of the image, noise as a fraction of the [0, 1] range."""

    sigma_x: float
    sigma_y: float
    angle: float
    downsample: float
    noise: float
    noise_seed: int
    quality: int
    grey: bool


class GFPGANDegradation(Degradation):
    """Blur, shrink by a random factor, noise, JPEG, back to full size, sometimes grey.

    The published values are for faces of 512 px (``reference_size``). ``kernel_size`` and ``sigma`` are pixels at
    that size and are scaled by H / reference_size, so that a 128 px crop is blurred as much, relative to the face, as
    a 512 px one. The ``downsample`` factor stays a factor: at 512 px it leaves 64-640 px, at 128 px 16-160 px.
    Half of the kernels are isotropic; the others have two independent sigmas at a random angle. ``noise`` is the
    standard deviation out of 255, ``jpeg`` the quality, ``grey`` the probability that the poor image turns grey
    (never the target).
    """

    def __init__(
        self,
        kernel_size: int = 41,
        sigma: tuple[float, float] = (0.1, 10.0),
        downsample: tuple[float, float] = (0.8, 8.0),
        noise: tuple[float, float] = (0, 20),
        jpeg: tuple[int, int] = (60, 100),
        grey: float = 0.01,
        reference_size: int = 512,
    ):
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size must be odd and positive, not {kernel_size}")
        if not isinstance(reference_size, int) or reference_size < 1:
            raise ConfigError(f"reference_size must be a number of pixels, not {reference_size}")
        self.kernel_size = kernel_size
        self.sigma = check_range("sigma", sigma, 0.0)
        self.downsample = check_range("downsample", downsample, 0.1)
        self.noise = check_range("noise", noise, 0.0, 255.0)
        self.jpeg = check_range("jpeg", jpeg, 1, 100)
        self.grey = check_probability("grey", grey)
        self.reference_size = reference_size

    def draw(self, dice: ops.Dice, height: int, width: int) -> GFPGANRecipe:
        """See `Degradation.draw`."""
        zoom = height / self.reference_size
        sigma_x = sigma_y = zoom * dice.uniform(*self.sigma)
        angle = 0.0
        if dice.chance(0.5):
            sigma_y = zoom * dice.uniform(*self.sigma)
            angle = dice.uniform(-math.pi, math.pi)
        return GFPGANRecipe(
            sigma_x=sigma_x,
            sigma_y=sigma_y,
            angle=angle,
            downsample=dice.uniform(*self.downsample),
            noise=dice.uniform(*self.noise) / 255.0,
            noise_seed=dice.seed(),
            quality=dice.integer(*map(int, self.jpeg)),
            grey=dice.chance(self.grey),
        )

    def apply(self, images: Tensor, recipes: Sequence[GFPGANRecipe]) -> Tensor:
        """See `Degradation.apply`."""
        height, width = images.shape[-2:]
        size = 2 * round((self.kernel_size // 2) * height / self.reference_size) + 1
        kernels = torch.stack([ops.gaussian_kernel(size, r.sigma_x, r.sigma_y, r.angle) for r in recipes])
        poor = []
        for image, recipe in zip(ops.blur(images, kernels), recipes, strict=True):
            low = (max(1, int(height / recipe.downsample)), max(1, int(width / recipe.downsample)))
            poor.append(ops.add_noise(ops.resize(image, low, "bilinear"), recipe.noise, recipe.noise_seed))
        poor = ops.jpeg(poor, [recipe.quality for recipe in recipes])
        poor = [ops.resize(image, (height, width), "bilinear") for image in poor]
        poor = [ops.to_grey(image) if recipe.grey else image for image, recipe in zip(poor, recipes, strict=True)]
        return ops.to_8bit(torch.stack(poor))
