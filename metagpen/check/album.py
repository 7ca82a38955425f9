"""An album before it is learned from: which photos serve, which do not and why, and who is on them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import recognise
from ..errors import PhotoError
from ..faces import FFHQ_LANDMARKS, Face, PhotoSource, crop_face, describe, detect_many, load_photo, to_tensor
from ..faces.photo import photo_list
from ..model import MetaGPEN
from . import measures
from .agree import Group, cosine_to_others, groups, is_divided, most_typical
from .limits import (
    ALIKE,
    COPY,
    FEWEST,
    MOST,
    STRANGER,
    Limit,
    alike,
    copy,
    detail_limits,
    face_limits,
    identity_limits,
    no_face,
    of_another_group,
    pose_limits,
    view_of,
)

Verdict = Literal["keep", "warn", "leave out"]
AT_A_TIME = 8  # photos in memory together
MOST_FACES = 12  # of a photo that are looked at, the largest
ENOUGH = 1024  # pixels of a face's side beyond which a copy is not better for having more


@dataclass(frozen=True, eq=False)  # arrays have no single answer to ==
class Seen:
    """One face of a photo. side: its crop's in photo pixels. view: the crop with measures.VIEW pixels."""

    face: Face
    limits: tuple[Limit, ...]
    side: float | None = None
    sharpness: float | None = None
    view: Image.Image | None = field(default=None, repr=False)
    embedding: Tensor | None = field(default=None, repr=False)
    face_print: np.ndarray | None = field(default=None, repr=False)

    @property
    def usable(self) -> bool:
        return not any(limit.stops for limit in self.limits)


@dataclass(frozen=True, eq=False)
class PhotoReport:
    """What is known about one photo of an album, seen at the face that the others agree with (else the largest).

    name: its path, or what to call it. limits: what it falls short of. found: how many faces were looked at,
    the MOST_FACES largest at most; chosen: which of them, the largest being 0. side: the face's native crop side in
    photo pixels. sharpness: see `measures.sharpness`. yaw, roll: degrees. cosine: to the unit mean of the album's other
    photos of the person, by the embedded recogniser; None when there is nothing to compare with. view: the aligned
    face, for looking at.
    """

    name: str
    source: PhotoSource = field(repr=False)
    limits: tuple[Limit, ...] = ()
    found: int = 0
    chosen: int = 0
    side: float | None = None
    sharpness: float | None = None
    yaw: float | None = None
    roll: float | None = None
    score: float | None = None
    cosine: float | None = None
    face: Face | None = field(default=None, repr=False)
    view: Image.Image | None = field(default=None, repr=False)
    embedding: Tensor | None = field(default=None, repr=False)

    @property
    def verdict(self) -> Verdict:
        if any(limit.stops for limit in self.limits):
            return "leave out"
        return "warn" if self.limits else "keep"

    @property
    def reasons(self) -> list[str]:
        return [limit.message for limit in self.limits]

    def learn_from(self, size: int) -> PhotoSource:
        """What to hand to `metagpen.adapt`: the photo, or where its largest face is another person's, the aligned crop
        [3, size, size] of the right one."""
        if self.chosen == 0 or self.face is None:
            return self.source
        return to_tensor(crop_face(load_photo(self.source), self.face.landmarks, size).image)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, for JSON."""
        numbers = {key: getattr(self, key) for key in ("side", "sharpness", "yaw", "roll", "score", "cosine")}
        return {"photo": self.name, "verdict": self.verdict, "faces": self.found, "chosen_face": self.chosen,
                **{key: None if value is None else round(value, 4) for key, value in numbers.items()},
                "reasons": [{"kind": limit.kind, "message": limit.message} for limit in self.limits]}


@dataclass(frozen=True)
class AlbumReport:
    """The photos in the order given, and advice for the album as a whole.

    people: on how many photos each person was found, the one the album is of first. divided: no person is on more than
    half of the photos, so that nobody can say whose album it is, and nobody is left out as a stranger.
    """

    photos: tuple[PhotoReport, ...]
    people: tuple[int, ...] = ()
    divided: bool = False
    advice: tuple[str, ...] = ()

    @property
    def usable(self) -> list[PhotoReport]:
        """The photos to learn from, in the order given."""
        return [photo for photo in self.photos if photo.verdict != "leave out"]

    @property
    def left_out(self) -> list[PhotoReport]:
        return [photo for photo in self.photos if photo.verdict == "leave out"]

    def best(self, count: int = MOST) -> list[PhotoReport]:
        """At most `count` usable photos, in the order given: those without a warning before those with one, and among
        equals those whose mean embedding comes closest to that of all usable photos."""
        usable = self.usable
        if len(usable) <= count:
            return usable
        embeddings = torch.stack([photo.embedding for photo in usable])
        clean = [i for i, photo in enumerate(usable) if photo.verdict == "keep"]
        if len(clean) >= count:
            chosen = [clean[i] for i in most_typical(embeddings[clean], count)]
        else:
            chosen = most_typical(embeddings, count, clean)
        return [usable[i] for i in sorted(chosen)]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, for JSON."""
        return {"photos": [photo.to_dict() for photo in self.photos], "usable": len(self.usable),
                "best": [photo.name for photo in self.best()], "people": list(self.people), "divided": self.divided,
                "advice": list(self.advice)}


