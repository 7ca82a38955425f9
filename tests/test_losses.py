"""Losses against closed forms."""

import torch

from metagpen.losses import (
    RecogniserLoss,
    discriminator_loss,
    feature_matching,
    generator_loss,
    gradient_l1,
    l1,
    r1_penalty,
)


def test_pixel_terms():
    truth = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(l1(truth + 0.25, truth), torch.full((2,), 0.25))
    torch.testing.assert_close(gradient_l1(truth + 0.25, truth), torch.zeros(2), atol=1e-6, rtol=0)
    ramp = torch.arange(8.0).expand(2, 3, 8, 8)
    torch.testing.assert_close(gradient_l1(truth + 0.1 * ramp, truth), torch.full((2,), 0.1))


def test_recogniser_terms_vanish_for_the_truth_and_have_gradients_elsewhere(tiny_recogniser):
    truth = torch.rand(3, 3, 16, 16) * 2 - 1
    loss = RecogniserLoss(tiny_recogniser)
    perceptual, identity = loss(truth, truth)
    torch.testing.assert_close(perceptual, torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(identity, torch.zeros(3), atol=1e-6, rtol=0)
    other = (-truth).requires_grad_()
    perceptual, identity = loss(other, truth)
    assert perceptual.min() > 0 and (identity >= 0).all() and (identity <= 2).all()
    gradient, = torch.autograd.grad((perceptual + identity).sum(), other)
    assert gradient.abs().sum() > 0


def test_adversarial_terms():
    zero = torch.zeros(4, 1)
    torch.testing.assert_close(generator_loss(zero), torch.full((4,), 2.0).log())
    torch.testing.assert_close(discriminator_loss(zero, zero), 2 * torch.tensor(2.0).log())
    assert discriminator_loss(zero + 5, zero - 5) < discriminator_loss(zero - 5, zero + 5)
    torch.testing.assert_close(feature_matching([zero, zero + 1], [zero + 1, zero]), torch.tensor(1.0))


def test_r1_of_a_linear_critic_is_its_squared_weight():
    weight = torch.randn(3 * 16)
    penalty = r1_penalty(lambda x: x.flatten(1) @ weight, torch.rand(5, 3, 4, 4))
    torch.testing.assert_close(penalty, weight.square().sum())
