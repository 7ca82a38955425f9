"""Who an album shows: in every photo the face that most of the others agree with.

Faces are unit embeddings; a photo is the stack [F, D] of those found on it, the largest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..person.start import mean_identity
from .limits import STRANGER

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
    return found


def largest_group(photos: Sequence[Tensor], among: Sequence[int]) -> Group:
    """The most photos among some that agree on one face each: seeded by the best single face, settled by the mean."""
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
    members = best[1]
    for _ in range(ROUNDS):
        settled: dict[int, int] = {}
        for i in among:
            others = [photos[j][face] for j, face in members.items() if j != i]
            if others:
                cosines = photos[i] @ mean_identity(torch.stack(others))
                if cosines.max() >= STRANGER:
                    settled[i] = int(cosines.argmax())
        if len(settled) < 2 or settled == members:
            break
        members = settled
    return Group(members)


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
