"""Stage 2, optional: the tutorial's joint optimisation, with only the discriminator's last layers released."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import recognise
from ..devices import undisturbed
from ..gpen.discriminator import Discriminator
from ..losses import discriminator_loss, generator_loss
from ..model import MetaGPEN
from ..person import Parameters
from .config import AdaptConfig
from .draws import Album, Support, draw, placed
from .objective import Objective
from .optimise import Optimiser, Rates, new_optimiser
from .steps import last_rates

CRITIC_BETAS = (0.0, 0.99)


def refine(model: MetaGPEN, albums: Sequence[Album], parameters: Parameters, config: AdaptConfig,
           recogniser: recognise.Recogniser | None, critic: Discriminator) -> Parameters:
    """Continue from `parameters` for `config.adversarial_steps` with the adversarial term; `critic` is copied.

    The critic compares whole batches, so people go one after the other.
    """
    refined = [refine_one(model, own, {name: value[i:i + 1] for name, value in parameters.items()}, config, recogniser,
                          critic) for i, own in enumerate(albums)]
    return {name: torch.cat([one[name] for one in refined]) for name in parameters}


@undisturbed
def refine_one(model: MetaGPEN, own: Album, parameters: Parameters, config: AdaptConfig,
               recogniser: recognise.Recogniser | None, critic: Discriminator) -> Parameters:
    critic = copy.deepcopy(critic).to(model.device)
    critic_optimiser = torch.optim.Adam(release_last_layers(critic), lr=config.lr_critic, betas=CRITIC_BETAS)
    objective = Objective(model, config, recogniser, parameters["latent.offset"].detach())
    optimiser, generator = new_optimiser(config.optimiser), torch.Generator().manual_seed(config.seed + 2)
    own, rates = own.cpu(), last_rates(model, config, parameters)
    for _ in range(config.adversarial_steps):
        support = placed(draw([own], objective.degradation, config, [generator]), model.device, recogniser)
        parameters, restored, _ = person_step(objective, parameters, support, rates, optimiser, critic)
        critic_step(critic, critic_optimiser, support[0], restored)
    return {name: value.detach() for name, value in parameters.items()}


def release_last_layers(critic: Discriminator) -> list[torch.nn.Parameter]:
    """Freeze the critic but for what follows its convolutional body; returns what moves."""
    critic.requires_grad_(False)
    last = (critic.final_conv, critic.final_linear)
    return [parameter for module in last for parameter in module.requires_grad_(True).parameters()]


def person_step(objective: Objective, parameters: Parameters, support: Support, rates: Rates,
                optimiser: Optimiser,
                critic: Discriminator | None = None) -> tuple[Parameters, Tensor, dict[str, float]]:
    """One step of one person, against `critic` if there is one: (parameters, restored [B, 3, S, S], losses before it).

    Only tensors that have a rate move. support: as `draw` or `placed` gives it.
    """
    truth, poor, landmarks = support
    parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    restored = objective.restore(parameters, poor)
    loss = objective.terms(parameters, restored, truth, poor, landmarks).sum()
    losses = {"loss": float(loss.detach())}
    if critic is not None:
        verdict = generator_loss(critic(restored)).mean()
        losses["adversarial"] = float(verdict.detach())
        loss = loss + objective.config.adversarial * verdict
    moving = {name: parameters[name] for name in rates}
    gradients = dict(zip(moving, torch.autograd.grad(loss, list(moving.values())), strict=True))
    with torch.no_grad():
        return {**parameters, **optimiser(moving, gradients, rates)}, restored.detach(), losses


def critic_step(critic: Discriminator, optimiser: torch.optim.Optimizer, real: Tensor, fake: Tensor) -> float:
    """One step of what is released in the critic; its loss before."""
    optimiser.zero_grad(set_to_none=True)
    loss = discriminator_loss(critic(real), critic(fake))
    loss.backward()
    optimiser.step()
    return float(loss.detach())
