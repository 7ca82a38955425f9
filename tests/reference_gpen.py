"""GPEN written the slow and plain way: the yardstick that the library's fast network is held against.

Everything is spelt out as the papers describe it: the modulated convolution builds one weight per sample and
runs a grouped convolution (StyleGAN2, Karras et al. 2020, section 2.2), and every blur is a full two-dimensional
"up-sample by zeros, pad, filter, down-sample". Keys and shapes are those of the published GPEN checkpoints
(Yang et al. 2021). Shares no code with `metagpen.gpen`, on purpose.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLUR_TAPS = (1.0, 3.0, 3.0, 1.0)


def channels_at(resolution: int, channel_multiplier: float, narrow: float) -> int:
    """Channels of the feature maps: 512 up to 32 px, then halving with each resolution, times `narrow`."""
    return int(512 * narrow) if resolution <= 32 else int(16384 // resolution * channel_multiplier * narrow)


def blur_kernel(gain: float = 1.0) -> Tensor:
    """Outer product of the taps with itself, its sum normalised to `gain`: [4, 4]."""
    taps = torch.tensor(BLUR_TAPS)
    kernel = taps[:, None] * taps[None, :]
    return gain * kernel / kernel.sum()


def upfirdn2d(x: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
    """Insert up-1 zeros after every sample, pad both axes by (before, after), filter, keep every down-th."""
    batch, channels, height, width = x.shape
    stuffed = x.new_zeros(batch, channels, height * up, width * up)
    stuffed[:, :, ::up, ::up] = x
    padded = F.pad(stuffed, (*pad, *pad))
    true_convolution = kernel.flip(0, 1)[None, None].to(x)
    planes = padded.reshape(batch * channels, 1, *padded.shape[2:])
    filtered = F.conv2d(planes, true_convolution)
    return filtered.reshape(batch, channels, *filtered.shape[2:])[:, :, ::down, ::down]


def up_blur_pad(kernel_size: int) -> tuple[int, int]:
    """Padding of the blur that follows a stride-2 transposed convolution."""
    spare = (len(BLUR_TAPS) - 2) - (kernel_size - 1)
    return (spare + 1) // 2 + 1, spare // 2 + 1


def down_blur_pad(kernel_size: int) -> tuple[int, int]:
    """Padding of the blur that goes before a stride-2 convolution."""
    spare = (len(BLUR_TAPS) - 2) + (kernel_size - 1)
    return (spare + 1) // 2, spare // 2


def skip_up_pad() -> tuple[int, int]:
    """Padding of the blur that doubles the RGB skip."""
    spare = len(BLUR_TAPS) - 2
    return (spare + 1) // 2 + 1, spare // 2


class Blur(nn.Module):
    def __init__(self, pad: tuple[int, int], gain: float = 1.0):
        super().__init__()
        self.register_buffer("kernel", blur_kernel(gain))
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        return upfirdn2d(x, self.kernel, pad=self.pad)


class SkipUpsample(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", blur_kernel(gain=4.0))

    def forward(self, x: Tensor) -> Tensor:
        return upfirdn2d(x, self.kernel, up=2, pad=skip_up_pad())


class PixelNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x**2).mean(dim=1, keepdim=True) + 1e-8)


def leaky(x: Tensor, bias: Tensor) -> Tensor:
    """sqrt(2) leaky_relu(x + bias, 0.2), the bias along dimension 1."""
    return math.sqrt(2.0) * F.leaky_relu(x + bias.reshape(1, -1, *[1] * (x.dim() - 2)), 0.2)


class BiasedLeaky(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return leaky(x, self.bias)


class EqualLinear(nn.Module):
    """Linear layer whose weight and bias are scaled at run time (equalised learning rate)."""

    def __init__(self, n_in: int, n_out: int, bias_init=0.0, lr_mul=1.0, activate=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / lr_mul)
        self.bias = nn.Parameter(torch.full((n_out,), float(bias_init)))
        self.scale = lr_mul / math.sqrt(n_in)
        self.lr_mul = lr_mul
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        product = x @ (self.scale * self.weight).t()
        bias = self.lr_mul * self.bias
        return leaky(product, bias) if self.activate else product + bias


class EqualConv2d(nn.Module):
    def __init__(self, n_in: int, n_out: int, kernel_size: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, kernel_size, kernel_size))
        self.scale = 1.0 / math.sqrt(n_in * kernel_size**2)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.scale * self.weight, stride=self.stride, padding=self.padding)


class ModulatedConv2d(nn.Module):
    """One weight per sample, w'_ijk = s_i w_ijk, normalised per output channel if demodulated; one group each."""

    def __init__(self, n_in: int, n_out: int, kernel_size: int, style_dim: int, demodulate=True,
                 upsample=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, n_out, n_in, kernel_size, kernel_size))
        self.modulation = EqualLinear(style_dim, n_in, bias_init=1.0)
        self.scale = 1.0 / math.sqrt(n_in * kernel_size**2)
        self.padding = kernel_size // 2
        self.demodulate = demodulate
        self.upsample = upsample
        if upsample:
            self.blur = Blur(up_blur_pad(kernel_size), gain=4.0)

    def sample_weights(self, style: Tensor) -> Tensor:
        """[B, out, in, k, k], one weight for every sample."""
        s = self.modulation(style)
        weights = self.scale * self.weight * s[:, None, :, None, None]
        if self.demodulate:
            weights = weights * torch.rsqrt((weights**2).sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
        return weights

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        batch, n_in, height, width = x.shape
        weights = self.sample_weights(style)
        n_out, kernel_size = weights.shape[1], weights.shape[3]
        one_row = x.reshape(1, batch * n_in, height, width)
        if self.upsample:
            grouped = weights.transpose(1, 2).reshape(batch * n_in, n_out, kernel_size, kernel_size)
            y = F.conv_transpose2d(one_row, grouped, stride=2, groups=batch)
        else:
            grouped = weights.reshape(batch * n_out, n_in, kernel_size, kernel_size)
            y = F.conv2d(one_row, grouped, padding=self.padding, groups=batch)
        y = y.reshape(batch, n_out, *y.shape[2:])
        return self.blur(y) if self.upsample else y


class FeatureInjection(nn.Module):
    """GPEN's stand-in for StyleGAN2's noise: the encoder's feature, scaled, goes beside the decoder's own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, feature: Tensor) -> Tensor:
        return torch.cat((x, self.weight * feature), dim=1)


class StyledConv(nn.Module):
    def __init__(self, n_in: int, n_out: int, style_dim: int, upsample: bool = False):
        super().__init__()
        self.conv = ModulatedConv2d(n_in, n_out, 3, style_dim, upsample=upsample)
        self.noise = FeatureInjection()
        self.activate = BiasedLeaky(2 * n_out)

    def forward(self, x: Tensor, style: Tensor, feature: Tensor) -> Tensor:
        return self.activate(self.noise(self.conv(x, style), feature))


class ToRGB(nn.Module):
    def __init__(self, n_in: int, style_dim: int, upsample: bool = True):
        super().__init__()
        if upsample:
            self.upsample = SkipUpsample()
        self.conv = ModulatedConv2d(n_in, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, x: Tensor, style: Tensor, skip: Tensor | None = None) -> Tensor:
        rgb = self.conv(x, style) + self.bias
        return rgb if skip is None else rgb + self.upsample(skip)


class ConstantInput(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))


class Decoder(nn.Module):
    """StyleGAN2's generator with GPEN's concatenated features."""

    def __init__(self, size: int, style_dim: int, n_mlp: int, channel_multiplier: int, narrow: float):
        super().__init__()
        linears = [EqualLinear(style_dim, style_dim, lr_mul=0.01, activate=True) for _ in range(n_mlp)]
        self.style = nn.Sequential(PixelNorm(), *linears)
        n_in = channels_at(4, channel_multiplier, narrow)
        self.input = ConstantInput(n_in)
        self.conv1 = StyledConv(n_in, n_in, style_dim)
        self.to_rgb1 = ToRGB(2 * n_in, style_dim, upsample=False)
        self.convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        for level in range(3, int(math.log2(size)) + 1):
            n_out = channels_at(2**level, channel_multiplier, narrow)
            self.convs.append(StyledConv(2 * n_in, n_out, style_dim, upsample=True))
            self.convs.append(StyledConv(2 * n_out, n_out, style_dim))
            self.to_rgbs.append(ToRGB(2 * n_out, style_dim))
            n_in = n_out

    def forward(self, z: Tensor, features: list[Tensor], offset: Tensor | float = 0.0) -> Tensor:
        """`features`: one at 4 px, then two at every resolution, as the styled convolutions come.

        `offset` [B, n_latent, style_dim] is added to w. As in StyleGAN2, styled convolution number l takes
        latent l and a ToRGB after it takes latent l + 1, which the next resolution's first convolution shares.
        """
        n_latent = 2 * (len(self.to_rgbs) + 1)
        latents = self.style(z)[:, None].repeat(1, n_latent, 1) + offset
        x = self.input.input.expand(len(z), -1, -1, -1)
        x = self.conv1(x, latents[:, 0], features[0])
        rgb = self.to_rgb1(x, latents[:, 1])
        for i, to_rgb in enumerate(self.to_rgbs):
            layer = 2 * i + 1
            x = self.convs[2 * i](x, latents[:, layer], features[layer])
            x = self.convs[2 * i + 1](x, latents[:, layer + 1], features[layer + 1])
            rgb = to_rgb(x, latents[:, layer + 2], rgb)
        return rgb


class ReferenceGPEN(nn.Module):
    """Images [B, 3, size, size] in [-1, 1] -> restored images of the same shape (not clamped)."""

    def __init__(self, size: int, channel_multiplier: int = 2, narrow: float = 1.0, style_dim=512, n_mlp=8):
        super().__init__()
        self.log_size = int(math.log2(size))
        self.generator = Decoder(size, style_dim, n_mlp, channel_multiplier, narrow)
        n_in = channels_at(size, channel_multiplier, narrow)
        self.ecd0 = nn.Sequential(nn.Sequential(EqualConv2d(3, n_in, 1), BiasedLeaky(n_in)))
        for i in range(1, self.log_size - 1):
            n_out = channels_at(size // 2**i, channel_multiplier, narrow)
            block = (Blur(down_blur_pad(3)), EqualConv2d(n_in, n_out, 3, stride=2), BiasedLeaky(n_out))
            setattr(self, f"ecd{i}", nn.Sequential(nn.Sequential(*block)))
            n_in = n_out
        self.final_linear = nn.Sequential(EqualLinear(n_in * 16, style_dim, activate=True))

    def encode(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images -> z [B, style_dim] and the encoder's maps, largest first."""
        x, maps = images, []
        for i in range(self.log_size - 1):
            x = getattr(self, f"ecd{i}")(x)
            maps.append(x)
        return self.final_linear(x.flatten(1)), maps

    def forward(self, images: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        z, maps = self.encode(images)
        twice_each = [m for m in maps for _ in range(2)]
        return self.generator(z, twice_each[::-1][1:], offset)
