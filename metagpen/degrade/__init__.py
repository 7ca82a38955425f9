"""Sharp faces to poor ones, batched and seeded.

Every degradation is called the same way: ``degrade(images, generator)`` with ``[B, 3, H, W]`` RGB in [-1, 1] and a
`torch.Generator`; the generator's seed reproduces the batch exactly.
"""

from .base import Degradation, MixedDegradation
from .bsrgan import BSRGANDegradation
from .gfpgan import GFPGANDegradation
from .heavy import HeavyDegradation
from .names import NAMES, by_name, full_size
from .none import NoDegradation
from .pairs import PairsSummary, write_pairs

__all__ = [
    "NAMES",
    "BSRGANDegradation",
    "Degradation",
    "GFPGANDegradation",
    "HeavyDegradation",
    "MixedDegradation",
    "NoDegradation",
    "PairsSummary",
    "by_name",
    "full_size",
    "write_pairs",
]
