"""Passes over large maps as one: torch.compile, where it is wanted."""

from collections.abc import Callable
from typing import Any

import torch

CASES = 64  # every depth, size and batch is one; at torch's own limit of 8 the later ones would stay as they are


def fused(function: Callable[..., Any], wanted: bool) -> Callable[..., Any]:
    """The function, compiled if that is wanted (it needs a C++ compiler): the same numbers, up to rounding."""
    if not wanted:
        return function
    torch._dynamo.config.recompile_limit = max(CASES, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=False)
