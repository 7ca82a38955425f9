"""Thousands of aligned crops as one uint8 tensor: decoded and resized once, kept in a cache file."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from ..errors import DataError
from ..faces.align import FFHQ_LANDMARKS
from ..tensors import write_tensors
from .people import People, Photo

FORMAT = "metagpen-packed-1"  # raise when the contents would differ for the same photos


@dataclass(frozen=True)
class PackedPhotos:
    """N aligned crops of P people, ordered as People orders them.

    images: uint8 [N, 3, size, size], 0..255. person: int64 [N], index into names. names: P names.
    landmarks: float32 [N, 5, 2] in pixels of the packed size; the mean FFHQ landmarks where none were
    known. source_side: float32 [N], native crop side in pixels, NaN where unknown.
    """

    images: torch.Tensor
    person: torch.Tensor
    names: list[str]
    landmarks: torch.Tensor
    source_side: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of pixels and landmarks, in their order."""
        digest = hashlib.sha256(self.images.contiguous().numpy())
        digest.update(self.landmarks.contiguous().numpy())
        return digest.hexdigest()

    @property
    def size(self) -> int:
        """Side of the crops in pixels."""
        return self.images.shape[-1]

    def by_person(self) -> list[torch.Tensor]:
        """The positions of every person's photos, in the order of `names`."""
        order = torch.argsort(self.person, stable=True)
        return list(order.split(torch.bincount(self.person, minlength=len(self.names)).tolist()))

    def batch(self, index: torch.Tensor) -> torch.Tensor:
        """Crops of the given positions as floats [B, 3, size, size] in [-1, 1]."""
        return self.images[index].float().div_(127.5).sub_(1.0)


def pack(people: People, size: int, cache_dir: str | os.PathLike | None = None,
         workers: int = 1) -> PackedPhotos:
    """Decodes every photo and resizes it (Lanczos, anti-aliased) to size x size.

    people: aligned square crops. cache_dir: keeps the result there in a file named by a hash of everything
    that goes into it, the photos' bytes included, and reads it from there next time. workers: threads that
    decode.

    Raises PhotoError for an unreadable photo, DataError for one that is not square or when there is none.
    """
    photos = list(people.photos())
    if not photos:
        raise DataError(f"{people} has no photos to pack")
    if cache_dir is None:
        return _decode(people, photos, size, workers)
    file = Path(cache_dir) / f"packed_{size}_{_key(people, size)[:20]}.safetensors"
    if not file.exists():
        _write(_decode(people, photos, size, workers), file)
    return _read(file)


def decode(photo: Photo, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [size, size, 3] and landmarks [5, 2] in them (the mean FFHQ ones where none are known).

    Raises PhotoError for an unreadable photo, DataError for one that is not square.
    """
    image = photo.load()
    side = image.width
    if image.height != side:
        raise DataError(f"'{photo.path}' is {side}x{image.height}; only aligned, square crops are packed")
    if side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image), scaled_landmarks(photo, side, size)


def scaled_landmarks(photo: Photo, side: int, size: int) -> np.ndarray:
    """Landmarks [5, 2] of a crop of `side` pixels in the pixels of one of `size`."""
    return FFHQ_LANDMARKS * size if photo.landmarks is None else photo.landmarks * (size / side)


def source_sides(photos: list[Photo]) -> torch.Tensor:
    """Native crop sides in pixels, float32 [N], NaN where unknown."""
    return torch.tensor([float("nan") if p.source_side is None else p.source_side for p in photos],
                        dtype=torch.float32)


def person_index(people: People) -> torch.Tensor:
    """Whom each photo shows, int64 [N], as positions in list(people)."""
    return torch.repeat_interleave(torch.tensor([len(photos) for photos in people.values()]))


def _decode(people: People, photos: list[Photo], size: int, workers: int) -> PackedPhotos:
    count = len(photos)
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    landmarks = np.empty((count, 5, 2), dtype=np.float32)

    def fill(i: int) -> None:
        images[i], landmarks[i] = decode(photos[i], size)

    with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
        for _ in pool.map(fill, range(count)):
            pass
    return PackedPhotos(
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        person=person_index(people),
        names=list(people),
        landmarks=torch.from_numpy(landmarks),
        source_side=source_sides(photos),
    )


def _key(people: People, size: int) -> str:
    digest = hashlib.sha256(f"{FORMAT}/{size}".encode())
    for name, photos in people.items():
        for photo in photos:
            landmarks = None if photo.landmarks is None else photo.landmarks.tolist()
            digest.update(json.dumps([name, photo.sha256, landmarks, photo.source_side]).encode())
    return digest.hexdigest()


def _write(packed: PackedPhotos, file: Path) -> None:
    tensors = {"images": packed.images, "person": packed.person, "landmarks": packed.landmarks,
               "source_side": packed.source_side}
    write_tensors(file, tensors, {"format": FORMAT, "names": json.dumps(packed.names)})


def _read(file: Path) -> PackedPhotos:
    try:
        with safe_open(file, framework="pt") as stored:
            names = json.loads(stored.metadata()["names"])
            return PackedPhotos(names=names, **{key: stored.get_tensor(key) for key in stored.keys()})
    except Exception as error:  # safetensors raises its own type and several builtin ones
        raise DataError(f"the packed photos in '{file}' cannot be read ({error}); delete the file") from error
