"""Photos in and out: whatever a user hands over becomes one upright, 8-bit RGB PIL image, or a clear
PhotoError.

Inside the library pictures are float tensors [3, H, W] in [-1, 1]; `to_tensor` and `to_pil` cross that
border.
"""

from __future__ import annotations

import math
import os
import struct
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..atomic import whole_file
from ..errors import DataError, PhotoError

T = TypeVar("T")
PhotoSource = str | os.PathLike | Image.Image | np.ndarray | torch.Tensor

PHOTO_SUFFIXES = frozenset(".jpg .jpeg .png .webp .bmp .tif .tiff .gif .ppm .pgm".split())
"""File names that folder readers take for photos (compared in lower case)."""

SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")
GREY = ("1", "L", "LA", "La", "F", *SIXTEEN_BIT)
TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")

EXIF_IFD, GPS_IFD = 0x8769, 0x8825
JPEG_EXIF = 65533  # bytes that a JPEG can hold of it
LAYOUT_TAGS = frozenset([0x0112, 0xA002, 0xA003, 0xA005, *range(254, 267), *range(273, 282), 284, 301, *range(317, 326),
                         330, *range(338, 342), 347, *range(512, 522), *range(529, 533), 700, 34377, 34675, 37724])
"""EXIF and TIFF tags that say how the pixels of one file lie in it, their number, or how to turn them, or that hold
Photoshop's layers and thumbnail: not true of any other file."""


@dataclass(frozen=True)
class Extras:
    """What a photo has beside its colours, for the picture that takes its place.

    covered: the upright RGBA picture where some of it is transparent, else None. grey: the photo has no colours.
    info: its EXIF (upright, without thumbnail), ICC profile and resolution, as `PIL.Image.Image.info` holds them.
    """

    covered: Image.Image | None = None
    grey: bool = False
    info: dict[str, Any] = field(default_factory=dict)


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
        return _from_file(Path(source), _decode)
    if isinstance(source, Image.Image):
        return _decode(source, describe(source))
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, torch.Tensor):
        return _from_tensor(source)
    raise PhotoError("a photo must be a path, a PIL image, a numpy array or a torch tensor, "
                     f"not {type(source).__name__}")


def photo_list(photos: Iterable[PhotoSource]) -> list[PhotoSource]:
    """The photos of one person, from whatever holds them: a list, an iterator, a tensor [K, 3, H, W].

    Raises PhotoError for what holds none, and for a single photo, which would be taken for its rows.
    """
    if isinstance(photos, (str, bytes, os.PathLike, Image.Image)) or getattr(photos, "ndim", 0) in (2, 3):
        raise PhotoError(f"expected a list of photos of one person, got {describe(photos)} alone; put it in a list")
    try:
        return list(photos)
    except TypeError as error:
        raise PhotoError(f"expected a list of photos of one person, not {type(photos).__name__} ({error})") from error


def load_with_extras(source: PhotoSource) -> tuple[Image.Image, Extras]:
    """`load_photo`, and what else the photo has; arrays and tensors have nothing else."""
    if isinstance(source, (str, os.PathLike)):
        return _from_file(Path(source), _decode_with_extras)
    if isinstance(source, Image.Image):
        return _decode_with_extras(source, describe(source))
    return load_photo(source), Extras()


def with_extras(image: Image.Image, extras: Extras) -> Image.Image:
    """A picture made from a photo, RGB, with what the photo had beside its colours: RGB, RGBA, L or LA.

    image: as `load_photo` gave the photo, changed; or larger, when the transparency is enlarged with it. Laid over
    white the result is `image`, and where that is the photo unchanged, so are the colours below the transparency.
    """
    result = image.convert("RGB") if extras.covered is None else _uncovered(image.convert("RGB"), extras.covered)
    if extras.grey:
        result = result.convert("L" if extras.covered is None else "LA")
    result.info = dict(extras.info)
    return result


def save_photo(image: Image.Image, path: str | Path) -> Path:
    """Write the picture with its EXIF, ICC profile and resolution, whole or not at all; the suffix says the format.

    Transparency is laid over white where the format has none. Raises DataError for a suffix, or a picture, that cannot
    be written.
    """
    path = Path(path)
    kind = photo_format(path)
    options = {key: image.info[key] for key in ("exif", "icc_profile", "dpi") if image.info.get(key)}
    if kind in ("JPEG", "WEBP"):
        options["quality"] = 95
    if kind in ("JPEG", "BMP", "PPM") and image.mode in TRANSPARENT:
        image = _to_rgb(image)
    if kind == "JPEG" and len(options.get("exif", b"")) > JPEG_EXIF:
        size = len(options.pop("exif"))
        warnings.warn(f"{path}: its EXIF is too long for a JPEG ({size} bytes) and is left out", stacklevel=2)
    with whole_file(path) as temporary:
        try:
            image.save(temporary, kind, **options)
        except (ValueError, OverflowError, struct.error) as error:
            raise DataError(f"{path}: cannot be written as {kind} ({error})") from None
    return path


def is_photo(path: Path) -> bool:
    """Whether a file is there whose suffix is one of PHOTO_SUFFIXES, and whose name does not hide it (".name")."""
    return path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".") and path.is_file()


def photos_in(folder: Path) -> list[Path]:
    """The photos of a folder by name, those of its sub-folders not. Raises OSError when there is no such folder."""
    return sorted(filter(is_photo, folder.iterdir()))


