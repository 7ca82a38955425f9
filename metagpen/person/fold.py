"""A Person as plain weights: what was learned goes into the model's own tensors, for tools that know no Persons.

The differences of the encoder's tail are added to it. A latent change needs no layer of its own either: every decoder
layer reads w through its own affine map, and A (w + offset + up down w) + b = A (I + up down) w + (b + A offset).
"""

from __future__ import annotations

import copy

import torch

from ..errors import ConfigError
from ..gpen import GPEN
from ..gpen.generator import Decoder
from ..gpen.layers import EqualLinear
from .adapter import expand, tail_indices
from .person import Person


@torch.no_grad()
def folded(person: Person, strength: float = 1.0) -> GPEN:
    """The model's GPEN with `person` inside: beside the model's own start (whose gate fills in for everybody) it
    restores as the Person does at this strength, up to float rounding. The shared model stays as it is.

    Raises ConfigError for a Person under a gate, or with a latent map where the model fills in: how much of it counts
    then depends on the photo, and no fixed weights can say that. Nor can they hold differences of the decoder, which
    the demodulation leaves alone.
    """
    if person.spec.decoder_rank:
        raise ConfigError("this Person changes decoder layers beside their demodulation, so it cannot be folded into "
                          "weights; learn it with decoder_rank=0")
    if person.model.gate is not None and (person.spec.gated or person.spec.latent_rank):
        raise ConfigError("this model's gate decides photo by photo how much of the Person counts, so the Person "
                          "cannot be folded into weights; only fine-tunes (metagpen train -opt) go without the gate")
    gpen, parameters = copy.deepcopy(person.model.gpen), person.parameters
    for k in tail_indices(gpen, person.spec):
        _, conv, activation = gpen.encoder[k][0]
        conv.weight += strength * expand(parameters, f"tail.{k}.weight", conv.weight.shape)[0]
        activation.bias += strength * parameters[f"tail.{k}.bias"][0]
    linear = gpen.final_linear[0]
    linear.weight += strength * expand(parameters, "linear.weight", linear.weight.shape)[0]
    linear.bias += strength * parameters["linear.bias"][0]
    for modulation, layer in modulations(gpen.generator):
        offset = strength * parameters["latent.offset"][0, layer]
        modulation.bias += modulation.weight @ offset * (modulation.scale / modulation.lr_mul)
        if "latent.up" in parameters:
            change = parameters["latent.up"][0, layer] @ parameters["latent.down"][0, layer]
            modulation.weight += strength * modulation.weight @ change
    return gpen


def modulations(decoder: Decoder) -> list[tuple[EqualLinear, int]]:
    """Every affine map from w to a style, with the index of the latent that it reads (see `Decoder.forward`)."""
    found = [(decoder.conv1.conv.modulation, 0), (decoder.to_rgb1.conv.modulation, 1)]
    for i, to_rgb in enumerate(decoder.to_rgbs):
        layers = (decoder.convs[2 * i], decoder.convs[2 * i + 1], to_rgb)
        found += [(layer.conv.modulation, 2 * i + k) for k, layer in enumerate(layers, start=1)]
    return found
