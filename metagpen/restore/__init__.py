"""Whole photos: find the faces, match them to known Persons, restore each, paste them back."""

from .matching import FaceWarning, Gallery
from .null_space import null_space
from .photo import FoundFace, RestoredPhoto, restore_photo, sweep

__all__ = ["FaceWarning", "FoundFace", "Gallery", "RestoredPhoto", "null_space", "restore_photo", "sweep"]
