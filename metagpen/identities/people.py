"""People: photos grouped by person, read from folders, filtered, merged and split by identity."""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from ..atomic import whole_file
from ..errors import DataError
from ..faces.photo import load_photo, photos_in

MANIFEST = "manifest.csv"
LANDMARK_COLUMNS = [f"{axis}{i}" for i in range(5) for axis in "xy"]


@dataclass(frozen=True)
class Photo:
    """One photo of a person.

    path: its file. landmarks: [5, 2] in pixels of that file, or None when unknown. source_side: native side
    in pixels of the aligned crop before it was resized (how sharp it can be), or None when unknown.
    """

    path: Path
    landmarks: np.ndarray | None = field(default=None, compare=False, repr=False)
    source_side: float | None = field(default=None, compare=False)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file's bytes, read on first use."""
        with self.open() as stream:
            return hashlib.sha256(stream.read()).hexdigest()

    def open(self) -> BinaryIO:
        """The file's bytes as a stream to be closed by the caller."""
        return open(self.path, "rb")

    def load(self) -> Image.Image:
        """The picture, upright RGB. Raises PhotoError when it cannot be read."""
        return load_photo(self.path)


class People(Mapping[str, tuple[Photo, ...]]):
    """An immutable mapping: person's name -> their photos; people in alphabetical order, photos as given.

    set_name names the collection; the people of a merged collection are called "set/person" instead.
    """

    def __init__(self, photos: Mapping[str, Iterable[Photo]], set_name: str = ""):
        self.set_name = set_name
        self._photos = {name: tuple(photos[name]) for name in sorted(photos)}

    @classmethod
    def from_folder(cls, root: str | os.PathLike) -> People:
        """Reads a folder with one sub-folder per person; the sub-folder's name is the person's.

        Photos lie directly in the sub-folder (jpg, png, webp, ...); other files, hidden ones, deeper
        folders and people without photos are passed over. An optional manifest.csv in the root adds what is
        known per photo: column `file` (path below the root) and any of `id`, `src_crop_side_px`, and
        landmarks x0, y0 ... x4, y4.

        Raises DataError when the folder is missing or shows nobody, or the manifest contradicts it.
        """
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"'{root}' is not a folder; give one with a sub-folder of photos per person")
        known = _read_manifest(root)
        people = {}
        for folder in sorted(root.iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                if files := photos_in(folder):
                    people[folder.name] = [Photo(f, *known.get(f"{folder.name}/{f.name}", ())) for f in files]
        if not people:
            raise DataError(f"'{root}' holds no photos of anybody; put each person's into a sub-folder of it")
        return cls(people, set_name=root.resolve().name)

    @classmethod
    def merge(cls, *collections: People) -> People:
        """Several collections as one, people renamed "set/person". Raises DataError for equal set names."""
        names = [people.set_name for people in collections]
        for name in names:
            if not name or names.count(name) > 1:
                raise DataError(f"collections to merge need different, non-empty set names, not {names}")
        return cls({f"{people.set_name}/{name}": photos
                    for people in collections for name, photos in people.items()})

    def select(self, names: Iterable[str]) -> People:
        """Only the named people. Raises DataError for an unknown name."""
        names = list(names)
        for name in names:
            if name not in self._photos:
                raise DataError(f"nobody is called '{name}' in {self}")
        return People({name: self._photos[name] for name in names}, self.set_name)

    def min_photos(self, count: int) -> People:
        """Only people with at least `count` photos."""
        return People({name: photos for name, photos in self.items() if len(photos) >= count}, self.set_name)

    def min_source_side(self, side: float) -> People:
        """Only photos whose native crop side is at least `side` pixels, and people who keep one.

        Raises DataError for a photo whose source_side is unknown.
        """
        for photo in self.photos():
            if photo.source_side is None:
                raise DataError(f"the native size of '{photo.path}' is unknown; give it in the column "
                                f"src_crop_side_px of {MANIFEST}, or do not filter by it")
        kept = {name: [p for p in photos if p.source_side >= side] for name, photos in self.items()}
        return People({name: photos for name, photos in kept.items() if photos}, self.set_name)

    def photos(self) -> Iterator[Photo]:
        """All photos, person after person."""
        return (photo for photos in self.values() for photo in photos)

    def __getitem__(self, name: str) -> tuple[Photo, ...]:
        return self._photos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._photos)

    def __len__(self) -> int:
        return len(self._photos)

    def __repr__(self) -> str:
        photos = sum(map(len, self.values()))
        return f"People({self.set_name or 'merged'}: {len(self)} people, {photos} photos)"

    def _name_of(self, set_name: str, person: str) -> str | None:
        """The name here of a person of a set, or None; a row without a set may mean any."""
        name = person if not set_name or set_name == self.set_name else f"{set_name}/{person}"
        return name if name in self._photos else None

    def _sets(self) -> set[str]:
        return {self.set_name} if self.set_name else {name.partition("/")[0] for name in self}


