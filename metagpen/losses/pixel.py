"""Distances between pictures, pixel by pixel. Every loss here returns one value per image, [B]."""

from torch import Tensor


def l1(restored: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference of [B, 3, H, W] images, per image [B]."""
    return (restored - truth).abs().mean(dim=(1, 2, 3))


def chroma_l1(restored: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference of colours apart from brightness, per image [B].

    Terms that see brightness alone (a recogniser's) leave colours to whatever comes with them; this holds them.
    """
    error = restored - truth
    return (error - luma(error)).abs().mean(dim=(1, 2, 3))


def luma(x: Tensor) -> Tensor:
    """RGB [B, 3, H, W] -> its brightness (BT.601) [B, 1, H, W]; linear, so a difference's is the differences'."""
    red, green, blue = x.unbind(dim=1)  # numbers and not a tensor, which would have to be brought to the device
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def gradient_l1(restored: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical finite differences, per image [B]: edges, not tones."""
    error = restored - truth
    horizontal = (error[..., :, 1:] - error[..., :, :-1]).abs().mean(dim=(1, 2, 3))
    vertical = (error[..., 1:, :] - error[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    return horizontal + vertical
