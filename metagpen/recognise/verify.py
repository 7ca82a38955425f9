"""Verification accuracy in the manner of LFW: same person or not, by a threshold on the cosine.

Pairs are fixed by a seed; the threshold for each of ten folds is the best one on the other nine.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError


def pairs(people: list[str], most: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Index pairs [N, 2] and whether each shows one person [N].

    people: the name behind each photo. All same-person pairs, at most `most` of them, and as many pairs of
    two people, both drawn by `seed`. Raises DataError when either kind is missing.
    """
    names = np.unique(people, return_inverse=True)[1]  # numbers are compared sooner than strings
    every = np.stack(np.triu_indices(len(names), 1), axis=1)
    same = names[every[:, 0]] == names[every[:, 1]]
    if not same.any() or same.all():
        raise DataError("verification needs at least two people, and two photos of one of them")
    random = np.random.default_rng(seed)
    count = min(most, int(same.sum()), int((~same).sum()))
    chosen = np.concatenate([random.permutation(np.flatnonzero(kind))[:count] for kind in (same, ~same)])
    chosen = random.permutation(chosen)
    return every[chosen], same[chosen]


def best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """The threshold with the most correct answers `score > threshold`; halfway between two scores."""
    order = np.argsort(scores)
    ranked, truth = scores[order], same[order]
    # Cutting after the k lowest: they are called different, the rest the same.
    correct = np.concatenate([[0], np.cumsum(~truth)]) + truth.sum() - np.concatenate([[0], np.cumsum(truth)])
    edges = np.concatenate([[ranked[0] - 1], (ranked[1:] + ranked[:-1]) / 2, [ranked[-1] + 1]])
    possible = np.concatenate([[True], ranked[1:] > ranked[:-1], [True]])  # no threshold parts equal scores
    return float(edges[np.where(possible, correct, -1).argmax()])


def accuracy(scores: np.ndarray, same: np.ndarray, folds: int = 10) -> tuple[float, float]:
    """Mean and standard error over the folds of the share of right answers."""
    parts = np.arange(len(scores)) % folds
    right = []
    for fold in range(folds):
        test = parts == fold
        threshold = best_threshold(scores[~test], same[~test])
        right.append(((scores[test] > threshold) == same[test]).mean())
    return float(np.mean(right)), float(np.std(right, ddof=1) / np.sqrt(folds))


def verification(embeddings: Tensor, people: list[str], most: int = 3000, seed: int = 0) -> dict[str, float]:
    """Accuracy, mean cosines and number of pairs for unit embeddings [N, D] of photos of `people` [N]."""
    index, same = pairs(people, most, seed)
    left, right = (embeddings[torch.from_numpy(column)] for column in index.T)
    scores = (left * right).sum(1).double().cpu().numpy()
    mean, error = accuracy(scores, same)
    return {"accuracy": mean, "standard_error": error, "cosine_same": float(scores[same].mean()),
            "cosine_different": float(scores[~same].mean()), "pairs": len(scores)}