def check_album(model: MetaGPEN, photos: Iterable[PhotoSource]) -> AlbumReport:
    """Look at photos that are meant to show one person, before learning from them. Nothing is raised for bad photos.

    model: what will learn from them; only its size matters. photos: anything that `metagpen.adapt` takes; tensors
    [3, S, S] of the model's size count as aligned crops. Faces are compared by the embedded recogniser, for which the
    thresholds of `metagpen.check.limits` hold. Raises PhotoError for a single photo in place of a list.
    """
    photos = photo_list(photos)
    recogniser = recognise.load(device=model.device)
    reports, faces = look(photos, model, recogniser)
    compared = [i for i, photo in enumerate(reports) if photo.verdict != "leave out"]
    people = groups([embeddings(faces[i]) for i in compared]) if compared else []
    divided = bool(people) and is_divided(people, len(compared))
    if people:
        reports = mark_strangers(reports, faces, compared, people[0], divided)
    found = tuple(map(len, people))
    report = AlbumReport(tuple(reports), found, divided)
    return replace(report, advice=tuple(advice(report, rival(faces, compared, people))))


def look(photos: Sequence[PhotoSource], model: MetaGPEN,
         recogniser: recognise.Recogniser) -> tuple[list[PhotoReport], list[list[Seen]]]:
    """Every photo's report at its largest usable face, and all its faces, the largest first."""
    reports, faces, prints = [], [], []
    waiting = iter(enumerate(photos, start=1))
    while chunk := list(islice(waiting, AT_A_TIME)):
        read = [read_photo(source, number) for number, source in chunk]
        images = [image for _, image in read if isinstance(image, Image.Image)]
        aligned = [is_aligned(source, model.size) for (_, source), (_, image) in zip(chunk, read)
                   if isinstance(image, Image.Image)]
        detected = find_faces(images, aligned, model.device)
        for (_, source), (name, image) in zip(chunk, read):
            own: list[Seen] = []
            if isinstance(image, Limit):
                report = PhotoReport(name, source, (image,))
            else:
                own = [see(image, face, model.size, recogniser) for face in next(detected)[:MOST_FACES]]
                report = at_face(PhotoReport(name, source, found=len(own)), own, first_usable(own))
            reports.append(report)
            faces.append(own)
            prints.append(None if isinstance(image, Limit) else measures.picture_print(image))
    return mark_copies(reports, prints, faces), faces


def read_photo(source: PhotoSource, number: int) -> tuple[str, Image.Image | Limit]:
    """(what to call the photo, the picture or why it cannot be read)."""
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"photo {number}"
    try:
        return name, load_photo(source)
    except PhotoError as error:
        return name, Limit("unreadable", str(error), stops=True)


