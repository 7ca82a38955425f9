"""Null space: what an input already fixes comes from the generic model, what it leaves open from the person.

With A a low-pass down-sampling and A⁺ its pseudo-inverse, x = A⁺A·generic + (I − A⁺A)·personal. Whatever the person
is, A·x = A·generic: seen from far enough away, the restoration is the generic one (Wang et al. 2022, "GAN prior based
null-space learning for consistent super-resolution", and 2023, DDNM, which put the photo itself in generic's place).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError

SIDE = 16
"""Pixels across a face that count as fixed by the input: heavy degradation leaves 8 to 16."""


def null_space(generic: Tensor, personal: Tensor, side: int | None = None) -> Tensor:
    """x = A⁺A·generic + (I − A⁺A)·personal for images [B, 3, S, S]; not clamped: values may leave [-1, 1] a little.

    side: how many pixels across A keeps, 1 to S, where S gives `generic`; default SIDE, and at most S / 8, so that
    small models too leave something to the person. Raises ConfigError for another.
    """
    side = default_side(generic.shape[-1]) if side is None else side
    if generic.shape != personal.shape:
        raise ConfigError(f"two equal batches are needed, not {tuple(generic.shape)} and {tuple(personal.shape)}")
    return personal + enlarge(reduce(generic - personal, side), generic.shape[-1])


def default_side(size: int) -> int:
    """The default of `null_space` for pictures of this side."""
    return max(1, min(SIDE, size // 8))


def reduce(images: Tensor, side: int = SIDE) -> Tensor:
    """A: images [..., S, S] -> [..., side, side], antialiased bicubic along rows and columns."""
    rows = reduction(images.shape[-1], side)[0].to(images)
    return rows @ images @ rows.T


def enlarge(images: Tensor, size: int) -> Tensor:
    """A⁺: images [..., side, side] -> [..., size, size], the smallest pictures that `reduce` takes to these."""
    columns = reduction(size, images.shape[-1])[1].to(images)
    return columns @ images @ columns.T


@lru_cache(maxsize=8)
def reduction(size: int, side: int) -> tuple[Tensor, Tensor]:
    """A [side, size] of one axis and its pseudo-inverse A⁺ [size, side], in double precision.

    A has full row rank, so A A⁺ = I. Along both axes A is the Kronecker product of this one with itself, and the
    pseudo-inverse of that is the product of the pseudo-inverses.
    """
    if not 1 <= side <= size:
        raise ConfigError(f"side = {side}: the null space of a {size} px model needs 1 to {size} pixels")
    with torch.inference_mode(False):  # kept for those who take gradients, too
        lines = torch.eye(size, dtype=torch.float64)[None, None]
        forward = F.interpolate(lines, (side, size), mode="bicubic", antialias=True, align_corners=False)[0, 0]
        return forward, torch.linalg.pinv(forward)
