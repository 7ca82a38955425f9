"""Episodes: one person's photos divided into support (to adapt to) and query (to be judged on)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from ..errors import DataError
from .people import People, Photo


@dataclass(frozen=True)
class Episode:
    """One few-shot task: support and query are photos of the same person and share none (but see `self_episode`)."""

    person: str
    support: list[Photo]
    query: list[Photo]


def episode(people: People, shots: int, queries: int, generator: torch.Generator) -> Episode:
    """Draws a person, then `shots` support and `queries` query photos of theirs, uniformly.

    Only people with at least shots + queries photos can be drawn. The draw depends on nothing but the
    generator. Raises DataError when nobody has enough photos.
    """
    _check_counts(shots, queries)
    names = [name for name, photos in people.items() if len(photos) >= shots + queries]
    if not names:
        most = max(map(len, people.values()), default=0)
        raise DataError(f"nobody in {people} has the {shots + queries} photos that {shots} shots and "
                        f"{queries} queries need (the most is {most}); add photos or lower the numbers")
    person = names[int(torch.randint(len(names), (), generator=generator))]
    photos = people[person]
    order = torch.randperm(len(photos), generator=generator)[:shots + queries].tolist()
    drawn = [photos[i] for i in order]
    return Episode(person, drawn[:shots], drawn[shots:])


def self_episode(people: People, generator: torch.Generator) -> Episode:
    """Draws one photo that is support and query at once: an episode of a person with a single photo (FFHQ).

    For training only, where support and query are degraded independently: it teaches to carry detail over, not to
    recognise a person in another photo, and a judgement by it would reward copying. People are drawn uniformly,
    whatever their number of photos. Raises DataError when there is nobody.
    """
    if not people:
        raise DataError(f"{people} is empty; nobody can be drawn")
    names = list(people)
    person = names[int(torch.randint(len(names), (), generator=generator))]
    photos = people[person]
    photo = photos[int(torch.randint(len(photos), (), generator=generator))]
    return Episode(person, [photo], [photo])


def fixed_episode(people: People, person: str, shots: int, seed: int = 0, largest: int = 8,
                  queries: int | None = None) -> Episode:
    """The episode of `person` for evaluation, the same on every machine.

    The person's photos are put in an order that depends on seed, person and file names only. The support is
    the first `shots` of it, so supports are nested: one shot is part of two, two of four. The query is
    every photo after the first `largest` (the first `queries` of those), so it is the same for every number
    of shots.

    Raises DataError when shots exceeds `largest`, the person is unknown, or has too few photos for it.
    """
    _check_counts(shots, 1 if queries is None else queries)
    if shots > largest:
        raise DataError(f"{shots} shots exceed the largest support of {largest}; "
                        "raise `largest` for every episode of the comparison")
    photos = sorted(people.select([person])[person], key=lambda photo: _rank(seed, person, photo))
    needed = largest + (1 if queries is None else queries)
    if len(photos) < needed:
        raise DataError(f"'{person}' has {len(photos)} photos; a largest support of {largest} and its queries "
                        f"need {needed}; lower `largest` or leave the person out (People.min_photos)")
    last = len(photos) if queries is None else needed
    return Episode(person, photos[:shots], photos[largest:last])


def _rank(seed: int, person: str, photo: Photo) -> str:
    # A hash orders the same on every torch version, and adding a photo leaves the order of the others as it was.
    return hashlib.sha256(f"{seed}/{person}/{photo.path.name}".encode()).hexdigest()


def _check_counts(shots: int, queries: int) -> None:
    if shots < 1 or queries < 1:
        raise DataError(f"an episode needs at least one shot and one query, not {shots} and {queries}")
