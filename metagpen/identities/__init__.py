"""Photos grouped by person: folders, public data sets, splits by identity, episodes, packing, shards, mining."""

from .celeba import celeba, celeba_hq, celeba_split
from .episodes import Episode, episode, fixed_episode, self_episode
from .ffhq import ffhq, ffhq_split
from .groups import read_groups, write_groups
from .lfw import lfw
from .listing import find_photos
from .mine import embed_photos, mine_identities, mining_quality, validated_threshold
from .packed import PackedPhotos, pack
from .people import LAYOUTS, People, Photo, load_crops, load_people, read_split, register_layout, split, write_split
from .shards import already_aligned, cut_by_landmarks, read_shards, write_shards
from .streamed import StreamedPhotos

__all__ = [
    "LAYOUTS",
    "Episode",
    "PackedPhotos",
    "People",
    "Photo",
    "StreamedPhotos",
    "already_aligned",
    "celeba",
    "celeba_hq",
    "celeba_split",
    "cut_by_landmarks",
    "embed_photos",
    "episode",
    "ffhq",
    "ffhq_split",
    "find_photos",
    "fixed_episode",
    "lfw",
    "load_crops",
    "load_people",
    "mine_identities",
    "mining_quality",
    "pack",
    "read_groups",
    "read_shards",
    "read_split",
    "register_layout",
    "self_episode",
    "split",
    "validated_threshold",
    "write_groups",
    "write_shards",
    "write_split",
]
