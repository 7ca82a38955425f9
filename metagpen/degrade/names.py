"""Degradations by name, as configurations and the command line give them."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .base import Degradation, MixedDegradation
from .bsrgan import BSRGANDegradation
from .gfpgan import GFPGANDegradation
from .heavy import HeavyDegradation
from .none import NoDegradation

#: What ``by_name("mixed")`` holds unless told otherwise.
DEFAULT_MIXTURE = {"heavy": 0.5, "gfpgan": 0.3, "bsrgan": 0.2}


def mixed(**parts: float | Mapping[str, Any]) -> MixedDegradation:
    """A mixture by names: ``mixed(heavy=0.5, gfpgan={"weight": 0.3, "grey": 0.0})``; without any, the default one.

    A number is the part's weight; a mapping holds its ``weight`` (default 1) and its own settings.
    """
    pairs = []
    for name, value in (parts or DEFAULT_MIXTURE).items():
        settings = dict(value) if isinstance(value, Mapping) else {"weight": value}
        pairs.append((settings.pop("weight", 1.0), by_name(name, **settings)))
    return MixedDegradation(pairs)


_BUILDERS = {
    "bsrgan": BSRGANDegradation,
    "gfpgan": GFPGANDegradation,
    "heavy": HeavyDegradation,
    "mixed": mixed,
    "none": NoDegradation,
}

#: Levels of damage that are measured under: of what, and with which settings.
LEVELS = {
    "moderate": ("bsrgan", {"scale": 1}),
    "hard": ("heavy", {"face_px": (16, 16)}),
    "extreme": ("heavy", {"face_px": (8, 8)}),
}

#: The names that `by_name` knows.
NAMES = tuple(sorted({*_BUILDERS, *LEVELS}))


def by_name(name: str, /, **settings: Any) -> Degradation:
    """The degradation of this name with these settings; `ConfigError` for a name or setting that does not exist.

    Names are known in any case: "BSRGAN" is "bsrgan".
    """
    name = name if name in NAMES else str(name).lower()
    if name not in NAMES:
        raise ConfigError(f"there is no degradation {name!r}{_nearest(name, NAMES)}; known: {', '.join(NAMES)}")
    kind, preset = LEVELS.get(name, (name, {}))
    builder, settings = _BUILDERS[kind], {**preset, **settings}
    if builder is not mixed:
        known = list(inspect.signature(builder).parameters)
        for key in settings:
            if key not in known:
                raise ConfigError(
                    f"degradation {name!r} has no setting {key!r}{_nearest(key, known)}; known: {', '.join(known)}"
                )
    return builder(**settings)


def full_size(parts: Mapping[str, Any]) -> MixedDegradation:
    """`by_name("mixed", **parts)` for whoever compares with the truth pixel by pixel: ConfigError for another scale."""
    found = by_name("mixed", **parts)
    if found.scale != 1:
        raise ConfigError(f"degradation: scale = {found.scale} makes smaller photos; restoring needs them at full size")
    return found


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(str(name).lower(), known, 1, 0.4)
    return f" (did you mean {close[0]!r}?)" if close else ""
