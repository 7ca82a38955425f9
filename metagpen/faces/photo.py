"""Photos in and out: whatever a user hands over becomes one upright, 8-bit RGB PIL image, or a clear
PhotoError.

Inside the library pictures are float tensors [3, H, W] in [-1, 1]; `to_tensor` and `to_pil` cross that
border.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import PhotoError

PhotoSource = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor

PHOTO_SUFFIXES = frozenset(".jpg .jpeg .png .webp .bmp .tif .tiff .gif .ppm .pgm".split())
"""File names that folder readers take for photos (compared in lower case)."""

SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def load_photo(source: PhotoSource) -> Image.Image:
    """Returns `source` as an upright RGB image with 8 bits per channel.

    Accepted:

    - a path (str or path-like) of any format PIL reads; of animated files the first frame;
    - a PIL image of any mode;
    - a numpy array [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4] (RGBA): uint8, uint16, or float in [0,
    1];
    - a torch tensor [3, H, W]: float in [-1, 1] (values beyond are clamped), or uint8.

    The EXIF orientation is applied, 16-bit values are scaled (65535 becomes 255), grey becomes three equal
    channels, and transparent pixels are laid over white. Embedded colour profiles are ignored.

    Raises PhotoError, naming the file and what to do, for everything else.
    """
    if isinstance(source, (str, os.PathLike)):
        return _from_file(Path(source))
    if isinstance(source, Image.Image):
        return _decode(source, describe(source))
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, torch.Tensor):
        return _from_tensor(source)
    raise PhotoError("a photo must be a path, a PIL image, a numpy array or a torch tensor, "
                     f"not {type(source).__name__}")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """PIL image [H, W] -> float32 tensor [3, H, W] in [-1, 1]."""
    pixels = np.array(image if image.mode == "RGB" else _to_rgb(image))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1.0)


def to_pil(tensor: torch.Tensor) -> Image.Image:
    """Tensor [3, H, W] in [-1, 1] -> RGB image; values are clamped, then rounded to 256 levels."""
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise PhotoError(f"to_pil wants one RGB tensor [3, H, W], not {list(tensor.shape)}")
    levels = tensor.detach().float().clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def describe(source: PhotoSource) -> str:
    """What to call `source` in a message: its file where one is known."""
    if isinstance(source, (str, os.PathLike)):
        return f"photo '{os.fspath(source)}'"
    if isinstance(source, Image.Image):
        filename = getattr(source, "filename", "")
        return f"photo '{filename}'" if filename else f"the given image ({source.width}x{source.height})"
    shape = list(getattr(source, "shape", []))
    return f"the given {'tensor' if isinstance(source, torch.Tensor) else 'array'} {shape}"


def _from_file(path: Path) -> Image.Image:
    name = describe(path)
    try:
        if path.is_dir():
            raise PhotoError(f"{name} is a folder; give the photos in it one by one")
        if not path.exists():
            raise PhotoError(f"{name} does not exist; check the path (working directory: {Path.cwd()})")
        if path.stat().st_size == 0:
            raise PhotoError(f"{name} is empty (0 bytes); copy or download it again")
        with Image.open(path) as image:
            return _decode(image, name)
    except UnidentifiedImageError:
        raise PhotoError(f"{name} is not a picture in a format that can be read here; "
                         "convert it to JPEG or PNG (HEIC and RAW files need that too)") from None
    except PermissionError:
        raise PhotoError(f"{name} may not be read; check its permissions") from None
    except PhotoError:
        raise
    except Image.DecompressionBombError as error:
        raise PhotoError(f"{name} is too large to open ({error}); scale it down first") from None
    except Exception as error:  # decoders raise nearly anything: SyntaxError, struct.error, EOFError
        raise _damaged(name, error) from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), name)
    except PhotoError:
        raise
    except Exception as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> PhotoError:
    return PhotoError(f"{name} is damaged or cut short ({error}); copy or download it again, or leave it out")


def _to_rgb(image: Image.Image, name: str = "the given image") -> Image.Image:
    if image.mode in SIXTEEN_BIT:
        return _grey16(np.asarray(image), name)
    if image.mode == "F":
        return _from_array(np.asarray(image), name)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _grey16(values: np.ndarray, name: str) -> Image.Image:
    if values.min() < 0 or values.max() > 65535:
        raise PhotoError(f"{name} holds integers outside 0..65535; save it with 8 or 16 bits per channel")
    return Image.fromarray(_eight_bit(values)).convert("RGB")


def _eight_bit(values: np.ndarray) -> np.ndarray:
    """0..65535 -> 0..255, rounded (65535 = 257 * 255)."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_array(array: np.ndarray, name: str = "") -> Image.Image:
    name = name or describe(array)
    grey = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if not (grey.ndim == 2 or (grey.ndim == 3 and grey.shape[-1] in (3, 4))) or grey.size == 0:
        raise PhotoError(f"{name} is not a picture; give [H, W], [H, W, 3] or [H, W, 4], channels last")
    if grey.dtype.kind == "u" and grey.dtype.itemsize == 2:
        grey = _eight_bit(grey)
    elif np.issubdtype(grey.dtype, np.floating):
        if not np.isfinite(grey).all() or grey.min() < 0 or grey.max() > 1:
            raise PhotoError(f"{name} holds floats outside [0, 1] or NaN; scale it to [0, 1] or give uint8")
        grey = np.rint(grey * 255).astype(np.uint8)
    elif grey.dtype != np.uint8:
        raise PhotoError(f"{name} has dtype {array.dtype}; give uint8, uint16, or float in [0, 1]")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(grey)), name)


def _from_tensor(tensor: torch.Tensor) -> Image.Image:
    name = describe(tensor)
    if tensor.ndim != 3 or tensor.shape[0] != 3 or tensor.numel() == 0:
        raise PhotoError(f"{name} is not one RGB picture; give [3, H, W] in [-1, 1]")
    if tensor.dtype == torch.uint8:
        return Image.fromarray(tensor.detach().permute(1, 2, 0).contiguous().cpu().numpy())
    if not tensor.is_floating_point():
        raise PhotoError(f"{name} has dtype {tensor.dtype}; give float in [-1, 1], or uint8")
    if not torch.isfinite(tensor).all() or tensor.abs().max() > 4:  # a network overshoots 1 by less
        raise PhotoError(f"{name} holds NaN or values far outside [-1, 1]; scale it to [-1, 1]")
    return to_pil(tensor)
