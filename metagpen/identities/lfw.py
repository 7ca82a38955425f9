"""Labeled Faces in the Wild: from a folder, or through scikit-learn's fetcher and its cache."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import DataError
from .people import People, register_layout


@register_layout("lfw")
def lfw(root: str | os.PathLike | None = None, *, funneled: bool = True, download: bool = True) -> People:
    """LFW's 250 x 250 pixel photos, a sub-folder per person.

    They are whole photos, not aligned crops, although they are square: cut them with a detector before use, see
    `write_shards`. root: the folder with a sub-folder per person; default: scikit-learn's cache (`$SCIKIT_LEARN_DATA`,
    else ~/scikit_learn_data), into which scikit-learn downloads the set when it is not there. funneled: the version
    turned upright (scikit-learn's default). download: False never asks the network.

    Raises DataError when the folder is missing, scikit-learn is not installed, or the download fails.
    """
    folder = Path(root) if root is not None else fetched(funneled, download)
    people = People.from_folder(folder)
    return People(people, set_name="lfw")


def fetched(funneled: bool, download: bool) -> Path:
    """The folder of LFW in scikit-learn's cache, filled when it must be. Raises DataError."""
    try:
        from sklearn.datasets import fetch_lfw_people, get_data_home
    except ImportError:
        raise DataError("without a folder, LFW is read through scikit-learn, which is not installed; "
                        "pip install scikit-learn, or give the folder") from None
    folder = Path(get_data_home()) / "lfw_home" / ("lfw_funneled" if funneled else "lfw")
    if not folder.is_dir():
        try:  # The fetcher returns small grey pictures; what is wanted here is what it leaves in its cache.
            fetch_lfw_people(funneled=funneled, download_if_missing=download, min_faces_per_person=100, resize=0.1)
        except OSError as error:
            raise DataError(f"scikit-learn could not provide LFW in '{folder}' ({error}); check the network, or give "
                            "the folder") from error
    return folder
