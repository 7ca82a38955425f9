"""What every recogniser here has in common: align, normalise the pixels, embed, and scale to unit length."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..faces.align import FFHQ_LANDMARKS
from ..tensors import digest_of
from .align import ARCFACE, View, resample, view


@dataclass(frozen=True)
class InputSpec:
    """What a network wants to see: size (height, width), template [5, 2] in pixels of that size, and pixels.

    The network receives `pixel_scale * x + pixel_shift` for x in [-1, 1]; blue first when `bgr`.
    """

    size: tuple[int, int] = (112, 112)
    template: tuple[tuple[float, float], ...] = ARCFACE
    pixel_scale: float = 1.0
    pixel_shift: float = 0.0
    bgr: bool = False


def must_be_recogniser(recogniser: object) -> None:
    """Raises ConfigError for a recogniser's name or file in the place of the recogniser itself."""
    if isinstance(recogniser, (str, PathLike)):
        raise ConfigError("recogniser: a Recogniser is needed, not its name; say "
                          f"metagpen.recognise.load({str(recogniser)!r})")


class Recogniser(nn.Module):
    """A face recogniser: FFHQ-style crops in, unit embeddings out.

    Frozen: in eval mode whatever its parent does, and no parameter asks for gradients; gradients flow to
    the images. `name` says which one, `dim` is the length of an embedding.
    """

    def __init__(self, name: str, net: nn.Module, spec: InputSpec, dim: int) -> None:
        super().__init__()
        self.name, self.dim, self.spec = name, dim, spec
        self.net = net
        self.requires_grad_(False).eval()

    @property
    def digest(self) -> str:
        """SHA-256 of its weights, whether they lie in torch or in a file of their own."""
        return getattr(self.net, "digest", None) or digest_of(self.state_dict())

    def train(self, mode: bool = True) -> Recogniser:
        """Stays in eval mode: batch statistics must never change inside somebody's training loop."""
        return super().train(False)

    def view(self, landmarks: Tensor | None, crops: Tensor) -> View:
        """Where the network looks in crops [B, 3, H, W] of these landmarks [B, 5, 2], in pixels of those crops; None
        takes the mean landmarks of FFHQ-style crops. Worth keeping where the same faces are seen several times."""
        if landmarks is None:
            side = torch.tensor([crops.shape[-1], crops.shape[-2]])
            landmarks = (torch.tensor(FFHQ_LANDMARKS, dtype=torch.float32) * side).expand(len(crops), -1, -1)
        return view(landmarks, torch.tensor(self.spec.template), self.spec.size, crops.shape[-2:], crops.device)

    def align(self, crops: Tensor, landmarks: Tensor | View | None = None) -> Tensor:
        """Crops [B, 3, H, W] in [-1, 1] -> the network's view of them [B, 3, *spec.size], still in [-1, 1] RGB.

        landmarks: [B, 5, 2] pixels of those crops, or the `view` of them; None takes the mean landmarks of FFHQ-style
        crops.
        """
        if crops.ndim != 4 or crops.shape[1] != 3:
            raise ValueError(f"crops must be [B, 3, H, W], not {tuple(crops.shape)}")
        return resample(crops, landmarks if isinstance(landmarks, View) else self.view(landmarks, crops))

    def forward(self, crops: Tensor, landmarks: Tensor | View | None = None) -> Tensor:
        """Same as `embed`."""
        return self.embed(crops, landmarks)

    def embed(self, crops: Tensor, landmarks: Tensor | View | None = None) -> Tensor:
        """Unit embeddings [B, dim], float32, of crops [B, 3, H, W] in [-1, 1]; differentiable in the crops."""
        return F.normalize(self.net(self._pixels(crops, landmarks)).flatten(1).float(), dim=1)

    def features(self, crops: Tensor, landmarks: Tensor | View | None = None) -> list[Tensor]:
        """Intermediate maps [B, C, h, w], shallow to deep, for a perceptual term; differentiable."""
        return self.net.features(self._pixels(crops, landmarks))

    def perceive(self, crops: Tensor, landmarks: Tensor | View | None = None) -> tuple[list[Tensor], Tensor]:
        """(`features`, `embed`) of the crops from one pass; native networks only."""
        maps, output = self.net.perceive(self._pixels(crops, landmarks))
        return maps, F.normalize(output.flatten(1).float(), dim=1)

    def _pixels(self, crops: Tensor, landmarks: Tensor | View | None) -> Tensor:
        x = self.align(crops, landmarks) * self.spec.pixel_scale + self.spec.pixel_shift
        x = x.flip(1) if self.spec.bgr else x
        parameter = next(self.net.parameters(), None)
        return x if parameter is None else x.to(parameter.dtype)
