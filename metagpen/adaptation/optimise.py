"""Gradient steps as functions from tensors to tensors, so that an outer loop can differentiate through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
Rates = Mapping[str, Tensor | float]
Optimiser = Callable[[Parameters, Mapping[str, Tensor], Rates], Parameters]
BETAS, EPS = (0.9, 0.99), 1e-8


def sgd(parameters: Parameters, gradients: Mapping[str, Tensor], rates: Rates) -> Parameters:
    """θ - rate · g, a rate for each tensor."""
    return {name: value - rates[name] * gradients[name] for name, value in parameters.items()}


class Adam:
    """Adam (Kingma & Ba 2015) with a rate for each tensor. Elementwise, so people in a batch do not meet.

    Every tensor counts its own steps, as in torch.optim.Adam, so that one which is released late is corrected as new.
    """

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self.mean: dict[str, Tensor] = {}
        self.square: dict[str, Tensor] = {}

    def __call__(self, parameters: Parameters, gradients: Mapping[str, Tensor],
                 rates: Rates) -> Parameters:
        first, second = BETAS
        updated = {}
        for name, value in parameters.items():
            g = gradients[name]
            t = self.steps[name] = self.steps.get(name, 0) + 1
            m = self.mean[name] = torch.lerp(g, self.mean.get(name, torch.zeros_like(g)), first)
            s = self.square[name] = torch.lerp(g * g, self.square.get(name, torch.zeros_like(g)), second)
            direction = m / (1 - first**t) / ((s / (1 - second**t)).sqrt() + EPS)
            updated[name] = value - rates[name] * direction
        return updated


def new_optimiser(name: str) -> Optimiser:
    """"adam" (with a memory of its own) or "sgd"."""
    return Adam() if name == "adam" else sgd
