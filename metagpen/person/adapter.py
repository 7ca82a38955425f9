"""A person's parameters as plain tensors, and GPEN's forward pass with them.

The adapter is a value: a dict of tensors with a leading people dimension P, never a change to the model's modules.

    latent.offset      [P, L, D]     added to w, layer by layer (W+; L = n_latent, D = style_dim)
    latent.up, .down   [P, L, D, r], [P, L, r, D]     optional low-rank map: w_l + offset_l + up_l down_l w
    tail.{k}.weight    [P, out, in, 3, 3]  or its factors .up [P, out, r], .down [P, r, in·9]     encoder block k
    tail.{k}.bias      [P, out]
    linear.weight      [P, D, in]  or .up [P, D, r], .down [P, r, in]     the encoder's final linear layer
    linear.bias        [P, D]
    decoder.{k}.up     [P, out, r]   the k-th styled convolution: times the filters that all people share, `bases`

All are differences from the shared model, so zeros mean "nobody", and a strength in [0, 1] scales them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..gpen import GPEN
from ..gpen.layers import Convolution, EqualConv2d, ModulatedConv2d, scaled_leaky_relu

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class AdapterSpec:
    """What is personal. `tail_blocks`: how many of the last encoder blocks; `tail_rank`: rank of the tail's deltas,
    0 for full matrices; `latent_rank`: rank of the map of the encoder's own w, 0 for the offset alone; `decoder_rank`:
    how many of the shared filters each decoder layer's difference is made of, 0 for no difference. `gated`: the
    model's gate, if it has one, decides how much of the person a photo lets in; a fine-tune goes without.
    `gated_decoder`: of the decoder's difference, too; without it that counts fully, whatever the photo."""

    tail_blocks: int = 2
    tail_rank: int = 8
    latent_rank: int = 0
    gated: bool = True
    decoder_rank: int = 0
    gated_decoder: bool = True

    def to_dict(self) -> dict[str, int]:
        """What is gated only where it is not: an addition to the file, and the others stay as they were."""
        return {name: value for name, value in asdict(self).items() if "gated" not in name or not value}


def tail_indices(gpen: GPEN, spec: AdapterSpec) -> list[int]:
    """Indices of the personal encoder blocks, e.g. [4, 5] at 128 px. Raises ConfigError for too many."""
    blocks = len(gpen.encoder)
    if not 0 <= spec.tail_blocks < blocks:
        raise ConfigError(f"tail_blocks = {spec.tail_blocks}: a {gpen.size} px model has {blocks - 1} blocks that can "
                          "be personal (0 to that many)")
    return list(range(blocks - spec.tail_blocks, blocks))


