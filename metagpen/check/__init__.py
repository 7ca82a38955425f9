"""Looking before learning: are these photos of one person, good enough, and where will personalisation not help?"""

from .album import AlbumReport, PhotoReport, check_album
from .limits import Limit, face_limits, identity_limits, no_face, people_instead, photo_limits

__all__ = ["AlbumReport", "Limit", "PhotoReport", "check_album", "face_limits", "identity_limits", "no_face",
           "people_instead", "photo_limits"]