def is_aligned(source: PhotoSource, size: int) -> bool:
    """Whether `metagpen.adapt` would take it for an aligned crop."""
    return isinstance(source, Tensor) and tuple(source.shape) == (3, size, size)


def find_faces(images: list[Image.Image], aligned: list[bool], device: torch.device) -> Iterator[list[Face]]:
    """The faces of each picture, the largest first; an aligned crop is one face."""
    found = iter(detect_many([image for image, crop in zip(images, aligned) if not crop], device))
    for image, crop in zip(images, aligned):
        box = np.array([0.0, 0.0, *image.size])
        yield [Face(box, FFHQ_LANDMARKS * image.size, 1.0)] if crop else next(found)


@torch.no_grad()
def see(photo: Image.Image, face: Face, size: int, recogniser: recognise.Recogniser) -> Seen:
    """One face, with everything that can be said without the other photos."""
    view = view_of(photo, face)
    limits = face_limits(photo, face, view)
    if any(limit.stops for limit in limits):
        return Seen(face, tuple(limits))
    crop = view if size == measures.VIEW else crop_face(photo, face.landmarks, size)
    marks = torch.from_numpy(view.landmarks).float()[None]
    embedding = recogniser.embed(to_tensor(view.image)[None].to(next(recogniser.parameters()).device), marks)[0].cpu()
    sharp = measures.sharpness(to_tensor(crop.image))
    limits += detail_limits(sharp, crop.source_side, size) + pose_limits(measures.yaw(face.landmarks))
    return Seen(face, tuple(limits), crop.source_side, sharp, view.image, embedding, measures.face_print(view.image))


def first_usable(faces: list[Seen]) -> int:
    return next((i for i, seen in enumerate(faces) if seen.usable), 0)


def at_face(report: PhotoReport, faces: list[Seen], chosen: int) -> PhotoReport:
    """The report with what belongs to one of the photo's faces."""
    if not faces:
        return replace(report, limits=(no_face(describe_briefly(report)),))
    seen = faces[chosen]
    points = seen.face.landmarks
    return replace(report, limits=seen.limits, chosen=chosen, side=seen.side, sharpness=seen.sharpness,
                   yaw=measures.yaw(points), roll=measures.roll(points), score=seen.face.score, face=seen.face,
                   view=seen.view, embedding=seen.embedding)


def describe_briefly(report: PhotoReport) -> str:
    return "it" if isinstance(report.source, (str, os.PathLike)) else describe(report.source)


def mark_copies(reports: list[PhotoReport], prints: list[np.ndarray | None],
                faces: list[list[Seen]]) -> list[PhotoReport]:
    """Leaves out all but the best of each photo's copies, and warns of photos that are nearly the same.

    prints: `measures.picture_print` of each photo that could be read.
    """
    marked = list(reports)
    short = tails([photo.name for photo in reports])
    kept: list[int] = []
    face_prints = [own[photo.chosen].face_print if own else None for own, photo in zip(faces, reports)]
    usable = [i for i, photo in enumerate(reports) if photo.verdict != "leave out"]
    for i in sorted(usable, key=lambda i: -detail(reports[i])):
        original = most_like(prints, i, kept)
        if original is not None and measures.likeness(prints[original], prints[i]) >= COPY:
            marked[i] = replace(reports[i], limits=(*reports[i].limits, copy(short[original])))
            continue
        original = most_like(face_prints, i, kept)
        if original is not None and measures.likeness(face_prints[original], face_prints[i]) >= ALIKE:
            marked[i] = replace(reports[i], limits=(*reports[i].limits, alike(short[original])))
        kept.append(i)
    return marked


def detail(report: PhotoReport) -> float:
    """Orders the copies of a photo: by their pixels, and less by sharpness, which compression fakes."""
    return min(report.side, ENOUGH) * report.sharpness**0.25


