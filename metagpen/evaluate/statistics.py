"""Means over identities with bootstrap intervals; gains paired by identity.

The identity, not the photo, is the unit: photos of one person are alike, so resampling photos would make the
intervals far too narrow. Values come as one number per person (the mean over that person's queries).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % percentile bootstrap interval over `identities` people."""

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


def bootstrap_mean(values: Mapping[str, float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean over people and its 95 % interval: people are drawn with replacement, percentiles 2.5 and 97.5 taken.

    The same seed and the same number of people give the same draws; people are sorted by name first.
    """
    if not values:
        raise ValueError("no identities to average over")
    x = np.array([values[name] for name in sorted(values)], dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    lo, hi = np.percentile(x[draws].mean(axis=1), [2.5, 97.5])
    return Interval(float(x.mean()), float(lo), float(hi), len(x))


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
    interval = bootstrap_mean(difference, seed, resamples)
    losses = [-d if higher_is_better else d for d in difference.values()]
    worse = sum(loss > 0 for loss in losses)
    return Gain(interval.mean, interval.lo, interval.hi, interval.identities, worse, max(0.0, *losses))
