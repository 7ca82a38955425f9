"""Where personalisation cannot help, or not well: every limit as a check, with its threshold and a sentence for people.

The thresholds hold for the embedded recogniser and were chosen from the figures that `benchmarks/album_thresholds.py`
writes to benchmarks/results/album_thresholds.json; docs/album.md shows them.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ..errors import PhotoError
from ..faces import (
    AlignedFace,
    Face,
    PhotoSource,
    crop_face,
    describe,
    detect,
    is_photo,
    load_photo,
    outside_share,
    photos_in,
)
from ..faces.detect import MAX_OUTSIDE, MIN_CROP_SIDE
from . import measures

FEWEST, MOST = 3, 8
"""Photos of a good album. The mean embedding of 1, 3, 8 and 15 photos is ever closer to the person's others; most of
that comes with the first three, little after eight."""

STRANGER = 0.25
"""Cosine to the mean of the album's others below which a face is taken for somebody else."""

DOUBTFUL = 0.35
"""Below this cosine it may be somebody else, or the person at another age; above it hardly any stranger is left."""

TWO_PEOPLE = 0.4
"""Mean cosine between the halves of an album over that inside them (`agree.likeness_of_halves`) below which they show
two people: one person's most unlike halves are seldom so unlike, two people's nearly always."""

COPY, ALIKE = 0.985, 0.94
"""Likeness of two whole pictures from which one is a copy of the other (resized, compressed, mirrored), and likeness of
two faces from which the photos are nearly the same, such as two of one second (`measures.likeness`)."""

SMALL = 0.75
"""Native side of the face over the model's below which a photo must be enlarged so far that it teaches softness."""

SOFT, BLURRED = 0.17, 0.03
"""Sharpness (`measures.sharpness`) below which a face has no more detail than half its side in pixels could hold, and
less than an eighth: then there is nothing to learn from."""

TURNED = 45.0
"""Degrees of yaw beyond which a face is nearly a profile: the recogniser knows it less, and so does the model."""

UNSURE = 0.985
"""Detection score below which the face is likely covered, cut off, or none at all; whole faces score higher."""

COVERED = 0.1
"""Flat share of the face's oval (`measures.flat_share`) from which a part of the face is painted over or burnt out."""

CUT_OFF = 0.05
"""Share of the face's oval beyond the photo's border from which who it is begins to get lost."""

OTHER_WAY = "general super-resolution (SwinIR, Real-ESRGAN) is made for pictures that are not faces"
INPAINT = "a restorer would invent what is missing: fill it in first with an inpainting model, or take another photo"
OTHER_AGE = "photos of another age (childhood photos above all) need an age-aware model"


@dataclass(frozen=True)
class Limit:
    """Something that a photo or an album falls short of.

    kind: one word ("unreadable", "no-face", "small", "blurred", "soft", "turned", "covered", "cut-off", "unsure",
    "stranger", "doubtful", "copy", "alike"). message: what, how much, and what to do. stops: nothing good can be
    learned from such a photo, it is left out.
    """

    kind: str
    message: str
    stops: bool = False


def photo_limits(source: PhotoSource, device: str | torch.device = "cpu") -> list[Limit]:
    """What keeps the largest face of a photo, sharp or degraded, from being restored well: [] when nothing does.

    source: anything `load_photo` takes. Raises PhotoError for a photo that cannot be read.
    """
    photo = load_photo(source)
    faces = detect(photo, device, degraded=True)
    return face_limits(photo, faces[0]) if faces else [no_face(describe(source))]


def no_face(name: str) -> Limit:
    """Nobody was found on the photo of this name."""
    return Limit("no-face", f"{name} shows no face that can be found; if there is one, cut it out upright, or tell "
                            f"metagpen restore where it is (--face); if not, {OTHER_WAY}", stops=True)


def view_of(photo: Image.Image, face: Face) -> AlignedFace | Limit:
    """The aligned face with measures.VIEW pixels, or why there is none."""
    try:
        return crop_face(photo, face.landmarks, measures.VIEW)
    except PhotoError as error:
        return Limit("cut-off", f"{error}; {INPAINT}", stops=True)


def face_limits(photo: Image.Image, face: Face, view: AlignedFace | Limit | None = None) -> list[Limit]:
    """Too small, cut off, covered, or hardly a face; for photos to learn from and photos to restore alike. view: what
    `view_of` says, where it is known."""
    view = view_of(photo, face) if view is None else view
    if isinstance(view, Limit):
        return [view]
    if view.source_side < MIN_CROP_SIDE:
        return [Limit("small", f"the face is too small: its crop has {view.source_side:.0f} px, at least "
                               f"{MIN_CROP_SIDE:.0f} are needed; use a larger photo", stops=True)]
    return [*cut_off(photo, face), *covered(view.image, face.score)]


