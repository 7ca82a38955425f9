"""Photos grouped by person: folders, splits by identity, episodes, and packing into one tensor."""

from .episodes import Episode, episode, fixed_episode
from .packed import PackedPhotos, pack
from .people import LAYOUTS, People, Photo, load_people, read_split, register_layout, split, write_split

__all__ = [
    "LAYOUTS",
    "Episode",
    "PackedPhotos",
    "People",
    "Photo",
    "episode",
    "fixed_episode",
    "load_people",
    "pack",
    "read_split",
    "register_layout",
    "split",
    "write_split",
]
