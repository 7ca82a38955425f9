"""Perceptual and identity terms, both from one pass of one frozen recogniser.

The recogniser of a loss must never be the one that scores: callers pass it in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recognise import Recogniser


class RecogniserLoss:
    """Distances between restored and true faces as a frozen recogniser sees them.

    `perceptual`: mean absolute difference of its feature maps, each channel-normalised per pixel as in LPIPS
    (Zhang et al. 2018), averaged over depths. `identity`: 1 - cosine of the embeddings (ArcFace style, as GPEN).
    """

    def __init__(self, recogniser: Recogniser):
        self.recogniser = recogniser

    def __call__(self, restored: Tensor, truth: Tensor, landmarks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] in [-1, 1] each -> (perceptual [B], identity [B]); differentiable in `restored`."""
        with torch.no_grad():
            true_maps, true_embedding = self.recogniser.perceive(truth, landmarks)
        maps, embedding = self.recogniser.perceive(restored, landmarks)
        distances = [(unit_channels(a) - unit_channels(b)).abs().sum(dim=1).mean(dim=(1, 2))
                     for a, b in zip(maps, true_maps, strict=True)]
        perceptual = torch.stack(distances).mean(dim=0)
        return perceptual, 1 - (embedding * true_embedding).sum(dim=1)


def unit_channels(x: Tensor) -> Tensor:
    """[B, C, h, w] with unit length over C at every pixel, scaled so that the L1 sum over C does not grow with C."""
    return F.normalize(x.float(), dim=1, eps=1e-4) / x.shape[1] ** 0.5