def parameter_shapes(gpen: GPEN, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a person's parameters, without the leading dimension of people."""
    latents, dim, rank = gpen.config.n_latent, gpen.config.style_dim, spec.tail_rank

    def delta(name: str, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        if not rank:
            return {name: tuple(shape)}
        return {f"{name}.up": (shape[0], rank), f"{name}.down": (rank, math.prod(shape[1:]))}

    shapes: dict[str, tuple[int, ...]] = {"latent.offset": (latents, dim)}
    if spec.latent_rank:
        shapes |= {"latent.up": (latents, dim, spec.latent_rank), "latent.down": (latents, spec.latent_rank, dim)}
    for k in tail_indices(gpen, spec):
        weight = gpen.encoder[k][0][1].weight.shape
        shapes |= delta(f"tail.{k}.weight", weight) | {f"tail.{k}.bias": (weight[0],)}
    weight = gpen.final_linear[0].weight.shape
    shapes |= delta("linear.weight", weight) | {"linear.bias": (weight[0],)}
    if spec.decoder_rank:
        shapes |= {f"decoder.{k}.up": (layer.conv.weight.shape[1], spec.decoder_rank)
                   for k, layer in enumerate(gpen.generator.styled)}
    return shapes


def new_parameters(gpen: GPEN, spec: AdapterSpec, people: int, generator: torch.Generator,
                   guess: Parameters | None = None) -> Parameters:
    """Parameters of `people` people who are nobody yet, or begin at a guess (`MetaGPEN.guess`).

    Low-rank factors begin as LoRA's do (Hu et al. 2022): `down` random and the same for everyone, `up` zero.
    """
    device, parameters = gpen.generator.input.input.device, {}
    for name, shape in parameter_shapes(gpen, spec).items():
        if name.endswith(".down"):  # equalised weights are of order 1
            down = torch.randn(shape, generator=generator) / math.sqrt(shape[-1 if name == "latent.down" else 0])
            parameters[name] = down.to(device).repeat(people, *[1] * len(shape))
        else:
            parameters[name] = torch.zeros(people, *shape, device=device)
    return guessed(parameters, guess)


def guessed(parameters: Parameters, guess: Parameters | None) -> Parameters:
    """Parameters moved by what a start guesses of them. Of mixtures of more filters than the people have, the first
    ones count; raises ConfigError for mixtures of fewer."""
    moved = dict(parameters)
    for name in parameters.keys() & (guess or {}).keys():
        value, own = parameters[name], guess[name]
        if own.shape[-1] < value.shape[-1]:
            raise ConfigError(f"decoder_rank = {value.shape[-1]}: the model's start guesses mixtures of "
                              f"{own.shape[-1]} filters; ask for at most that many")
        moved[name] = value + own[..., :value.shape[-1]]
    return moved


def expand(parameters: Parameters, name: str, shape: torch.Size) -> Tensor:
    """The full difference [P, *shape] called `name`, multiplied out if it is kept as factors."""
    if name in parameters:
        return parameters[name]
    return (parameters[f"{name}.up"] @ parameters[f"{name}.down"]).reshape(-1, *shape)


def encode_prefix(gpen: GPEN, images: Tensor, spec: AdapterSpec) -> list[Tensor]:
    """Maps of the shared encoder blocks, from the full size down; no person enters here."""
    maps, x = [], images
    for block in gpen.encoder[:len(gpen.encoder) - spec.tail_blocks]:
        x = block(x)
        maps.append(x)
    return maps


def personal_forward(gpen: GPEN, images: Tensor, parameters: Parameters, spec: AdapterSpec,
                     strength: float | Tensor = 1.0, frozen: bool = False, share: Tensor | None = None,
                     filling: Tensor | None = None, bases: Sequence[Tensor] | None = None,
                     mixed_weights: Sequence[Tensor] | None = None) -> Tensor:
    """GPEN with every person's own latents, mixtures and tail: images [P·B, 3, S, S], person-major -> same shape.

    One batch for all people: everything shared runs once over P·B images, the tail as grouped convolutions and batched
    matrix products. `strength` scales the person, or each image's own [P·B]; 0 is the generic forward pass itself, bit
    for bit. `frozen`: the shared encoder blocks run without a graph (their output depends on no parameter of a
    person). `share` [P·B, L] of the person that each decoder layer gets, tail and decoder the mean of it, default all,
    and `filling` [P·B, L, D], what the model itself adds to w whoever it is, are what `MetaGPEN.look` says; what the
    spec does not gate is taken whole whatever the share. `bases`: what the spec's `decoder_rank` asks for
    (`MetaGPEN.bases_of`). `mixed_weights`, in their place: the decoder's weights with one person's mixtures in them
    (`LastMixtures`).
    """
    if isinstance(strength, float | int) and strength == 0:
        return gpen(images, filling)
    people = parameters["latent.offset"].shape[0]
    if images.shape[0] % people:
        raise ConfigError(f"{images.shape[0]} images cannot be shared evenly by {people} people")
    if share is None or not spec.gated:
        share = images.new_ones(len(images), gpen.config.n_latent)
    strengths = strength if isinstance(strength, Tensor) else share.new_full((len(images),), strength)  # [P·B]
    share = share * strengths[:, None]
    part = share.mean(dim=1)  # [P·B]
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        maps = encode_prefix(gpen, images, spec)
    maps += encode_tail(gpen, maps[-1], parameters, spec, part)
    w = gpen.map(encode_style(gpen, maps[-1], parameters, part))
    own = None
    if mixed_weights is not None:
        own = [partial(layer.conv.filter, weight=weight)
               for layer, weight in zip(gpen.generator.styled, mixed_weights, strict=True)]
    elif spec.decoder_rank:
        alike = len(images) == 1 or not (spec.gated_decoder or isinstance(strength, Tensor))
        own = [personal_convolution(layer.conv, filters, parameters[f"decoder.{k}.up"],
                                    part if spec.gated_decoder else strengths, alike)
               for k, (layer, filters) in enumerate(zip(gpen.generator.styled, bases, strict=True))]
    return gpen.decode(maps[::-1], personal_latents(w, parameters, share, filling), own)


def encode_tail(gpen: GPEN, x: Tensor, parameters: Parameters, spec: AdapterSpec, part: Tensor) -> list[Tensor]:
    """Maps of the personal encoder blocks after the shared ones' last map x, each image in its part [P·B]."""
    maps = []
    for k in tail_indices(gpen, spec):
        blur, conv, activation = gpen.encoder[k][0]
        x = blur(x)
        x = conv(x) + personal_conv(x, parameters, f"tail.{k}.weight", conv, part)
        x = scaled_leaky_relu(x, activation.bias + personal_bias(parameters, f"tail.{k}.bias", part))
        maps.append(x)
    return maps


def encode_style(gpen: GPEN, x: Tensor, parameters: Parameters, part: Tensor) -> Tensor:
    """z [P·B, D] of the encoder's last map x through its final linear layer, each image in its part [P·B]."""
    linear, gain = gpen.final_linear[0], math.sqrt(2)
    x = x.flatten(1) * (gain * linear.scale)  # as `EqualLinear` does it, so that nobody is the generic model to the bit
    z = F.linear(x, linear.weight.to(x.dtype), (gain * linear.bias).to(x.dtype))
    z = z + personal_linear(x, parameters, "linear.weight", part)
    return F.leaky_relu_(z + (gain * personal_bias(parameters, "linear.bias", part)).to(x.dtype), 0.2)


def personal_convolution(conv: ModulatedConv2d, filters: Tensor, up: Tensor, part: Tensor,
                         alike: bool = False) -> Convolution:
    """A decoder layer's convolution with what people add to it: the shared filters [r, in, k, k], run once over the
    images of all people, mixed by everybody's own `up` [P, out, r], each image in its part [P·B].

    alike: whether all images have the same part. Then those of one person from which nothing is learned get one weight:
    no more work than the generic model's.
    """
    weight = conv.weight[0]
    if alike and len(up) == 1 and not torch.is_grad_enabled():
        return partial(conv.filter, weight=mixed_in(weight, filters, part[:1] * up[0]))
    return lambda x: plus_mixed(conv.filter(x, weight), conv.filter(x, filters.to(x.dtype)), up, part)


def mixed_in(weight: Tensor, filters: Tensor, up: Tensor) -> Tensor:
    """The weight [out, in, k, k] plus the mixture `up` [out, r] of filters [r, in, k, k], in one pass over it."""
    return torch.addmm(weight.flatten(1), up, filters.flatten(1)).view_as(weight)


class LastMixtures:
    """The decoder's weights with the mixtures of the person in them who was restored last: of somebody whose photos
    come one by one they are multiplied out once. Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self.known: tuple[Any, list[Tensor], list[Tensor]] | None = None

    def __reduce__(self) -> tuple[type[LastMixtures], tuple[()]]:
        return LastMixtures, ()

    def __call__(self, gpen: GPEN, filters: Sequence[Tensor], ups: Sequence[Tensor], strength: float) -> list[Tensor]:
        """Weights [out, in, k, k] of the styled convolutions, for one person's mixtures [1, out, r] at a strength."""
        weights = [layer.conv.weight for layer in gpen.generator.styled]
        # what lies where, and how often autograd saw it written to; what is kept here keeps its place to itself
        sources = [value.detach() for value in (*weights, *filters, *ups)]
        state = strength, [None if value.is_inference() else (value.data_ptr(), value.shape, value._version)
                           for value in sources]
        known = self.known  # once: other threads may restore other people meanwhile
        if known is None or None in state[1] or known[0] != state:
            with torch.autocast(weights[0].device.type, enabled=False):  # or the next call, without, would get its type
                mixed = [mixed_in(weight[0], own, strength * up[0].to(weight))
                         for weight, own, up in zip(weights, filters, ups, strict=True)]
            known = self.known = state, sources, mixed
        return known[2]


def multiplied_out(up: Tensor, filters: Tensor) -> Tensor:
    """The weight difference [out, in, k, k] that a mixture `up` [out, r] of filters [r, in, k, k] stands for."""
    return (up @ filters.flatten(1)).unflatten(1, filters.shape[1:])


def personal_bias(parameters: Parameters, name: str, part: Tensor) -> Tensor:
    """The bias differences called `name`, [P, C], for every image in its part: [P·B, C]."""
    own = parameters[name]
    return part[:, None] * own.repeat_interleave(len(part) // len(own), dim=0)


def personal_latents(w: Tensor, parameters: Parameters, share: Tensor, filling: Tensor | None = None) -> Tensor:
    """w [P·B, D] of the images -> w'_l = w + filling_l + share_l · (offset_l + up_l down_l w) [P·B, L, D].

    share: [P·B, L], what the gate lets in, times the strength. filling: [P·B, L, D].
    """
    people = parameters["latent.offset"].shape[0]
    share = share.unflatten(0, (people, -1))[..., None]  # [P, B, L, 1]
    w = w.unflatten(0, (people, -1))[:, :, None]  # [P, B, 1, D]
    change = parameters["latent.offset"][:, None]
    if "latent.up" in parameters:
        inner = torch.einsum("plrd,pbxd->pblr", parameters["latent.down"].to(w.dtype), w)
        change = change + torch.einsum("pldr,pblr->pbld", parameters["latent.up"].to(w.dtype), inner)
    change = (share * change).flatten(0, 1)  # [P·B, L, D]
    return w.flatten(0, 1) + (change if filling is None else change + filling).to(w.dtype)


def personal_conv(x: Tensor, parameters: Parameters, name: str, conv: EqualConv2d, part: Tensor) -> Tensor:
    """What the weight difference called `name` adds to the shared `conv` of x [P·B, C, H, W], each image in its part.

    Factors are applied one after the other and never multiplied out: a convolution to r maps, then a product per pixel.
    """
    if name in parameters:
        return part.to(x.dtype)[:, None, None, None] * people_conv(x, parameters[name] * conv.scale, conv.stride)
    up, down = parameters[f"{name}.up"], parameters[f"{name}.down"] * conv.scale
    return mixed(people_conv(x, down.unflatten(2, conv.weight.shape[1:]), conv.stride), up, part)


def mixed(maps: Tensor, up: Tensor, part: Tensor) -> Tensor:
    """maps [P·B, r, h, w], each image times its part [P·B], through everybody's `up` [P, out, r]: [P·B, out, h, w]."""
    mapped = pixels_of_people(maps, len(up), part) @ up.transpose(1, 2).to(maps.dtype)  # [P, B·h·w, out]
    return mapped.reshape(len(maps), *maps.shape[2:], -1).permute(0, 3, 1, 2)


def plus_mixed(x: Tensor, maps: Tensor, up: Tensor, part: Tensor) -> Tensor:
    """x [P·B, out, h, w] + `mixed(maps, up, part)`. Where nothing is learned the product is added into x, one pass over
    these large maps in place of three."""
    into = x.permute(0, 2, 3, 1)
    if torch.is_grad_enabled() or not into.is_contiguous():
        return x + mixed(maps, up, part)
    into.view(len(up), -1, up.shape[1]).baddbmm_(pixels_of_people(maps, len(up), part), up.transpose(1, 2).to(x.dtype))
    return x


def pixels_of_people(maps: Tensor, people: int, part: Tensor) -> Tensor:
    """maps [P·B, r, h, w], each image times its part [P·B]: [P, B·h·w, r]."""
    pixels = maps.permute(0, 2, 3, 1) * part.to(maps.dtype)[:, None, None, None]
    return pixels.reshape(people, -1, maps.shape[1])


def personal_linear(x: Tensor, parameters: Parameters, name: str, part: Tensor) -> Tensor:
    """What the matrix difference called `name` adds to the shared linear layer of x [P·B, in], each in its part."""
    steps = [name] if name in parameters else [f"{name}.down", f"{name}.up"]
    x = x * part.to(x.dtype)[:, None]
    for step in steps:
        matrix = parameters[step]  # [P, rows, columns]
        x = (x.unflatten(0, (len(matrix), -1)) @ matrix.transpose(1, 2).to(x.dtype)).flatten(0, 1)
    return x


def people_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Every person's own convolution in one: x [P·B, C, H, W] person-major, weight [P, out, C, k, k]."""
    people = weight.shape[0]
    if people == 1:
        return F.conv2d(x, weight[0], stride=stride)
    x = x.unflatten(0, (people, -1)).transpose(0, 1).flatten(1, 2)  # [B, P·C, H, W]
    x = F.conv2d(x, weight.flatten(0, 1), stride=stride, groups=people)
    return x.unflatten(1, (people, -1)).transpose(0, 1).flatten(0, 1)


def personal_forward_reference(gpen: GPEN, images: Tensor, parameters: Parameters, strength: float = 1.0,
                               share: Tensor | None = None, filling: Tensor | None = None,
                               bases: Sequence[Tensor] | None = None, gated_decoder: bool = True) -> Tensor:
    """The plain twin of `personal_forward`: one image after the other, each with a changed copy of the weights."""
    people = parameters["latent.offset"].shape[0]
    targets = {f"tail.{k}.{kind}": f"ecd{k}.0.{i}.{kind}" for k in range(1, len(gpen.encoder))
               for i, kind in ((1, "weight"), (2, "bias"))}
    targets |= {f"linear.{kind}": f"final_linear.0.{kind}" for kind in ("weight", "bias")}
    outputs = []
    for i, image in enumerate(images.split(1)):
        p = i * people // len(images)
        mine = {name: value[p:p + 1] for name, value in parameters.items()}
        own_share = image.new_ones(1, gpen.config.n_latent) if share is None else share[i:i + 1]
        changed = dict(gpen.named_parameters())
        for name, target in targets.items():
            if name in mine or f"{name}.up" in mine:
                own = expand(mine, name, changed[target].shape)[0]
                changed[target] = changed[target] + strength * own_share.mean() * own
        features, w = torch.func.functional_call(_Encode(gpen), {f"gpen.{k}": v for k, v in changed.items()}, (image,))
        own_filling = None if filling is None else filling[i:i + 1]
        convolutions = None
        if "decoder.0.up" in mine:
            part = strength * (own_share.mean() if gated_decoder else 1.0)
            weights = [part * multiplied_out(mine[f"decoder.{k}.up"][0], filters) for k, filters in enumerate(bases)]
            convolutions = [partial(layer.conv.filter, weight=layer.conv.weight[0] + weight)
                            for layer, weight in zip(gpen.generator.styled, weights, strict=True)]
        latents = personal_latents(w, mine, strength * own_share, own_filling)
        outputs.append(gpen.decode(features, latents, convolutions))
    return torch.cat(outputs)


class _Encode(torch.nn.Module):
    """`gpen.encode` as a module's forward, which is what `functional_call` calls."""

    def __init__(self, gpen: GPEN):
        super().__init__()
        self.gpen = gpen

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        return self.gpen.encode(images)