LAYOUTS: dict[str, Callable[[str | os.PathLike], People]] = {"folder": People.from_folder}
"""Readers by name of the layout on disk, each (root) -> People. Collections that do not lie in one
sub-folder per person (CelebA-HQ with its identity lists, FFHQ, LFW) join through `register_layout`."""


def register_layout(name: str) -> Callable:
    """Decorator: adds a reader (root) -> People under `name`. Raises DataError when the name is taken."""

    def add(reader: Callable[[str | os.PathLike], People]) -> Callable:
        if name in LAYOUTS:
            raise DataError(f"a layout called '{name}' is registered already")
        LAYOUTS[name] = reader
        return reader

    return add


def load_people(*roots: str | os.PathLike, layout: str = "folder") -> People:
    """Reads one collection, or several merged into one (see `People.merge`), in a registered layout."""
    if layout not in LAYOUTS:
        raise DataError(f"unknown layout '{layout}'; known: {', '.join(sorted(LAYOUTS))}")
    if not roots:
        raise DataError("no folder of people given")
    collections = [LAYOUTS[layout](root) for root in roots]
    return collections[0] if len(collections) == 1 else People.merge(*collections)


WHOLE_PHOTOS = frozenset({"celeba", "lfw"})  # layouts whose photos are not crops yet


def load_crops(*roots: str | os.PathLike, layout: str = "folder") -> People:
    """`load_people` for whoever takes every photo as an aligned crop. Raises DataError for a layout of whole photos."""
    if layout in WHOLE_PHOTOS:
        raise DataError(f"layout '{layout}': its photos are whole ones, not aligned crops; cut them into shards with "
                        "metagpen.identities.write_shards, then take the layout shards")
    return load_people(*roots, layout=layout)


def split(people: People, file: str | os.PathLike | None = None, *,
          fractions: Mapping[str, float] | None = None, seed: int = 0, strict: bool = True) -> dict[str, People]:
    """Parts of `people` that share nobody, e.g. {"train": ..., "val": ...}.

    Either from a csv file with the columns set, id, split (see `read_split`; rows of sets not loaded are
    passed over), or drawn: fractions, e.g. {"train": 0.8, "val": 0.1, "test": 0.1}, of a shuffle by `seed`.
    strict: everybody in the file must be here, and everybody here in the file; otherwise both are passed
    over.

    Raises DataError, naming file and row, for an unknown or doubly listed person, and when a part would be
    empty.
    """
    if (file is None) == (fractions is None):
        raise DataError("split wants either a file or fractions")
    if fractions is not None:
        parts = _drawn_parts(people, fractions, seed)
    else:
        parts = _listed_parts(people, Path(file), strict)
    return {part: people.select(names) for part, names in parts.items()}


def read_split(file: str | os.PathLike) -> dict[tuple[str, str], str]:
    """Reads a split file: csv with the columns id, split and optionally set; others are ignored.

    Returns {(set, id): split}, set "" where the file has none. Raises DataError, naming file and row, when
    a column is missing, a value is empty, or a person is listed twice.
    """
    return {key: part for key, (part, _) in _split_rows(Path(file)).items()}


def write_split(parts: Mapping[str, People], file: str | os.PathLike) -> None:
    """Writes parts as a file that `read_split` and `split` read again."""
    with whole_file(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["set", "id", "split"])
        for part, people in parts.items():
            for name in people:
                merged, slash, person = name.partition("/")  # people of a merged collection are called "set/person"
                own = (merged, person) if slash and not people.set_name else (people.set_name, name)
                writer.writerow([*own, part])


def _split_rows(file: Path) -> dict[tuple[str, str], tuple[str, int]]:
    """{(set, id): (split, row number)}."""
    listed: dict[tuple[str, str], tuple[str, int]] = {}
    for number, row in _csv_rows(file, required=("id", "split")):
        key, part = ((row.get("set") or "").strip(), row["id"].strip()), row["split"].strip()
        if not key[1] or not part:
            raise DataError(f"{file}, row {number}: id or split is empty")
        if key in listed:
            before, earlier = listed[key]
            raise DataError(f"{file}, row {number}: '{key[1]}' is listed again as {part} "
                            f"(row {earlier}: {before}); everybody belongs to exactly one part")
        listed[key] = (part, number)
    return listed


