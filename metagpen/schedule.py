"""How rates fall along a run."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, warmup: int, final: float) -> float:
    """Factor on every rate: linear over `warmup` steps, then half a cosine from 1 down to `final` at the last step."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
