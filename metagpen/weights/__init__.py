"""Where models come from: the one in the package, published GPEN weights by name, or any checkpoint file."""

from .catalogue import Published, available, fetch
from .files import gpen_from_state, load, read_state

__all__ = ["Published", "available", "fetch", "gpen_from_state", "load", "read_state"]
