"""The inner loop: `adapt` learns one person, `adapt_many` any number of them, several in one batch."""

from .loop import AdaptConfig, Album, adapt, adapt_stream, album
from .many import adapt_many

__all__ = ["AdaptConfig", "Album", "adapt", "adapt_many", "adapt_stream", "album"]
