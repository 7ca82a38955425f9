"""Face recognisers: from an FFHQ-style crop to a unit embedding of the person."""

from .loading import load
from .recogniser import InputSpec, Recogniser
from .verify import verification

__all__ = ["InputSpec", "Recogniser", "load", "verification"]
