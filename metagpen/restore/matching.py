"""Who is who: the faces of a photo against the templates of known Persons."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from .. import recognise
from ..errors import CheckpointError, DataError, PersonNotFound
from ..model import MetaGPEN
from ..person import Person
from ..recognise.recogniser import must_be_recogniser
from ..tensors import some

SAME_PERSON = 0.35
"""Cosine to a template from which a face counts as that person's, for the embedded recogniser. Of the pairs of
strangers in benchmarks/results/matching.json less than 2 % reach it on clear studio portraits, which look most alike,
and less than 1 % elsewhere; heavily degraded faces come nowhere near it, whoever they are."""


LEGIBLE = 0.75
"""Severity (`person.start.Gate.severity`) from which a face no longer says whose it is. In the same file nearly all
heavily degraded faces, which the recogniser puts as near to strangers, lie above it; few moderately degraded ones do,
and no clear photo."""


class FaceWarning(UserWarning):
    """Something about the faces of one photo that its owner should look at."""


class Gallery:
    """Known Persons by name, and the templates by which their faces are told: read once, for any number of photos.

    persons: {name: Person}, a PersonStore too: only the templates stay in memory. recogniser: default the one that the
    model's card names. Persons without a template of that recogniser (files of earlier versions) cannot be told from
    others and are left out with a warning, and so are those of a store whose files cannot be read; only as the only
    Person given do they need none. Raises CheckpointError where several are given and nobody has one, or can be read.
    """

    def __init__(self, persons: Mapping[str, Person], model: MetaGPEN, recogniser: recognise.Recogniser | None = None):
        must_be_recogniser(recogniser)
        self.persons, self.model = persons, model
        found, damaged = templates_of(persons)
        self.only = found[0][0] if len(found) == 1 and not damaged else None
        if recogniser is None and any(template is not None for _, template, _ in found):
            recogniser = recognise.load(model.card.get("recogniser", "embedded"), device=str(model.device))
        self.recogniser = None if recogniser is None else recogniser.to(model.device)
        known = [(name, template) for name, template, by in found if template is not None and recogniser is not None
                 and (by, len(template)) == (recogniser.name, recogniser.dim)]
        self.names = [name for name, _ in known]
        self.templates = normalize(torch.stack([template for _, template in known]), dim=1) if known else None
        without = sorted({name for name, _, _ in found} - set(self.names))
        if without and self.only is None:
            who = some(without, 3)
            if not known:
                raise CheckpointError(f"{who}: no template in these Person files, so nobody can be told from the "
                                      "others; adapt again from the photos, or restore with one Person at a time")
            warnings.warn(f"{who}: no template of this recogniser, so never matched; adapt again from the photos",
                          FaceWarning, stacklevel=2)

    @classmethod
    def of(cls, persons: Persons, model: MetaGPEN, recogniser: recognise.Recogniser | None = None) -> Gallery:
        """A gallery of whatever holds Persons; a lone one is called "person", those of a list "person 1" and so on."""
        if isinstance(persons, Gallery):
            return persons
        if isinstance(persons, Person):
            persons = {} if persons.metadata.get("shots") == 0 else {"person": persons}  # `Person.generic` is nobody
        elif persons is None:
            persons = {}
        elif isinstance(persons, (str, bytes)) or hasattr(persons, "__fspath__"):
            raise DataError(f"persons: '{persons}' is no Person; read a file with metagpen.Person.load(file, model)")
        elif not isinstance(persons, Mapping):
            persons = {f"person {i}": person for i, person in enumerate(persons, start=1)}
        if not all(isinstance(name, str) for name in persons):
            raise DataError("persons must be a Person, a list of them, or a mapping {name: Person}")
        return cls(persons, model, recogniser)

    @torch.no_grad()
    def cosines(self, crops: Tensor, generic: Tensor, landmarks: Tensor) -> Tensor:
        """Faces against templates [F, N], by the better of two looks: at the photo, and at its generic restoration.

        crops, generic: [F, 3, S, S] in [-1, 1]; landmarks: [F, 5, 2] in their pixels.
        """
        looks = [self.recogniser.embed(part.to(self.model.device), landmarks.to(self.model.device)).cpu()
                 for part in (crops, generic)]
        return torch.maximum(*(look @ self.templates.cpu().T for look in looks))

    @torch.no_grad()
    def legible(self, crops: Tensor) -> list[bool]:
        """Whether faces [F, 3, S, S] still say whose they are, as the gate judges; without one all do."""
        if self.model.start is None:
            return [True] * len(crops)
        return (self.model.start.gate.severity(crops.to(self.model.device, self.model.dtype)) < LEGIBLE).tolist()


def templates_of(persons: Mapping[str, Person]) -> tuple[list[tuple[str, Tensor | None, str | None]], list[str]]:
    """(name, template, its recogniser's name) of everybody who can be read, and who else is there, of whom it warns.

    Raises CheckpointError where nobody can be read, DataError for what is no Person.
    """
    found, damaged = [], {}
    for name in persons:
        try:
            person = persons[name]
        except PersonNotFound:  # deleted by another process since the store was listed
            continue
        except CheckpointError as error:
            damaged[name] = error
            continue
        if not isinstance(person, Person):
            raise DataError(f"persons: {name} is no Person; read files with metagpen.Person.load(file, model)")
        found.append((name, person.template, person.metadata.get("recogniser")))
    if damaged:
        first = next(iter(damaged.values()))
        if not found:
            raise first
        warnings.warn(f"{some(list(damaged), 3)}: left out; {first}", FaceWarning, stacklevel=3)
    return found, list(damaged)


Persons = Gallery | Person | Mapping[str, Person] | Sequence[Person] | None


def too_far(cosine: float) -> bool:
    """Whether a face is too far from a template to be taken for that person's; says nothing of illegible faces."""
    return cosine < SAME_PERSON


def assign(cosines: Tensor, once: bool = True) -> list[int | None]:
    """The person of every face, None for strangers: cosines [F, N] -> F column numbers.

    Nobody who is too far. once: a person is in a photo once at most, and the faces share the people so that the sum
    of cosines above the threshold is largest; else every face takes who is nearest.
    """
    result: list[int | None] = [None] * len(cosines)
    if not cosines.numel():
        return result
    excess = (cosines - SAME_PERSON).double().clamp(min=-1)
    if not once:
        return [int(row.argmax()) if row.max() >= 0 else None for row in excess]
    columns = (excess >= 0).any(dim=0).nonzero()[:, 0]  # of thousands of people a few come into question
    worth = torch.where(excess[:, columns] >= 0, excess[:, columns] + 1e-9, 0.0)
    for face, column in zip(*linear_sum_assignment(worth.numpy(), maximize=True), strict=True):
        if worth[face, column] > 0:
            result[face] = int(columns[column])
    return result