def _listed_parts(people: People, file: Path, strict: bool) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    rows_of: dict[str, int] = {}
    for (set_name, person), (part, number) in _split_rows(file).items():
        if set_name and set_name not in people._sets():
            continue
        name = people._name_of(set_name, person)
        if name is None:
            if strict:
                raise DataError(f"{file}, row {number}: '{person}' is not among the people of "
                                f"{set_name or people.set_name}; remove the row, or split with strict=False")
            continue
        if name in rows_of:
            raise DataError(f"{file}, row {number}: '{name}' is listed already in row {rows_of[name]}")
        rows_of[name] = number
        parts.setdefault(part, []).append(name)
    if strict and len(rows_of) < len(people):
        missing = next(name for name in people if name not in rows_of)
        raise DataError(f"{file} does not say to which part '{missing}' belongs "
                        f"({len(people) - len(rows_of)} people in all); add rows, or split with strict=False")
    if not parts:
        raise DataError(f"{file} lists nobody of {people}")
    return parts


def _drawn_parts(people: People, fractions: Mapping[str, float], seed: int) -> dict[str, list[str]]:
    if min(fractions.values(), default=0) <= 0 or not math.isclose(sum(fractions.values()), 1.0):
        raise DataError(f"fractions must be positive and add up to 1, not {dict(fractions)}")
    names = list(people)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    parts, start, total = {}, 0, 0.0
    for part, fraction in fractions.items():
        total += fraction
        end = round(total * len(names))
        if end == start:
            raise DataError(f"{len(names)} people are too few for a part '{part}' of {fraction:g}")
        parts[part] = sorted(names[i] for i in order[start:end])
        start = end
    return parts


def _read_manifest(root: Path) -> dict[str, tuple[np.ndarray | None, float | None]]:
    """{"person/file": (landmarks, source_side)} from the manifest; empty when there is none."""
    file = root / MANIFEST
    if not file.exists():
        return {}
    known: dict[str, tuple[np.ndarray | None, float | None]] = {}
    for number, row in _csv_rows(file, required=("file",)):
        path = Path(row["file"].strip()).as_posix()
        if path in known:
            raise DataError(f"{file}, row {number}: '{path}' is listed twice")
        if not (root / path).is_file():
            raise DataError(f"{file}, row {number}: '{path}' does not exist below {root}")
        person = (row.get("id") or "").strip()
        if person and person != Path(path).parent.as_posix():
            raise DataError(f"{file}, row {number}: id '{person}' is not the folder of '{path}'")
        side = _number(row, "src_crop_side_px", file, number)
        known[path] = (_landmarks(row, file, number), side)
    return known


def _landmarks(row: dict[str, str], file: Path, number: int) -> np.ndarray | None:
    values = [_number(row, column, file, number) for column in LANDMARK_COLUMNS]
    if None in values and any(v is not None for v in values):
        raise DataError(f"{file}, row {number}: give all ten landmark columns {LANDMARK_COLUMNS} or none")
    return None if None in values else np.array(values).reshape(5, 2)


def _number(row: dict[str, str], column: str, file: Path, number: int) -> float | None:
    text = (row.get(column) or "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{file}, row {number}: {column} is '{text}', not a number")
    return value


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turns what reading text or csv may raise half-way into a DataError that names the file."""
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"'{file}' cannot be read as a csv in UTF-8 ({error}); save it as one again") from None


def _csv_rows(file: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a csv with their line numbers (the header is line 1)."""
    try:
        stream = open(file, newline="", encoding="utf-8-sig")  # spreadsheets like to write a byte order mark
    except OSError as error:
        raise DataError(f"'{file}' cannot be read ({error.strerror}); check the path") from None
    with stream, readable(file):
        reader = csv.DictReader(stream)
        missing = [column for column in required if column not in (reader.fieldnames or [])]
        if missing:
            raise DataError(f"{file}: column '{missing[0]}' is missing; the first line must name the columns")
        for row in reader:
            if any(row[column] is None for column in required):
                raise DataError(f"{file}, row {reader.line_num}: too few values")
            yield reader.line_num, row
