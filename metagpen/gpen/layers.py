"""The layers GPEN is made of, with the parameter names and shapes of the published checkpoints.

Equalised learning rate (Karras et al. 2018), fused leaky ReLU, separable FIR blur (Zhang 2019) and modulated
convolution (Karras et al. 2020, StyleGAN2). Two of them are written for speed and have plain twins beside them,
`blur_reference` and `ModulatedConv2d.reference`; the tests hold each pair together in float64.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIR_TAPS = (1.0, 3.0, 3.0, 1.0)


class FusedLeakyReLU(nn.Module):
    """sqrt(2) * leaky_relu(x + bias, 0.2) over channels of [B, C, ...]; sqrt(2) keeps the variance."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return scaled_leaky_relu(x, self.bias)


def scaled_leaky_relu(x: Tensor, bias: Tensor) -> Tensor:
    """x [B, C, ...], bias [C] (one for all) or [B, C] (one per sample).

    The gain goes into the sum and the activation works in place (both allowed: leaky ReLU is homogeneous), which
    saves two passes over the largest maps.
    """
    gain = math.sqrt(2)
    bias = (gain * bias).to(x.dtype).reshape(*bias.shape, *[1] * (x.ndim - 2))
    return F.leaky_relu_(torch.add(bias, x, alpha=gain), 0.2)


class EqualConv2d(nn.Module):
    """Convolution without bias whose weight is divided by sqrt(fan_in) at run time (equalised learning rate)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0,
                 bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scale = 1 / math.sqrt(in_channels * kernel_size**2)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding)


class EqualLinear(nn.Module):
    """Linear layer with equalised learning rate; `lr_mul` slows it further (0.01 in the mapping network)."""

    def __init__(self, in_dim: int, out_dim: int, bias_init: float = 0.0, lr_mul: float = 1.0,
                 activation: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_dim,), float(bias_init)))
        self.scale, self.lr_mul, self.activation = lr_mul / math.sqrt(in_dim), lr_mul, activation

    def forward(self, x: Tensor) -> Tensor:
        if self.activation:
            return scaled_leaky_relu(F.linear(x, self.weight * self.scale), self.bias * self.lr_mul)
        return F.linear(x, self.weight * self.scale, self.bias * self.lr_mul)


class PixelNorm(nn.Module):
    """Divide [B, D] vectors by their root mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class Blur(nn.Module):
    """FIR low-pass [1, 3, 3, 1]² / 64 · gain, as two depthwise passes (4 + 4 taps a pixel instead of 16).

    `pad` = (before, after), zeros, on both axes. The 4x4 buffer `kernel` is in the published checkpoints.
    """

    def __init__(self, pad: tuple[int, int], gain: float = 1.0):
        super().__init__()
        taps = torch.tensor(FIR_TAPS) / sum(FIR_TAPS) * math.sqrt(gain)
        self.register_buffer("taps", taps, persistent=False)
        self.register_buffer("kernel", torch.outer(taps, taps))
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        before, after = self.pad
        taps = self.taps.to(x.dtype)
        column = taps.reshape(1, 1, -1, 1).expand(channels, 1, -1, 1)
        row = taps.reshape(1, 1, 1, -1).expand(channels, 1, 1, -1)
        if before == after:  # the convolution can pad by itself
            x = F.conv2d(x, column, padding=(before, 0), groups=channels)
            return F.conv2d(x, row, padding=(0, before), groups=channels)
        x = F.pad(x, (before, after, before, after))
        return F.conv2d(F.conv2d(x, column, groups=channels), row, groups=channels)


def blur_reference(x: Tensor, kernel: Tensor, pad: tuple[int, int]) -> Tensor:
    """The plain twin of `Blur`: pad, then one 2-D convolution per channel with the full kernel."""
    channels = x.shape[1]
    before, after = pad
    x = F.pad(x, (before, after, before, after))
    return F.conv2d(x, kernel.flip(0, 1).to(x.dtype).expand(channels, 1, *kernel.shape), groups=channels)


class Upsample(nn.Module):
    """Twice the size of [B, C, H, W] by zero-stuffing and the FIR kernel, in one strided transposed convolution."""

    def __init__(self):
        super().__init__()
        taps = torch.tensor(FIR_TAPS) / sum(FIR_TAPS) * 2
        self.register_buffer("kernel", torch.outer(taps, taps))

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, *self.kernel.shape)
        return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=channels)


