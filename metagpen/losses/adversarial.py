"""The adversarial game: non-saturating logistic loss (Goodfellow et al. 2014) with R1 (Mescheder et al. 2018)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def generator_loss(fake_logits: Tensor) -> Tensor:
    """softplus(-D(fake)), per image."""
    return F.softplus(-fake_logits).flatten(1).mean(dim=1)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """softplus(-D(real)) + softplus(D(fake)), mean over the batch."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def r1_penalty(discriminator: nn.Module, real: Tensor) -> Tensor:
    """E |∇ D(x)|² at real images; multiply by gamma/2 (and by the interval when applied lazily)."""
    real = real.detach().requires_grad_()
    gradient, = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def feature_matching(fake_maps: Sequence[Tensor], real_maps: Sequence[Tensor]) -> Tensor:
    """Mean absolute difference of the discriminator's feature maps (GPEN's third term), mean over depths."""
    return torch.stack([(a - b.detach()).abs().mean() for a, b in zip(fake_maps, real_maps, strict=True)]).mean()
