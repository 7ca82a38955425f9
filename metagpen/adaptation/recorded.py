"""Inner steps as a CUDA graph: the twin of `loop.PlainSteps` for a GPU, which waits for a small model's launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..graphs import Captured
from ..recognise.align import View
from .optimise import BETAS, EPS

Parameters = dict[str, Tensor]


class RecordedSteps:
    """Adam's steps from `parameters` [P, ...], in place: the same sums as `loop.PlainSteps`, in tensors that stay where
    they are.

    objective: (parameters, truth, poor, View) -> loss [P]. moving: names of what has a rate. recorded: False runs the
    function that would be recorded, on any device.
    """

    def __init__(self, objective: Callable[..., Tensor], parameters: Parameters, moving: list[str],
                 recorded: bool = True):
        self.objective, self.moving, self.taken = objective, moving, 0
        self.parameters = {name: value.detach().clone() for name, value in parameters.items()}
        for name in moving:
            self.parameters[name].requires_grad_()
        self.mean, self.square = ({name: torch.zeros_like(self.parameters[name], requires_grad=False)
                                   for name in moving} for _ in range(2))
        self.record: Callable[[Any], Any] = Captured if recorded else lambda function: function
        self.updates: dict[int, Callable[..., dict[str, Tensor]]] = {}

    def __call__(self, support: tuple[Tensor, Tensor, View], rates: Mapping[str, Tensor | float]) -> Tensor:
        """The loss [P] before a step on (truth, poor, where the recogniser looks) at these rates."""
        truth, poor, where = support
        self.taken += 1
        corrections = truth.new_tensor([1 - beta ** self.taken for beta in BETAS])
        given = [torch.as_tensor(rates[name], dtype=truth.dtype).to(truth.device) for name in self.moving]
        if where.finer not in self.updates:  # it is work and not a value, and nearly always the same
            self.updates[where.finer] = self.record(lambda *inputs: self.update(where.finer, *inputs))
        return self.updates[where.finer](truth, poor, where.grid, corrections, *given)["loss"].clone()

    def update(self, finer: int, truth: Tensor, poor: Tensor, grid: Tensor, corrections: Tensor,
               *rates: Tensor) -> dict[str, Tensor]:
        """`optimise.Adam` in place; corrections: 1 - β^t of both moments."""
        loss = self.objective(self.parameters, truth, poor, View(grid, finer))
        gradients = torch.autograd.grad(loss.sum(), [self.parameters[name] for name in self.moving])
        (first, second), (one, two) = BETAS, corrections.unbind()
        with torch.no_grad():
            for name, g, rate in zip(self.moving, gradients, rates, strict=True):
                m = self.mean[name].copy_(torch.lerp(g, self.mean[name], first))
                s = self.square[name].copy_(torch.lerp(g * g, self.square[name], second))
                self.parameters[name].sub_(rate * (m / one / ((s / two).sqrt() + EPS)))
        return {"loss": loss.detach()}
