"""Inner steps as a CUDA graph: the twin of `steps.PlainSteps` for a GPU, which waits for a small model's launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..graphs import Captured
from ..recognise.align import View
from .optimise import BETAS, Parameters, Rates, adam_direction


class RecordedSteps:
    """Adam's steps from `parameters` [P, ...], in place: the same sums as `steps.PlainSteps`, in tensors that stay
    where they are.

    objective: (parameters, truth, poor, View) -> loss [P]. What has a rate moves; where that changes, a step is
    recorded anew. recorded: False runs the function that would be recorded, on any device.
    """

    def __init__(self, objective: Callable[..., Tensor], parameters: Parameters, recorded: bool = True):
        self.objective, self.recorded = objective, recorded
        self.parameters = {name: value.detach().clone() for name, value in parameters.items()}
        self.taken: Counter[str] = Counter()
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.step: InPlace | None = None

    def __call__(self, support: tuple[Tensor, Tensor, View], rates: Rates) -> Tensor:
        """The loss [P] before a step on (truth, poor, where the recogniser looks) at these rates."""
        truth, poor, where = support
        if self.step is None or self.step.moving != list(rates):
            self.begin(list(rates))
        self.taken.update(list(rates))  # of a mapping it would add the values
        self.step.size = where.size
        corrections = truth.new_tensor([[1 - beta ** self.taken[name] for beta in BETAS] for name in rates])
        return self.run(truth, poor, where.grid, corrections, self.flat_rates(rates))["loss"].clone()

    def begin(self, moving: list[str]) -> None:
        """From here on these move; each goes on with the moments that it had."""
        self.step = self.run = None  # with the recording's memory, before another is made
        for name, value in self.parameters.items():
            value.requires_grad_(name in moving)
        known = [self.moments.get(name) or (torch.zeros_like(self.parameters[name], requires_grad=False),) * 2
                 for name in moving]
        moments = [flat(own) for own in zip(*known, strict=True)]
        self.step = InPlace(self.objective, self.parameters, moving, *moments)
        self.run = Captured(self.step) if self.recorded else self.step
        self.moments |= {name: (mean, square) for name, mean, square in zip(
            moving, *(self.step.parts(own) for own in moments), strict=True)}

    def flat_rates(self, rates: Rates) -> Tensor:
        """A rate for each that moves; or, where some have several, for each of their numbers."""
        like = self.step.mean
        if not any(isinstance(rate, Tensor) for rate in rates.values()):
            return like.new_tensor(list(rates.values()))
        tensors = {name: torch.as_tensor(rate).to(like) for name, rate in rates.items()}
        if all(rate.numel() == 1 for rate in tensors.values()):
            return flat(list(tensors.values()))
        return flat([rate.expand_as(self.parameters[name]) for name, rate in tensors.items()])


class InPlace:
    """`optimise.Adam` in place, as a function of tensors alone; on all that moves at once, which takes a dozen kernels
    where a dozen for each would take longer than a small model. It does not know its recording, so that both go, and
    with them the recording's memory, as soon as nobody needs them.

    mean, square: moments of what moves, one after the other.
    """

    def __init__(self, objective: Callable[..., Tensor], parameters: Parameters, moving: list[str], mean: Tensor,
                 square: Tensor):
        self.objective, self.parameters, self.moving, self.mean, self.square = (
            objective, parameters, moving, mean, square)
        self.size = 0
        self.counts = torch.tensor([parameters[name].numel() for name in moving], device=mean.device)

    def __call__(self, truth: Tensor, poor: Tensor, grid: Tensor, corrections: Tensor,
                 rates: Tensor) -> dict[str, Tensor]:
        """corrections [moving, 2]: 1 - β^t of both moments. rates: [moving], or as many as there are numbers."""
        loss = self.objective(self.parameters, truth, poor, View(grid, self.size))
        gradients = torch.autograd.grad(loss.sum(), [self.parameters[name] for name in self.moving])
        with torch.no_grad():
            direction, mean, square = adam_direction(flat(gradients), self.mean, self.square,
                                                     *map(self.for_each_number, corrections.unbind(1)))
            self.mean.copy_(mean)
            self.square.copy_(square)
            if len(rates) == len(self.moving):
                rates = self.for_each_number(rates)
            for name, move in zip(self.moving, self.parts(rates * direction), strict=True):
                self.parameters[name].sub_(move)
        return {"loss": loss.detach()}

    def for_each_number(self, values: Tensor) -> Tensor:
        """Values [moving], repeated for every number of what they belong to."""
        return values.repeat_interleave(self.counts, output_size=len(self.mean))

    def parts(self, whole: Tensor) -> list[Tensor]:
        """Views of what is flat, in the shapes of what moves."""
        shapes = [self.parameters[name].shape for name in self.moving]
        return [part.view(shape) for part, shape in zip(whole.split([shape.numel() for shape in shapes]), shapes,
                                                        strict=True)]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of all of them, one after the other."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
