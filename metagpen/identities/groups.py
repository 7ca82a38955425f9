"""A CSV file that says which photos of any folder show the same person."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from ..atomic import whole_file
from ..errors import DataError
from .listing import existing_folder
from .people import People, Photo, _csv_rows, register_layout

GROUPS = "identities.csv"


@register_layout("grouped")
def read_groups(root: str | os.PathLike, file: str | os.PathLike | None = None, set_name: str = "") -> People:
    """People of a folder whose layout says nothing about who is who.

    file: CSV with the columns `file` (path below the root) and `id`; default: identities.csv in the root. Photos that
    it does not list are left out. set_name: default: the root's name.

    Raises DataError, naming file and row, when a photo is missing, listed twice, or without an id.
    """
    root = existing_folder(root)
    file = root / GROUPS if file is None else Path(file)
    people: dict[str, list[Photo]] = {}
    seen: set[str] = set()
    for number, row in _csv_rows(file, required=("file", "id")):
        path, person = Path(row["file"].strip()).as_posix(), row["id"].strip()
        if not person or path in seen:
            raise DataError(f"{file}, row {number}: '{path}' has no id or is listed twice")
        if not (root / path).is_file():
            raise DataError(f"{file}, row {number}: '{path}' does not exist below {root}")
        seen.add(path)
        people.setdefault(person, []).append(Photo(root / path))
    if not people:
        raise DataError(f"{file} lists nobody")
    return People({name: sorted(of, key=lambda photo: photo.path) for name, of in people.items()},
                  set_name or root.resolve().name)


def write_groups(people: People, root: str | os.PathLike, file: str | os.PathLike) -> None:
    """Writes who is on which photo, as `read_groups` reads it; photos are named by their paths below `root`.

    Raises DataError for a photo that does not lie there, and when there is nobody.
    """
    if not people:
        raise DataError(f"'{file}' is not written: there is nobody to write down")
    rows = []
    for name, photos in people.items():
        for photo in photos:
            if not photo.path.is_relative_to(root):
                raise DataError(f"'{photo.path}' does not lie below '{root}'; give the folder that holds all photos")
            rows.append([photo.path.relative_to(root).as_posix(), name])
    with whole_file(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["file", "id"], *sorted(rows)])
