"""What every outer loop works on, and the list of outer loops.

A problem is a batch of people: where they begin, one support batch per inner step, and a query batch. An outer loop
turns it into a loss and gradients for where people begin and for the rates. It is one function and one `outer_loop`
line; what lies between (unrolling the inner steps, first or second order) is the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..person.adapter import Parameters

Objective = Callable[..., Tensor]  # (parameters, *batch) -> loss [P]
# (parameters, support batch, names) -> the inner objective's gradients by name, constants
InnerGradient = Callable[[Parameters, tuple[Any, ...], Iterable[str]], Parameters]
StepRates = dict[str, Tensor]


@dataclass
class Problem:
    """support: a batch per inner step; query: one batch. Both are passed on to their objective after the parameters.

    begin: parameters [P, ...] from which people start; rates: per step, what `InnerRule.rates` gives; slow: shared
    weights that are learned too, by the query's direct gradient (their influence through the steps is left out);
    gradient: a faster way to the inner objective's gradients where they are constants, in first order.
    """

    inner: Objective
    outer: Objective
    support: Sequence[tuple[Any, ...]]
    query: tuple[Any, ...]
    begin: Parameters
    rates: Sequence[StepRates]
    optimiser: str = "sgd"
    slow: Sequence[Tensor] = ()
    gradient: InnerGradient | None = None

    @property
    def people(self) -> int:
        return self.begin["latent.offset"].shape[0]


@dataclass
class MetaGradient:
    """loss: the outer loss, mean over people. begin: by name, [P, ...]; rates: by step and name; slow: as given.
    The gradients belong to the mean loss; tensors without influence are absent (begin, rates) or None (slow)."""

    loss: Tensor
    begin: Parameters
    rates: list[StepRates] = field(default_factory=list)
    slow: list[Tensor | None] = field(default_factory=list)


# (problem, leaves, rates, second_order) -> the parameters after each inner step
Engine = Callable[[Problem, Parameters, Sequence[StepRates], bool], Sequence[Parameters]]
OuterGradient = Callable[[Problem, Engine, "Progress"], MetaGradient]


@dataclass(frozen=True)
class Progress:
    """How far the outer loop is, 0 to 1, and which order it was asked for."""

    done: float = 0.0
    second_order: bool = True


@dataclass(frozen=True)
class OuterLoop:
    """gradient: the outer loop itself. The rest says what the rule it learns looks like (`person.rule.RuleConfig`)."""

    name: str
    gradient: OuterGradient
    moving: tuple[str, ...] | None = None  # None: everything
    per_step: bool = False
    elementwise: bool = False
    learns_rates: bool = True


OUTER_LOOPS: dict[str, OuterLoop] = {}


def outer_loop(name: str, **shape: Any) -> Callable[[OuterGradient], OuterGradient]:
    """Registers an outer loop under the name that configurations use."""
    def register(gradient: OuterGradient) -> OuterGradient:
        OUTER_LOOPS[name] = OuterLoop(name, gradient, **shape)
        return gradient
    return register


def through_the_steps(problem: Problem, engine: Engine, second_order: bool,
                      weights: Sequence[float] | None = None) -> MetaGradient:
    """Gradient of the query loss after the inner steps (after each of them, weighted, if `weights` are given)."""
    leaves = {name: value.detach().requires_grad_() for name, value in problem.begin.items()}
    rates = [{name: value.detach().requires_grad_() for name, value in step.items()} for step in problem.rates]
    path = engine(problem, leaves, rates, second_order)
    weights = [0.0] * (len(path) - 1) + [1.0] if weights is None else weights
    judged = [(weight, parameters) for weight, parameters in zip(weights, path, strict=True) if weight]
    loss = sum(weight * query_loss(problem, parameters, remembered=len(judged) > 1) for weight, parameters in judged)
    inputs = [*leaves.values(), *(value for step in rates for value in step.values()), *problem.slow]
    found = iter(torch.autograd.grad(loss, inputs, allow_unused=True))
    begin = {name: next(found) for name in leaves}
    by_step = [{name: next(found) for name in step} for step in rates]
    return MetaGradient(loss.detach(), present(begin), [present(step) for step in by_step], list(found))


def query_loss(problem: Problem, parameters: Parameters, remembered: bool = False) -> Tensor:
    """The outer loss, mean over people. remembered: only its inputs are, and it is computed again on the way back, so
    that memory does not grow with the number of places that are judged."""
    def loss() -> Tensor:
        return problem.outer(parameters, *problem.query).mean()

    return checkpoint(loss, use_reentrant=False) if remembered else loss()


def where_people_begin(problem: Problem) -> MetaGradient:
    """Gradient of the query loss without an inner step, which is the same in all outer loops."""
    return through_the_steps(problem, lambda problem, leaves, rates, second_order: [leaves], second_order=False)


def present(gradients: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value for name, value in gradients.items() if value is not None}
