"""Discriminators: published keys, their arithmetic, second derivatives, regions where the landmarks are."""

import math

import pytest
import torch
import torch.nn.functional as F
from reference_gpen import blur_kernel, channels_at, down_blur_pad, upfirdn2d
from torch import Tensor

from metagpen.errors import CheckpointError, ConfigError
from metagpen.gpen.discriminator import (
    REGIONS,
    Discriminator,
    FaceRegionDiscriminator,
    append_batch_deviation,
    crop_region,
    face_axis,
)

# an upright face in a 64 px crop: eyes, nose, mouth corners (x, y)
FACE = torch.tensor([[24.0, 30.0], [40.0, 30.0], [32.0, 38.0], [26.0, 46.0], [38.0, 46.0]])


def small_discriminator(size: int = 16, narrow: float = 1 / 64) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(size, narrow=narrow).double()


def images_of(size: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).double()


# -------------------- keys and shapes

def published_shapes(size: int, channel_multiplier: float, narrow: float) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a published -D file, by rule."""
    width = channels_at(size, channel_multiplier, narrow)
    shapes = {"convs.0.0.weight": (width, 3, 1, 1), "convs.0.1.bias": (width,)}
    for i in range(1, int(math.log2(size)) - 1):
        out = channels_at(size >> i, channel_multiplier, narrow)
        shapes |= {
            f"convs.{i}.conv1.0.weight": (width, width, 3, 3), f"convs.{i}.conv1.1.bias": (width,),
            f"convs.{i}.conv2.0.kernel": (4, 4), f"convs.{i}.conv2.1.weight": (out, width, 3, 3),
            f"convs.{i}.conv2.2.bias": (out,),
            f"convs.{i}.skip.0.kernel": (4, 4), f"convs.{i}.skip.1.weight": (out, width, 1, 1),
        }
        width = out
    return shapes | {
        "final_conv.0.weight": (width, width + 1, 3, 3), "final_conv.1.bias": (width,),
        "final_linear.0.weight": (width, 16 * width), "final_linear.0.bias": (width,),
        "final_linear.1.weight": (1, width), "final_linear.1.bias": (1,),
    }


@pytest.mark.parametrize("arguments", [(256, 2, 1.0), (512, 2, 1.0), (256, 1, 0.5), (128, 1, 0.25)])
def test_published_keys_and_shapes(arguments):
    with torch.device("meta"):
        state = Discriminator(*arguments).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == published_shapes(*arguments)


def test_published_256_has_narrow_1():
    with torch.device("meta"):
        state = Discriminator(256).state_dict()
    assert state["final_linear.1.weight"].shape == (1, 512)
    assert state["convs.0.0.weight"].shape == (128, 3, 1, 1)


@pytest.mark.parametrize("arguments", [(16, 2, 1 / 64), (64, 1, 1 / 32), (64, 2, 1 / 32), (128, 0.5, 1 / 16)])
def test_arguments_are_read_off_the_tensors(arguments):
    saved = Discriminator(*arguments)
    loaded = Discriminator.from_state_dict(saved.state_dict())
    size, narrow = loaded.config.size, loaded.config.narrow
    assert (size, narrow) == (arguments[0], arguments[2])
    images = torch.randn(2, 3, size, size)
    assert torch.equal(loaded(images), saved(images))


def test_foreign_tensors_are_refused():
    with pytest.raises(CheckpointError, match="not a GPEN discriminator"):
        Discriminator.from_state_dict({"conv.weight": torch.zeros(1)})
    state = Discriminator(16, narrow=1 / 64).state_dict()
    del state["convs.1.skip.1.weight"]
    with pytest.raises(CheckpointError, match="convs.1.skip.1.weight"):
        Discriminator.from_state_dict(state)


@pytest.mark.parametrize("size", [0, 4, 100])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ConfigError, match=f"power of two.*{size}"):
        Discriminator(size)


# -------------------- arithmetic

def plain_layer(x: Tensor, state: dict[str, Tensor], prefix: str, down: bool = False) -> Tensor:
    """(blur and stride-2) convolution and biased leaky ReLU, from the tensors of a state dict."""
    first = 1 if down else 0
    weight = state[f"{prefix}.{first}.weight"]
    kernel_size = weight.shape[-1]
    if down:
        x = upfirdn2d(x, blur_kernel().double(), pad=down_blur_pad(kernel_size))
    x = F.conv2d(x, weight / math.sqrt(weight[0].numel()), stride=2 if down else 1,
                 padding=0 if down else kernel_size // 2)
    bias = state.get(f"{prefix}.{first + 1}.bias")
    return x if bias is None else math.sqrt(2) * F.leaky_relu(x + bias[:, None, None], 0.2)


def plain_discriminator(images: Tensor, state: dict[str, Tensor], blocks: int) -> Tensor:
    x = plain_layer(images, state, "convs.0")
    for i in range(1, blocks + 1):
        main = plain_layer(plain_layer(x, state, f"convs.{i}.conv1"), state, f"convs.{i}.conv2", down=True)
        x = (main + plain_layer(x, state, f"convs.{i}.skip", down=True)) / math.sqrt(2)
    spread = (((x - x.mean(0)) ** 2).mean(0) + 1e-8).sqrt().mean()
    x = torch.cat((x, torch.full_like(x[:, :1], spread.item())), dim=1)
    x = plain_layer(x, state, "final_conv").flatten(1)
    w0, w1 = state["final_linear.0.weight"], state["final_linear.1.weight"]
    x = x @ (w0 / math.sqrt(w0.shape[1])).t() + state["final_linear.0.bias"]
    x = math.sqrt(2) * F.leaky_relu(x, 0.2)
    return x @ (w1 / math.sqrt(w1.shape[1])).t() + state["final_linear.1.bias"]


@torch.no_grad()
def test_logits_equal_the_plain_arithmetic():
    model = small_discriminator(32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    images = images_of(32)
    expected = plain_discriminator(images, model.state_dict(), blocks=3)
    assert expected.shape == (3, 1)
    assert expected.std() > 1e-3
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_features_are_the_maps_on_the_way():
    model = small_discriminator(32)
    images = images_of(32)
    maps = model.features(images)
    assert [tuple(m.shape) for m in maps] == [(3, 8, r, r) for r in (32, 16, 8, 4)]
    assert torch.equal(model.head(maps[-1]), model(images))


@torch.no_grad()
def test_batch_deviation():
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    with_deviation = append_batch_deviation(x)
    assert torch.equal(with_deviation[:, :3], x)
    expected = x.numpy().std(axis=0).mean()
    assert torch.allclose(with_deviation[:, 3], torch.full((4, 2, 2), expected, dtype=torch.float64))
    alike = append_batch_deviation(x[:1].expand(4, -1, -1, -1))
    assert torch.allclose(alike[:, 3], torch.full((4, 2, 2), 1e-4, dtype=torch.float64))


def r1_penalty(model, images: Tensor) -> Tensor:
    """Mean squared norm of the logits' gradient at real images (Mescheder et al. 2018)."""
    (gradient,) = torch.autograd.grad(model(images).sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def test_r1_has_the_right_gradient():
    """d R1 / d weights by double backward against central differences along random directions, in float64.

    Leaky ReLU is piecewise linear: R1 is smooth except where a unit changes sign; steps this small meet none.
    """
    model = small_discriminator()
    images = images_of(16).requires_grad_()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if not name.endswith("weight"):
            continue
        (gradient,) = torch.autograd.grad(r1_penalty(model, images), parameter)
        direction = torch.randn(parameter.shape, generator=generator).double()
        step, values = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
            values.append(r1_penalty(model, images).item())
            with torch.no_grad():
                parameter -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-8), name


