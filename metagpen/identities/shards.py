"""Shards: aligned crops as JPEGs in a few tar files, with a manifest that says where in them each photo lies.

A folder `manifest.csv`, `shard_000.tar`, `shard_001.tar`, ... Each photo is read by its offset, so access is random and
nothing is unpacked; unpacked all the same (`tar xf`), the folder is one that `People.from_folder` reads.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ..errors import DataError, PhotoError
from ..faces.align import AlignedFace, crop_face
from ..faces.photo import load_photo
from .listing import existing_folder
from .people import LANDMARK_COLUMNS, MANIFEST, People, Photo, _csv_rows, _landmarks, _number, register_layout

COLUMNS = ["id", "file", "src_crop_side_px", *LANDMARK_COLUMNS, "shard", "offset", "bytes"]
AT_ONCE = 64  # photos decoded ahead of the writer: bounds the memory


@dataclass(frozen=True, kw_only=True)
class ShardPhoto(Photo):
    """A photo inside a shard. path: where it would lie if the shard were unpacked where it is."""

    shard: Path
    offset: int
    length: int

    def open(self) -> BinaryIO:
        """The photo's bytes. The shard is opened anew each time: threads and forked processes share no position."""
        with open(self.shard, "rb") as stream:
            stream.seek(self.offset)
            return io.BytesIO(stream.read(self.length))

    def load(self) -> Image.Image:
        """The picture, upright RGB. Raises PhotoError when it cannot be read."""
        try:
            return load_photo(Image.open(self.open()))
        except (OSError, PhotoError) as error:
            raise PhotoError(f"'{self.path.name}' in '{self.shard}' cannot be read ({error}); copy or write the "
                             "shards again") from error


class Crop(Protocol):
    """What a cropper returns; `metagpen.faces.AlignedFace` is one."""

    image: Image.Image
    landmarks: np.ndarray | None
    source_side: float | None


class FinishedCrop(NamedTuple):
    """A crop that was one already."""

    image: Image.Image
    landmarks: np.ndarray | None
    source_side: float | None


def already_aligned(photo: Photo, size: int) -> FinishedCrop:
    """The default cropper: the photo is an aligned crop and is only resized (Lanczos) to size x size.

    Raises DataError when it is not square.
    """
    image = photo.load()
    if image.width != image.height:
        raise DataError(f"'{photo.path}' is {image.width}x{image.height}, not an aligned, square crop; give a cropper, "
                        "e.g. crop=cut_by_landmarks")
    landmarks = None if photo.landmarks is None else photo.landmarks * (size / image.width)
    return FinishedCrop(image.resize((size, size), Image.Resampling.LANCZOS), landmarks, photo.source_side)


def cut_by_landmarks(photo: Photo, size: int) -> AlignedFace:
    """A cropper for whole photos with landmarks (CelebA in the wild): the FFHQ-style crop through them.

    Raises DataError when the landmarks are unknown, PhotoError when they do not lie on the photo.
    """
    if photo.landmarks is None:
        raise DataError(f"the landmarks of '{photo.path}' are unknown; find the face with a detector instead, e.g. "
                        "crop=lambda photo, size: metagpen.faces.single_face(photo.path, size)")
    return crop_face(photo.load(), photo.landmarks, size)


