"""What can be measured cheaply on one aligned face: sharpness, pose, what is covered or cut off, likeness of pictures.

Everything here works on FFHQ-style crops and five landmarks; no network is asked.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from ..faces import crop_matrix, invert, transform

OVAL = (0.5, 0.6, 0.21, 0.28)
"""The face itself in an FFHQ-style crop, from brows to chin, as fractions of its side: centre x, y, half axes x, y."""

FLAT_WINDOW = 7
"""Side in pixels of the windows that count as flat or not, on a crop of VIEW pixels."""

VIEW = 128
"""Side in pixels of the crops on which flat areas and likeness are measured and faces are recognised."""

FLAT_LEVELS = 4
"""A window is flat when no channel of it spans more of the 256 levels: paint, censor bars, blown-out light."""

NOSE_DEPTH = 0.4
"""How far the nose's tip stands before the plane of eyes and mouth, over the distance from eyes to mouth: generic
heads of pose estimation have 0.33 to 0.42 (OpenCV's: 130 of 320 units)."""

THUMB, COARSE = 48, 6
"""Side in pixels at which two pictures are compared; the blur whose result is taken off before, since light and the
shape of a head are alike in many photos."""

GRAIN = 0.002
"""What rounding to 256 levels leaves in the finest octave of a grey picture in [-1, 1], alone and after alignment."""


def sharpness(crop: Tensor) -> float:
    """How much of the finest octave a crop [3, S, S] in [-1, 1] has, over that at an eighth or a sixteenth of its size.

    Only inside the face's oval. About 0.4 for sharp photos, 0.1 when they were reduced to half the crop's side and
    enlarged again, 0.05 after a quarter of it. Contrast does not matter; noise raises it. S: 32 or more.
    """
    grey = crop.float().cpu().mean(dim=0)[None, None]
    strengths = []
    for _ in range(5):
        half = F.interpolate(grey, scale_factor=0.5, mode="bicubic", antialias=True, align_corners=False)
        band = grey - F.interpolate(half, grey.shape[-2:], mode="bicubic", align_corners=False)
        strengths.append(band[0, 0][torch.from_numpy(oval(band.shape[-1]))].square().mean().sqrt())
        grey = half
    fine = (strengths[0].square() - GRAIN**2).clamp_min(0).sqrt()
    return float(fine / (max(strengths[3:]) + 1e-6))


def yaw(landmarks: np.ndarray) -> float:
    """How far a face is turned sideways, in degrees from -90 to 90; positive towards the picture's right.

    landmarks: [5, 2]. From the nose's offset from the middle of eyes and mouth; within some 10 degrees.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    eyes, mouth = points[:2].mean(axis=0), points[3:].mean(axis=0)
    down = mouth - eyes
    length = max(float(np.hypot(*down)), 1e-6)
    right = np.array([down[1], -down[0]]) / length
    offset = float((points[2] - (eyes + mouth) / 2) @ right)
    return math.degrees(math.asin(np.clip(offset / (NOSE_DEPTH * length), -1, 1)))


def roll(landmarks: np.ndarray) -> float:
    """How far a face is tilted in the picture, in degrees; positive clockwise. Alignment takes it out."""
    across = np.asarray(landmarks, dtype=np.float64)[1] - landmarks[0]
    return math.degrees(math.atan2(across[1], across[0]))


def oval(size: int) -> np.ndarray:
    """Which pixels [size, size] of an FFHQ-style crop are face rather than hair or background."""
    x, y, across, down = OVAL
    grid = (np.arange(size) + 0.5) / size
    return ((grid[None, :] - x) / across) ** 2 + ((grid[:, None] - y) / down) ** 2 <= 1


def face_outside(photo_size: tuple[int, int], landmarks: np.ndarray) -> float:
    """Share of the face's oval that lies beyond the borders of a photo of (width, height), in [0, 1]."""
    rows, columns = np.nonzero(oval(64))
    points = transform((np.stack([columns, rows], axis=1) + 0.5) / 64, invert(crop_matrix(landmarks, 1)))
    return float(1 - ((points >= 0) & (points < photo_size)).all(axis=1).mean())


def flat_share(crop: Image.Image) -> float:
    """Share of the face's oval without any structure, in [0, 1]. crop: RGB, square; looked at with VIEW pixels."""
    view = crop if crop.size == (VIEW, VIEW) else crop.resize((VIEW, VIEW), Image.Resampling.BOX)
    levels = torch.from_numpy(np.asarray(view.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)
    span = F.max_pool2d(levels, FLAT_WINDOW, 1) + F.max_pool2d(-levels, FLAT_WINDOW, 1)
    windows = (span <= FLAT_LEVELS).all(dim=0)[None].float()
    flat = F.max_pool2d(F.pad(windows, [FLAT_WINDOW - 1] * 4), FLAT_WINDOW, 1)[0].bool().numpy()
    return float(flat[oval(VIEW)].mean())


def picture_print(picture: Image.Image) -> np.ndarray:
    """What `likeness` compares of whole photos: unit vectors [2, N], their fine grey structure and its mirror image."""
    return _print(picture, np.ones((THUMB, THUMB), dtype=bool))


def face_print(crop: Image.Image) -> np.ndarray:
    """What `likeness` compares of aligned faces: the same inside the oval, so that background and frame do not count.
    """
    return _print(crop, oval(THUMB))


def _print(picture: Image.Image, inside: np.ndarray) -> np.ndarray:
    small = picture.convert("L").resize((THUMB, THUMB), Image.Resampling.BOX)
    fine = np.asarray(small, dtype=np.float64) - np.asarray(small.filter(ImageFilter.GaussianBlur(COARSE)), np.float64)
    both = np.stack([fine[inside], fine[:, ::-1][inside]])
    both = both - both.mean(axis=1, keepdims=True)
    return both / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-9)


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of two prints, mirrored or not, in [-1, 1]: about 1 for copies of one photo."""
    return float((other @ one[0]).max())
