"""The steps every degradation is made of: blur, resize, noise, JPEG, and the dice that draw their settings.

Images here are RGB float tensors in [0, 1], batched ``[B, 3, H, W]`` where all sizes agree and lists of ``[3, h, w]``
where they may differ. Nothing here draws from a global random state: settings come from `Dice`, and noise from a seed
that the settings carry, so an image looks the same alone and within any batch.
"""

import io
import math
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import ConfigError

RESIZE_MODES = ("area", "bilinear", "bicubic", "nearest")


class Dice:
    """Draws plain Python numbers from one `torch.Generator` (on whichever device that generator lives)."""

    def __init__(self, generator: torch.Generator):
        if not isinstance(generator, torch.Generator):
            raise ConfigError(f"a degradation needs a torch.Generator to draw from, not {type(generator).__name__}")
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        """U[low, high)."""
        device = self.generator.device
        u = torch.rand((), generator=self.generator, device=device, dtype=torch.float64).item()
        return low + (high - low) * u

    def log_uniform(self, low: float, high: float) -> float:
        """exp of U[log low, log high)."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return torch.randint(low, high + 1, (), generator=self.generator, device=self.generator.device).item()

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform(0.0, 1.0) < probability

    def choice(self, options: Sequence):
        """One of the options, all equally likely."""
        return options[self.integer(0, len(options) - 1)]

    def order(self, count: int) -> list[int]:
        """A random order of 0 … count - 1."""
        return torch.randperm(count, generator=self.generator, device=self.generator.device).tolist()

    def seed(self) -> int:
        """The seed of a stream of its own, for noise."""
        return self.integer(0, 2**62)


# blur


def gaussian_kernel(
    size: int, sigma_x: float, sigma_y: float | None = None, angle: float = 0.0, shift: float = 0.0
) -> Tensor:
    """A sampled Gaussian ``[size, size]`` that sums to 1.

    ``sigma_x`` and ``sigma_y`` (default: the same) are the standard deviations, in pixels, along axes turned by
    ``angle`` radians; ``shift`` moves the centre right and down by so many pixels. ``size`` is odd.
    """
    position = torch.arange(size, dtype=torch.float64) - (size - 1) / 2 - shift
    y, x = torch.meshgrid(position, position, indexing="ij")
    along = math.cos(angle) * x + math.sin(angle) * y
    across = math.cos(angle) * y - math.sin(angle) * x
    sigma_x = max(sigma_x, 1e-3)
    sigma_y = sigma_x if sigma_y is None else max(sigma_y, 1e-3)
    kernel = torch.exp(-0.5 * ((along / sigma_x) ** 2 + (across / sigma_y) ** 2))
    return (kernel / kernel.sum()).float()


def pad_kernel(kernel: Tensor, size: int) -> Tensor:
    """The same kernel ``[k, k]`` in the middle of a ``[size, size]`` one, so that kernels of many sizes stack."""
    margin = (size - kernel.shape[-1]) // 2
    return F.pad(kernel, (margin, margin, margin, margin))


def mirror_pad(images: Tensor, vertical: int, horizontal: int) -> Tensor:
    """Mirrors ``[..., H, W]`` outwards about the border pixels, even where a margin exceeds the image."""
    height, width = images.shape[-2:]
    if images.ndim == 4 and images.is_floating_point() and vertical < height and horizontal < width:  # much quicker
        return F.pad(images, (horizontal, horizontal, vertical, vertical), mode="reflect")
    for dim, margin in ((-2, vertical), (-1, horizontal)):
        length = images.shape[dim]
        period = max(2 * length - 2, 1)
        folded = torch.arange(-margin, length + margin, device=images.device).remainder(period)
        images = images.index_select(dim, torch.minimum(folded, period - folded).clamp(max=length - 1))
    return images


def blur_plain(images: Tensor, kernels: Tensor) -> Tensor:
    """Filters each image ``[B, 3, H, W]`` with its own kernel ``[B, k, k]`` (k odd, mirrored border): the reference."""
    batch, channels, height, width = images.shape
    margin = kernels.shape[-1] // 2
    padded = mirror_pad(images, margin, margin)
    weight = kernels.to(images).repeat_interleave(channels, 0)[:, None]
    return F.conv2d(padded.flatten(0, 1)[None], weight, groups=batch * channels).view(images.shape)


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """The same as `blur_plain` through the Fourier transform: the cost does not grow with the kernel."""
    height, width = images.shape[-2:]
    margin = kernels.shape[-1] // 2
    padded = mirror_pad(images, margin, margin)
    shape = [_fast_length(n) for n in padded.shape[-2:]]
    spectrum = torch.fft.rfft2(padded, s=shape)
    response = torch.fft.rfft2(kernels.to(images), s=shape)[:, None].conj()
    return torch.fft.irfft2(spectrum * response, s=shape)[..., :height, :width]


def gaussian_matrix(length: int, sigma: float) -> Tensor:
    """[length, length]: Gaussian blur along one axis as a matrix (`separable` applies it); any sigma in pixels.

    Row i holds the weights about pixel i, cut at 3 sigma, with what lies beyond the border mirrored back in.
    """
    margin = max(1, math.ceil(3 * sigma))
    offset = torch.arange(-margin, margin + 1, dtype=torch.float32)
    weights = torch.softmax(-0.5 * (offset / max(sigma, 1e-3)) ** 2, 0)
    sources = mirror_pad(torch.arange(length)[None, :], 0, margin)[0].unfold(0, 2 * margin + 1, 1)
    return torch.zeros(length, length).scatter_add_(1, sources, weights.expand(length, -1))


@cache
def _fast_length(length: int) -> int:
    """The least number >= length without prime factors above 5, where the FFT is quick."""
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1


# resize


def resize(image: Tensor, size: tuple[int, int], mode: str, antialias: bool = False) -> Tensor:
    """Resizes one image ``[3, h, w]`` to ``size`` = (height, width); pixel centres at half-integers (OpenCV's rule).

    ``area`` is the exact mean over each output pixel's footprint, shrinking or enlarging. ``antialias`` widens the
    bilinear and bicubic filters when shrinking (OpenCV's do not; Pillow's do).
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    if mode == "area":
        return _mean_rows(_mean_rows(image, size[0]).mT, size[1]).mT.contiguous()
    if mode == "nearest":
        return F.interpolate(image[None], size, mode="nearest-exact")[0]
    return F.interpolate(image[None], size, mode=mode, align_corners=False, antialias=antialias)[0]


def _mean_rows(image: Tensor, target: int) -> Tensor:
    """``[3, h, w]`` to ``[3, target, w]``: each new row is the mean over the span of old rows that it covers."""
    length = image.shape[-2]
    edges = torch.arange(target + 1, dtype=torch.float64) * (length / target)
    first = edges[:-1].floor()
    result = image.new_zeros(image.shape[0], target, image.shape[-1])
    for step in range(math.ceil(length / target) + 1):
        row = first + step
        share = (torch.minimum(edges[1:], row + 1) - torch.maximum(edges[:-1], row)).clamp(min=0.0) * (target / length)
        rows = image.index_select(-2, row.clamp(max=length - 1).long().to(image.device))
        result += share.to(image)[:, None] * rows
    return result


def separable(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``rows @ image @ columns.T`` per channel: any separable linear filter, ``[3, h, w]`` to ``[3, h', w']``.

    The side that shrinks most goes first.
    """
    rows, columns = rows.to(image), columns.to(image)
    if rows.shape[0] * columns.shape[1] < columns.shape[0] * rows.shape[1]:
        return (rows @ image) @ columns.mT
    return rows @ (image @ columns.mT)


@lru_cache(maxsize=256)
def resize_matrix(length: int, target: int, mode: str, antialias: bool = False) -> Tensor:
    """[target, length]: what `resize` does along one axis, as a matrix. The quick form when one side is tiny."""
    return resize(torch.eye(length)[None], (target, length), mode, antialias)[0]


# noise


def normal(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal numbers from a stream of their own (drawn on the CPU: the same whatever the images' device)."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def add_noise(image: Tensor, sigma: float, seed: int, kind: str = "colour", covariance: Tensor | None = None) -> Tensor:
    """Adds Gaussian noise of standard deviation ``sigma`` (of the [0, 1] range) and clamps to [0, 1].

    ``kind``: ``colour`` (independent channels), ``grey`` (one value for all three), ``covariance`` (channels mixed
    by the 3x3 ``covariance``; ``sigma`` is then unused).
    """
    height, width = image.shape[-2:]
    if kind == "grey":
        noise = sigma * normal((1, height, width), seed)
    elif kind == "colour":
        noise = sigma * normal((3, height, width), seed)
    else:
        root = torch.linalg.cholesky(covariance.double() + 1e-12 * torch.eye(3, dtype=torch.float64)).float()
        noise = torch.einsum("ij,jhw->ihw", root, normal((3, height, width), seed))
    return (image + noise.to(image)).clamp_(0.0, 1.0)


# 8 bit, JPEG


def to_8bit(images: Tensor) -> Tensor:
    """Rounds to the 256 values that a photo file can hold."""
    return images.clamp(0.0, 1.0).mul_(255.0).round_().div_(255.0)


def to_grey(image: Tensor) -> Tensor:
    """The luminance (ITU-R BT.601) in all three channels of ``[3, h, w]``."""
    weights = image.new_tensor([0.299, 0.587, 0.114])
    return (weights[:, None, None] * image).sum(0, keepdim=True).expand_as(image)


def jpeg(images: Sequence[Tensor], qualities: Sequence[int | None]) -> list[Tensor]:
    """Writes and reads each image ``[3, h, w]`` as a JPEG file in memory (Pillow, chroma 4:2:0 as OpenCV's default).

    Sizes may differ. ``qualities`` are 1-100; None leaves that image as it is. All images cross to the CPU and back
    in one transfer each way.
    """
    chosen = [i for i, quality in enumerate(qualities) if quality is not None]
    result = list(images)
    if not chosen:
        return result
    flat = [images[i].clamp(0.0, 1.0).mul_(255.0).round_().to(torch.uint8).permute(1, 2, 0).flatten() for i in chosen]
    lengths = [len(pixels) for pixels in flat]
    sent = torch.cat(flat).cpu().split(lengths)
    decoded = [
        _jpeg_once(pixels.numpy().reshape(*images[i].shape[1:], 3), qualities[i])
        for i, pixels in zip(chosen, sent, strict=True)
    ]
    received = torch.from_numpy(np.concatenate([d.reshape(-1) for d in decoded])).to(images[chosen[0]].device)
    for i, pixels in zip(chosen, received.to(images[chosen[0]].dtype).div(255.0).split(lengths), strict=True):
        result[i] = pixels.view(*images[i].shape[1:], 3).permute(2, 0, 1).contiguous()
    return result


def _jpeg_once(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=int(quality), subsampling="4:2:0")
    return np.asarray(Image.open(buffer))
