"""Progressive growth changes the size, not the function: grown(x) = upsample(small(halve(x)))."""

import pytest
import torch
from reference_gpen import ReferenceGPEN, blur_kernel, down_blur_pad, skip_up_pad, upfirdn2d
from torch import Tensor

from metagpen.gpen import GPEN
from metagpen.gpen.growth import grow, halve

ARCHITECTURES = [(16, 1, 1 / 32), (32, 2, 1 / 32), (32, 1, 1 / 32), (64, 1, 1 / 16)]


def trained_like(size: int, channel_multiplier: float, narrow: float, concat: bool = True) -> GPEN:
    """A small GPEN in float64 whose every parameter has moved from its initial value."""
    torch.manual_seed(size)
    model = GPEN(size, channel_multiplier, narrow, style_dim=32, concat=concat).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def images_of(size: int) -> Tensor:
    return (torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(9)) * 2 - 1).double()


def halved(images: Tensor) -> Tensor:
    """The encoder's blur in full, then every second pixel, from the plain reference."""
    return upfirdn2d(images, blur_kernel().double(), pad=down_blur_pad(3))[:, :, 1::2, 1::2]


def doubled(images: Tensor) -> Tensor:
    """The decoder's doubling of the RGB skip, from the plain reference."""
    return upfirdn2d(images, blur_kernel(gain=4.0).double(), up=2, pad=skip_up_pad())


def test_halve_is_the_encoders_low_pass():
    images = images_of(32)
    assert halve(images).shape == (2, 3, 16, 16)
    torch.testing.assert_close(halve(images), halved(images), rtol=0, atol=1e-14)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_growth_keeps_the_function(architecture):
    small = trained_like(*architecture)
    grown = grow(small).double()
    assert grown.size == 2 * small.size
    images = images_of(grown.size)
    expected = doubled(small(halved(images)))
    assert expected.std() > 0.05
    torch.testing.assert_close(grown(images), expected, rtol=0, atol=1e-6)  # grown in float32, hence not 1e-12


@torch.no_grad()
def test_growth_keeps_every_feature_and_the_latent():
    small = trained_like(32, 1, 1 / 32)
    grown = grow(small).double()
    images = images_of(64)
    features, w = grown.encode(images)
    small_features, small_w = small.encode(halved(images))
    torch.testing.assert_close(w, small_w, rtol=0, atol=1e-6)
    for found, expected in zip(features, small_features, strict=False):  # the grown net has one more, at 64 px
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert len(features) == len(small_features) + 1


@torch.no_grad()
def test_growing_twice():
    small = trained_like(16, 1, 1 / 16)
    grown = grow(grow(small)).double()
    images = images_of(64)
    expected = doubled(doubled(small(halved(halved(images)))))
    torch.testing.assert_close(grown(images), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_growth_without_concatenation():
    small = trained_like(16, 1, 1 / 32, concat=False)
    grown = grow(small).double()
    images = images_of(32)
    torch.testing.assert_close(grown(images), doubled(small(halved(images))), rtol=0, atol=1e-5)


def test_a_grown_net_is_a_published_one_of_its_size():
    grown = grow(trained_like(16, 2, 1 / 32))
    plain = ReferenceGPEN(32, 2, 1 / 32, style_dim=32)
    plain.load_state_dict(grown.state_dict())


def test_growth_leaves_the_small_net_alone():
    small = trained_like(16, 1, 1 / 32)
    before = {key: tensor.clone() for key, tensor in small.state_dict().items()}
    grown = grow(small)
    with torch.no_grad():
        for parameter in grown.parameters():
            parameter.zero_()
    for key, tensor in small.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_the_new_layers_can_learn():
    """Starting as the identity must not stop the new layers: a gradient step moves each of them at last.

    At the first step only the top ToRGB, the pass-through and the old layers have a gradient, because that ToRGB
    starts at zero; once it has moved, so do the new styled convolutions.
    """
    torch.manual_seed(0)
    grown = grow(trained_like(16, 1, 1 / 32)).double()
    images = images_of(32)
    start = {name: parameter.detach().clone() for name, parameter in grown.named_parameters()}
    optimiser = torch.optim.SGD(grown.parameters(), lr=1e-3)
    for _ in range(3):
        optimiser.zero_grad()
        (grown(images) - images).square().mean().backward()
        optimiser.step()
    new = ("ecd0.", "ecd1.", "generator.convs.2.", "generator.convs.3.", "generator.to_rgbs.1.")
    moved = {name: not torch.equal(parameter, start[name]) for name, parameter in grown.named_parameters()}
    still = [name for name, did in moved.items() if name.startswith(new) and not did]
    assert still == []


def test_too_narrow_to_carry_the_image():
    with pytest.raises(ValueError, match="at least 6 channels"):
        grow(GPEN(32, 1, 1 / 128, style_dim=32))
