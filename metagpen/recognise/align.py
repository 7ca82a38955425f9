"""Similarity warp of FFHQ-style crops onto the five-point template of a recogniser, batched and differentiable.

Five points in the plane are complex numbers, and a similarity without reflection is z -> a z + b. The
least-squares a and b (what Umeyama's method finds in general) then have a closed form.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..faces.align import FFHQ_LANDMARKS

# ArcFace's template on its 112 x 112 input: eyes, nose, mouth corners (image left first), x and y in pixels.
ARCFACE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))

# Template of face-reidentification-retail-0095 on its 128 px input, as fractions.
RETAIL = ((0.3156, 0.4616), (0.6827, 0.4616), (0.5003, 0.6405), (0.3495, 0.8247), (0.6534, 0.8247))


def arcface(size: tuple[int, int]) -> tuple[tuple[float, float], ...]:
    """ArcFace's template [5, 2] for an input of (height, width): scaled to the height, centred across.

    So 112 x 112 has the original, and 112 x 96 the same without 8 pixels on either side.
    """
    height, width = size
    scale = height / 112
    return tuple((x * scale + (width - height) / 2, y * scale) for x, y in ARCFACE)


def similarity(source: Tensor, target: Tensor) -> Tensor:
    """Least-squares similarity that carries `source` points onto `target` points.

    source, target: [B, N, 2] (x, y). Returns [B, 2, 3]: rotation times scale, and translation.
    """
    z, w = torch.view_as_complex(source.contiguous()), torch.view_as_complex(target.contiguous())
    z_mean, w_mean = z.mean(1, keepdim=True), w.mean(1, keepdim=True)
    z, w = z - z_mean, w - w_mean
    a = (z.conj() * w).sum(1) / z.abs().square().sum(1)
    b = w_mean[:, 0] - a * z_mean[:, 0]
    return torch.stack([torch.stack([a.real, -a.imag, b.real], -1), torch.stack([a.imag, a.real, b.imag], -1)], 1)


class View(NamedTuple):
    """Where a network's view of crops, size (height, width), takes its pixels: grid [B, height · n, width · n, 2] as
    `grid_sample` wants it; the means of n x n of them make one pixel."""

    grid: Tensor
    size: tuple[int, int]


def warp(images: Tensor, landmarks: Tensor, template: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample crops so that their landmarks meet the template.

    images: [B, 3, H, W]; landmarks: [B, 5, 2] pixels of those images; template: [5, 2] pixels of the
    output; size: (height, width) of the output. Returns [B, 3, height, width] in the range of `images`,
    float32, differentiable in the images. Outside the crop the border pixel is repeated.
    """
    return resample(images, view(landmarks, template, size, images.shape[-2:], images.device))


def view(landmarks: Tensor, template: Tensor, size: tuple[int, int], crop: tuple[int, int],
         device: torch.device) -> View:
    """Where `warp` looks in crops of (height, width) `crop`; the grid on the device, wherever the landmarks are."""
    with torch.autocast(landmarks.device.type, enabled=False):  # in bfloat16 points would move by half a pixel
        landmarks = landmarks.float()
        inverse = similarity(template.to(landmarks).expand(len(landmarks), -1, -1), landmarks)
        finer = samples_per_pixel(template, crop)
        # theta maps output coordinates in [-1, 1] to input coordinates in [-1, 1]; both count from pixel edges.
        half_output = landmarks.new_tensor([size[1] / 2, size[0] / 2])
        half_input = landmarks.new_tensor([crop[1] / 2, crop[0] / 2])
        offset = inverse[:, :, 2] + inverse[:, :, :2] @ half_output - half_input
        theta = torch.cat([inverse[:, :, :2] * half_output, offset[:, :, None]], 2) / half_input[:, None]
    with torch.autocast(device.type, enabled=False):
        shape = [len(theta), 1, size[0] * finer, size[1] * finer]
        return View(F.affine_grid(theta.to(device, non_blocking=True), shape, align_corners=False), size)


def samples_per_pixel(template: Tensor, crop: tuple[int, int]) -> int:
    """How many samples along an axis make a pixel of the view. Where it is coarser than the crop, one would alias fine
    detail. It follows from where FFHQ's alignment puts a face, whoever it is: nobody's view depends on who shares the
    batch."""
    usual = torch.tensor(FFHQ_LANDMARKS, dtype=torch.float32, device="cpu")[None] * crop[1]
    scale = similarity(template.detach().float().cpu()[None], usual)[0, :, 0].norm()
    return max(1, math.ceil(float(scale) - 1e-3))


def resample(images: Tensor, where: View) -> Tensor:
    """The view [B, 3, height, width] of images [B, 3, H, W], float32."""
    with torch.autocast(images.device.type, enabled=False):
        out = F.grid_sample(images.float(), where.grid, mode="bilinear", padding_mode="border", align_corners=False)
        finer = out.shape[-1] // where.size[1]
        return F.avg_pool2d(out, finer) if finer > 1 else out
