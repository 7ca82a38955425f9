"""The pairs of one person, aligned, and what is drawn of them: both sides always moved and coloured alike."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..degrade import Degradation
from ..errors import DataError, PhotoError
from ..faces import (
    LEFT_RIGHT,
    PHOTO_SUFFIXES,
    crop_face,
    describe,
    invert,
    load_photo,
    photos_in,
    single_face,
    to_tensor,
    transform,
)
from .options import ColorJitter, Pairs, TrainPairs

Batch = tuple[Tensor, Tensor, Tensor]  # truth, degraded [B, 3, S, S] in [-1, 1]; landmarks [B, 5, 2] in pixels
LARGEST_RATIO = 16  # sides of the sharp photo over sides of the degraded one


@dataclass(frozen=True)
class PairSet:
    """Aligned pairs: truth [N, 3, S, S] in [-1, 1], poor the same (None: to be degraded when drawn), landmarks
    [N, 5, 2] in their pixels, file names."""

    truth: Tensor
    poor: Tensor | None
    landmarks: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def select(self, chosen: list[int]) -> PairSet:
        poor = None if self.poor is None else self.poor[chosen]
        return PairSet(self.truth[chosen], poor, self.landmarks[chosen], tuple(self.names[i] for i in chosen))

    @property
    def digest(self) -> str:
        """SHA-256 of the pictures and their names: another one, other data."""
        found = hashlib.sha256("/".join(self.names).encode())
        for part in (self.truth, self.landmarks, *([] if self.poor is None else [self.poor])):
            found.update(part.contiguous().numpy().tobytes())
        return found.hexdigest()


def read_pairs(options: Pairs, size: int) -> PairSet:
    """Read and align the pairs of two folders: files belong together by their names without suffix.

    The face is found in the sharp photo and cut from both at the same place. Raises DataError for folders that do not
    match, PhotoError for a photo without a usable face.
    """
    sharp = photos_by_stem(options.dataroot_gt)
    poor = photos_by_stem(options.dataroot_lq) if options.dataroot_lq else None
    if poor is not None and poor.keys() != sharp.keys():
        lone = sorted(poor.keys() ^ sharp.keys())[0]
        holds, lacks = (options.dataroot_gt, options.dataroot_lq)[:: 1 if lone in sharp else -1]
        raise DataError(f"{lacks}: no photo '{lone}', which {holds} has; the two folders must hold the same names")
    cut = [read_pair(path, poor[stem] if poor else None, size, options.aligned) for stem, path in sharp.items()]
    truth, degraded, landmarks = zip(*cut, strict=True)
    return PairSet(torch.stack(truth), torch.stack(degraded) if poor else None, torch.stack(landmarks), tuple(sharp))


def photos_by_stem(folder: Path) -> dict[str, Path]:
    """The photos of a folder by name without suffix, in order. Raises DataError for none, or two of a name."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of photos")
    found: dict[str, Path] = {}
    for path in photos_in(folder):
        if path.stem in found:
            raise DataError(f"{path}: there is also {found[path.stem].name}; give them different names")
        found[path.stem] = path
    if not found:
        raise DataError(f"{folder}: no photos in this folder ({', '.join(sorted(PHOTO_SUFFIXES))})")
    return found


