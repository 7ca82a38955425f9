"""GPEN: an encoder that feeds a StyleGAN2 decoder (Yang et al. 2021, "GAN Prior Embedded Network").

The encoder's last feature becomes the latent code, its other features take the place of the decoder's noise.
Keys and shapes are those of the published checkpoints.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .layers import Convolution, EqualLinear, PixelNorm, StyledConv, ToRGB, encoder_layer


@dataclass(frozen=True)
class GPENConfig:
    """What determines every tensor's shape. `size` is the side of the aligned face in pixels, a power of two."""

    size: int = 512
    channel_multiplier: float = 2
    narrow: float = 1.0
    style_dim: int = 512
    n_mlp: int = 8
    concat: bool = True

    def __post_init__(self) -> None:
        if self.size < 8 or self.size & (self.size - 1):
            raise ConfigError(f"size = {self.size}: a GPEN's side is a power of two from 8 up")
        if min(self.channels(4), self.channels(self.size)) < 1:
            raise ConfigError(f"narrow = {self.narrow}, channel_multiplier = {self.channel_multiplier}: too little for "
                              f"a channel at {self.size} px")

    @property
    def log_size(self) -> int:
        return int(math.log2(self.size))

    @property
    def n_latent(self) -> int:
        """Number of per-layer latents: one per styled convolution plus the last ToRGB."""
        return 2 * self.log_size - 2

    def channels(self, resolution: int) -> int:
        """Width at a resolution, as published: int(base · narrow), the channel multiplier counting from 64 px up."""
        if resolution <= 32:
            return int(512 * self.narrow)
        return int(16384 // resolution * self.channel_multiplier * self.narrow)

    def to_dict(self) -> dict:
        return asdict(self)


class ConstantInput(nn.Module):
    def __init__(self, channels: int, size: int = 4):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, size, size))


def layout(x: Tensor) -> torch.memory_format:
    """The memory format of a map [B, C, H, W]."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


class Decoder(nn.Module):
    """The StyleGAN2 prior: mapping network and synthesis, the encoder's features in place of noise."""

    def __init__(self, config: GPENConfig):
        super().__init__()
        mix = 2 if config.concat else 1
        dim = config.style_dim
        self.style = nn.Sequential(
            PixelNorm(), *[EqualLinear(dim, dim, lr_mul=0.01, activation=True) for _ in range(config.n_mlp)])
        width = config.channels(4)
        self.input = ConstantInput(width)
        self.conv1 = StyledConv(width, width, 3, dim, concat=config.concat)
        self.to_rgb1 = ToRGB(width * mix, dim, upsample=False)
        self.convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        for log in range(3, config.log_size + 1):
            out = config.channels(2**log)
            self.convs.append(StyledConv(width * mix, out, 3, dim, upsample=True, concat=config.concat))
            self.convs.append(StyledConv(out * mix, out, 3, dim, concat=config.concat))
            self.to_rgbs.append(ToRGB(out * mix, dim))
            width = out

    @property
    def styled(self) -> list[StyledConv]:
        """The styled convolutions from 4 px up; the k-th reads the k-th latent."""
        return [self.conv1, *self.convs]

    def forward(self, latents: Tensor, features: list[Tensor], own: Sequence[Convolution] | None = None) -> Tensor:
        """latents [B, n_latent, style_dim]; features from 4 px up, one per resolution -> image [B, 3, S, S].

        own: one for each of `styled`, see `ModulatedConv2d.convolve`.
        """
        w = latents.unbind(dim=1)
        own = own or [None] * len(self.styled)
        x = self.input.input.expand(latents.shape[0], -1, -1, -1).to(features[0].dtype)
        x = x.contiguous(memory_format=layout(features[-1]))  # else every layer would mix two layouts, and copy
        x = self.conv1(x, w[0], features[0], own[0])
        rgb = self.to_rgb1(x, w[1])
        for i, to_rgb in enumerate(self.to_rgbs):
            x = self.convs[2 * i](x, w[2 * i + 1], features[i + 1], own[2 * i + 1])
            x = self.convs[2 * i + 1](x, w[2 * i + 2], features[i + 1], own[2 * i + 2])
            rgb = to_rgb(x, w[2 * i + 3], rgb)
        return rgb


class GPEN(nn.Module):
    """Degraded aligned faces [B, 3, S, S] in [-1, 1] (RGB) -> restored faces, same shape, nominally in [-1, 1].

    The forward pass is `encode` (features and w) then `decode`; a person's adapter enters between and inside them
    (see `metagpen.person`), never by changing this module.
    """

    def __init__(self, size: int = 512, channel_multiplier: float = 2, narrow: float = 1.0, style_dim: int = 512,
                 n_mlp: int = 8, concat: bool = True):
        super().__init__()
        config = self.config = GPENConfig(size, channel_multiplier, narrow, style_dim, n_mlp, concat)
        self.size = size
        self.generator = Decoder(config)
        self.ecd0 = nn.Sequential(encoder_layer(3, config.channels(size), 1))
        for k in range(1, config.log_size - 1):
            resolution = size >> k
            self.add_module(f"ecd{k}", nn.Sequential(encoder_layer(
                config.channels(2 * resolution), config.channels(resolution), 3, downsample=True)))
        self.final_linear = nn.Sequential(EqualLinear(config.channels(4) * 16, style_dim, activation=True))

    @property
    def encoder(self) -> list[nn.Sequential]:
        """The blocks ecd0 … ecd{log2(size) - 2}; block k works at size / 2^k pixels."""
        return [getattr(self, f"ecd{k}") for k in range(self.config.log_size - 1)]

    def encode(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Feature maps, from 4 px up, and w [B, style_dim]."""
        features, x = [], images
        for block in self.encoder:
            x = block(x)
            features.append(x)
        return features[::-1], self.map(self.final_linear(x.flatten(1)))

    def map(self, z: Tensor) -> Tensor:
        """z [B, style_dim] -> w [B, style_dim], through the prior's mapping network."""
        return self.generator.style(z)

    def decode(self, features: list[Tensor], latents: Tensor, own: Sequence[Convolution] | None = None) -> Tensor:
        return self.generator(latents, features, own)

    def forward(self, images: Tensor, offset: Tensor | None = None) -> Tensor:
        """`offset` [B, n_latent, style_dim], if given, is added to the encoder's w layer by layer (W+)."""
        features, w = self.encode(images)
        latents = w[:, None].expand(-1, self.config.n_latent, -1)
        return self.decode(features, latents if offset is None else latents + offset.to(w.dtype))
