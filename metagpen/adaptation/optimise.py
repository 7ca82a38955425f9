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
            nothing = torch.zeros_like(g)
            direction, self.mean[name], self.square[name] = adam_direction(
                g, self.mean.get(name, nothing), self.square.get(name, nothing), 1 - first**t, 1 - second**t)
            updated[name] = value - rates[name] * direction
        return updated


def adam_direction(g: Tensor, mean: Tensor, square: Tensor, correct_mean: float | Tensor,
                   correct_square: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's direction for a gradient, and the moments that it leaves; corrections: 1 - β^t of either."""
    first, second = BETAS
    mean, square = torch.lerp(g, mean, first), torch.lerp(g * g, square, second)
    return mean / correct_mean / ((square / correct_square).sqrt() + EPS), mean, square


def new_optimiser(name: str) -> Optimiser:
    """"adam" (with a memory of its own) or "sgd"."""
    return Adam() if name == "adam" else sgd