def read_pair(sharp: Path, poor: Path | None, size: int, aligned: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """(truth [3, size, size], degraded or None, landmarks [5, 2]) of one pair."""
    face = single_face(sharp, size, aligned=aligned)
    truth, landmarks = to_tensor(face.image), torch.as_tensor(face.landmarks, dtype=torch.float32)
    if poor is None:
        return truth, None, landmarks
    photo, other = load_photo(sharp), load_photo(poor)
    ratio = photo.width / other.width
    if abs(photo.height - ratio * other.height) > ratio or not 0.99 < ratio <= LARGEST_RATIO:
        raise PhotoError(f"{describe(poor)} is {other.width}x{other.height} and its partner {photo.width}x"
                         f"{photo.height}; both sides must show the same cut of the photo")
    if aligned:
        return truth, to_tensor(other.resize((size, size), Image.Resampling.BICUBIC)), landmarks
    in_photo = transform(face.landmarks, invert(face.matrix))
    return truth, to_tensor(crop_face(other, in_photo / ratio, size).image), landmarks


def hold_back(pairs: PairSet) -> tuple[PairSet, PairSet | None]:
    """(to train on, held out): the last pair is held back when there are three or more."""
    if len(pairs) < 3:
        return pairs, None
    return pairs.select(list(range(len(pairs) - 1))), pairs.select([len(pairs) - 1])


# --- drawing -----------------------------------------------------------------------------------------------------


def draw(pairs: PairSet, options: TrainPairs, degradation: Degradation, generator: torch.Generator) -> Batch:
    """A batch that depends on the generator's state alone; without degraded sides these are made here."""
    chosen = torch.randint(len(pairs), (options.batch_size_per_gpu,), generator=generator)
    sides = [pairs.truth[chosen]] if pairs.poor is None else [pairs.truth[chosen], pairs.poor[chosen]]
    matrix, shift = frames(len(chosen), options, generator)
    sides, landmarks = move(sides, pairs.landmarks[chosen], matrix, shift)
    sides = jitter(sides, options.color_jitter, generator)
    truth = sides[0]
    return truth, sides[1] if len(sides) == 2 else degradation(truth, generator), landmarks


def frames(count: int, options: TrainPairs, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Where each drawn picture looks in its photo: matrix [B, 2, 2] and shift [B, 2], in units of half a side.

    A point p of the new picture shows the point matrix p + shift of the photo. Everything is drawn whether it is
    wanted or not, so that one option does not change what another draws.
    """
    coins = torch.rand(count, 3, generator=generator) < 0.5  # mirrored, upside down, a quarter turn
    zoom, place = torch.rand(count, generator=generator), torch.rand(count, 2, generator=generator)
    low, high = options.resize_crop or (1.0, 1.0)
    scale = 1 / (low + (high - low) * zoom)  # share of the photo that is seen
    matrix = torch.eye(2).repeat(count, 1, 1)
    if options.use_hflip:
        matrix[coins[:, 0], 0] *= -1
    if options.use_rot:
        matrix[coins[:, 1], 1] *= -1
        matrix[coins[:, 2]] = matrix[coins[:, 2]].flip(1)
    return matrix * scale[:, None, None], (2 * place - 1) * (1 - scale).abs()[:, None]


def move(sides: list[Tensor], landmarks: Tensor, matrix: Tensor, shift: Tensor) -> tuple[list[Tensor], Tensor]:
    """The pictures [B, 3, S, S] through these frames (bicubic, mirrored at the border), landmarks along with them."""
    size = sides[0].shape[-1]
    grid = F.affine_grid(torch.cat((matrix, shift[..., None]), dim=2), list(sides[0].shape), align_corners=False)
    moved = [F.grid_sample(side, grid, "bicubic", "reflection", align_corners=False).clamp(-1, 1) for side in sides]
    points = 2 * landmarks / size - 1
    points = torch.linalg.solve(matrix, (points - shift[:, None]).transpose(1, 2)).transpose(1, 2)
    points = (points + 1) * size / 2
    mirrored = torch.linalg.det(matrix) < 0
    points[mirrored] = points[mirrored][:, LEFT_RIGHT]
    return moved, points


def jitter(sides: list[Tensor], options: ColorJitter, generator: torch.Generator) -> list[Tensor]:
    """Brightness and contrast by the same factors, contrast about the same grey (the truth's mean), on all sides."""
    draws = 2 * torch.rand(len(sides[0]), 2, generator=generator) - 1
    if not (options.brightness or options.contrast):
        return sides
    brightness = (1 + options.brightness * draws[:, 0])[:, None, None, None]
    contrast = (1 + options.contrast * draws[:, 1])[:, None, None, None]
    lit = [(side + 1) / 2 * brightness for side in sides]
    grey = lit[0].mean(dim=(1, 2, 3), keepdim=True)
    return [((side - grey) * contrast + grey).clamp(0, 1) * 2 - 1 for side in lit]
