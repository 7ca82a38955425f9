"""Photo -> aligned face and back: loading, detection (MTCNN), FFHQ-style alignment, paste-back."""

from .align import (
    FFHQ_LANDMARKS,
    AlignedFace,
    crop_face,
    crop_matrix,
    ffhq_quad,
    invert,
    outside_share,
    paste_back,
    rim_mask,
    transform,
)
from .detect import Face, detect, detect_many, single_face
from .photo import (
    PHOTO_SUFFIXES,
    PhotoSource,
    describe,
    load_photo,
    load_with_extras,
    photo_format,
    save_photo,
    to_pil,
    to_tensor,
    with_extras,
)

__all__ = [
    "FFHQ_LANDMARKS",
    "PHOTO_SUFFIXES",
    "AlignedFace",
    "Face",
    "PhotoSource",
    "crop_face",
    "crop_matrix",
    "describe",
    "detect",
    "detect_many",
    "ffhq_quad",
    "invert",
    "load_photo",
    "load_with_extras",
    "outside_share",
    "paste_back",
    "photo_format",
    "rim_mask",
    "save_photo",
    "single_face",
    "to_pil",
    "to_tensor",
    "transform",
    "with_extras",
]