def cut_off(photo: Image.Image, face: Face) -> list[Limit]:
    crop, oval = outside_share(photo, face.landmarks), measures.face_outside(photo.size, face.landmarks)
    if crop > MAX_OUTSIDE:
        return [Limit("cut-off", f"{crop:.0%} of the face's crop lies beyond the picture's border (at most "
                                 f"{MAX_OUTSIDE:.0%} may); {INPAINT}", stops=True)]
    if oval > CUT_OFF:
        return [Limit("cut-off", f"{oval:.0%} of the face lies beyond the picture's border; {INPAINT}")]
    return []


def covered(crop: Image.Image, score: float) -> list[Limit]:
    """crop: the aligned face. score: the detector's."""
    flat = measures.flat_share(crop)
    if flat > COVERED:
        return [Limit("covered", f"{flat:.0%} of the face is flat: painted over, masked or burnt out; {INPAINT}")]
    if score < UNSURE:
        return [Limit("unsure", f"the detector is unsure of this face ({score:.3f}; whole faces have more than "
                                f"{UNSURE}): it may be covered, cut off or none; {INPAINT}")]
    return []


def detail_limits(sharp: float, source_side: float, size: int) -> list[Limit]:
    """Too little detail to learn from. sharp: `measures.sharpness` of the aligned face of the model's `size`.
    source_side: its side in the photo."""
    found = []
    if sharp < BLURRED:
        return [Limit("blurred", f"no detail left (sharpness {sharp:.2f}, sharp photos have 0.4): take a sharper photo",
                      stops=True)]
    if source_side < SMALL * size:
        found.append(Limit("small", f"the face's crop has {source_side:.0f} px, the model {size}: it is enlarged, and "
                                    "teaches softness"))
    elif sharp < SOFT:
        found.append(Limit("soft", f"soft (sharpness {sharp:.2f}, sharp photos have 0.4): it teaches softness"))
    return found


def pose_limits(yaw: float) -> list[Limit]:
    """yaw in degrees, from `measures.yaw`."""
    if abs(yaw) <= TURNED:
        return []
    return [Limit("turned", f"turned by about {abs(yaw):.0f} degrees: half of the face is hidden")]


def identity_limits(cosine: float) -> list[Limit]:
    """cosine: of a face to the unit mean of the person's (other) photos, by the embedded recogniser."""
    if cosine < STRANGER:
        return [Limit("stranger", f"another person than on the other photos (cosine {cosine:.2f}, below {STRANGER}); "
                                  f"{OTHER_AGE}", stops=True)]
    if cosine < DOUBTFUL:
        return [Limit("doubtful", f"far from the other photos (cosine {cosine:.2f}, below {DOUBTFUL}): another person, "
                                  f"or another age; {OTHER_AGE}")]
    return []


def of_another_group(cosine: float) -> Limit:
    """For a face that is no stranger's by its cosine to the album's person, but whose photo is one of a second person.
    """
    return Limit("stranger", f"it agrees more with photos of a second person than with the album's (cosine "
                             f"{cosine:.2f}); {OTHER_AGE}", stops=True)


def copy(other: str) -> Limit:
    return Limit("copy", f"the same picture as {other}", stops=True)


def alike(other: str) -> Limit:
    return Limit("alike", f"nearly the same picture as {other}: together they say little more than one")


def people_instead(paths: Sequence[Path]) -> str | None:
    """What to say when a command for one person is given a folder with sub-folders of photos: people, it seems.

    Also where pictures lie beside the sub-folders: to learn from those alone would pass over the others in silence.
    """
    for path in paths:
        if not path.is_dir():
            continue
        people = [own for own in sorted(path.iterdir()) if own.is_dir() and not own.name.startswith(".")
                  and any(map(is_photo, own.iterdir()))]
        if people:
            return advise_many(path, people, beside=len(photos_in(path)))
    return None


def advise_many(path: Path, people: Sequence[Path], beside: int) -> str:
    """people: sub-folders of `path` that hold photos. beside: how many pictures lie beside them."""
    many = f"`metagpen adapt-many {shlex.quote(str(path))} -o {shlex.quote(str(learned_name(path)))}`"
    if not beside:
        return (f"{path}: holds {len(people)} folder(s) of photos, one per person it seems; learn them all with "
                f"{many}, or name one of them, {people[0]}")
    return (f"{path}: {beside} picture(s) lie beside {len(people)} sub-folder(s) that hold photos too, so it cannot be "
            f"told who is meant; for one person per sub-folder take {many}, for one of them name it, {people[0]}, and "
            "for the pictures alone name those, or move them to a folder of their own")


def learned_name(path: Path) -> Path:
    """Where to put what is learned from a folder: beside it, never inside, not even where it is called '.'."""
    whole = path if path.name not in ("", "..") else path.resolve()
    return whole.with_name(f"{whole.name}_learned") if whole.name else whole / "learned"
