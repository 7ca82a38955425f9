"""The inner loop: `adapt` learns one person, `adapt_many` several in one batch."""

from .loop import AdaptConfig, Album, adapt, adapt_many, adapt_stream, album

__all__ = ["AdaptConfig", "Album", "adapt", "adapt_many", "adapt_stream", "album"]
