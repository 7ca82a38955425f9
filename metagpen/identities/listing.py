"""What the readers of public data sets share: numbered photos below a folder, and lists in plain text."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import DataError
from ..faces.photo import PHOTO_SUFFIXES

NUMBERED = re.compile(r"(?:img|imgHQ)?(\d+)")


def existing_folder(root: str | os.PathLike) -> Path:
    """The folder as a Path. Raises DataError when it is none."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"'{root}' is not a folder; check the path")
    return root


def first_folder(root: Path, names: Iterable[str]) -> Path:
    """The first of the sub-folders that exists, else the root itself."""
    return next((root / name for name in names if (root / name).is_dir()), root)


def find_photos(root: str | os.PathLike) -> list[Path]:
    """All photos below a folder, at any depth, sorted; hidden files and folders are passed over.

    Raises DataError when the folder is missing or holds no photo, OSError for a folder that cannot be read.
    """
    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, below, names in os.walk(existing_folder(root), onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        found += [Path(folder, name) for name in names
                  if not name.startswith(".") and os.path.splitext(name)[1].lower() in PHOTO_SUFFIXES]
    if not found:
        raise DataError(f"'{root}' holds no photos ({', '.join(sorted(PHOTO_SUFFIXES))}), nor do its sub-folders")
    return sorted(found)


def numbered_photos(root: Path) -> dict[int, Path]:
    """{number: file} of the photos below `root` that are named by a number (7.jpg, 00007.png, imgHQ00007.png).

    Raises DataError when there is none, or two of one number.
    """
    numbered: dict[int, Path] = {}
    for path in find_photos(root):
        match = NUMBERED.fullmatch(path.stem)
        if match is None:
            continue
        number = int(match[1])
        if number in numbered:
            raise DataError(f"'{path}' and '{numbered[number]}' bear the same number; name the folder of one of the "
                            "copies as the root")
        numbered[number] = path
    if not numbered:
        raise DataError(f"'{root}' holds no photos named by numbers, such as 0.jpg or 00000.png")
    return numbered


def find_list(name: str, root: Path, lists: str | os.PathLike | None) -> Path:
    """The file `name`: in `lists` when given, else in the root, the folder above it, or an Anno folder of either.

    Raises DataError when it is in none of them.
    """
    homes = (root, root.resolve().parent) if lists is None else (Path(lists),)
    places = [place for home in homes for place in (home, home / "Anno")]
    for place in places:
        if (place / name).is_file():
            return place / name
    raise DataError(f"'{name}' is in none of {', '.join(map(str, places))}; put it into the first, or name its folder "
                    "with lists=")


def text_rows(file: str | os.PathLike, columns: int, heads: int = 1) -> Iterator[tuple[int, list[str]]]:
    """Rows of a list of numbers, split at white space, with their line numbers; blank lines are passed over.

    columns: how many values a row has, the last one a number. heads: up to so many first lines may be a header:
    of another width, or ending in a word. Raises DataError, naming file and line, for any other row.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{file}' cannot be read as a text list ({error}); check the path") from None
    for number, line in enumerate(text.splitlines(), start=1):
        row = line.split()
        if not row:
            continue
        fits = len(row) == columns and row[-1].removesuffix(".jpg").lstrip("-").isdigit()
        if fits:
            yield number, row
        elif number > heads:
            raise DataError(f"{file}, line {number}: '{line.strip()}' is not a row of {columns} values that ends in "
                            "a number; repair the line or copy the file again")