def write_shards(people: People, folder: str | os.PathLike, size: int, *,
                 crop: Callable[[Photo, int], Crop] = already_aligned, quality: int = 95, shard_mb: float = 32,
                 workers: int = 1, on_error: Callable[[Photo, PhotoError], None] | None = None) -> People:
    """Writes everybody's photos as size x size JPEGs and returns what `read_shards` reads back.

    folder: is made, and appears only when it is whole. crop: (photo, size) -> the aligned crop with its landmarks in
    crop pixels and its native side. quality: of the JPEGs, colour at full resolution. shard_mb: a shard ends after
    the photo with which it exceeds so many megabytes. workers: threads that decode and encode. on_error: is told of a
    photo that raised a PhotoError, which is then left out; without it the error is raised. Equal input gives equal
    bytes.

    Raises DataError when the folder exists, or two photos of a person differ in their suffix only.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"'{folder}' exists already; shards are written into a new folder")
    building = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    building.mkdir(parents=True)
    try:
        rows = _write_tars(_encoded(people, size, crop, quality, workers, on_error), building, shard_mb * 1e6)
        with open(building / MANIFEST, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([COLUMNS, *rows])
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return read_shards(folder)


@register_layout("shards")
def read_shards(folder: str | os.PathLike) -> People:
    """People whose photos lie in shards; `split`, `pack`, `StreamedPhotos` and episodes take them as any others.

    They load through `Photo.load`; code that wants files needs the shards unpacked (`tar xf`, in their folder).
    Raises DataError, naming file and row, when the manifest or a shard is missing, damaged or cut short.
    """
    folder = existing_folder(folder)
    file = folder / MANIFEST
    lengths: dict[Path, int] = {}
    people: dict[str, list[Photo]] = {}
    for number, row in _csv_rows(file, required=("id", "file", "shard", "offset", "bytes")):
        shard = folder / row["shard"]
        if shard not in lengths:
            if not shard.is_file():
                raise DataError(f"{file}, row {number}: '{shard}' does not exist; copy all shards of the folder")
            lengths[shard] = shard.stat().st_size
        offset, length = (_whole(row, column, file, number) for column in ("offset", "bytes"))
        if offset + length > lengths[shard]:
            raise DataError(f"{file}, row {number}: '{shard}' is cut short at {lengths[shard]} bytes; copy it again")
        people.setdefault(row["id"], []).append(ShardPhoto(
            folder / row["file"], _landmarks(row, file, number), _number(row, "src_crop_side_px", file, number),
            shard=shard, offset=offset, length=length))
    if not people:
        raise DataError(f"{file} lists nobody; write the shards again")
    return People(people, folder.resolve().name)


class _Encoded(NamedTuple):
    person: str
    name: str  # below the root
    jpeg: bytes
    landmarks: np.ndarray | None
    source_side: float | None


def _encoded(people: People, size: int, crop: Callable[[Photo, int], Crop], quality: int, workers: int,
             on_error: Callable[[Photo, PhotoError], None] | None) -> Iterator[_Encoded]:
    """All photos in order, encoded a little ahead by `workers` threads."""

    def encode(named: tuple[str, Photo]) -> _Encoded | PhotoError:
        person, photo = named
        try:
            face = crop(photo, size)
        except PhotoError as error:
            return error
        stream = io.BytesIO()
        face.image.save(stream, "JPEG", quality=quality, subsampling=0)
        return _Encoded(person, f"{person}/{photo.path.stem}.jpg", stream.getvalue(), face.landmarks, face.source_side)

    everybody = ((person, photo) for person, photos in people.items() for photo in photos)
    with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
        while some := list(islice(everybody, AT_ONCE)):
            for (_, photo), result in zip(some, pool.map(encode, some)):
                if not isinstance(result, PhotoError):
                    yield result
                elif on_error is None:
                    raise result
                else:
                    on_error(photo, result)


def _write_tars(photos: Iterable[_Encoded], folder: Path, limit: float) -> list[list]:
    """Writes the shards; returns the manifest's rows."""
    rows: dict[str, list] = {}
    tar: tarfile.TarFile | None = None
    shards: list[Path] = []
    filled = 0
    try:
        for photo in photos:
            if photo.name in rows:
                raise DataError(f"two photos would be called '{photo.name}' in the shards; rename one")
            if tar is None or filled > limit:
                if tar is not None:
                    tar.close()
                filled = 0
                shards.append(folder / f"shard_{len(shards):03}.tar")
                tar = tarfile.open(shards[-1], "w", format=tarfile.PAX_FORMAT)
            entry = tarfile.TarInfo(photo.name)  # no owner and no time: equal input gives equal bytes
            entry.size = len(photo.jpeg)
            tar.addfile(entry, io.BytesIO(photo.jpeg))
            filled += len(photo.jpeg)
            marks = [""] * 10 if photo.landmarks is None else np.round(photo.landmarks, 3).ravel().tolist()
            side = "" if photo.source_side is None else round(float(photo.source_side), 2)
            rows[photo.name] = [photo.person, photo.name, side, *marks]
    finally:
        if tar is not None:
            tar.close()
    if not rows:
        raise DataError("there are no photos to write into shards")
    for shard in shards:
        with tarfile.open(shard) as written:
            for entry in written:
                rows[entry.name] += [shard.name, entry.offset_data, entry.size]
    return list(rows.values())


def _whole(row: dict[str, str], column: str, file: Path, number: int) -> int:
    if not row[column].isdigit():
        raise DataError(f"{file}, row {number}: {column} is '{row[column]}', not a whole number")
    return int(row[column])
