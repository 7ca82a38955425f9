"""GPEN's discriminator and one for the regions of the face that people look at: eyes, nose and mouth.

`Discriminator` is StyleGAN2's residual one (Karras et al. 2020) with the keys and shapes of the published GPEN
checkpoints (-D). `FaceRegionDiscriminator` follows the facial component discriminators of GFPGAN (Wang et al.
2021).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from .generator import GPENConfig
from .layers import EqualConv2d, EqualLinear, down_blur, encoder_layer


class ResBlock(nn.Module):
    """[B, in, H, W] -> [B, out, H/2, W/2]: two 3x3 convolutions beside a blurred 1x1 skip, over sqrt(2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = encoder_layer(in_channels, in_channels, 3)
        self.conv2 = encoder_layer(in_channels, out_channels, 3, downsample=True)
        self.skip = nn.Sequential(down_blur(1), EqualConv2d(in_channels, out_channels, 1, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


def append_batch_deviation(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C + 1, H, W]: the last channel is the features' mean deviation over the batch.

    Generated batches that all look alike give themselves away by it (Karras et al. 2018). One value for the
    whole batch, as GPEN trains; a batch of one has none (1e-4).
    """
    deviation = (x.var(dim=0, unbiased=False) + 1e-8).sqrt().mean()
    return torch.cat((x, deviation.expand(x.shape[0], 1, *x.shape[2:])), dim=1)


class Discriminator(nn.Module):
    """Images [B, 3, S, S] in [-1, 1] -> logits [B, 1], positive for real.

    Its widths are its own: the published 256 px discriminator has narrow 1 while its generator has 0.5. The
    logits of a batch depend on one another (`append_batch_deviation`): judge real and restored images in
    separate batches.

    Raises ConfigError when `size` is not a power of two from 8 up.
    """

    def __init__(self, size: int, channel_multiplier: float = 2, narrow: float = 1.0):
        super().__init__()
        if size < 8 or size & (size - 1):
            raise ConfigError(f"discriminator size must be a power of two from 8 up, not {size}")
        self.config = GPENConfig(size, channel_multiplier, narrow)
        self.size = size
        widths = [self.config.channels(size >> k) for k in range(self.config.log_size - 1)]
        blocks = [ResBlock(*pair) for pair in zip(widths[:-1], widths[1:], strict=True)]
        self.convs = nn.Sequential(encoder_layer(3, widths[0], 1), *blocks)
        self.final_conv = encoder_layer(widths[-1] + 1, widths[-1], 3)
        self.final_linear = nn.Sequential(EqualLinear(widths[-1] * 16, widths[-1], activation=True),
                                          EqualLinear(widths[-1], 1))

    def features(self, images: Tensor) -> list[Tensor]:
        """The maps for feature matching, from [B, C, S, S] down to [B, C, 4, 4]; `head` judges the last."""
        maps = []
        for block in self.convs:
            images = block(images)
            maps.append(images)
        return maps

    def head(self, last_map: Tensor) -> Tensor:
        """The last of `features` -> logits [B, 1]."""
        x = self.final_conv(append_batch_deviation(last_map))
        return self.final_linear(x.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images)[-1])

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "Discriminator":
        """A discriminator of the size and widths that the tensors have, holding them.

        Raises CheckpointError when they are not a GPEN discriminator's.
        """
        try:
            blocks = max(int(key.split(".")[1]) for key in state if key.startswith("convs."))
            narrow = state["final_linear.1.weight"].shape[1] / 512
            width = state["convs.0.0.weight"].shape[0]
        except (LookupError, ValueError) as error:
            raise CheckpointError(f"not a GPEN discriminator: no convs.* or final_linear.* ({error})") from error
        size = 4 << blocks
        try:
            multiplier = width * size / (16384 * narrow) if size > 32 else 2
            model = cls(size, multiplier, narrow)
            model.load_state_dict(state)
        except (RuntimeError, ValueError, ZeroDivisionError, OverflowError) as error:
            raise CheckpointError(f"not a GPEN discriminator of {size} px: {error}") from error
        return model


class Region(NamedTuple):
    """A square of the face: who judges it, its middle, its side as a fraction of the face's."""

    kind: str
    landmarks: tuple[int, ...]
    fraction: float
    mirrored: bool = False


REGIONS = {
    "left_eye": Region("eye", (0,), 0.2),
    "right_eye": Region("eye", (1,), 0.2, mirrored=True),  # as a left one: a single discriminator serves both
    "nose": Region("nose", (2,), 0.2),
    "mouth": Region("mouth", (3, 4), 0.28),
}


def face_axis(landmarks: Tensor) -> Tensor:
    """[B, 5, 2] px -> [B, 2]: half a side of the face's FFHQ-style square, from its middle to its right edge.

    It points along the eyes, corrected by the normal of the line to the mouth (Karras et al. 2019).
    """
    left_eye, right_eye, _, left_mouth, right_mouth = landmarks.unbind(dim=1)
    eye_to_eye = right_eye - left_eye
    eye_to_mouth = (left_mouth + right_mouth - left_eye - right_eye) / 2
    direction = F.normalize(eye_to_eye - rotate90(eye_to_mouth), dim=1)
    return direction * torch.maximum(2.0 * eye_to_eye.norm(dim=1, keepdim=True),
                                     1.8 * eye_to_mouth.norm(dim=1, keepdim=True))


def rotate90(vectors: Tensor) -> Tensor:
    """(x, y) -> (-y, x): from "right" to "down" in image coordinates."""
    return torch.stack((-vectors[..., 1], vectors[..., 0]), dim=-1)


def crop_region(images: Tensor, landmarks: Tensor, region: Region, resolution: int) -> Tensor:
    """Cut a region, upright in the face's own frame: [B, 3, H, W] -> [B, 3, resolution, resolution].

    landmarks: [B, 5, 2] (x, y) in pixels, (0, 0) being the corner of the image as in `metagpen.faces`. Bilinear,
    differentiable in the images (once: PyTorch's `grid_sample` has no second derivative, so take R1 with respect
    to the crops).
    """
    landmarks = landmarks.to(images.device, torch.promote_types(images.dtype, torch.float32))
    centre = landmarks[:, list(region.landmarks)].mean(dim=1)
    across = region.fraction * face_axis(landmarks)
    down = rotate90(across)
    pixels = torch.arange(resolution, device=landmarks.device, dtype=landmarks.dtype)
    ticks = (2 * pixels + 1) / resolution - 1  # pixel centres in [-1, 1]
    along = -ticks if region.mirrored else ticks
    points = (centre[:, None, None]
              + along[None, None, :, None] * across[:, None, None]
              + ticks[None, :, None, None] * down[:, None, None])  # [B, resolution, resolution, 2] px
    extent = points.new_tensor((images.shape[3], images.shape[2]))
    grid = 2 * points / extent - 1
    crops = F.grid_sample(images.to(grid.dtype), grid, padding_mode="reflection", align_corners=False)
    return crops.to(images.dtype)


class FaceRegionDiscriminator(nn.Module):
    """A small `Discriminator` for each kind of region: the eyes (both), the nose and the mouth.

    `size` is the side of the images; regions are looked at with a quarter of it, about their own resolution.

        crops = discriminator.crops(images, landmarks)    # once; R1 is taken with respect to these
        logits = discriminator.judge(crops)               # {"left_eye": [B, 1], ..., "mouth": [B, 1]}
    """

    def __init__(self, size: int, channel_multiplier: float = 2, narrow: float = 0.125):
        super().__init__()
        self.resolution = size // 4
        self.kinds = nn.ModuleDict({
            kind: Discriminator(self.resolution, channel_multiplier, narrow)
            for kind in dict.fromkeys(region.kind for region in REGIONS.values())})

    def crops(self, images: Tensor, landmarks: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, S, S], landmarks [B, 5, 2] in their pixels -> every region [B, 3, S/4, S/4]."""
        return {name: crop_region(images, landmarks, region, self.resolution)
                for name, region in REGIONS.items()}

    def features(self, crops: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """The maps of every region, for feature matching or GFPGAN's Gram-matrix loss."""
        return {name: self.kinds[REGIONS[name].kind].features(crop) for name, crop in crops.items()}

    def judge(self, crops: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `crops` returned -> logits [B, 1] per region, positive for real."""
        return {name: self.kinds[REGIONS[name].kind](crop) for name, crop in crops.items()}

    def forward(self, images: Tensor, landmarks: Tensor) -> dict[str, Tensor]:
        return self.judge(self.crops(images, landmarks))
