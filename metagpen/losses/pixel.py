"""Distances between pictures, pixel by pixel. Every loss here returns one value per image, [B]."""

from torch import Tensor


def l1(restored: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference of [B, 3, H, W] images, per image [B]."""
    return (restored - truth).abs().mean(dim=(1, 2, 3))


def gradient_l1(restored: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical finite differences, per image [B]: edges, not tones."""
    error = restored - truth
    horizontal = (error[..., :, 1:] - error[..., :, :-1]).abs().mean(dim=(1, 2, 3))
    vertical = (error[..., 1:, :] - error[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    return horizontal + vertical
