"""Inner steps as a CUDA graph: the twin of `loop.PlainSteps` for a GPU, which waits for a small model's launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..graphs import Captured
from ..recognise.align import View
from .optimise import BETAS, Parameters, adam_direction


class RecordedSteps:
    """Adam's steps from `parameters` [P, ...], in place: the same sums as `loop.PlainSteps`, in tensors that stay where
    they are.

    objective: (parameters, truth, poor, View) -> loss [P]. moving: names of what has a rate. recorded: False runs the
    function that would be recorded, on any device.
    """

    def __init__(self, objective: Callable[..., Tensor], parameters: Parameters, moving: list[str],
                 recorded: bool = True):
        self.taken, self.step = 0, InPlace(objective, parameters, moving)
        self.run = Captured(self.step) if recorded else self.step

    @property
    def parameters(self) -> Parameters:
        return self.step.parameters

    def __call__(self, support: tuple[Tensor, Tensor, View], rates: Mapping[str, Tensor | float]) -> Tensor:
        """The loss [P] before a step on (truth, poor, where the recogniser looks) at these rates."""
        truth, poor, where = support
        self.taken, self.step.size = self.taken + 1, where.size
        corrections = truth.new_tensor([1 - beta ** self.taken for beta in BETAS])
        given = [torch.as_tensor(rates[name], dtype=truth.dtype).to(truth.device) for name in self.step.moving]
        return self.run(truth, poor, where.grid, corrections, *given)["loss"].clone()


class InPlace:
    """`optimise.Adam` in place, as a function of tensors alone. It does not know its recording, so that both go, and
    with them the recording's memory, as soon as nobody needs them."""

    def __init__(self, objective: Callable[..., Tensor], parameters: Parameters, moving: list[str]):
        self.objective, self.moving, self.size = objective, moving, 0
        self.parameters = {name: value.detach().clone() for name, value in parameters.items()}
        for name in moving:
            self.parameters[name].requires_grad_()
        self.mean, self.square = ({name: torch.zeros_like(self.parameters[name], requires_grad=False)
                                   for name in moving} for _ in range(2))

    def __call__(self, truth: Tensor, poor: Tensor, grid: Tensor, corrections: Tensor,
                 *rates: Tensor) -> dict[str, Tensor]:
        """corrections: 1 - β^t of both moments."""
        loss = self.objective(self.parameters, truth, poor, View(grid, self.size))
        gradients = torch.autograd.grad(loss.sum(), [self.parameters[name] for name in self.moving])
        with torch.no_grad():
            for name, g, rate in zip(self.moving, gradients, rates, strict=True):
                mean, square = self.mean[name], self.square[name]
                direction, *moments = adam_direction(g, mean, square, *corrections.unbind())
                mean.copy_(moments[0])
                square.copy_(moments[1])
                self.parameters[name].sub_(rate * direction)
        return {"loss": loss.detach()}
