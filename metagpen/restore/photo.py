"""A whole photo, or the crop of one face: find, match, restore, paste back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError, PhotoError
from ..faces import (
    AlignedFace,
    Face,
    PhotoSource,
    describe,
    detect,
    load_with_extras,
    single_face,
    to_pil,
    to_tensor,
    with_extras,
)
from ..faces.detect import MIN_SCORE, usable_face
from ..faces.landmarks import landmarks_in, refine
from ..person import Person, restore_many
from ..person.person import must_be_strength
from .matching import SAME_PERSON, FaceWarning, Gallery, Persons, assign, too_far
from .null_space import null_space as join
from .paste import Background, agree_in_colour, paste_faces

if TYPE_CHECKING:
    from ..model import MetaGPEN
    from ..recognise import Recogniser

SMALLEST_FACE = 12.0  # side of the crop in photo pixels; restoring may start from far less than learning needs
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FARTHEST = 1e6  # pixels; a box beyond is a slip

Box = Sequence[float]  # x0, y0, x1, y1 in photo pixels


@dataclass(frozen=True, eq=False)  # arrays have no single answer to ==
class FoundFace:
    """A face of a photo and what was done with it.

    box: [4] x0, y0, x1, y1 in photo pixels, upright. person: the name of the Person it was restored with, None for
    the generic model. cosine: to that Person's template, or of a stranger to the nearest one; None without templates.
    strength: 0 for the generic model. legible: False where it is too degraded to tell whose face it is. unsure: the
    detector is, which found it in a blurred photo alone. left_alone: why it was not restored, "" if it was.
    """

    box: np.ndarray
    person: str | None = None
    cosine: float | None = None
    strength: float = 0.0
    legible: bool = True
    left_alone: str = ""
    unsure: bool = False

    def __str__(self) -> str:
        return self.what() + (" (perhaps no face)" if self.unsure else "")

    def what(self) -> str:
        """Whose face it is, or why it was left alone."""
        if self.left_alone:
            return f"left alone ({self.left_alone})"
        cosine = "" if self.cosine is None else f" {self.cosine:.2f}"
        if self.person is None:
            known = "stranger" if self.legible else "stranger, or too degraded to tell"
            return known + (f" (nearest{cosine})" if cosine else "")
        unsure = self.cosine is not None and too_far(self.cosine) and not self.legible
        return f"{self.person}{cosine}" + (" (too degraded to tell, or somebody else)" if unsure else "")


@dataclass(frozen=True, eq=False)
class RestoredPhoto:
    """The restored photo and its faces, the largest first, or as the boxes were given."""

    image: Image.Image
    faces: list[FoundFace]


def restore_photo(model: MetaGPEN, photo: PhotoSource, persons: Persons = None, *, strength: float = 1.0,
                  null_space: bool = False, aligned: bool = False, boxes: Sequence[Box] = (),
                  background: Background | None = None, once: bool = True,
                  recogniser: Recogniser | None = None) -> RestoredPhoto:
    """Restore every face of a photo, each with its own Person, strangers with the generic model.

    photo: path, PIL image, array or tensor. persons: a Person, several, {name: Person}, a PersonStore, or, for many
    photos, a `Gallery` made once. One Person and one face belong together; otherwise faces are matched by
    `recogniser`, default that of the model's card. strength: 0 the generic model ... 1 fully personal. null_space:
    persons change only what the photo leaves open. aligned: the photo is the square crop of one face. boxes: where the
    faces are that are to be restored, in place of looking for them: each x0, y0, x1, y1 in pixels of the upright photo,
    from ear to ear and from the hairline to the chin, of heads that tilt by less than 30 degrees. background: any
    callable from photo to photo, of which the faces' surroundings are taken. once: nobody is in a photo twice.

    The image has the photo's size (an aligned crop: S x S; with `background`: what that returns), is upright, and keeps
    transparency, EXIF, ICC profile and greyness. Raises PhotoError when no face can be restored, ConfigError for a
    strength outside [0, 1] or an impossible box. Warns with FaceWarning of a face that is too far from the only Person
    given.
    """
    strength = must_be_strength(strength)
    gallery = Gallery.of(persons, model, recogniser)
    picture, extras = load_with_extras(photo)
    name = describe(photo)
    cuts = cut_faces(picture, model, name, aligned, boxes)
    batch = FaceBatch(model, cuts, gallery, name, once)
    restored = batch.restore(strength, null_space)
    if aligned:
        image = to_pil(restored[0])
    else:
        agreed = agree_in_colour(restored, batch.crops)
        image = paste_faces(picture, batch.faces, [to_pil(face) for face in agreed], background)
    found = iter(batch.found(strength))
    return RestoredPhoto(with_extras(image, extras),
                         [cut.left if cut.face is None else next(found) for cut in cuts])


def sweep(model: MetaGPEN, photo: PhotoSource, persons: Persons, strengths: Sequence[float] = STRENGTHS, *,
          null_space: bool = False, aligned: bool = False, boxes: Sequence[Box] = (), once: bool = True,
          recogniser: Recogniser | None = None) -> list[list[tuple[str, Image.Image]]]:
    """Each matched face as it came and at several strengths: labelled S x S crops, a line per face, for
    `metagpen.evaluate.report.contact_sheet`. Raises PhotoError when no face belongs to a Person."""
    gallery = Gallery.of(persons, model, recogniser)
    picture, _ = load_with_extras(photo)
    name = describe(photo)
    batch = FaceBatch(model, cut_faces(picture, model, name, aligned, boxes), gallery, name, once)
    columns = [batch.restore(strength, null_space) for strength in strengths]
    lines = [[(f"{who}: input", to_pil(batch.crops[i])),
              *((f"strength {strength:g}", to_pil(column[i])) for strength, column in zip(strengths, columns))]
             for i, who in enumerate(batch.who) if who is not None]
    if not lines:
        raise PhotoError(f"{name}: no face in it belongs to a Person, so there is no strength to vary")
    return lines


@dataclass(frozen=True, eq=False)
class Cut:
    """A face of a photo: cut out, or with the reason why not."""

    box: np.ndarray
    face: AlignedFace | None = None
    reason: str = ""
    unsure: bool = False

    @property
    def left(self) -> FoundFace:
        return FoundFace(self.box, left_alone=self.reason, unsure=self.unsure)


def cut_faces(picture: Image.Image, model: MetaGPEN, name: str, aligned: bool = False,
              boxes: Sequence[Box] = ()) -> list[Cut]:
    """The faces of a photo, largest first, or those in the boxes, as given. Raises PhotoError, naming it, when there is
    none that can be restored, ConfigError for boxes that are none."""
    if aligned:
        if len(boxes):
            raise ConfigError("aligned and boxes: the photo is the crop of one face, or has faces in it; give one")
        if picture.width != picture.height:
            raise PhotoError(f"{name} is {picture.width}x{picture.height}; an aligned crop must be square")
        face = single_face(picture, model.size, aligned=True)
        return [Cut(np.array([0, 0, *picture.size], dtype=float), face)]
    cuts = []
    for face in faces_in(boxes, picture) if len(boxes) else detect(picture, model.device, degraded=True):
        unsure = face.score < MIN_SCORE
        try:
            better = refine(picture, face.landmarks, model.device)
            cuts.append(Cut(face.box, usable_face(picture, better, model.size, SMALLEST_FACE), unsure=unsure))
        except PhotoError as error:
            cuts.append(Cut(face.box, reason=str(error), unsure=unsure))
    if not cuts:
        raise PhotoError(f"{name} shows no face that can be found; turn it upright, or say where the face is (--face, "
                         "boxes=)")
    if not any(cut.face for cut in cuts):
        raise PhotoError(f"{name} shows no face that can be restored: " + "; ".join(cut.reason for cut in cuts))
    return cuts


def faces_in(boxes: Sequence[Box], picture: Image.Image) -> list[Face]:
    """The faces that are said to be there, with the mean landmarks. Raises ConfigError for a box that is none."""
    found = []
    for box in boxes:
        try:
            corners = np.array(box, dtype=float)
        except (TypeError, ValueError):
            corners = np.array([])
        if corners.shape != (4,) or not (np.abs(corners) < FARTHEST).all() or not (corners[:2] < corners[2:]).all():
            several = "; boxes are a list of such" if corners.ndim == 0 else ""
            raise ConfigError(f"box {box}: four numbers x0, y0, x1, y1 with x0 < x1 and y0 < y1 are wanted{several}")
        if (corners[:2] >= picture.size).any() or (corners[2:] <= 0).any():
            raise ConfigError(f"box {box}: lies outside the photo, which is {picture.width}x{picture.height}")
        found.append(Face(corners, landmarks_in(corners), 1.0))
    return found


class FaceBatch:
    """The faces of a photo together: who they are, and their restorations.

    crops: [F, 3, S, S] in [-1, 1]. who: the name of each face's Person or None.
    """

    def __init__(self, model: MetaGPEN, cuts: Sequence[Cut], gallery: Gallery, name: str, once: bool):
        self.model, self.gallery = model, gallery
        self.boxes, self.faces, self.unsure = zip(
            *((cut.box, cut.face, cut.unsure) for cut in cuts if cut.face is not None))
        self.crops = torch.stack([to_tensor(face.image) for face in self.faces])
        nobody = [Person.generic(model)] * len(self.crops)
        self.generic = restore_many(model, nobody, self.crops, 0.0).float().cpu()
        self.legible = gallery.legible(self.crops)
        self.who, self.cosine = self.match(name, once)

    def match(self, name: str, once: bool) -> tuple[list[str | None], list[float | None]]:
        """The Person of each face, and its cosine to it, or to the nearest one."""
        gallery, count = self.gallery, len(self.crops)
        if gallery.templates is None:
            return self.without_templates(name)
        landmarks = torch.from_numpy(np.stack([face.landmarks for face in self.faces])).float()
        cosines = gallery.cosines(self.crops, self.generic, landmarks)
        chosen = assign(cosines, once)
        if gallery.only is not None and count == 1:
            chosen = [0]
        shown = [float(row.max() if column is None else row[column]) for row, column in zip(cosines, chosen)]
        if gallery.only is not None and too_far(max(shown)) and (count > 1 or self.legible[0]):
            said = (f"{name}: cosine {max(shown):.2f} to '{gallery.only}', and {SAME_PERSON} is the least that counts "
                    "as them")
            used = "the face is restored as theirs, as asked" if count == 1 else (
                f"all {count} faces are restored with the generic model; say which one is theirs (--face, boxes=)")
            warnings.warn(f"{said}; {used}", FaceWarning, stacklevel=4)
        return [None if column is None else gallery.names[column] for column in chosen], shown

    def without_templates(self, name: str) -> tuple[list[str | None], list[float | None]]:
        """Nobody is known, or one Person of whom no template is: the largest face then counts as theirs."""
        only, count = self.gallery.only, len(self.crops)
        if only is not None:
            why = "it is not checked that the face is theirs" if count == 1 else (
                f"the largest of {count} faces is taken for theirs")
            largest = max(range(count), key=lambda i: self.faces[i].source_side)
            warnings.warn(f"{name}: the file of '{only}' holds no template of this recogniser, so {why}; adapt again "
                          "from the photos to have it matched", FaceWarning, stacklevel=5)
            return [only if i == largest else None for i in range(count)], [None] * count
        return [None] * count, [None] * count

    def restore(self, strength: float, null_space: bool) -> Tensor:
        """Every face at this strength, strangers by the generic model: [F, 3, S, S], clamped to [-1, 1]."""
        mine = [i for i, who in enumerate(self.who) if who is not None]
        restored = self.generic.clone()
        if mine and strength:
            persons = [self.gallery.persons[self.who[i]] for i in mine]
            personal = restore_many(self.model, persons, self.crops[mine], strength).float().cpu()
            restored[mine] = join(self.generic[mine], personal).clamp(-1, 1) if null_space else personal
        return restored

    def found(self, strength: float) -> list[FoundFace]:
        return [FoundFace(box, who, cosine, strength if who is not None else 0.0, legible, unsure=unsure)
                for box, who, cosine, legible, unsure in zip(self.boxes, self.who, self.cosine, self.legible,
                                                             self.unsure)]
