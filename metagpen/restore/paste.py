"""Laying restored faces back into their photo so that no seam shows: agreeing colours, soft masks, nobody twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from kornia.filters import gaussian_blur2d
from PIL import Image
from torch import Tensor

from ..errors import PhotoError
from ..faces import AlignedFace, invert, paste_back, transform

FEATHER = 0.3  # share of the way from rim to centre over which a face fades in
ROUNDNESS = 3.0  # exponent of the mask's outline: 2 a circle, larger nearer to the square
OVERLAP = 0.4  # width, in half sides, of the strip that two neighbouring faces share
COLOUR_SCALE = 1 / 10  # sigma, in sides, below which colours are the restoration's own
COLOURLESS = 3 / 127.5  # channels that differ by less are grey

Background = Callable[[Image.Image], Image.Image]


def agree_in_colour(restored: Tensor, seen: Tensor) -> Tensor:
    """Restored faces with the colours and the light of the photo around them: [F, 3, S, S] in [-1, 1] -> the same.

    seen: the faces as they were cut. What is wider than COLOUR_SCALE comes from them, everything finer from the
    restoration; a colourless photo gets a colourless face.
    """
    sigma = COLOUR_SCALE * seen.shape[-1]
    kernel = 2 * int(2 * sigma) + 1
    agreed = restored + gaussian_blur2d(seen - restored, (kernel, kernel), (sigma, sigma), border_type="reflect")
    grey = (seen.amax(dim=1) - seen.amin(dim=1)).flatten(1).amax(dim=1) <= COLOURLESS
    return torch.where(grey[:, None, None, None], agreed.mean(dim=1, keepdim=True), agreed).clamp(-1, 1)


def paste_faces(photo: Image.Image, faces: Sequence[AlignedFace], restored: Sequence[Image.Image],
                background: Background | None = None) -> Image.Image:
    """The photo with the restored crops in the place of its faces; larger where `background` enlarges it.

    background: called with the RGB photo, returns it restored, of any size with the same proportions.
    """
    canvas = enlarged(photo, background) if background else photo
    scale = np.array([canvas.width / photo.width, canvas.height / photo.height])
    masks = soft_masks(faces)
    for face, image, mask in zip(faces, restored, masks, strict=True):
        matrix = face.matrix.copy()
        matrix[:, :2] /= scale
        canvas = paste_back(canvas, image, matrix, mask)
    return canvas


def enlarged(photo: Image.Image, background: Background) -> Image.Image:
    """What `background` makes of the photo. Raises PhotoError when that is no picture of the same proportions."""
    result = background(photo.copy())
    if not isinstance(result, Image.Image):
        raise PhotoError(f"background must return a PIL image, not {type(result).__name__}")
    if abs(result.width * photo.height - result.height * photo.width) > max(result.width, result.height,
                                                                           photo.width, photo.height):
        raise PhotoError(f"background made {result.width}x{result.height} of {photo.width}x{photo.height}: the "
                         "proportions must stay")
    return result.convert("RGB")


def soft_masks(faces: Sequence[AlignedFace]) -> list[np.ndarray]:
    """For every face the weights [S, S] in [0, 1] with which its crop is laid into the photo.

    1 in the middle, falling smoothly to 0 before the rim; and where the crop of a neighbour reaches, only up to the
    line half way between the two.
    """
    masks = []
    for face in faces:
        size = face.image.width
        axis = (np.arange(size) + 0.5) / size * 2 - 1
        points = np.stack(np.meshgrid(axis, axis), -1)  # from the crop's centre, in its half sides
        distance = (np.abs(points) ** ROUNDNESS).sum(-1) ** (1 / ROUNDNESS)
        mask = smooth_step((1 - distance) / FEATHER)
        own = np.hypot(*np.moveaxis(points, -1, 0))
        reach = own[mask > 0].max()
        for other in faces:
            if other is face:
                continue
            centre = transform(transform(np.full((1, 2), other.image.width / 2), invert(other.matrix)), face.matrix)
            centre = 2 * centre[0] / size - 1
            if far_apart(centre, reach, face.source_side / other.source_side):
                continue
            theirs = np.hypot(*np.moveaxis(points - centre, -1, 0)) * face.source_side / other.source_side
            mask = mask * smooth_step((theirs - own) / OVERLAP + 0.5)
        masks.append(mask)
    return masks


def far_apart(centre: np.ndarray, reach: float, ratio: float) -> bool:
    """Whether a neighbour takes nothing of a mask, by the triangle inequality.

    centre: the neighbour's, [2]; reach: how far the mask goes from its own; both in half sides of the mask's crop, of
    which the neighbour's has 1 / ratio. A point of the mask is at most `reach` from its own centre, and at least
    (|centre| - reach) * ratio of the neighbour's half sides from the neighbour's.
    """
    return (np.hypot(*centre) - reach) * ratio - reach > OVERLAP / 2


def smooth_step(x: np.ndarray) -> np.ndarray:
    """0 below 0, 1 above 1, half a cosine between."""
    return 0.5 - 0.5 * np.cos(np.pi * np.clip(x, 0, 1))
