"""What a device can do, and waiting for it."""

from __future__ import annotations

from functools import cache

import torch


@cache
def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 convolutions are native: where they are not they run, but slower than float32."""
    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def bf16_autocast(device: torch.device, wanted: bool = True) -> torch.autocast:
    """Autocast to bfloat16 where it is wanted and native; elsewhere everything stays as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_bf16(device))


def synchronise(device: torch.device) -> None:
    """Returns when the device has done all that it was given: before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
