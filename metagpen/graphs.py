"""CUDA graphs: a step of fixed shape recorded once and played again, without Python and without a launch per kernel.

A small network on a fast GPU waits for the processor that tells it what to do: a training step of a 128 px model has
some thousand kernels of a few microseconds. Recorded as a graph they start one after the other by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

WARM_UP = 3  # calls that run as they are, on a stream of their own, before one is recorded


class Captured:
    """A function of tensors to a dict of tensors, whose work depends on nothing but their shapes, on a CUDA device.

    For each set of shapes the first calls run it as it is; then it is recorded, and every call plays the recording,
    with the given values in the place of those that were there. What it returns is overwritten by the next call. It
    must not wait for the device or bring anything to it, draw random numbers, or depend on Python values that change;
    the gradients it leaves behind must be forgotten (set to None) inside it, before the backward pass. `function` is
    the plain twin.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]]):
        self.function = function
        self.recordings: dict[tuple[torch.Size, ...], Recording] = {}

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        shapes = tuple(value.shape for value in inputs)
        recording = self.recordings.setdefault(shapes, Recording(self.function))
        with torch.cuda.device(inputs[0].device):
            return recording(*inputs)


class Recording:
    """`Captured` for inputs of the same shapes."""

    def __init__(self, function: Callable[..., dict[str, Tensor]]):
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return self._warm_up(*inputs) if self.calls <= WARM_UP else self._play(*inputs)

    def _warm_up(self, *inputs: Tensor) -> dict[str, Tensor]:
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            outputs = self.function(*inputs)
        here.wait_stream(aside)
        return outputs

    def _play(self, *inputs: Tensor) -> dict[str, Tensor]:
        if self.graph is None:
            self.inputs, graph = [value.clone() for value in inputs], torch.cuda.CUDAGraph()
            # other threads pin memory for batches to come meanwhile, which would count as a mistake otherwise
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
            self.graph = graph
        for mine, value in zip(self.inputs, inputs, strict=True):
            mine.copy_(value, non_blocking=True)
        self.graph.replay()
        return self.outputs


def make_capturable(optimiser: Optimizer, device: torch.device, wanted: bool = True) -> Optimizer:
    """The optimiser with its rates and counters where a recording finds them, on the device; or, if that is not wanted,
    as it is made by default."""
    for group in optimiser.param_groups:
        group["capturable"] = wanted
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if wanted else rate
    for state in optimiser.state.values():
        if "step" in state:
            state["step"] = state["step"].to(device if wanted else "cpu")
    optimiser._warned_capturable_if_run_uncaptured = True  # torch would, of the calls before the recording
    return optimiser


def set_rate(group: dict[str, Any], rate: float) -> None:
    """The rate of a parameter group, also where a recording reads it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
