"""Means over identities with 95 % intervals; gains paired by identity.

The identity, not the photo, is the unit: photos of one person are alike, so resampling photos would make the
intervals far too narrow. Values come as one number per person (the mean over that person's queries).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.stats import t

RESAMPLES = 10_000
FEW = 10  # people, below whom a bootstrap is too narrow: of five, its intervals hold the truth four times in five


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval over `identities` people."""

    mean: float
    lo: float
    hi: float
    identities: int


@dataclass(frozen=True)
class Gain(Interval):
    """A mean paired difference; for how many identities it goes against the metric's good direction, and how far it
    goes for the worst of them (0 when it does for nobody)."""

    worse: int
    worst: float


def mean_interval(values: Mapping[str, float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean over people and its 95 % interval: by the percentile bootstrap, people drawn with replacement; of fewer than
    FEW people by Student's t; of one person the value itself, which says nothing about others.

    The same seed and the same number of people give the same draws; people are sorted by name first.
    """
    if not values:
        raise ValueError("no identities to average over")
    x = np.array([values[name] for name in sorted(values)], dtype=np.float64)
    mean = float(x.mean())
    if len(x) < FEW:
        half = 0.0 if len(x) == 1 else float(t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
        return Interval(mean, mean - half, mean + half, len(x))
    lo, hi = np.percentile(x[people_drawn(len(x), seed, resamples)].mean(axis=1), [2.5, 97.5])
    return Interval(mean, float(lo), float(hi), len(x))


@lru_cache(maxsize=2)  # a table asks for the same over and over
def people_drawn(people: int, seed: int, resamples: int) -> np.ndarray:
    """The bootstrap's draws with replacement, [resamples, people]."""
    return np.random.default_rng(seed).integers(people, size=(resamples, people))


def paired_gain(
    values: Mapping[str, float],
    baseline: Mapping[str, float],
    *,
    higher_is_better: bool = True,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Gain:
    """Mean of values[person] - baseline[person] with its interval; both must hold the same people."""
    if set(values) != set(baseline):
        raise ValueError(
            f"paired gains need the same people on both sides; only one side has {sorted(set(values) ^ set(baseline))}"
        )
    difference = {name: values[name] - baseline[name] for name in values}
    interval = mean_interval(difference, seed, resamples)
    losses = [-d if higher_is_better else d for d in difference.values()]
    worse = sum(loss > 0 for loss in losses)
    return Gain(interval.mean, interval.lo, interval.hi, interval.identities, worse, max(0.0, *losses))
