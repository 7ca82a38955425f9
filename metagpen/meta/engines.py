"""Unrolling the inner steps so that an outer gradient can pass through them: three engines, one answer.

`batched` is ours and the default: all people in one batch, and in second order every step is run again on the way back
in place of being kept, so memory does not grow with the number of steps. `higher` (Grefenstette et al. 2019) and
`learn2learn` (Arnold et al. 2020) do the same through those libraries' own differentiable optimisers; the tests hold
the three together.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..adaptation.optimise import new_optimiser, sgd
from ..adaptation.steps import inner_gradient, inner_step, moved
from ..errors import ConfigError
from ..person.adapter import Parameters
from ..person.rule import key
from .problem import Engine, InnerGradient, Problem, StepRates


def batched(problem: Problem, leaves: Parameters, rates: Sequence[StepRates], second_order: bool) -> list[Parameters]:
    """Plain autograd. First order keeps no inner graph, and may have its gradients from `problem.gradient`; second
    order runs each step again when its turn comes back."""
    if second_order and problem.optimiser != "sgd":
        raise ConfigError(f"second order through {problem.optimiser}: only sgd; choose it, or a first-order loop")
    optimiser = new_optimiser(problem.optimiser)
    gradient = problem.gradient or plain_gradient(problem)
    path, parameters = [], leaves
    for support, step in zip(problem.support, rates, strict=True):
        if second_order:
            parameters = remembered_step(problem, parameters, support, step)
        else:
            parameters = moved(parameters, gradient(parameters, support, step), step, optimiser)
        path.append(parameters)
    return path


def plain_gradient(problem: Problem) -> InnerGradient:
    """By autograd, where the problem has no faster way."""
    return lambda parameters, support, names: inner_gradient(problem.inner, parameters, support, names)[0]


def batched_reference(problem: Problem, leaves: Parameters, rates: Sequence[StepRates],
                      second_order: bool) -> list[Parameters]:
    """The plain twin of `batched`: every step's graph is kept."""
    optimiser = new_optimiser(problem.optimiser)
    path, parameters = [], leaves
    for support, step in zip(problem.support, rates, strict=True):
        parameters = inner_step(problem.inner, parameters, support, step, optimiser, create_graph=second_order)[0]
        path.append(parameters)
    return path


def remembered_step(problem: Problem, parameters: Parameters, support: tuple[Any, ...],
                    rates: StepRates) -> Parameters:
    """An inner step that keeps only its inputs, a person's parameters, and not its activations."""
    names, rated = list(parameters), list(rates)

    def step(*tensors: Tensor, create_graph: bool) -> tuple[Tensor, ...]:
        mine = dict(zip(names, tensors[:len(names)], strict=True))
        own_rates = dict(zip(rated, tensors[len(names):], strict=True))
        after = inner_step(problem.inner, mine, support, own_rates, sgd, create_graph)[0]
        return tuple(after[name] for name in rated)

    after = RememberedStep.apply(step, *parameters.values(), *rates.values())
    return {**parameters, **dict(zip(rated, after, strict=True))}


class RememberedStep(torch.autograd.Function):
    """Checkpointing for a function that itself takes gradients (which `torch.utils.checkpoint` does not nest)."""

    @staticmethod
    def forward(ctx: Any, step: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        ctx.save_for_backward(*tensors)
        return RememberedStep.run(step, tensors, create_graph=False)[1]

    @staticmethod
    def run(step: Any, tensors: Sequence[Tensor], create_graph: bool) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in tensors]
            outputs = step(*inputs, create_graph=create_graph)
        return inputs, outputs if create_graph else tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, outputs = RememberedStep.run(ctx.step, ctx.saved_tensors, create_graph=True)
        return (None, *torch.autograd.grad(outputs, inputs, gradients, allow_unused=True))


class Adapter(nn.Module):
    """The moving parameters as a module, which is what both libraries want; dots are no part of a module's names."""

    def __init__(self, parameters: Parameters):
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(key(name), nn.Parameter(value))

    def values(self, names: Sequence[str]) -> Parameters:
        return {name: getattr(self, key(name)) for name in names}


def require_sgd(problem: Problem, engine: str) -> None:
    if problem.optimiser != "sgd":
        raise ConfigError(f"the {engine} engine takes inner sgd steps, not {problem.optimiser}; use engine: batched")


def higher(problem: Problem, leaves: Parameters, rates: Sequence[StepRates], second_order: bool) -> list[Parameters]:
    """Through higher's differentiable SGD. In first order its inner gradients are cut by its gradient callback."""
    import higher as library

    require_sgd(problem, "higher")
    names = list(rates[0])
    module = Adapter({name: leaves[name].detach() for name in names})
    groups = [{"params": [parameter], "lr": 1.0} for parameter in module.parameters()]
    functional = library.monkeypatch(module, copy_initial_weights=False, track_higher_grads=True)
    functional.update_params([leaves[name] for name in names])
    optimiser = library.get_diff_optim(torch.optim.SGD(groups, lr=1.0), list(module.parameters()), fmodel=functional,
                                       track_higher_grads=True)
    path = []
    for support, step in zip(problem.support, rates, strict=True):
        now = {**leaves, **dict(zip(names, functional.fast_params, strict=True))}
        loss = problem.inner(now, *support).sum()
        optimiser.step(loss, override={"lr": [step[name] for name in names]},
                       grad_callback=None if second_order else lambda found: [g.detach() for g in found])
        path.append({**leaves, **dict(zip(names, functional.fast_params, strict=True))})
    return path


def learn2learn(problem: Problem, leaves: Parameters, rates: Sequence[StepRates],
                second_order: bool) -> list[Parameters]:
    """Through learn2learn's MetaSGD wrapper, whose rates are ours broadcast to every number."""
    meta_sgd = import_learn2learn().MetaSGD

    require_sgd(problem, "learn2learn")
    names = list(rates[0])
    module = Adapter({name: leaves[name].detach() for name in names})
    learner = meta_sgd(module, lr=1.0, first_order=not second_order).clone()
    for name in names:  # the clone's parameters are plain tensors: begin at ours, with their graph
        learner.module._parameters[key(name)] = leaves[name]
    path = []
    for support, step in zip(problem.support, rates, strict=True):
        learner.lrs = [step[name].expand_as(leaves[name]) for name in names]
        now = {**leaves, **learner.module.values(names)}
        learner.adapt(problem.inner(now, *support).sum())
        path.append({**leaves, **learner.module.values(names)})
    return path


def import_learn2learn() -> Any:
    """learn2learn's algorithms. Its package imports vision, gym and text parts that want a dozen other packages;
    empty modules in their place let the algorithms, which need torch alone, be imported."""
    parts = [f"learn2learn.{part}" for part in ("vision", "gym", "text", "data", "data.transforms")]
    empty = {name: ModuleType(name) for name in parts if name not in sys.modules}
    try:
        sys.modules.update(empty)
        from learn2learn import algorithms
    except ImportError as error:
        raise ConfigError(f"engine: learn2learn needs that package ({error}): make setup-learn2learn") from error
    finally:
        for name in empty:  # so that whoever wants the real ones can have them
            del sys.modules[name]
    return algorithms


ENGINES: dict[str, Engine] = {"batched": batched, "higher": higher, "learn2learn": learn2learn}
