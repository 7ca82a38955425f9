"""Landmarks of degraded faces: a small network that corrects a detector's five points.

MTCNN places landmarks on what it can see. Of a face of 16 px they come out a sixth of the eyes' distance wrong, and the
aligned crop with them, in which a restorer finds nothing where it learned to expect it. `LandmarkNet` looks at the crop
that the first landmarks make, and at its mirror image, and says where in it they should be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..devices import undisturbed
from ..tensors import packaged, read_tensors
from .align import FFHQ_LANDMARKS, crop_face, crop_matrix, invert, mirror, transform
from .photo import to_tensor

SIDE = 64  # of the crop that the network sees, in pixels
WIDTH = 24  # channels of its first maps
EMBEDDED = "embedded_landmarks.safetensors"
BOX = (0.225, 0.182, 0.768, 0.916)  # mean x0, y0, x1, y1 of MTCNN's boxes, as fractions of the aligned crop


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation, and what goes in beside them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class LandmarkNet(nn.Module):
    """Crops [B, 3, 64, 64] in [-1, 1] -> landmarks [B, 5, 2], as fractions of the crop's side.

    width: channels at 32 x 32; each of three halvings doubles them.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(12, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                                   Residual(width)]
        for _ in range(3):
            layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * width),
                       nn.ReLU(), Residual(2 * width)]
            width *= 2
        self.maps = nn.Sequential(nn.PixelUnshuffle(2), *layers)  # [B, 8 * width, 4, 4]
        self.head = nn.Sequential(nn.Conv2d(width, 32, 1), nn.Flatten(), nn.ReLU(),
                                  nn.Linear(32 * (SIDE // 16) ** 2, FFHQ_LANDMARKS.size))

    def forward(self, crops: Tensor) -> Tensor:
        return self.head(self.maps(crops)).view(-1, *FFHQ_LANDMARKS.shape) + 0.5


@undisturbed
def refine(image: Image.Image, landmarks: np.ndarray, device: str | torch.device = "cpu") -> np.ndarray:
    """Better landmarks of a face of an RGB photo, from those that a detector or a hand gave: [5, 2] in its pixels.

    Raises PhotoError where they coincide or do not lie on the photo.
    """
    pitch = math.sqrt(abs(np.linalg.det(invert(crop_matrix(landmarks, SIDE))[:, :2])))  # photo pixels per crop pixel
    coarser = max(1, int(pitch / 2))  # a large face is made smaller first, which is quick, and still seen finely enough
    smaller = image.reduce(coarser) if coarser > 1 else image
    face = crop_face(smaller, np.asarray(landmarks) / coarser, SIDE)
    found = looked_at_twice(embedded_net(str(device)), to_tensor(face.image)[None].to(device))[0]
    return coarser * transform(SIDE * found.double().cpu().numpy(), invert(face.matrix))


@torch.no_grad()
def looked_at_twice(net: nn.Module, crops: Tensor) -> Tensor:
    """Landmarks [B, 5, 2] of crops [B, 3, H, W], the mean over each and its mirror image."""
    plain, mirrored = net(torch.cat([crops, crops.flip(-1)])).chunk(2)
    return (plain + mirror(mirrored, 1)) / 2


def landmarks_in(box: Sequence[float]) -> np.ndarray:
    """Where the landmarks [5, 2] of an upright face lie, to begin with, in a box x0, y0, x1, y1 from its hairline to
    its chin and from ear to ear, as MTCNN draws them. From there `refine` finds heads that tilt by up to 30 degrees."""
    low, high = np.asarray(box, dtype=np.float64).reshape(2, 2)
    mean = np.array(BOX).reshape(2, 2)
    side = ((high - low) / (mean[1] - mean[0])).mean()
    return (FFHQ_LANDMARKS - mean.mean(axis=0)) * side + (low + high) / 2


@lru_cache(maxsize=4)
@torch.random.fork_rng(devices=[])  # what the file fills, the caller's dice need not
def embedded_net(device: str) -> LandmarkNet:
    """The network in the package. Raises CheckpointError where the installation lacks it."""
    with packaged(EMBEDDED) as path:
        tensors, _ = read_tensors(path)
    net = LandmarkNet(len(tensors["maps.1.weight"]))
    counters = {name: value for name, value in net.state_dict().items() if not value.is_floating_point()}
    net.load_state_dict(counters | {name: value.float() for name, value in tensors.items()})
    return net.eval().requires_grad_(False).to(device)
