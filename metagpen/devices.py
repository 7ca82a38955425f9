"""Which device, what it can do, and waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from .errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import nn

P, T = ParamSpec("P"), TypeVar("T")


def pick_device(name: str) -> str:
    """'auto' becomes 'cuda' where there is one, else 'cpu'. Raises DataError for a device that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        there = torch.empty(0, device=name).device.type != "meta"  # which holds no numbers
    except (RuntimeError, AssertionError, ValueError, ImportError):
        there = False
    if not there:
        raise DataError(f"device '{name}' is not available here; take auto or cpu")
    return name


def undisturbed(function: Callable[P, T]) -> Callable[P, T]:
    """The function, with gradients and in the precision that it sets itself, in the middle of whatever its caller is:
    no_grad, inference_mode, autocast."""

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        import torch

        # Around many steps, autocast would keep what it made of parameters that move meanwhile: no cache.
        plain = {"enabled": False, "cache_enabled": False}
        with (torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", **plain),
              torch.autocast("cuda", **plain)):
            return function(*args, **kwargs)

    return inside


@contextmanager
def one_thread() -> Iterator[None]:
    """For work whose roundings must not depend on how many threads share it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 convolutions are native: where they are not they run, but slower than float32."""
    import torch

    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def bf16_autocast(device: torch.device, wanted: bool = True) -> torch.autocast:
    """Autocast to bfloat16 where it is wanted and native; elsewhere everything stays as it is."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_bf16(device))


def halve_convolutions(network: nn.Module) -> nn.Module:
    """The frozen network, its convolutions' weights in bfloat16: what autocast would make of them again and again."""
    import torch

    for module in network.modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.ndim == 4:
            module.to(torch.bfloat16)
    return network


def synchronise(device: torch.device) -> None:
    """Returns when the device has done all that it was given: before a clock is read."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
