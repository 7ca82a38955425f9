"""Aligned crops that are decoded when they are asked for: for collections too large for `pack`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..errors import DataError, PhotoError
from .packed import decode, person_index, scaled_landmarks, source_sides
from .people import People, Photo


class StreamedPhotos:
    """N aligned crops of P people, used as `PackedPhotos` is, except that `batch` decodes and `images` does not exist.

    person: int64 [N], index into names. names: P names. landmarks: float32 [N, 5, 2] in pixels of `size`.
    source_side: float32 [N], native crop side in pixels, NaN where unknown. workers: threads that decode a batch.
    Worker processes of a DataLoader may share one: nothing is kept open.

    Raises PhotoError for an unreadable photo, DataError for one that is not square, here or when it is decoded;
    DataError when there is none.
    """

    def __init__(self, people: People, size: int, workers: int = 1):
        self.photos = list(people.photos())
        if not self.photos:
            raise DataError(f"{people} has no photos to stream")
        self.names, self.size, self.workers = list(people), size, workers
        self.person = person_index(people)
        self.source_side = source_sides(self.photos)
        marks = [scaled_landmarks(photo, _side(photo), size) for photo in self.photos]
        self.landmarks = torch.from_numpy(np.stack(marks).astype(np.float32))

    def __len__(self) -> int:
        return len(self.photos)

    def batch(self, index: torch.Tensor) -> torch.Tensor:
        """Crops of the given positions as floats [B, 3, size, size] in [-1, 1], decoded now."""
        photos = [self.photos[i] for i in index.tolist()]
        if self.workers > 1:
            with ThreadPoolExecutor(max_workers=self.workers) as pool:
                pixels = list(pool.map(self._pixels, photos))
        else:
            pixels = [self._pixels(photo) for photo in photos]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        return images.float().contiguous().div_(127.5).sub_(1.0)

    def _pixels(self, photo: Photo) -> np.ndarray:
        return decode(photo, self.size)[0]


def _side(photo: Photo) -> int:
    """Side in pixels, from the file's header; only landmarks need it, `batch` checks the others."""
    if photo.landmarks is None:
        return 1  # the mean landmarks are fractions of the side
    try:
        with photo.open() as stream, Image.open(stream) as image:
            width, height = image.size
    except (OSError, UnidentifiedImageError) as error:
        raise PhotoError(f"photo '{photo.path}' cannot be read ({error}); copy it again or leave it out") from error
    if width != height:
        raise DataError(f"'{photo.path}' is {width}x{height}; only aligned, square crops are streamed")
    return width
