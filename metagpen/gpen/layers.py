"""The layers GPEN is made of, with the parameter names and shapes of the published checkpoints.

Equalised learning rate (Karras et al. 2018), fused leaky ReLU, FIR blur (Zhang 2019) and modulated convolution
(Karras et al. 2020, StyleGAN2). What is written for speed has a plain twin beside it, called `reference`; the tests
hold each pair together in float64, and `benchmarks/inner_step.py` says what it is worth.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIR_TAPS = (1.0, 3.0, 3.0, 1.0)
Convolution = Callable[[Tensor], Tensor]


class FusedLeakyReLU(nn.Module):
    """sqrt(2) * leaky_relu(x + bias, 0.2) over channels of [B, C, ...]; sqrt(2) keeps the variance."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return scaled_leaky_relu(x, self.bias)


def scaled_leaky_relu(x: Tensor, bias: Tensor, factor: Tensor | None = None) -> Tensor:
    """sqrt(2) * leaky_relu(factor * x + bias, 0.2): x [B, C, ...]; bias [C] (one for all) or [B, C] (one per sample);
    factor likewise, or [1]; default 1.

    Gain and factor go into the sum and the activation works in place (both allowed: leaky ReLU is homogeneous), which
    saves passes over the largest maps, forwards and backwards.
    """
    gain, spatial = math.sqrt(2), [1] * (x.ndim - 2)
    bias = (gain * bias).to(x.dtype).reshape(*bias.shape, *spatial)
    if factor is None:
        return F.leaky_relu_(torch.add(bias, x, alpha=gain), 0.2)
    factor = (gain * factor).to(x.dtype).reshape(*factor.shape, *spatial)
    return F.leaky_relu_(torch.addcmul(bias, x, factor), 0.2)


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
        # scales x, not the much larger weight; never in bfloat16: there is too little work to gain from it, and styles,
        # which every pixel is multiplied with, would lose digits
        # the gain goes in before: torch.compile (2.13) loses one that is the `alpha` of a sum after a product
        gain = math.sqrt(2) if self.activation else 1.0
        with torch.autocast(x.device.type, enabled=False):
            x = F.linear(x.to(self.weight.dtype) * (gain * self.scale), self.weight, self.bias * (gain * self.lr_mul))
            return F.leaky_relu_(x, 0.2) if self.activation else x


