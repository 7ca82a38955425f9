"""A step of every person at once, at which rates, and from where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import recognise
from ..errors import ConfigError
from ..model import MetaGPEN
from ..person import Parameters, new_parameters
from ..person.rule import by_kind
from ..schedule import warmup_cosine
from .config import AdaptConfig
from .draws import Support
from .optimise import Optimiser, new_optimiser
from .recorded import RecordedSteps


def begin(model: MetaGPEN, config: AdaptConfig, people: int, generator: torch.Generator,
          guess: Parameters | None) -> Parameters:
    """Where `people` people begin, detached: at the start's guess, and what the rule adds to it."""
    if config.rule:
        begun = model.rule.begin(people, guess)
    else:
        begun = new_parameters(model.gpen, config.spec, people, generator, guess)
    return {name: value.detach().clone() for name, value in begun.items()}


def step_rates(model: MetaGPEN, config: AdaptConfig, step: int, names: Iterable[str]) -> dict[str, Tensor | float]:
    """Rates of an inner step, times `lr_scale`: the rule's, or the configuration's with warm-up and cosine."""
    if config.rule:
        return {name: config.lr_scale * value.detach() for name, value in model.rule.rates(step, config.steps).items()}
    factor = config.lr_scale * warmup_cosine(step, config.steps, config.warmup, config.eta_min)
    return {name: factor * rate(name, config) for name in names}


def last_rates(model: MetaGPEN, config: AdaptConfig, names: Iterable[str]) -> dict[str, Tensor | float]:
    """Rates of stage 2: those at which the steps before it end."""
    if config.rule:
        steps = max(config.steps, model.rule.config.steps)  # without a step, or with few, as after the rule's own
        return step_rates(model, config.model_copy(update={"steps": steps}), steps - 1, names)
    return {name: config.lr_scale * config.eta_min * rate(name, config) for name in names}


def rate(name: str, config: AdaptConfig) -> float:
    return by_kind(name, config.lr_latent, config.lr_tail, config.lr_decoder)


def inner_step(objective: Callable[..., Tensor], parameters: Parameters, support: Any,
               rates: Mapping[str, Tensor | float], optimiser: Optimiser,
               create_graph: bool = False) -> tuple[Parameters, Tensor]:
    """One step of every person at once: (parameters after it, loss before it [P]).

    Only tensors that have a rate move. The result stays connected to parameters and rates; `create_graph` also
    connects the gradients, for second derivatives.
    """
    found, loss = inner_gradient(objective, parameters, support, rates, create_graph)
    return moved(parameters, found, rates, optimiser), loss


def inner_gradient(objective: Callable[..., Tensor], parameters: Parameters, support: Any, names: Iterable[str],
                   create_graph: bool = False) -> tuple[Parameters, Tensor]:
    """(gradients of the named parameters, loss [P]): everybody's own, because nobody's loss depends on another's."""
    names = list(names)
    loss = objective(parameters, *support)
    found = torch.autograd.grad(loss.sum(), [parameters[name] for name in names], create_graph=create_graph)
    return dict(zip(names, found, strict=True)), loss


def moved(parameters: Parameters, gradients: Parameters, rates: Mapping[str, Tensor | float],
          optimiser: Optimiser) -> Parameters:
    """The parameters after a step on those that have a rate."""
    return {**parameters, **optimiser({name: parameters[name] for name in rates}, gradients, rates)}


class PlainSteps:
    """Steps from `parameters` [P, ...], each into new tensors; `recorded.RecordedSteps` is its twin for a GPU."""

    def __init__(self, objective: Callable[..., Tensor], parameters: Parameters, optimiser: str):
        self.objective, self.parameters, self.optimiser = objective, parameters, new_optimiser(optimiser)

    def __call__(self, support: Support, rates: Mapping[str, Tensor | float]) -> Tensor:
        """The loss [P] before the step."""
        parameters = {name: value.detach().requires_grad_(name in rates) for name, value in self.parameters.items()}
        self.parameters, loss = inner_step(self.objective, parameters, support, rates, self.optimiser)
        return loss.detach()


def steps_from(objective: Callable[..., Tensor], parameters: Parameters, config: AdaptConfig, device: torch.device,
               recogniser: recognise.Recogniser | None) -> PlainSteps | RecordedSteps:
    """Steps from `parameters`: called with a support and rates, each leads on, and says the loss [P] before it."""
    if config.steps and records_steps(config, device, recogniser):
        return RecordedSteps(objective, parameters)
    return PlainSteps(objective, parameters, config.optimiser)


def records_steps(config: AdaptConfig, device: torch.device, recogniser: recognise.Recogniser | None) -> bool:
    """Whether steps are recorded as a CUDA graph. Raises ConfigError where that is asked for and cannot be."""
    possible = config.optimiser == "adam" and recogniser is not None
    if config.cuda_graphs and device.type == "cuda" and not possible:
        raise ConfigError("cuda_graphs: steps are recorded with Adam and a recogniser in the losses only; take it out")
    return device.type == "cuda" and possible and config.cuda_graphs is not False
