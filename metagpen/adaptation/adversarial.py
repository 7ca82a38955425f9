"""Stage 2, optional: the tutorial's joint optimisation, with only the discriminator's last layers released."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import recognise
from ..gpen.discriminator import Discriminator
from ..losses import discriminator_loss, generator_loss
from ..model import MetaGPEN
from ..person import Parameters
from .optimise import Adam

if TYPE_CHECKING:
    from .loop import AdaptConfig, Album


def refine(model: MetaGPEN, albums: Sequence[Album], parameters: Parameters, config: AdaptConfig,
           recogniser: recognise.Recogniser | None, critic: Discriminator) -> Parameters:
    """Continue from `parameters` for `config.adversarial_steps` with the adversarial term; `critic` is copied.

    The critic compares whole batches, so people go one after the other.
    """
    refined = [refine_one(model, own, {name: value[i:i + 1] for name, value in parameters.items()}, config, recogniser,
                          critic) for i, own in enumerate(albums)]
    return {name: torch.cat([one[name] for one in refined]) for name in parameters}


def refine_one(model: MetaGPEN, own: Album, parameters: Parameters, config: AdaptConfig,
               recogniser: recognise.Recogniser | None, critic: Discriminator) -> Parameters:
    from .loop import Objective, draw, rate

    critic = copy.deepcopy(critic).to(model.device).requires_grad_(False)
    released = [*critic.final_conv.requires_grad_(True).parameters(),
                *critic.final_linear.requires_grad_(True).parameters()]
    critic_optimiser = torch.optim.Adam(released, lr=config.lr_critic, betas=(0.0, 0.99))
    objective = Objective(model, config, recogniser, parameters["latent.offset"].detach())
    optimiser, generator = Adam(), torch.Generator().manual_seed(config.seed + 2)
    for _ in range(config.adversarial_steps):
        truth, poor, landmarks = draw([own], objective.degradation, config, [generator])
        parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        restored = objective.restore(parameters, poor)
        loss = objective.terms(parameters, restored, truth, poor, landmarks).sum()
        loss = loss + config.adversarial * generator_loss(critic(restored)).mean()
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        rates = {name: config.eta_min * rate(name, config) for name in parameters}
        with torch.no_grad():
            parameters = optimiser(parameters, gradients, rates)
        critic_step(critic, critic_optimiser, truth, restored.detach())
    return {name: value.detach() for name, value in parameters.items()}


def critic_step(critic: Discriminator, optimiser: torch.optim.Optimizer, real: Tensor, fake: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    discriminator_loss(critic(real), critic(fake)).backward()
    optimiser.step()