def most_like(prints: list[np.ndarray | None], one: int, among: list[int]) -> int | None:
    return max(among, key=lambda j: measures.likeness(prints[j], prints[one]), default=None)


def tails(names: Sequence[str]) -> list[str]:
    """Of each path the shortest end that no other path has: its file name, and as many folders as are needed."""
    parts = [Path(name).parts for name in names]
    owners: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for path in parts:
        for length in range(1, len(path) + 1):
            owners.setdefault(path[-length:], set()).add(path)
    lengths = [next((n for n in range(1, len(path)) if len(owners[path[-n:]]) == 1), len(path)) for path in parts]
    return [str(Path(*path[-length:])) if path else name for name, path, length in zip(names, parts, lengths)]


def usable_faces(faces: list[Seen]) -> list[int]:
    return [i for i, seen in enumerate(faces) if seen.usable]


def embeddings(faces: list[Seen]) -> Tensor:
    """Of the usable faces of a photo, [F, D]."""
    return torch.stack([faces[i].embedding for i in usable_faces(faces)])


def mark_strangers(reports: list[PhotoReport], faces: list[list[Seen]], compared: list[int], person: Group,
                   divided: bool) -> list[PhotoReport]:
    """Every compared photo at the face of the album's person, with its cosine to the others; strangers are left out."""
    marked = list(reports)
    stacks = [embeddings(faces[i]) for i in compared]
    for at, i in enumerate(compared):
        choice = person.faces.get(at)
        if choice is None:  # a stranger: the face that comes closest
            choice = max(range(len(stacks[at])), key=lambda k: cosine_to_others(stacks, person, at, k) or -1.0)
        cosine = cosine_to_others(stacks, person, at, choice)
        chosen = usable_faces(faces[i])[choice]
        photo = reports[i] if chosen == reports[i].chosen else at_face(reports[i], faces[i], chosen)
        photo = replace(photo, cosine=cosine)
        if cosine is not None:
            found = identity_limits(cosine)
            if at not in person.faces and not divided and cosine >= STRANGER:  # looks like both of two people
                found = [of_another_group(cosine)]
            photo = replace(photo, limits=(*photo.limits, *(
                replace(limit, stops=limit.stops and not divided) for limit in found)))
        marked[i] = photo
    return marked


def rival(faces: list[list[Seen]], compared: list[int], people: list[Group]) -> int:
    """On how many of the person's photos one other person is beside them."""
    if not people or len(people[0]) < 2:
        return 0
    beside = []
    for at, face in people[0].faces.items():
        stack = embeddings(faces[compared[at]])
        if len(stack) > 1:
            beside.append(torch.cat([stack[:face], stack[face + 1:]]))
    return len(groups(beside)[0]) if beside else 0


def advice(report: AlbumReport, beside: int) -> Iterator[str]:
    """What to tell about the album as a whole."""
    count = len(report.usable)
    if report.divided:
        most = report.people[0]
        yield (f"these photos show {len(report.people)} different people, nobody on more than {most} of "
               f"{sum(report.people)}: it cannot be told whose album it is; give the photos of one person (for many "
               "people make a folder for each and take `metagpen adapt-many`)")
    elif count == 0:
        yield "no photo is usable: take new ones, sharp, upright and with the whole face"
    elif count == 1:
        yield (f"one usable photo: nothing to compare it with, so make sure who it is; {FEWEST} to {MOST} photos are "
               "better")
    elif count < FEWEST:
        yield f"{count} usable photos: they serve, but {FEWEST} to {MOST} know a person better"
    elif count > MOST:
        yield (f"{count} usable photos: all serve; {MOST} of them do nearly as well: `metagpen adapt --best {MOST}` "
               "learns from those, in Python `report.best()` names them")
    if report.people and beside == report.people[0]:
        yield (f"a second person is on {beside} photos too; the one with the larger faces is taken: cut the photos if "
               "the other one is meant")
