"""A critic that looks through a frozen recogniser: projected adversarial training (Sauer et al. 2021).

A critic that starts from random weights must first learn to see before it can tell sharp from soft, which takes far
more photos than a few thousand. This one reads the feature maps that the perceptual term computes anyway, and a small
head on each depth tells real from restored; the picture's brightness itself is the finest depth. Spectral
normalisation (Miyato et al. 2018) keeps the heads smooth in place of a gradient penalty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class ProjectedCritic(nn.Module):
    """Brightness [B, 1, S, S] and maps [B, C_d, h_d, w_d] -> logits [B, 1, h, w] of every depth, brightness first.

    channels: C_d of the maps; width: of the heads.
    """

    def __init__(self, channels: Sequence[int], width: int = 64):
        super().__init__()
        self.brightness = nn.Sequential(
            spectral_norm(nn.Conv2d(1, width // 2, 4, 2, 1)), nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width // 2, width, 4, 2, 1)), nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, width, 3, padding=1)), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 1, 1))
        self.heads = nn.ModuleList(nn.Sequential(
            spectral_norm(nn.Conv2d(count, width, 1)), nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(width, width, 3, padding=1)), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 1, 1)) for count in channels)

    def forward(self, brightness: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        # channels as directions, of order 1 each, so that no depth speaks louder than another
        directions = [F.normalize(m.float(), dim=1, eps=1e-4) * m.shape[1] ** 0.5 for m in maps]
        return [self.brightness(brightness), *(own(m) for own, m in zip(self.heads, directions, strict=True))]
