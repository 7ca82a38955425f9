"""How much memory there is, and letting a process keep what it has freed when it computes on the CPU for long."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# parameters of glibc's mallopt(3)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
UNKNOWN = 2**31  # bytes that are taken to be free where nothing says


def keep_freed_memory() -> bool:
    """Tells glibc to serve large tensors from memory that was used before, instead of from fresh pages each time.

    By default every large tensor is a new mapping, whose pages the kernel clears one fault at a time. The price is that
    the process does not shrink. It is the process' decision, so the command line takes it and the library never does.
    Returns whether it took effect; elsewhere than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    wanted = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28))
    return all([mallopt(parameter, value) for parameter, value in wanted])


def free_memory(device: torch.device) -> int:
    """Bytes that could still be taken on a device: a GPU's own, else the machine's, or less where a control group
    (a container) limits it. Systems that do not say what is free are counted as half empty, or, where they do not say
    what they have either, as having 2 GiB."""
    if device.type == "cuda":
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # freed, not given back
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        try:
            available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (AttributeError, ValueError):  # Windows
            available = UNKNOWN
    return min(available, control_group_memory())


def control_group_memory(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes left under the limit of the process' control group (version 2), without one all there can be. Cached files
    that nobody has touched lately count as free: the kernel gives them up first."""
    try:
        limit, used, *parts = ((folder / name).read_text().strip()
                               for name in ("memory.max", "memory.current", "memory.stat"))
    except OSError:
        return sys.maxsize
    cached = dict(line.split() for line in parts[0].splitlines()).get("inactive_file", 0)
    return sys.maxsize if limit == "max" else max(0, int(limit) - int(used) + int(cached))
