"""Smaller Persons: the same file format, with matrices of lower rank."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .adapter import Parameters, new_parameters

if TYPE_CHECKING:
    from .person import Person


def compress(person: Person, tail_rank: int | None = None, latent_rank: int | None = None,
             max_bytes: int | None = None) -> Person:
    """`person` with its matrices replaced by the nearest ones of lower rank (truncated SVD).

    tail_rank: for the encoder's blocks and final layer, at least 1; latent_rank: for the map of w, 0 drops it; None,
    or more than there is, keeps the rank. max_bytes: the largest tail rank, up to tail_rank, with which the file is at
    most that many bytes. The W+ offset [L, D], the biases and the decoder's mixtures stay whole: at fp16 offset and
    biases are 14 KB of a 128 px Person, 16 filters per decoder layer 35 KB, and both carry most of the identity.

    Returns a new Person, which also says in its metadata what it was compressed from. Raises ConfigError for ranks
    that cannot be, or a size that no rank reaches.
    """
    before = person.spec
    highest = most(before.tail_rank or None, tail_rank)
    latent = most(before.latent_rank, latent_rank)
    if latent < 0 or (highest is not None and highest < 1):
        raise ConfigError(f"tail_rank = {tail_rank}, latent_rank = {latent_rank}: a tail needs rank 1 or more, the "
                          "latent map 0 or more")
    if max_bytes is not None and len(person.to_bytes()) > max_bytes:
        fitting = fitting_rank(person, highest or largest_rank(person.parameters), latent, max_bytes)
        highest = most(highest, fitting)
    return lowered(person, highest, latent)


def fitting_rank(person: Person, highest: int, latent_rank: int, max_bytes: int) -> int:
    """The largest tail rank, at most `highest`, with which the file is at most max_bytes long."""
    def planned(rank: int) -> int:
        spec = replace(person.spec, tail_rank=rank, latent_rank=latent_rank)
        shapes = new_parameters(person.model.gpen, spec, 1, torch.Generator())
        return len(replace(person, spec=spec, parameters=shapes, metadata=note(person)).to_bytes())

    fitting = bisect_right(range(1, highest + 1), max_bytes, key=planned)
    if not fitting:
        raise ConfigError(f"max_bytes = {max_bytes}: with tail_rank 1 and latent_rank {latent_rank} this Person still "
                          f"takes {planned(1)} bytes" + ("; try latent_rank=0" if latent_rank else ""))
    return fitting


def most(have: int | None, wanted: int | None) -> int | None:
    """The smaller of two ranks, None being no limit."""
    return have if wanted is None else wanted if have is None else min(have, wanted)


def lowered(person: Person, tail_rank: int | None, latent_rank: int) -> Person:
    """The Person at these ranks; tail_rank None: as it is."""
    before = person.spec
    spec = replace(before, tail_rank=before.tail_rank if tail_rank is None else tail_rank, latent_rank=latent_rank)
    if spec == before:
        return person
    parameters: Parameters = {}
    for name, value in person.parameters.items():
        base = name.removesuffix(".up").removesuffix(".down")
        rank = latent_rank if base == "latent" else spec.tail_rank
        if base.startswith("decoder."):
            parameters[name] = value
        elif name.endswith(".up"):
            if rank:
                parameters |= factors(base, value, person.parameters[f"{base}.down"], rank)
        elif name.endswith(".weight") and spec.tail_rank:
            matrix = value.flatten(2)
            parameters |= factors(base, matrix, torch.eye(matrix.shape[2]).to(matrix)[None], rank)
        elif not name.endswith(".down"):
            parameters[name] = value
    return replace(person, spec=spec, parameters=parameters, metadata=note(person))


def note(person: Person) -> dict[str, Any]:
    """The metadata of the compressed Person."""
    return {"compressed_from": person.spec.to_dict(), **person.metadata}


def factors(name: str, up: Tensor, down: Tensor, rank: int) -> Parameters:
    """The best factors [.., rows, rank] and [.., rank, columns] of up @ down, their scales shared evenly."""
    left, values, right = torch.linalg.svd(up.double().cpu() @ down.double().cpu(), full_matrices=False)
    root = values[..., :rank].sqrt()
    return {f"{name}.up": (left[..., :rank] * root[..., None, :]).to(up),
            f"{name}.down": (root[..., None] * right[..., :rank, :]).to(up)}


def largest_rank(parameters: Parameters) -> int:
    """The rank beyond which full tail matrices [1, out, ...] have nothing more to give."""
    return max(min(value.shape[1], value[0, 0].numel()) for name, value in parameters.items()
               if name.endswith(".weight"))
