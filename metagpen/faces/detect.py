"""Finding faces: facenet-pytorch's MTCNN (Zhang et al. 2016), whose weights come inside its package."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageFilter

from ..compat import ensure_torchvision
from ..devices import undisturbed
from ..errors import PhotoError
from .align import FFHQ_LANDMARKS, AlignedFace, crop_face, outside_share
from .photo import PhotoSource, describe, load_photo

if TYPE_CHECKING:
    from facenet_pytorch import MTCNN

SIDES = (1024, 2048)  # longer side for detection: first look, and second look for small faces in large photos
MIN_SIDE = 320  # smaller photos are enlarged: MTCNN places landmarks better on faces of 50 px and more
MARGIN = 0.25  # grey rim for photos filled by one face, as a share of the longer side
MIN_SCORE = 0.9
SOFT_SIDES = ((1024, 1.0), (512, 1.0), (320, 1.0), (1280, 4.0))  # at most and, times the photo's own: blurred looks
SOFT_SIGMA = 3.0  # of that blur, in pixels there: blocks and noise of ruined faces go, what MTCNN sees of them stays
SOFT_SCORE = 0.7  # least score of a face found so; MTCNN itself gives none below

MIN_CROP_SIDE = 48
"""Smallest usable face: side of its crop in photo pixels. The eyes are a quarter of that apart, here 12 px,
about the smallest face that MTCNN finds reliably."""
MAX_OUTSIDE = 0.35
"""Largest share of the crop that may lie outside the photo."""


@dataclass(frozen=True, eq=False)  # arrays have no single answer to ==
class Face:
    """A detected face: box [4] x0, y0, x1, y1 and landmarks [5, 2] in photo pixels; score in [0, 1]."""

    box: np.ndarray
    landmarks: np.ndarray
    score: float

    def visible_area(self, photo_size: tuple[int, int]) -> float:
        """Area in square pixels of that part of the box which lies on a photo of (width, height)."""
        corners = np.clip(self.box.reshape(2, 2), 0, photo_size)
        return float(np.prod(corners[1] - corners[0]))


@dataclass(frozen=True)
class Look:
    """One way to look at a photo. longest: at most so many pixels on its longer side. scale: enlarged so many times up
    to there. margin: see MARGIN. sigma: of a blur, in the pixels looked at. score: least that counts."""

    longest: int
    scale: float = 1.0
    margin: float = 0.0
    sigma: float = 0.0
    score: float = MIN_SCORE

    def side(self, image: Image.Image) -> int:
        """The longer side at which it shows the photo."""
        return int(np.clip(self.scale * max(image.size), MIN_SIDE, self.longest))


LOOKS = (Look(SIDES[0]), Look(SIDES[1]), Look(SIDES[0], margin=MARGIN))
SOFT_LOOKS = tuple(Look(*side, sigma=SOFT_SIGMA, score=SOFT_SCORE) for side in SOFT_SIDES)


def detect(image: Image.Image, device: str | torch.device = "cpu", degraded: bool = False) -> list[Face]:
    """Faces of an RGB photo, largest (by the visible part of the box) first; an empty list when there is none."""
    return detect_many([image], device, degraded)[0]


def detect_many(images: list[Image.Image], device: str | torch.device = "cpu",
                degraded: bool = False) -> list[list[Face]]:
    """`detect` for several photos; photos of equal size go through the networks together, 16 at a time.

    A photo in which nothing is found is looked at again: first larger, if it had been reduced; then, if there still is
    nothing, with a grey rim around it (a face that fills the whole photo needs that). degraded: last of all blurred, at
    several sizes, where faces of a dozen pixels are found whose blocks and noise hide them otherwise; a little of what
    is found so is no face.
    """
    found: list[list[Face]] = [[] for _ in images]
    shown: list[set[tuple[int, float, float]]] = [set() for _ in images]
    for look in LOOKS + (SOFT_LOOKS if degraded else ()):
        views = [(look.side(image), look.margin, look.sigma) for image in images]
        missed = [i for i, view in enumerate(views) if not found[i] and view not in shown[i]]
        for i, faces in zip(missed, _look([images[i] for i in missed], look, device), strict=True):
            found[i] = faces
            shown[i].add(views[i])
    return found


def single_face(source: PhotoSource, size: int, aligned: bool = False, device: str | torch.device = "cpu",
                min_crop_side: float = MIN_CROP_SIDE) -> AlignedFace:
    """The one face of a photo as a size x size crop.

    source: anything load_photo takes. aligned: the photo already is a square FFHQ-style crop; it is only
    resized and gets the mean landmarks. min_crop_side: smallest native crop side in photo pixels.

    Of several faces the largest is taken, with a warning. Raises PhotoError, naming the photo, when it
    shows no face, or the face is too small, or more than 35 % of its crop lies outside the photo.
    """
    photo, name = load_photo(source), describe(source)
    if aligned:
        return _already_aligned(photo, size, name)
    faces = detect(photo, device)
    if not faces:
        raise PhotoError(f"{name} shows no face that can be found; use a photo with a clear, upright face, "
                         "or say that it already is an aligned crop")
    if len(faces) > 1:
        warnings.warn(f"{name} shows {len(faces)} faces; the largest is used "
                      "(cut the photo if another one is meant)", stacklevel=2)
    try:
        return usable_face(photo, faces[0].landmarks, size, min_crop_side)
    except PhotoError as error:
        raise PhotoError(f"the face in {name} cannot be used ({error}); use a photo that shows the whole face, and "
                         "shows it large") from None


def usable_face(photo: Image.Image, landmarks: np.ndarray, size: int, smallest: float) -> AlignedFace:
    """A face of an RGB photo as a size x size crop. Raises PhotoError, which says why and names no photo, where the
    landmarks do not lie on the photo, a side of the crop has fewer than `smallest` photo pixels, or more than 35 % of
    it lies outside the photo."""
    face = crop_face(photo, landmarks, size)
    if face.source_side < smallest:
        raise PhotoError(f"too small: its crop has {face.source_side:.0f} px, at least {smallest:.0f} are needed")
    outside = outside_share(photo, landmarks)
    if outside > MAX_OUTSIDE:
        raise PhotoError(f"cut off: {outside:.0%} of its crop lies outside the photo")
    return face


def _already_aligned(photo: Image.Image, size: int, name: str) -> AlignedFace:
    if photo.width != photo.height:
        raise PhotoError(f"{name} is {photo.width}x{photo.height}; an aligned crop must be square")
    scale = size / photo.width
    image = photo if photo.width == size else photo.resize((size, size), Image.Resampling.LANCZOS)
    return AlignedFace(image, np.array([[scale, 0, 0], [0, scale, 0]]), FFHQ_LANDMARKS * size)


@undisturbed
def _look(images: list[Image.Image], look: Look, device: str | torch.device) -> list[list[Face]]:
    """One pass of MTCNN over photos brought to a workable size, with boxes and landmarks in photo pixels."""
    prepared = [_prepare(image, look) for image in images]
    found: list[list[Face]] = [[] for _ in images]
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, (canvas, _, _) in enumerate(prepared):
        by_size.setdefault(canvas.size, []).append(i)
    for indices in by_size.values():
        for start in range(0, len(indices), 16):
            batch = indices[start:start + 16]
            results = _mtcnn(str(device)).detect([prepared[i][0] for i in batch], landmarks=True)
            for i, boxes, scores, points in zip(batch, *results, strict=True):
                _, scale, offset = prepared[i]
                faces = [] if boxes is None else _faces(boxes, scores, points, scale, offset, look.score)
                found[i] = sorted(faces, key=lambda face: -face.visible_area(images[i].size))
    return found


def _prepare(image: Image.Image, look: Look) -> tuple[Image.Image, np.ndarray, float]:
    """Canvas for MTCNN, with: canvas pixels = photo pixels * scale [2] + offset."""
    factor = look.side(image) / max(image.size)
    size = [max(round(n * factor), 1) for n in image.size]
    scaled = image.convert("RGB").resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    if look.sigma:
        scaled = scaled.filter(ImageFilter.GaussianBlur(look.sigma))
    offset = round(look.margin * max(size))
    width, height = (max(n + 2 * offset, 48) for n in size)  # MTCNN fails on strips thinner than a face
    canvas = Image.new("RGB", (width, height), (128, 128, 128))
    canvas.paste(scaled, (offset, offset))
    return canvas, np.array(size) / np.array(image.size), float(offset)


def _faces(boxes: np.ndarray, scores: np.ndarray, points: np.ndarray, scale: np.ndarray, offset: float,
           least: float) -> list[Face]:
    return [Face(((np.asarray(box, dtype=np.float64).reshape(2, 2) - offset) / scale).ravel(),
                 (np.asarray(five, dtype=np.float64) - offset) / scale, float(score))
            for box, score, five in zip(boxes, scores, points, strict=True) if score >= least]


@lru_cache(maxsize=4)
def _mtcnn(device: str) -> MTCNN:
    ensure_torchvision()
    from facenet_pytorch import MTCNN

    return MTCNN(keep_all=True, device=torch.device(device)).eval()
