"""Restoring photos of different people together: one forward pass, everybody with their own adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .person import Person

if TYPE_CHECKING:
    from ..model import MetaGPEN


@torch.no_grad()
def restore_many(model: MetaGPEN, persons: Sequence[Person], images: Tensor, strength: float | Sequence[float] = 1.0,
                 batch: int = 64) -> Tensor:
    """`persons[i].restore_batch` of images[i], for all of them together: aligned faces [N, 3, S, S] in [-1, 1] -> same.

    persons: one for each image, in any order, the same one as often as they have photos. strength: one for all, or one
    for each image; those at 0 get the generic model. batch: most images in a pass, which is what bounds memory.

    Equal to one at a time up to float rounding. Persons of another shape go in a pass of their own. Raises
    PhotoError for other shapes, CheckpointError for a Person of another model, ConfigError for strengths outside
    [0, 1] or counts that differ.
    """
    model.check_faces(images)
    strengths = check(model, persons, len(images), strength, batch)
    restored = torch.empty(images.shape, device=model.device, dtype=model.dtype)
    for chosen in passes(persons, strengths, batch):
        if not strengths[chosen[0]]:
            restored[chosen] = model.restore(images[chosen])
            continue
        together = people_of([persons[i] for i in chosen])
        parameters = together[0].parameters
        if len(together) > 1:
            parameters = {name: torch.cat([person.parameters[name].to(model.device) for person in together])
                          for name in parameters}
        each = [strengths[i] for i in chosen]
        one = len(set(each)) == 1  # which can be cheaper
        own = each[0] if one else torch.tensor(each, device=model.device, dtype=model.dtype)
        restored[chosen] = model.restore_people(images[chosen], parameters, together[0].spec, own)
    return restored


def check(model: MetaGPEN, persons: Sequence[Person], images: int, strength: float | Sequence[float],
          batch: int) -> list[float]:
    """The strength of each image, after everything that was given beside them has been looked at."""
    if not isinstance(persons, Sequence) or not all(isinstance(person, Person) for person in persons):
        raise ConfigError(f"persons: a list with a Person for each image is needed, not {persons!r:.80}")
    try:
        strengths = [float(s) for s in strength] if np.iterable(strength) else [float(strength)] * images
    except (TypeError, ValueError):
        raise ConfigError(f"strength must be a number in [0, 1], or one for each image, not {strength!r}") from None
    if not images == len(persons) == len(strengths):
        raise ConfigError(f"{images} images, {len(persons)} persons, {len(strengths)} strengths: one of each per "
                          "image is needed")
    if not isinstance(batch, int) or batch < 1 or not all(0 <= value <= 1 for value in strengths):
        raise ConfigError("strength must lie in [0, 1], and batch be a whole number from 1 on")
    for person in {id(person): person for person in persons}.values():
        if person.model is not model and person.model.fingerprint != model.fingerprint:
            raise CheckpointError("a Person was learned on another model than the one that should restore with it; "
                                  "load its model, or adapt again from the photos")
    return strengths


def passes(persons: Sequence[Person], strengths: Sequence[float], batch: int) -> Iterator[list[int]]:
    """Indices of the images that go through the network together: the generic model, or one spec and parameters of the
    same shapes (factors may be of lower rank than the spec says), people adjacent."""
    groups: dict[Any, dict[int, list[int]]] = {}
    for i, person in enumerate(persons):
        shape = None
        if strengths[i]:  # files give their tensors in any order
            shape = person.spec, *sorted((name, value.shape) for name, value in person.parameters.items())
        groups.setdefault(shape, {}).setdefault(id(person), []).append(i)
    for group in groups.values():
        indices = [i for own in group.values() for i in own]
        for first in range(0, len(indices), batch):
            yield indices[first:first + batch]


def people_of(persons: Sequence[Person]) -> list[Person]:
    """The people of a pass whose images lie person by person, each for the same number of them: somebody with k times
    as many images is there k times."""
    return list(persons[::math.gcd(*Counter(map(id, persons)).values())])

