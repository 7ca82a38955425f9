"""The inner loop: `adapt` learns one person, `adapt_many` any number of them, several in one batch."""

from .config import AdaptConfig
from .draws import Album, album
from .loop import adapt, adapt_stream
from .many import adapt_many

__all__ = ["AdaptConfig", "Album", "adapt", "adapt_many", "adapt_stream", "album"]
