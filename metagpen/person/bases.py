"""What all people's decoder differences are made of: a few filters per decoder layer, the same for everybody.

A person's difference of a decoder weight is up @ down with up [out, r] their own and down [r, in·9] shared, so that a
person is some tens of numbers per channel, and a batch of people needs no grouped convolution: the shared filters run
once over all images. Random filters can serve (LoRA-FA, Zhang et al. 2023, freezes a random `down` too; VeRA,
Kopiczko et al. 2024, shares random factors); an outer loop can learn them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..gpen import GPEN


class DecoderBases(nn.Module):
    """`filters[k]` [r, in, 3, 3] of the k-th styled convolution of a GPEN's decoder."""

    def __init__(self, gpen: GPEN, rank: int):
        super().__init__()
        self.rank = rank
        self.filters = nn.ParameterList(nn.Parameter(torch.empty(rank, *layer.conv.weight.shape[2:]))
                                        for layer in gpen.generator.styled)

    @classmethod
    def random(cls, gpen: GPEN, rank: int) -> DecoderBases:
        """Normal numbers of variance 1/r, the same on every machine and for good: numpy keeps this stream as it is."""
        bases, stream = cls(gpen, rank), np.random.RandomState(0)
        for own in bases.filters:
            values = stream.standard_normal(tuple(own.shape)) / math.sqrt(rank)
            own.data = torch.from_numpy(values).to(gpen.generator.conv1.conv.weight)
        return bases.requires_grad_(False)

    def of(self, rank: int) -> list[Tensor]:
        """The first `rank` filters of every layer. Raises ConfigError where there are fewer."""
        if rank > self.rank:
            raise ConfigError(f"decoder_rank = {rank}: this model shares {self.rank} filters per decoder layer")
        return list(self.filters) if rank == self.rank else [own[:rank] for own in self.filters]
