"""Who an album shows: in every photo the face that most of the others agree with.

Faces are unit embeddings; a photo is the stack [F, D] of those found on it, the largest first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..person.start import mean_identity
from .limits import STRANGER, TWO_PEOPLE

ROUNDS = 5  # of matching against the mean; albums settle after two or three


@dataclass(frozen=True)
class Group:
    """Photos that show one person: index of the photo -> index of the face on it."""

    faces: dict[int, int]

    def __len__(self) -> int:
        return len(self.faces)


def groups(photos: Sequence[Tensor]) -> list[Group]:
    """The people of an album, the one on most photos first; every photo is in exactly one group, by one of its faces.

    Of people on equally many photos the one with the larger faces comes first.
    """
    left, found = set(range(len(photos))), []
    while left:
        found.append(largest_group(photos, sorted(left)))
        left -= found[-1].faces.keys()
    return sorted(found, key=len, reverse=True)  # one that was divided may have become smaller than those after it


def is_divided(people: Sequence[Group], photos: int) -> bool:
    """Whether nobody is on more than half of so many photos; one photo alone is nobody else's."""
    return photos > 1 and 2 * len(people[0]) <= photos


def largest_group(photos: Sequence[Tensor], among: Sequence[int]) -> Group:
    """The most photos among some that agree on one face each: seeded by the best single face, settled by the mean.

    Two people with as many photos each both resemble the mean of all, so what has settled is divided while it shows
    two people, and the larger half settles again without the faces of the other.
    """
    members, others = settled(photos, among, seed(photos, among)), set()
    while halves := two_people(photos, members):
        members = halves[0]
        others |= halves[1].items()
        members = settled(photos, among, members, others)
    return Group(members)


def seed(photos: Sequence[Tensor], among: Sequence[int]) -> dict[int, int]:
    """Photo -> face, for those that agree with the single face that most photos agree with."""
    faces = torch.cat([photos[i] for i in among])
    owner = torch.cat([torch.full((len(photos[i]),), i) for i in among])
    rank = torch.cat([torch.arange(len(photos[i])) for i in among])
    best: tuple[tuple[int, float, float], dict[int, int]] | None = None
    for anchor, cosines in enumerate(faces @ faces.T):
        members = closest(cosines, owner, rank)
        members[int(owner[anchor])] = int(rank[anchor])
        worth = (len(members), -sum(members.values()), float(cosines[cosines >= STRANGER].sum()))
        if best is None or worth > best[0]:
            best = worth, members
    return best[1]


def settled(photos: Sequence[Tensor], among: Sequence[int], members: dict[int, int],
            others: Collection[tuple[int, int]] = ()) -> dict[int, int]:
    """Photo -> face, for those among some that agree with the mean of the members on other photos, until that is so.

    others: (photo, face) of somebody else, which are not taken.
    """
    for _ in range(ROUNDS):
        found: dict[int, int] = {}
        for i in among:
            rest = [photos[j][face] for j, face in members.items() if j != i]
            if rest:
                cosines = photos[i] @ mean_identity(torch.stack(rest))
                cosines[[face for at, face in others if at == i]] = -1.0
                if cosines.max() >= STRANGER:
                    found[i] = int(cosines.argmax())
        if len(found) < 2 or found == members:
            break
        members = found
    return members


def two_people(photos: Sequence[Tensor], members: dict[int, int]) -> tuple[dict[int, int], dict[int, int]] | None:
    """The members as two people, the one on more photos (or else with larger faces) first; None for one person."""
    at = sorted(members)
    if len(at) < 4:  # two photos of each are the fewest that tell how alike photos of one person are
        return None
    faces = torch.stack([photos[i][members[i]] for i in at])
    side = halves(faces)
    if min(int(side.sum()), int((~side).sum())) < 2 or likeness_of_halves(faces[side], faces[~side]) >= TWO_PEOPLE:
        return None
    both = [{i: members[i] for i, here in zip(at, half.tolist()) if here} for half in (side, ~side)]
    larger, other = sorted(both, key=lambda half: (-len(half), sum(half.values()), min(half)))
    return larger, other


def halves(faces: Tensor) -> Tensor:
    """Which of unit embeddings [N, D] belong to the first of two clusters: spherical 2-means, begun where they spread
    most widely. Booleans [N]."""
    spread = faces - faces.mean(dim=0)
    side = spread @ torch.linalg.svd(spread, full_matrices=False).Vh[0] > 0
    for _ in range(ROUNDS):
        if side.all() or not side.any():
            break
        nearer = faces @ mean_identity(faces[side]) > faces @ mean_identity(faces[~side])
        if torch.equal(nearer, side):
            break
        side = nearer
    return side


def likeness_of_halves(one: Tensor, other: Tensor) -> float:
    """Mean cosine between two sets of unit embeddings [N, D] and [M, D], over that inside them: near 1 for photos of
    one person however they are divided and however unlike each other they are, near 0 for two people."""
    inside = [max(mean_pair(part), STRANGER) for part in (one, other)]
    return float((one @ other.T).mean()) / math.sqrt(inside[0] * inside[1])


def mean_pair(faces: Tensor) -> float:
    """Mean cosine of two different ones of unit embeddings [N, D], N at least 2."""
    count = len(faces)
    return float((faces @ faces.T).sum() - count) / (count * (count - 1))


def closest(cosines: Tensor, owner: Tensor, rank: Tensor) -> dict[int, int]:
    """Photo -> its face with the highest cosine, for photos that have one which is no stranger's."""
    members: dict[int, int] = {}
    for at in torch.argsort(cosines).tolist():  # the highest comes last and stays
        if cosines[at] >= STRANGER:
            members[int(owner[at])] = int(rank[at])
    return members


def cosine_to_others(photos: Sequence[Tensor], group: Group, photo: int, face: int) -> float | None:
    """Of one face to the mean of the group's faces on other photos; None without any."""
    others = [photos[i][at] for i, at in group.faces.items() if i != photo]
    return float(photos[photo][face] @ mean_identity(torch.stack(others))) if others else None


def most_typical(embeddings: Tensor, count: int, ready: Sequence[int] = ()) -> list[int]:
    """Indices of `count` of unit embeddings [N, D] whose mean comes closest to the mean of all, greedily.

    ready: indices that are taken first. Measured: such a choice knows a person better than a random one.
    """
    whole, chosen = mean_identity(embeddings), list(ready)[:count]
    while len(chosen) < min(count, len(embeddings)):
        rest = [i for i in range(len(embeddings)) if i not in chosen]
        total = embeddings[chosen].sum(dim=0) if chosen else torch.zeros_like(whole)
        means = torch.nn.functional.normalize(total + embeddings[rest], dim=1)
        chosen.append(rest[int((means @ whole).argmax())])
    return chosen
