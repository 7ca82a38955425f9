"""GPEN computed plainly, the way the published code does it, on the weights of a `metagpen.gpen.GPEN`.

What a speed is to be compared with has to compute the same thing. This walks through the fast network's own weights
and does every step as the papers spell it out: each sample gets its own modulated weights in one grouped convolution
(StyleGAN2, Karras et al. 2020, section 2.2), each blur is an up-sample by zeros, pad, filter with the full 4x4 kernel
and keep every n-th, over batch x channels single planes, and activations are written out. Maps are contiguous, [B, C,
H, W]. A person's parameters (`metagpen.person`) change copies of the weights of their layers; there is one person.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metagpen.gpen import GPEN
from metagpen.gpen.layers import EqualLinear, ModulatedConv2d, StyledConv, ToRGB
from metagpen.person import Parameters


def upfirdn2d(x: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
    """Zeros between samples, zeros around, true convolution with `kernel`, every `down`-th: [B, C, H, W]."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch * channels, 1, height, 1, width, 1)
    x = F.pad(x, (0, up - 1, 0, 0, 0, up - 1)).reshape(batch * channels, 1, height * up, width * up)
    x = F.pad(x, (*pad, *pad))
    x = F.conv2d(x, kernel.flip(0, 1)[None, None].to(x.dtype))
    return x.reshape(batch, channels, *x.shape[2:])[:, :, ::down, ::down]


def fused_leaky_relu(x: Tensor, bias: Tensor) -> Tensor:
    return math.sqrt(2) * F.leaky_relu(x + bias.reshape(1, -1, *[1] * (x.ndim - 2)), 0.2)


def equal_linear(layer: EqualLinear, x: Tensor) -> Tensor:
    x = F.linear(x, layer.weight * layer.scale)
    bias = layer.bias * layer.lr_mul
    return fused_leaky_relu(x, bias) if layer.activation else x + bias


def modulated_conv(layer: ModulatedConv2d, x: Tensor, w: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    weight = layer.scale * layer.weight * equal_linear(layer.modulation, w).reshape(batch, 1, channels, 1, 1)
    if layer.demodulate:
        weight = weight * torch.rsqrt(weight.pow(2).sum((2, 3, 4)) + 1e-8).reshape(batch, -1, 1, 1, 1)
    x = x.reshape(1, batch * channels, height, width)
    if layer.upsample:
        x = F.conv_transpose2d(x, weight.transpose(1, 2).flatten(0, 1), stride=2, groups=batch)
        return upfirdn2d(x.reshape(batch, -1, *x.shape[2:]), layer.blur.kernel, pad=layer.blur.pad)
    x = F.conv2d(x, weight.flatten(0, 1), padding=layer.padding, groups=batch)
    return x.reshape(batch, -1, height, width)


def styled_conv(layer: StyledConv, x: Tensor, w: Tensor, feature: Tensor) -> Tensor:
    x = modulated_conv(layer.conv, x, w)
    feature = layer.noise.weight * feature
    x = torch.cat((x, feature), dim=1) if layer.noise.concat else x + feature
    return fused_leaky_relu(x, layer.activate.bias)


def to_rgb(layer: ToRGB, x: Tensor, w: Tensor, skip: Tensor | None) -> Tensor:
    rgb = modulated_conv(layer.conv, x, w) + layer.bias
    return rgb if skip is None else rgb + upfirdn2d(skip, layer.upsample.kernel, up=2, pad=(2, 1))


def restore(gpen: GPEN, images: Tensor, person: Parameters | None = None) -> Tensor:
    """images [B, 3, S, S] -> the same shape, as `GPEN.forward`; with `person` (people dimension 1) as
    `personal_forward`."""
    person = person or {}
    maps, x = [], images.contiguous()
    for k, block in enumerate(gpen.encoder):
        *blur, conv, activation = block[0]
        if blur:
            x = upfirdn2d(x, blur[0].kernel, pad=blur[0].pad)
        weight = conv.scale * changed(person, f"tail.{k}.weight", conv.weight)
        x = F.conv2d(x, weight, stride=conv.stride, padding=conv.padding)
        x = fused_leaky_relu(x, changed(person, f"tail.{k}.bias", activation.bias))
        maps.append(x)
    linear = gpen.final_linear[0]
    z = F.linear(x.flatten(1), linear.scale * changed(person, "linear.weight", linear.weight))
    z = fused_leaky_relu(z, changed(person, "linear.bias", linear.bias))
    return decode(gpen, z, maps[::-1], person)


def decode(gpen: GPEN, z: Tensor, features: list[Tensor], person: Parameters) -> Tensor:
    decoder, w = gpen.generator, z * torch.rsqrt(z.pow(2).mean(1, keepdim=True) + 1e-8)
    for layer in decoder.style[1:]:
        w = equal_linear(layer, w)
    latents = w[:, None].repeat(1, gpen.config.n_latent, 1)
    if "latent.offset" in person:
        latents = latents + person["latent.offset"]
    if "latent.up" in person:
        maps = person["latent.up"][0] @ person["latent.down"][0]  # [L, D, D]
        latents = latents + torch.einsum("lij,bj->bli", maps, w)
    w = latents.unbind(1)
    x = styled_conv(decoder.conv1, decoder.input.input.repeat(len(z), 1, 1, 1), w[0], features[0])
    rgb = to_rgb(decoder.to_rgb1, x, w[1], None)
    for i, last in enumerate(decoder.to_rgbs):
        x = styled_conv(decoder.convs[2 * i], x, w[2 * i + 1], features[i + 1])
        x = styled_conv(decoder.convs[2 * i + 1], x, w[2 * i + 2], features[i + 1])
        rgb = to_rgb(last, x, w[2 * i + 3], rgb)
    return rgb


def changed(person: Parameters, name: str, shared: Tensor) -> Tensor:
    """The person's own copy of a shared tensor: shared + difference, multiplied out if it is kept as factors."""
    if name in person:
        return shared + person[name][0]
    if f"{name}.up" in person:
        return shared + (person[f"{name}.up"][0] @ person[f"{name}.down"][0]).reshape(shared.shape)
    return shared
