"""Passes over large maps as one: torch.compile, where it is wanted."""

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..errors import ConfigError

CASES = 64  # every depth, size and batch is one; at torch's own limit of 8 the later ones would stay as they are


def fused(function: Callable[..., Any], wanted: bool) -> Callable[..., Any]:
    """The function, compiled if that is wanted (it needs a C++ compiler): the same numbers, up to rounding."""
    if not wanted:
        return function
    torch._dynamo.config.recompile_limit = max(CASES, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=False)


def check_compiles() -> None:
    """Raises ConfigError where nothing can be compiled for this processor."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX") or usual  # as torch looks for it
    if shutil.which(compiler) is None:
        raise ConfigError(f"compile: needs a C++ compiler, and there is no {compiler} here; install one, name yours in "
                          "$CXX, or leave compile out")