class ModulatedConv2d(nn.Module):
    """StyleGAN2's modulated convolution with one weight shared by the whole batch.

    Scaling the input channels by the style, convolving once, and scaling the output channels by the demodulation
    factor equals convolving each sample with its own modulated weight (`reference`), without a grouped convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, style_dim: int,
                 demodulate: bool = True, upsample: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, out_channels, in_channels, kernel_size, kernel_size))
        self.modulation = EqualLinear(style_dim, in_channels, bias_init=1.0)
        self.scale = 1 / math.sqrt(in_channels * kernel_size**2)
        self.padding, self.demodulate, self.upsample = kernel_size // 2, demodulate, upsample
        if upsample:
            self.blur = Blur(pad=(1, 1), gain=4.0)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [B, in, H, W], w [B, style_dim] -> [B, out, H, W], or twice the size with `upsample`."""
        style = self.modulation(w)  # [B, in]
        weight = self.weight[0] * self.scale  # [out, in, k, k]
        if not (self.padding or self.demodulate or self.upsample):  # ToRGB: few outputs, so scale the weight, not x
            return pointwise(x, weight[None, :, :, 0, 0] * style[:, None])
        x = x * style.to(x.dtype)[:, :, None, None]
        if self.upsample:
            x = self.blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2))
        else:
            x = F.conv2d(x, weight, padding=self.padding)
        if self.demodulate:
            energy = F.linear(style.square().to(weight.dtype), weight.square().sum(dim=(2, 3)))  # [B, out]
            x = x * torch.rsqrt(energy + 1e-8).to(x.dtype)[:, :, None, None]
        return x

    def reference(self, x: Tensor, w: Tensor) -> Tensor:
        """The plain twin, as StyleGAN2 writes it: one weight per sample, one grouped convolution."""
        batch, channels, height, width = x.shape
        weight = self.scale * self.weight * self.modulation(w).reshape(batch, 1, channels, 1, 1)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
        x = x.reshape(1, batch * channels, height, width)
        if self.upsample:
            weight = weight.transpose(1, 2).flatten(0, 1)
            x = F.conv_transpose2d(x, weight, stride=2, groups=batch)
            x = x.reshape(batch, -1, *x.shape[2:])
            return blur_reference(x, self.blur.kernel, self.blur.pad)
        x = F.conv2d(x, weight.flatten(0, 1), padding=self.padding, groups=batch)
        return x.reshape(batch, -1, height, width)


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution with one weight [B, out, in] per sample, as a matrix product over pixels."""
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # a view when x is channels_last
    return (pixels @ weight.transpose(1, 2).to(x.dtype)).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class NoiseInjection(nn.Module):
    """GPEN's use of StyleGAN2's noise input: the encoder's feature map takes the noise's place.

    With `concat` (the published models) [B, C, H, W] becomes cat(x, weight * feature) [B, 2C, H, W]; without, a sum.
    """

    def __init__(self, concat: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.concat = concat

    def forward(self, x: Tensor, feature: Tensor) -> Tensor:
        feature = self.weight.to(x.dtype) * feature.to(x.dtype)
        return torch.cat((x, feature), dim=1) if self.concat else x + feature


class StyledConv(nn.Module):
    """Modulated convolution, feature injection, bias and activation."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, style_dim: int,
                 upsample: bool = False, concat: bool = True):
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, out_channels, kernel_size, style_dim, upsample=upsample)
        self.noise = NoiseInjection(concat)
        self.activate = FusedLeakyReLU(out_channels * (2 if concat else 1))

    def forward(self, x: Tensor, w: Tensor, feature: Tensor) -> Tensor:
        return self.activate(self.noise(self.conv(x, w), feature))


class ToRGB(nn.Module):
    """1x1 modulated convolution to RGB, added to the up-sampled image of the layer below."""

    def __init__(self, in_channels: int, style_dim: int, upsample: bool = True):
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        if upsample:
            self.upsample = Upsample()

    def forward(self, x: Tensor, w: Tensor, skip: Tensor | None = None) -> Tensor:
        rgb = self.conv(x, w) + self.bias.to(x.dtype)
        return rgb if skip is None else rgb + self.upsample(skip)


def encoder_layer(in_channels: int, out_channels: int, kernel_size: int, downsample: bool = False) -> nn.Sequential:
    """(blur, stride-2) convolution and fused leaky ReLU: one `ecd` block, one layer of the discriminator."""
    if not downsample:
        conv = EqualConv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        return nn.Sequential(conv, FusedLeakyReLU(out_channels))
    return nn.Sequential(down_blur(kernel_size), EqualConv2d(in_channels, out_channels, kernel_size, stride=2),
                         FusedLeakyReLU(out_channels))


def down_blur(kernel_size: int) -> Blur:
    """The blur before a stride-2 convolution, padded so that the pair halves an even size exactly."""
    total = len(FIR_TAPS) - 2 + kernel_size - 1
    return Blur(pad=((total + 1) // 2, total // 2))
