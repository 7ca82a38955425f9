"""Perceptual and identity terms, both from one pass of one frozen recogniser.

The recogniser of a loss must never be the one that scores: callers pass it in.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recognise import Recogniser
from ..recognise.align import View
from .fused import fused
from .pixel import luma


class RecogniserTerms(NamedTuple):
    """perceptual, identity: [B]. lost [B]: identity that the degradation took away; None when the degraded input was
    not given. maps, true_maps: [B, C, h, w] of every depth, of the restored (with a graph) and the true faces."""

    perceptual: Tensor
    identity: Tensor
    lost: Tensor | None
    maps: list[Tensor]
    true_maps: list[Tensor]


class RecogniserLoss:
    """Distances between restored and true faces as a frozen recogniser sees them.

    `perceptual`: mean absolute difference of its feature maps, each channel-normalised per pixel as in LPIPS
    (Zhang et al. 2018), averaged over depths. `identity`: 1 - cosine of the embeddings (ArcFace style, as GPEN);
    given the degraded input, it counts by the identity that the degradation took away, `lost` = 1 - cosine(input,
    truth): a photo that still shows who it is needs no push towards a recogniser's idea of it, which costs PSNR.

    The recogniser sees the restored brightness in the true colours: it hardly minds colours, and pleasing it with them
    tints eyes and lips.
    """

    def __init__(self, recogniser: Recogniser, compiled: bool = False):
        self.recogniser = recogniser
        self.distance = fused(direction_distance, compiled)

    def __call__(self, restored: Tensor, truth: Tensor, landmarks: Tensor | View | None = None,
                 poor: Tensor | None = None) -> RecogniserTerms:
        """[B, 3, S, S] in [-1, 1] each -> terms [B]; differentiable in `restored`."""
        where = landmarks if isinstance(landmarks, View) else self.recogniser.view(landmarks, truth)
        with torch.no_grad():
            true_maps, true_embedding = self.recogniser.perceive(truth, where)
            lost = None if poor is None else 1 - (self.recogniser.embed(poor, where) * true_embedding).sum(dim=1)
        maps, embedding = self.recogniser.perceive(truth + luma(restored - truth), where)
        distances = [self.distance(a, b) for a, b in zip(maps, true_maps, strict=True)]
        perceptual = torch.stack(distances).mean(dim=0)
        identity = 1 - (embedding * true_embedding).sum(dim=1)
        return RecogniserTerms(perceptual, identity if lost is None else lost * identity, lost, maps, true_maps)


def direction_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference [B] of maps [B, C, h, w], each pixel's C numbers as a direction."""
    return (unit_channels(a) - unit_channels(b)).abs().sum(dim=1).mean(dim=(1, 2))


def unit_channels(x: Tensor) -> Tensor:
    """[B, C, h, w] with unit length over C at every pixel, scaled so that the L1 sum over C does not grow with C."""
    return F.normalize(x.float(), dim=1, eps=1e-4) / x.shape[1] ** 0.5
