"""What the names of a curve's methods say by themselves."""

from __future__ import annotations

import re

BASELINE = "generic"
CEILING = "other-photo"
FOLDER = "folder-"  # before the name of a method that is read from pictures


def rate_of(method: str) -> tuple[str, float]:
    """("lora-4", 16.0) of "lora-4-x16", a rival at so many times its rates; (method, 1.0) of another."""
    found = re.fullmatch(r"(.+)-x(\d+(?:\.\d+)?)", method)
    return (found[1], float(found[2])) if found else (method, 1.0)
