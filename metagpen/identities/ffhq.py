"""FFHQ: 70,000 aligned photos of people nobody named, one-photo people unless identities were mined."""

from __future__ import annotations

import os

from ..errors import DataError
from .groups import read_groups
from .listing import existing_folder, first_folder, numbered_photos
from .people import People, Photo, register_layout

FOLDERS = ("images1024x1024", "thumbnails128x128")
FIRST_VALIDATION = 60_000


@register_layout("ffhq")
def ffhq(root: str | os.PathLike, identities: str | os.PathLike | None = None) -> People:
    """FFHQ: every photo a person of its own, or the pseudo-identities of a file.

    root: a folder with `00000.png` ... at any depth (00000/00000.png as published); where images1024x1024 or
    thumbnails128x128 lie in it, the first of these. identities: a CSV file that `metagpen mine-identities` wrote for
    this root; people then are those of the file, other photos are left out. People of one photo are named by it.

    Raises DataError when the folder is missing or holds no photo, or the file contradicts it.
    """
    root = existing_folder(root)
    if identities is not None:
        return read_groups(root, identities, set_name="ffhq")
    files = numbered_photos(first_folder(root, FOLDERS))
    return People({f"{number:05}": [Photo(path)] for number, path in files.items()}, set_name="ffhq")


def ffhq_split(people: People) -> dict[str, People]:
    """FFHQ's official split by photo (the first 60,000 train, the others val), made to share nobody as well.

    A mined person with photos on both sides is train, and keeps only the photos of that side.
    Returns the parts that are not empty. Raises DataError for photos that are not named by a number.
    """
    parts: dict[str, dict[str, list[Photo]]] = {"train": {}, "val": {}}
    for name, photos in people.items():
        early = [photo for photo in photos if _number(photo) < FIRST_VALIDATION]
        parts["train" if early else "val"][name] = early or list(photos)
    return {part: People(members, people.set_name) for part, members in parts.items() if members}


def _number(photo: Photo) -> int:
    if not photo.path.stem.isdigit():
        raise DataError(f"'{photo.path}' is not named by FFHQ's number, such as 00000.png")
    return int(photo.path.stem)
