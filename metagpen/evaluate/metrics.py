"""Image and identity metrics. Every function returns one number per image: no batch size can change a result.

Images are RGB [B, 3, H, W] in [-1, 1]; restored images are clamped to that range first, as writing a file
would do. The data range is therefore 2.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

DATA_RANGE = 2.0
PSNR_MOST = 100.0  # dB: of what is equal it would be infinite, which no mean and no JSON can hold
LPIPS_SMALLEST = 31  # px: of less, AlexNet's poolings leave nothing


class Embedder(Protocol):
    """What the identity metrics need of a recogniser (metagpen.recognise.Recogniser has it)."""

    def embed(self, crops: Tensor, landmarks: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] in [-1, 1], landmarks [B, 5, 2] in pixels of the crop -> [B, dim], unit norm."""


def _pair(restored: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    if restored.shape != truth.shape or restored.ndim != 4:
        raise ValueError(
            f"two equal batches [B, 3, H, W] are needed, not {tuple(restored.shape)} and {tuple(truth.shape)}"
        )
    return restored.detach().float().clamp(-1, 1), truth.detach().float()


def psnr(restored: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over all channels and pixels, [B]; at most 100, which equal images have."""
    from metagpen.compat import ensure_torchvision

    ensure_torchvision()  # which the next import wants
    from torchmetrics.functional.image import peak_signal_noise_ratio

    restored, truth = _pair(restored, truth)
    values = [peak_signal_noise_ratio(a, b, data_range=DATA_RANGE) for a, b in zip(restored, truth)]
    return torch.stack(values).clamp(max=PSNR_MOST)


def ssim(restored: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity, window sigma 1.5 px, mean over channels, [B] (Wang et al. 2004)."""
    from metagpen.compat import ensure_torchvision

    ensure_torchvision()  # which the next import wants
    from torchmetrics.functional.image import structural_similarity_index_measure

    restored, truth = _pair(restored, truth)
    values = structural_similarity_index_measure(restored, truth, data_range=DATA_RANGE, reduction="none")
    return values.reshape(-1)


# Weights of MS-SSIM's scales, fine to coarse, as published; fewer scales take the first, scaled to the same sum.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim_scales(size: int) -> int | None:
    """How many scales of MS-SSIM fit images of this side with the 11 px window: 5 from 176 px, 4 from 99 px, or None.

    With fewer than four it would hardly differ from SSIM, and is said to be not available.
    """
    return 5 if size >= 176 else 4 if size >= 99 else None


def ms_ssim_name(size: int) -> str | None:
    """What MS-SSIM is called at this side: `ms_ssim` with the published five scales, `ms_ssim4` with four of them."""
    return {5: "ms_ssim", 4: "ms_ssim4", None: None}[ms_ssim_scales(size)]


def ms_ssim(restored: Tensor, truth: Tensor) -> Tensor | None:
    """Multi-scale SSIM [B] (Wang, Simoncelli & Bovik 2003), or None for images below 99 px; see `ms_ssim_scales`."""
    from metagpen.compat import ensure_torchvision

    ensure_torchvision()  # which the next import wants
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    restored, truth = _pair(restored, truth)
    scales = ms_ssim_scales(min(truth.shape[-2:]))
    if scales is None:
        return None
    weights = MS_SSIM_WEIGHTS[:scales]
    total = sum(weights) / sum(MS_SSIM_WEIGHTS)  # the published five add up to 1.0001 and stay as they are
    betas = tuple(weight / total for weight in weights)
    values = [
        multiscale_structural_similarity_index_measure(
            a[None], b[None], data_range=DATA_RANGE, betas=betas, reduction="none"
        )
        for a, b in zip(restored, truth)
    ]
    return torch.stack([value.reshape(()) for value in values])


def focus(images: Tensor) -> Tensor:
    """Sharpness without a reference, [B]: standard deviation of the Laplacian of the grey image, of [-1, 1].

    A variant of the focus measure of Pech-Pacheco et al. 2000. A blurred picture has a low one whatever the truth
    looked like; noise and blocks have a high one, so it convicts blur and acquits nobody.
    """
    grey = images.detach().float().clamp(-1, 1).mean(1, keepdim=True)
    kernel = grey.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return torch.nn.functional.conv2d(grey, kernel).flatten(1).std(dim=1)


def sharpness(restored: Tensor, truth: Tensor) -> Tensor:
    """High-band amplitude relative to the truth, [B]: 1 is as sharp as the truth, 0 has no fine detail.

    The high band is the grey image minus its Gaussian blur with sigma = size / 64 (2 px at 128). Only amplitudes
    are compared, not content: noise counts too, so read it beside PSNR and identity.
    """
    from kornia.filters import gaussian_blur2d

    restored, truth = _pair(restored, truth)
    sigma = truth.shape[-1] / 64
    kernel = 2 * math.ceil(3 * sigma) + 1

    def amplitude(images: Tensor) -> Tensor:
        grey = images.mean(1, keepdim=True)
        return (grey - gaussian_blur2d(grey, (kernel, kernel), (sigma, sigma))).std(dim=(1, 2, 3))

    return amplitude(restored) / amplitude(truth).clamp_min(1e-6)


@torch.no_grad()
def embeddings(recogniser: Embedder, images: Tensor, landmarks: Tensor | None = None) -> Tensor:
    """Identity embeddings [B, dim] of images [B, 3, H, W], clamped to the range of a file; on the images' device."""
    own = next(recogniser.parameters(), images) if isinstance(recogniser, torch.nn.Module) else images
    landmarks = landmarks if landmarks is None else landmarks.to(own.device)
    return recogniser.embed(images.to(own.device).float().clamp(-1, 1), landmarks).to(images.device)


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of the angle between embeddings, [B, dim] x [B, dim] -> [B]."""
    return torch.nn.functional.cosine_similarity(first, second, dim=-1)


def degrees(cosines: Tensor) -> Tensor:
    """Deg, the angle between two embeddings in degrees: arccos of the cosine."""
    return torch.rad2deg(torch.arccos(cosines.clamp(-1, 1)))


def identity(recogniser: Embedder, restored: Tensor, truth: Tensor, landmarks: Tensor | None = None) -> Tensor:
    """Identity cosine [B] between restored and true faces, both aligned by the truth's landmarks [B, 5, 2]."""
    return cosine(embeddings(recogniser, restored, landmarks), embeddings(recogniser, truth, landmarks))


@torch.no_grad()
def lpips(module: nn.Module | None, restored: Tensor, truth: Tensor) -> Tensor | None:
    """LPIPS distance [B] (lower is closer), or None when `load_lpips` found no backbone, or the faces are too small."""
    if module is None or restored.shape[-1] < LPIPS_SMALLEST:
        return None
    restored, truth = _pair(restored, truth)
    return module(restored, truth).reshape(-1)
