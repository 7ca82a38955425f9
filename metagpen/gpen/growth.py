"""Progressive growth: a GPEN of size S becomes one of size 2S that computes the same function.

Training at low resolution first is several times cheaper (Karras et al. 2018, "Progressive Growing of GANs"); the new
layers start as the identity (Chen et al. 2016, "Net2Net"), so that nothing learnt is lost and no fading is needed.
"""

import math

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .generator import GPEN
from .layers import down_blur


def grow(small: GPEN) -> GPEN:
    """A GPEN of twice the size with `grown(x) == upsample(small(halve(x)))`, up to rounding.

    The shared levels are copied. The new top ToRGB starts at zero, so the image is the up-sampled skip of the level
    below. The new `ecd0` passes +RGB and -RGB on six of its channels; since leaky(x) - leaky(-x) = 1.2 x, the new
    `ecd1` recovers the halved image exactly and applies the small model's `ecd0` to it.
    """
    config = small.config
    grown = GPEN(2 * config.size, config.channel_multiplier, config.narrow, config.style_dim, config.n_mlp,
                 config.concat)
    if grown.config.channels(grown.size) < 6:
        raise ConfigError("growth needs at least 6 channels at the new resolution to carry +RGB and -RGB")
    with torch.no_grad():
        grown.generator.load_state_dict(small.generator.state_dict(), strict=False)
        grown.final_linear.load_state_dict(small.final_linear.state_dict())
        for block, source in zip(grown.encoder[2:], small.encoder[1:], strict=True):
            block.load_state_dict(source.state_dict())
        top = grown.generator.to_rgbs[-1]
        nn.init.zeros_(top.conv.weight)
        nn.init.zeros_(top.bias)
        _pass_rgb_through(grown, small)
    return grown


def _pass_rgb_through(grown: GPEN, small: GPEN) -> None:
    split, _ = grown.encoder[0][0]  # 1x1 convolution, activation
    _, merge, merge_activation = grown.encoder[1][0]  # blur, 3x3 stride-2 convolution, activation
    first, first_activation = small.encoder[0][0]
    identity = torch.eye(3)[:, :, None, None] / split.scale
    split.weight[:3], split.weight[3:6] = identity, -identity
    recover = first.weight[:, :, 0, 0] * first.scale / (merge.scale * 1.2 * math.sqrt(2))
    merge.weight.zero_()
    merge.weight[:, :3, 1, 1], merge.weight[:, 3:6, 1, 1] = recover, -recover
    merge_activation.bias.copy_(first_activation.bias)


def halve(images: Tensor) -> Tensor:
    """[B, 3, S, S] -> [B, 3, S/2, S/2], with the encoder's own blur: what the grown `ecd1` sees."""
    blur = down_blur(3).to(images.device, images.dtype)
    return blur(images)[:, :, 1::2, 1::2]