def photo_format(path: Path) -> str:
    """PIL's name of the format that the file's suffix stands for. Raises DataError for one not in PHOTO_SUFFIXES."""
    if path.suffix.lower() not in PHOTO_SUFFIXES:
        raise DataError(f"{path}: pictures cannot be written as '{path.suffix}'; end the name in one of "
                        f"{', '.join(sorted(PHOTO_SUFFIXES))}")
    return Image.registered_extensions()[path.suffix.lower()]


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


def _from_file(path: Path, decode: Callable[[Image.Image, str], T]) -> T:
    name = describe(path)
    try:
        if path.is_dir():
            raise PhotoError(f"{name} is a folder; give the photos in it one by one")
        if not path.exists():
            raise PhotoError(f"{name} does not exist; check the path (working directory: {Path.cwd()})")
        if path.stat().st_size == 0:
            raise PhotoError(f"{name} is empty (0 bytes); copy or download it again")
        with Image.open(path) as image:
            most = Image.MAX_IMAGE_PIXELS  # of which PIL only warns, up to twice as many
            if most and image.width * image.height > most:
                raise PhotoError(f"{name} is too large to open ({image.width}x{image.height}, more than {most} "
                                 "pixels); scale it down first")
            return decode(image, name)
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
    return _converted(image, name)[0]


def _decode_with_extras(image: Image.Image, name: str) -> tuple[Image.Image, Extras]:
    rgb, upright = _converted(image, name)
    exif = _kept_exif(image, name)
    transparent = upright.mode in TRANSPARENT or "transparency" in upright.info
    grey = upright.mode in GREY
    info = {"exif": exif, "icc_profile": _kept_profile(upright, grey),
            "dpi": _kept_resolution(upright)}
    covered = upright.convert("RGBA") if transparent else None
    return rgb, Extras(covered, grey, {key: value for key, value in info.items() if value})


def _kept_exif(image: Image.Image, name: str) -> bytes:
    """The EXIF for an upright picture in another file: no layout, no thumbnail of what it showed before."""
    try:
        found, kept = image.getexif(), Image.Exif()
        kept.update({tag: value for tag, value in found.items() if tag not in LAYOUT_TAGS | {EXIF_IFD, GPS_IFD}})
        for section in (EXIF_IFD, GPS_IFD):
            values = {tag: value for tag, value in found.get_ifd(section).items() if tag not in LAYOUT_TAGS}
            if values:
                kept[section] = kept.get_ifd(section)
                kept[section].update(values)
        return kept.tobytes() if len(kept) else b""
    except Exception as error:  # hand-made EXIF breaks its readers in every way
        warnings.warn(f"{name}: its EXIF cannot be read ({error}) and is left out", stacklevel=2)
        return b""


def _kept_resolution(image: Image.Image) -> tuple[float, float] | None:
    """Dots per inch, if the two are numbers that a file can hold."""
    found = image.info.get("dpi")
    return found if found and all(math.isfinite(value) and 0 < value < 1e5 for value in found) else None


def _kept_profile(image: Image.Image, grey: bool) -> bytes:
    """The colour profile, if it is for the colours that the picture will be written in (CMYK becomes RGB)."""
    profile = image.info.get("icc_profile") or b""
    return profile if profile[16:20] == (b"GRAY" if grey else b"RGB ") else b""


def _uncovered(image: Image.Image, covered: Image.Image) -> Image.Image:
    """The RGBA picture that, laid over white, is `image`, with the transparency of `covered`."""
    same = image.size == covered.size
    covered = covered if same else covered.resize(image.size, Image.Resampling.LANCZOS)
    below, wanted = np.asarray(covered, dtype=np.float32), np.asarray(image, dtype=np.float32)
    share = below[..., 3:] / 255
    solved = np.where(share > 0, (wanted - 255 * (1 - share)) / np.maximum(share, 1 / 255), below[..., :3])
    if same:
        untouched = (np.asarray(_to_rgb(covered)) == np.asarray(image)).all(axis=2, keepdims=True)
        solved = np.where(untouched, below[..., :3], solved)
    pixels = np.concatenate([np.rint(np.clip(solved, 0, 255)), below[..., 3:]], axis=2)
    return Image.fromarray(pixels.astype(np.uint8), "RGBA")


def _converted(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image]:
    """The upright picture as RGB, and in its own mode."""
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
        return _to_rgb(upright, name), upright
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
    if image.mode in TRANSPARENT or "transparency" in image.info:
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


def crop_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that counts as an aligned crop: float [3, H, W] in [-1, 1], or uint8, which is scaled. PhotoError for
    another."""
    _check_tensor(tensor)
    return tensor.float().div(127.5).sub(1) if tensor.dtype == torch.uint8 else tensor.float()


def _from_tensor(tensor: torch.Tensor) -> Image.Image:
    _check_tensor(tensor)
    if tensor.dtype == torch.uint8:
        return Image.fromarray(tensor.detach().permute(1, 2, 0).contiguous().cpu().numpy())
    return to_pil(tensor)


def _check_tensor(tensor: torch.Tensor) -> None:
    name = describe(tensor)
    if tensor.ndim != 3 or tensor.shape[0] != 3 or tensor.numel() == 0:
        raise PhotoError(f"{name} is not one RGB picture; give [3, H, W] in [-1, 1]")
    if tensor.dtype == torch.uint8:
        return
    if not tensor.is_floating_point():
        raise PhotoError(f"{name} has dtype {tensor.dtype}; give float in [-1, 1], or uint8")
    if not torch.isfinite(tensor).all() or tensor.abs().max() > 4:  # a network overshoots 1 by less
        raise PhotoError(f"{name} holds NaN or values far outside [-1, 1]; scale it to [-1, 1]")
