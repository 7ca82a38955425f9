"""Pseudo-identities: photos of nobody in particular grouped by a recogniser, so that FFHQ has people with many photos.

The recogniser is the caller's: mining takes a callable from crops to embeddings, and knows no network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from rich.progress import Progress

from ..errors import DataError
from .people import People, Photo
from .streamed import StreamedPhotos

Embed = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Crops [B, 3, size, size] in [-1, 1] and their landmarks [B, 5, 2] in pixels -> embeddings [B, D]; for instance the
method `embed` of a `metagpen.recognise.Recogniser`."""

THRESHOLDS = {"embedded": (0.55, 1000)}
"""By the recogniser's name: a validated threshold, and for how many photos at most (docs/datasets.md says on what)."""

LARGEST_CHAIN = 20_000  # photos: their distances take 6.4 GB (float64, twice)
MOST_PAIRS = 50_000_000  # above the threshold: 0.8 GB
ROWS_AT_ONCE = 512


def validated_threshold(recogniser: str, photos: int) -> float:
    """The threshold for a recogniser by its name, to mine so many photos with.

    Pairs of strangers grow with the square of the photos, pairs of friends do not: what is precise among hundreds is
    not among thousands. Raises DataError where none was validated, or not for so many photos.
    """
    advice = "give a threshold, chosen with metagpen.identities.mining_quality on people whose names are known"
    if recogniser not in THRESHOLDS:
        raise DataError(f"no threshold was validated for the recogniser '{recogniser}' (only for: "
                        f"{', '.join(THRESHOLDS)}); {advice}")
    threshold, most = THRESHOLDS[recogniser]
    if photos > most:
        raise DataError(f"the threshold {threshold:g} of the recogniser '{recogniser}' was validated for {most} "
                        f"photos, not for {photos}, among which more strangers are alike; {advice}, and rather a "
                        "better recogniser")
    return threshold


def mine_identities(photos: Iterable[Photo], embed: Embed, threshold: float, *, size: int = 128, batch: int = 64,
                    workers: int = 1, device: str | torch.device = "cpu", progress: bool = False) -> People:
    """Photos grouped so that each group shows, in all likelihood, one person.

    photos: aligned crops, as `People.photos` or `find_photos` give them. embed: see `Embed`; it is called with crops on
    `device`. threshold: mean cosine from which two groups become one (see `group`). size: side in pixels at which the
    crops are embedded. Every photo is in one group, alone if need be: `People.min_photos(2)` keeps the real ones. A
    group is called "mined_000012" after the position of its first photo.

    Raises PhotoError and DataError as `StreamedPhotos` does, and DataError for a threshold that chains everything.
    """
    check_threshold(threshold)  # before an hour of embedding
    photos = list(photos)
    labels = group(embed_photos(photos, embed, size=size, batch=batch, workers=workers, device=device,
                                progress=progress), threshold)
    members: dict[int, list[int]] = {}
    for position, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(position)
    return People({f"mined_{found[0]:06}": [photos[i] for i in found] for found in members.values()}, "mined")


@torch.no_grad()
def embed_photos(photos: Sequence[Photo], embed: Embed, *, size: int = 128, batch: int = 64, workers: int = 1,
                 device: str | torch.device = "cpu", progress: bool = False) -> torch.Tensor:
    """Unit embeddings [N, D], float32 on the CPU, of aligned crops. Arguments as in `mine_identities`."""
    crops = StreamedPhotos(People({"everybody": photos}), size, workers)
    chunks = torch.arange(len(crops)).split(batch)
    with Progress(disable=not progress) as bar:  # ends with the block, as `track` alone would not after an error
        found = [embed(crops.batch(index).to(device), crops.landmarks[index].to(device)).float().cpu()
                 for index in bar.track(chunks, description="embedding")]
    return torch.nn.functional.normalize(torch.cat(found), dim=1)


def check_threshold(threshold: float) -> None:
    if not 0 < threshold < 1:
        raise DataError(f"the threshold is a cosine between 0 and 1, not {threshold:g}")


def group(embeddings: torch.Tensor, threshold: float) -> np.ndarray:
    """Labels [N] of groups of unit embeddings [N, D], numbered as they first appear.

    Average linkage: the two groups with the highest mean cosine between their members become one, again and again,
    until no mean reaches `threshold`. Raises DataError for a threshold outside (0, 1), or so low that the pairs above
    it, or chains of them, do not fit into memory.
    """
    check_threshold(threshold)
    chains = _chains(embeddings, threshold)
    labels = np.empty(len(embeddings), dtype=np.int64)
    count = 0
    for chain in chains:
        own = _average_linkage(embeddings[torch.from_numpy(chain)], threshold)
        labels[chain] = count + own
        count += own.max() + 1
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def mining_quality(embeddings: torch.Tensor, people: Sequence[object], threshold: float) -> dict[str, float]:
    """How right `group` is about unit embeddings [N, D] of photos of known `people` [N]: to choose a threshold by.

    precision: share of the pairs that were put together and do show one person (NaN without any); recall: share of the
    pairs of one person that were put together; `pairs` were put together, `wrong` of them wrongly; groups: those with
    two photos or more. All pairs are compared: for thousands of photos, not for hundreds of thousands.
    """
    labels = group(embeddings, threshold)
    names = np.unique(np.asarray(people), return_inverse=True)[1]
    pairs, true = _pairs_within(labels), _pairs_within(names)
    right = _pairs_within(labels * (names.max() + 1) + names)
    return {"precision": right / pairs if pairs else float("nan"), "recall": right / true if true else float("nan"),
            "pairs": pairs, "wrong": pairs - right, "groups": int((np.bincount(labels) > 1).sum())}


def _pairs_within(labels: np.ndarray) -> int:
    counts = np.unique(labels, return_counts=True)[1]
    return int((counts * (counts - 1) // 2).sum())


def _chains(embeddings: torch.Tensor, threshold: float) -> list[np.ndarray]:
    """Positions of the photos that chains of pairs above the threshold connect.

    Groups whose mean cosine reaches the threshold hold such a pair, so no group of average linkage leaves its chain:
    the distance matrix of everything, 40 GB for FFHQ, is never needed.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count, found = len(embeddings), 0
    links = []
    for start in range(0, count, ROWS_AT_ONCE):
        near = torch.nonzero(embeddings[start:start + ROWS_AT_ONCE] @ embeddings[start:].T >= threshold) + start
        links.append(near[near[:, 0] < near[:, 1]].numpy())
        found += len(links[-1])
        if found > MOST_PAIRS:
            raise DataError(f"more than {MOST_PAIRS} pairs of photos reach a threshold of {threshold:g}; raise it")
    rows, columns = np.concatenate(links).T
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    order = np.argsort(labels, kind="stable")
    chains = np.split(order, np.cumsum(np.bincount(labels))[:-1])
    if (longest := max(map(len, chains))) > LARGEST_CHAIN:
        raise DataError(f"a threshold of {threshold:g} chains {longest} of {count} photos together; raise it")
    return chains


def _average_linkage(embeddings: torch.Tensor, threshold: float) -> np.ndarray:
    """Labels [N], from 0, of the groups within one chain."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(embeddings) < 3:
        return np.zeros(len(embeddings), dtype=np.int64)  # one photo, or a pair above the threshold
    vectors = embeddings.double()
    distances = (1 - vectors @ vectors.T).clamp(min=0).fill_diagonal_(0).numpy()
    tree = linkage(squareform(distances, checks=False), method="average")
    return fcluster(tree, 1 - threshold, criterion="distance") - 1