def test_every_parameter_learns():
    model = small_discriminator()
    F.softplus(-model(images_of(16))).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


# -------------------- regions

def turned(points: Tensor, degrees: float, about: float = 32.0) -> Tensor:
    """Points of a 64 px image, turned clockwise (as seen, y down) about its middle."""
    a = math.radians(degrees)
    turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    return (points - about) @ turn.t() + about


def pixel_centres() -> tuple[Tensor, Tensor]:
    """x and y of each pixel of a 64 px image, the image's corner being (0, 0)."""
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    return x, y


def test_face_axis_is_half_the_ffhq_side():
    # eyes 16 px apart, 16 px above the mouth: half a side = max(2 * 16, 1.8 * 16) = 32 px
    assert torch.allclose(face_axis(FACE[None]), torch.tensor([[32.0, 0.0]]))
    tilted = face_axis(turned(FACE, 30)[None])
    assert torch.allclose(tilted, 32 * torch.tensor([[math.cos(math.pi / 6), 0.5]]), atol=1e-4)
    long_face = FACE.clone()
    long_face[3:, 1] = 60.0  # the mouth 30 px below: 1.8 * 30 wins
    assert torch.allclose(face_axis(long_face[None]).norm(), torch.tensor(54.0))


@pytest.mark.parametrize("degrees", [0, 25, -90])
@torch.no_grad()
def test_crops_land_on_the_landmarks(degrees):
    """A disc drawn on each landmark, in its own colour and image, lies in the middle of the region's crop."""
    points = turned(FACE, degrees)
    centres = {"left_eye": points[0], "right_eye": points[1], "nose": points[2], "mouth": points[3:].mean(0)}
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    x, y = pixel_centres()
    images = torch.zeros(4, 3, 64, 64)
    for image, centre, colour in zip(images, centres.values(), colours, strict=True):
        image[:, (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= 2.5**2] = colour[:, None]
    crops = FaceRegionDiscriminator(64, narrow=1 / 64).crops(images, points.expand(4, -1, -1))
    assert list(crops) == list(centres)
    for i, (name, crop) in enumerate(crops.items()):
        assert crop.shape == (4, 3, 16, 16)
        assert torch.allclose(crop[i, :, 7:9, 7:9].mean(dim=(1, 2)), colours[i], atol=0.01), name
        mass = crop[i].sum(0)
        for profile in (mass.sum(0), mass.sum(1)):  # its centre of mass is the crop's centre
            assert (profile * torch.arange(16)).sum() / profile.sum() == pytest.approx(7.5, abs=0.35), name


@pytest.mark.parametrize("degrees", [0, 90])
@torch.no_grad()
def test_crops_of_a_ramp_in_closed_form(degrees):
    """Bilinear sampling reproduces a linear ramp: channel 0 reads off x, channel 1 reads off y, in pixels."""
    x, y = pixel_centres()
    ramp = torch.stack((x, y, torch.zeros_like(x)))[None]
    points = turned(FACE, degrees)
    for region in REGIONS.values():
        crop = crop_region(ramp, points[None], region, resolution=8)
        half = region.fraction * 32.0  # a side of the face is 64 px
        ticks = (torch.arange(8.0) + 0.5) / 4 - 1
        along = half * (-ticks if region.mirrored else ticks)[None, :].expand(8, 8)
        down = half * ticks[:, None].expand(8, 8)
        centre = points[list(region.landmarks)].mean(0)
        offset = (along, down) if degrees == 0 else (-down, along)
        for channel in range(2):
            torch.testing.assert_close(crop[0, channel], centre[channel] + offset[channel], rtol=0, atol=1e-3)


def test_crops_are_differentiable_and_local():
    images = torch.zeros(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    crop = crop_region(images, FACE[None], REGIONS["left_eye"], resolution=16)
    (gradient,) = torch.autograd.grad(crop.sum(), images)
    rows, columns = gradient[0, 0].nonzero().unbind(1)
    assert gradient.sum().item() == pytest.approx(3 * 16 * 16)  # bilinear weights sum to 1 for every sample
    half = 0.2 * 32
    assert FACE[0, 1] - half - 1 <= rows.min() and rows.max() <= FACE[0, 1] + half + 1
    assert FACE[0, 0] - half - 1 <= columns.min() and columns.max() <= FACE[0, 0] + half + 1


@torch.no_grad()
def test_a_region_beyond_the_border_is_reflected():
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) + 1
    crop = crop_region(image, FACE[None] - torch.tensor([24.0, 30.0]), REGIONS["left_eye"], resolution=16)
    assert crop.min() >= 1  # no black padding
    torch.testing.assert_close(crop, crop.mean(0, keepdim=True))


@torch.no_grad()
def test_both_eyes_meet_one_discriminator():
    """A mirror-symmetric face has the same left and right eye crop, hence the same logits."""
    torch.manual_seed(0)
    model = FaceRegionDiscriminator(64, narrow=1 / 16)
    assert set(model.kinds) == {"eye", "nose", "mouth"}
    half = torch.randn(2, 3, 64, 32)
    images = torch.cat((half, half.flip(3)), dim=3)
    logits = model(images, FACE.expand(2, -1, -1))
    assert {name: tuple(v.shape) for name, v in logits.items()} == {name: (2, 1) for name in REGIONS}
    torch.testing.assert_close(logits["left_eye"], logits["right_eye"])
    assert not torch.allclose(logits["nose"], logits["mouth"])


def test_regions_reach_images_and_r1_reaches_weights():
    torch.manual_seed(0)
    model = FaceRegionDiscriminator(64, narrow=1 / 32).double()
    images = images_of(64, batch=2).requires_grad_()
    crops = model.crops(images, FACE.expand(2, -1, -1))
    (gradient,) = torch.autograd.grad(sum(v.sum() for v in model.judge(crops).values()), images)
    assert gradient.abs().max() > 0
    assert gradient[:, :, :8].abs().max() == 0  # the forehead is nobody's region
    for name, crop in crops.items():
        crop = crop.detach().requires_grad_()
        penalty = r1_penalty(model.kinds[REGIONS[name].kind], crop)
        weight = model.kinds[REGIONS[name].kind].convs[0][0].weight
        (second,) = torch.autograd.grad(penalty, weight)
        assert torch.isfinite(second).all() and second.abs().max() > 0


@torch.no_grad()
def test_half_precision_images_are_cropped_at_full_precision():
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    crop = crop_region(images, FACE[None], REGIONS["mouth"], resolution=16)
    expected = crop_region(images.float(), FACE[None], REGIONS["mouth"], resolution=16)
    assert crop.dtype == torch.bfloat16
    assert torch.equal(crop, expected.bfloat16())


def test_region_maps_for_feature_matching():
    model = FaceRegionDiscriminator(64, narrow=1 / 64)
    maps = model.features(model.crops(torch.zeros(2, 3, 64, 64), FACE.expand(2, -1, -1)))
    assert set(maps) == set(REGIONS)
    for found in maps.values():
        assert [m.shape[-1] for m in found] == [16, 8, 4]