class PixelNorm(nn.Module):
    """Divide [B, D] vectors by their root mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class Blur(nn.Module):
    """FIR low-pass [1, 3, 3, 1]² / 64 · gain, in one depthwise pass (two of 4 taps each read and write twice as much).

    `pad` = (before, after), zeros, on both axes. The 4x4 buffer `kernel` is in the published checkpoints.
    """

    def __init__(self, pad: tuple[int, int], gain: float = 1.0):
        super().__init__()
        taps = torch.tensor(FIR_TAPS) / sum(FIR_TAPS) * math.sqrt(gain)
        self.register_buffer("kernel", torch.outer(taps, taps))
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        before, after = self.pad
        if x.is_cuda and (fir := triton_fir(x.device)) is not None:
            return fir(x, self.kernel.flip(0, 1), before, after)
        kernel = self.kernel.flip(0, 1).to(x.dtype).expand(channels, 1, *self.kernel.shape)
        if before == after:  # the convolution can pad by itself
            return F.conv2d(x, kernel, padding=before, groups=channels)
        return F.conv2d(F.pad(x, (before, after, before, after)), kernel, groups=channels)

    def reference(self, x: Tensor) -> Tensor:
        """The plain twin: pad, then filter every channel of every sample by itself."""
        before, after = self.pad
        planes = F.pad(x, (before, after, before, after)).flatten(0, 1)[:, None]
        return F.conv2d(planes, self.kernel.flip(0, 1)[None, None].to(x.dtype)).unflatten(0, x.shape[:2]).squeeze(2)


@cache
def triton_fir(device: torch.device) -> Callable[..., Tensor] | None:
    """`fir.fir` where Triton is installed, as it is beside torch for CUDA on Linux, and can compile for this GPU; it
    wants a C compiler."""
    try:
        from .fir import fir
    except ImportError:
        return None
    try:
        fir(torch.zeros(1, 1, 4, 4, device=device), torch.zeros(4, 4, device=device), 1, 1)
    except Exception as error:
        warnings.warn(f"blurs run without Triton, which is slower: it cannot compile a kernel here ({error})",
                      stacklevel=2)
        return None
    return fir


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
        x, factor = self.convolve(x, w)
        return x if factor is None else x * factor.to(x.dtype)[:, :, None, None]

    def convolve(self, x: Tensor, w: Tensor, own: Convolution | None = None) -> tuple[Tensor, Tensor | None]:
        """The result before demodulation, and the factor [B, out] that demodulates it: the activation that follows
        can apply it on its way.

        own: what convolves the modulated x in place of the weight, before the blur of an up-sampling layer. The
        demodulation stays that of the weight.
        """
        style, weight = self.modulation(w) * self.scale, self.weight[0]  # [B, in], [out, in, k, k]
        if not (self.padding or self.demodulate or self.upsample):  # ToRGB: few outputs, so scale the weight, not x
            return pointwise(x, weight[None, :, :, 0, 0] * style[:, None]), None
        x = x * style.to(x.dtype)[:, :, None, None]
        x = self.filter(x, weight) if own is None else own(x)
        if self.upsample:
            x = self.blur(x)
        if not self.demodulate:
            return x, None
        with torch.autocast(x.device.type, enabled=False):
            energy = F.linear(style.square(), weight.square().sum(dim=(2, 3)))  # [B, out]
        return x, torch.rsqrt(energy + 1e-8)

    def filter(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [B, in, H, W] with a weight [out, in, k, k]: as this layer does it, [B, out, H, W] or, where it goes up,
        [B, out, 2H + 1, 2W + 1], yet to be blurred."""
        if self.upsample:
            return F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        return F.conv2d(x, weight, padding=self.padding)

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
            return self.blur.reference(x.reshape(batch, -1, *x.shape[2:]))
        x = F.conv2d(x, weight.flatten(0, 1), padding=self.padding, groups=batch)
        return x.reshape(batch, -1, height, width)


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution with one weight [B, out, in] per sample, as a matrix product over pixels."""
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # a view when x is channels_last
    return PixelProduct.apply(pixels, weight.to(x.dtype)).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class PixelProduct(torch.autograd.Function):
    """pixels [B, N, in] @ weight [B, out, in] transposed, for few outputs and many pixels.

    Its plain twin is that product itself. It writes the weight's gradient as [out, N] @ [N, in]; autograd's
    [in, N] @ [N, out], then transposed, is several times slower in float32.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(pixels: Tensor, weight: Tensor) -> Tensor:
        return pixels @ weight.transpose(1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        pixels, weight = ctx.saved_tensors
        gradient = gradient.to(pixels.dtype)
        return (gradient @ weight if ctx.needs_input_grad[0] else None,
                gradient.transpose(1, 2) @ pixels if ctx.needs_input_grad[1] else None)


class NoiseInjection(nn.Module):
    """GPEN's use of StyleGAN2's noise input: the encoder's feature map takes the noise's place.

    With `concat` (the published models) [B, C, H, W] becomes cat(x, weight * feature) [B, 2C, H, W]; without, a sum.
    The weight begins at 1 and not at StyleGAN2's 0, which is right for noise: at 0 neither the encoder nor what reads
    its features gets a gradient, and a short training leaves the low resolutions without them.
    """

    def __init__(self, concat: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
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

    def forward(self, x: Tensor, w: Tensor, feature: Tensor, own: Convolution | None = None) -> Tensor:
        """`own`: see `ModulatedConv2d.convolve`."""
        x, factor = self.conv.convolve(x, w, own)
        if not self.noise.concat:
            return self.activate(self.noise(x * factor.to(x.dtype)[:, :, None, None], feature))
        # activate both parts before they meet: one pass each, and none backwards for a feature without a graph
        own, injected = self.activate.bias.tensor_split([x.shape[1]])
        return torch.cat((scaled_leaky_relu(x, own, factor),
                          scaled_leaky_relu(feature.to(x.dtype), injected, self.noise.weight)), dim=1)

    def reference(self, x: Tensor, w: Tensor, feature: Tensor) -> Tensor:
        """The plain twin: convolution, injection and activation, one after the other."""
        return self.activate(self.noise(self.conv.reference(x, w), feature))


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
