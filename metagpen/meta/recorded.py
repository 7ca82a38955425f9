"""The gradient of an inner step as a CUDA graph. In first order it is a constant, so that it may come from a recording,
which a small model's launches do not hold up. The outer gradient, and what depends on the rates, stay autograd's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..graphs import Captured
from ..person.adapter import Parameters


class RecordedGradient:
    """The gradients of one objective: the twin of `engines.plain_gradient`.

    objective: (parameters, *tensors) -> loss [P], of tensors alone; what else it reads must stay where it is. names: of
    all parameters; moving: of those that inner steps change. recorded: False runs the function that would be recorded,
    on any device.
    """

    def __init__(self, objective: Callable[..., Tensor], names: Sequence[str], moving: Sequence[str],
                 recorded: bool = True):
        self.function = GradientOfTensors(objective, list(names), list(moving))
        self.run = Captured(self.function) if recorded else self.function

    def __call__(self, parameters: Parameters, support: tuple[Tensor, ...],
                 names: Iterable[str]) -> Parameters:
        found = self.run(*(parameters[name].detach() for name in self.function.names), *support)
        return {name: found[name].clone() for name in names}  # the next call overwrites them


class GradientOfTensors:
    """What is recorded. It does not know its recording, so that both go as soon as nobody needs them."""

    def __init__(self, objective: Callable[..., Tensor], names: list[str], moving: list[str]):
        self.objective, self.names, self.moving = objective, names, moving

    def __call__(self, *tensors: Tensor) -> dict[str, Tensor]:
        count = len(self.names)
        parameters = {name: value.detach().requires_grad_(name in self.moving)
                      for name, value in zip(self.names, tensors[:count], strict=True)}
        loss = self.objective(parameters, *tensors[count:])
        found = torch.autograd.grad(loss.sum(), [parameters[name] for name in self.moving])
        return dict(zip(self.moving, found, strict=True))
