"""What one person is measured on: support, queries, their damage, and who lends photos in the wrong-person control.

Everything is fixed by a seed, the person's name and the files' names: no batch size, order, number of people or
machine can change an input; only who lends photos to whom depends on who is there.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metagpen import faces
from metagpen.errors import DataError
from metagpen.identities import Episode, People, Photo, fixed_episode

Degrade = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Task:
    """One person's photos: support [K, 3, S, S]; queries [Q, 3, S, S] with landmarks [Q, 5, 2] and file names."""

    person: str
    support: Tensor
    queries: Tensor
    landmarks: Tensor
    names: tuple[str, ...]


def seed_of(*parts: Any) -> int:
    """A 63-bit seed from any printable parts, the same on every machine and in every Python (a CPU's generator reads 32
    of the bits)."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def draws_of(person: str, seed: int) -> int:
    """The seed of the draws (photos, flips, degradations) with which a person is learned. Everybody has their own: the
    luck of one would be everybody's, and no interval over people would show it."""
    return seed_of(seed, "draws", person)


def generator_of(*parts: Any) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*parts))


def derangement(names: Sequence[str], seed: int = 0) -> dict[str, str]:
    """Who lends photos to whom in the wrong-person control: one cycle through all people, so nobody keeps their own."""
    if len(names) < 2:
        raise DataError("the wrong-person control needs at least two people")
    names = sorted(names)
    order = [names[i] for i in torch.randperm(len(names), generator=generator_of(seed, "wrong")).tolist()]
    return dict(zip(order, order[1:] + order[:1]))


def load_crop(photo: Photo, size: int, aligned: bool = False) -> tuple[Tensor, Tensor]:
    """An aligned crop [3, size, size] in [-1, 1] (antialiased bicubic) and its landmarks [5, 2].

    A photo that comes with landmarks is an aligned crop already; any other is detected and aligned first, or, aligned
    saying that all are, has FFHQ's mean landmarks.
    """
    if photo.landmarks is None and not aligned:
        face = faces.single_face(photo.path, size)
        return faces.to_tensor(face.image), torch.as_tensor(face.landmarks, dtype=torch.float32)
    image = photo.load()
    if image.width != image.height:
        why = "it counts as an aligned crop, which" if photo.landmarks is None else "a photo with listed landmarks"
        raise DataError(f"{photo.path}: {image.width} x {image.height}; {why} must be square")
    crop = faces.to_tensor(image)[None]
    if image.width != size:
        crop = F.interpolate(crop, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    if photo.landmarks is None:
        return crop[0], torch.as_tensor(faces.FFHQ_LANDMARKS * size, dtype=torch.float32)
    return crop[0], torch.as_tensor(photo.landmarks, dtype=torch.float32).reshape(5, 2) * (size / image.width)


def draw(
    people: People,
    person: str,
    shots: int,
    size: int,
    seed: int = 0,
    max_queries: int | None = None,
    min_queries: int = 2,
) -> Episode:
    """`shots` support photos in a fixed order, of which fewer shots take the first; the sharp others are queries.

    A query's native crop must have been at least `size` px wide before it was resized, or its truth is no truth;
    photos of unknown native size are trusted. Raises DataError when fewer than `min_queries` are left.
    """
    episode = fixed_episode(people, person, shots, seed, largest=shots)
    sharp = [photo for photo in episode.query if photo.source_side is None or photo.source_side >= size]
    if len(sharp) < min_queries:
        wanted = "two sharp queries are" if min_queries == 2 else f"{min_queries} sharp query photos are"
        raise DataError(
            f"person '{person}': besides {shots} support photos only {len(sharp)} of at least {size} px width; "
            f"{wanted} needed"
        )
    return Episode(person, episode.support, sharp[:max_queries])


def measurable(people: People, shots: int, size: int, seeds: Sequence[int] = (0,), max_queries: int | None = None,
               min_queries: int = 2) -> People:
    """Those who have photos enough for `shots` and the queries under every seed (see `draw`)."""
    def enough(person: str) -> bool:
        try:
            for seed in seeds:
                draw(people, person, shots, size, seed, max_queries, min_queries)
        except DataError:
            return False
        return True

    kept = [person for person in people if enough(person)]
    if kept and (lost := sorted(set(people) - set(kept))):
        some = ", ".join(lost[:8]) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
        warnings.warn(f"{len(kept)} of {len(people)} people can be measured; left out, for too few photos of {size} px "
                      f"or more: {some}", stacklevel=2)
    return people.select(kept)


def apart(episode: Episode) -> Episode:
    """Itself. Raises DataError when a query is, byte for byte, also a support photo."""
    support = {photo.sha256: photo.path for photo in episode.support}
    for photo in episode.query:
        if photo.sha256 in support:
            raise DataError(f"{photo.path}: the same photo as {support[photo.sha256]}, a support photo; remove one")
    return episode


def load_support(people: People, person: str, shots: int, size: int, seed: int = 0) -> Tensor:
    """The support crops [shots, 3, size, size] of a person."""
    episode = fixed_episode(people, person, shots, seed, largest=shots)
    return load_photos(episode.support, size)


def load_photos(photos: Sequence[Photo], size: int, aligned: bool = False) -> Tensor:
    """Their crops [N, 3, size, size]."""
    return torch.stack([load_crop(photo, size, aligned)[0] for photo in photos])


def load_task(
    people: People,
    person: str,
    shots: int,
    size: int,
    seed: int = 0,
    max_queries: int | None = None,
    min_queries: int = 2,
    aligned: bool = False,
) -> Task:
    """Support and queries of a person at the model's size; aligned: see `load_crop`. Raises DataError for a photo that
    is both, byte for byte."""
    episode = apart(draw(people, person, shots, size, seed, max_queries, min_queries))
    crops, landmarks = zip(*(load_crop(photo, size, aligned) for photo in episode.query))
    support = load_photos(episode.support, size, aligned)
    names = tuple(photo.path.name for photo in episode.query)
    return Task(person, support, torch.stack(crops), torch.stack(landmarks), names)


def damage(task: Task, name: str, degrade: Degrade, seed: int = 0) -> Tensor:
    """The degraded queries [Q, 3, S, S]; each photo has its own generator. Smaller results are resized back."""
    degraded = [
        degrade(query[None], generator_of(seed, "query", name, task.person, file))
        for query, file in zip(task.queries, task.names)
    ]
    size = task.queries.shape[-2:]
    return torch.cat(
        [x if x.shape[-2:] == size else F.interpolate(x, size, mode="bicubic").clamp(-1, 1) for x in degraded]
    )
