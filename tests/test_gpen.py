"""The fast network against the plain one: keys, shapes, outputs, gradients; every fast layer against its twin."""

import pytest
import torch
from reference_gpen import ModulatedConv2d as PlainModulatedConv2d
from reference_gpen import ReferenceGPEN, blur_kernel, skip_up_pad, upfirdn2d
from torch import Tensor, nn

from metagpen.errors import ConfigError
from metagpen.gpen import GPEN
from metagpen.gpen.generator import layout
from metagpen.gpen.layers import (
    Blur,
    EqualLinear,
    ModulatedConv2d,
    NoiseInjection,
    PixelProduct,
    StyledConv,
    Upsample,
    down_blur,
    scaled_leaky_relu,
)

# size, channel_multiplier, narrow: the widths above 32 px differ from those below from 64 px on
ARCHITECTURES = [(16, 1, 1 / 64), (32, 2, 1 / 64), (64, 1, 1 / 64), (128, 2, 1 / 128)]


def randomise(model: nn.Module, seed: int) -> None:
    """Biases and feature weights start at 0 or 1, which would hide a mistake in them: move all parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)


def pair_of_models(size: int, channel_multiplier: float, narrow: float) -> tuple[GPEN, ReferenceGPEN]:
    """The library's GPEN and the reference, with the same random weights, style_dim 32 to stay quick."""
    torch.manual_seed(size)
    fast = GPEN(size, channel_multiplier, narrow, style_dim=32)
    randomise(fast, seed=size)
    plain = ReferenceGPEN(size, channel_multiplier, narrow, style_dim=32)
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def images_of(size: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(7)) * 2 - 1


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of the output, so that no entry's error can cancel another's."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    return torch.autograd.grad((output * direction).sum(), inputs)


def assert_same(fast: Tensor, plain: Tensor, tolerance: float) -> None:
    """The largest difference, relative to the largest entry when that exceeds 1."""
    assert fast.shape == plain.shape
    assert (fast - plain).abs().max() <= tolerance * max(1.0, plain.abs().max().item())


# -------------------- the whole network

@pytest.mark.parametrize("architecture, parameters, keys", [
    ((512, 2, 1.0), 71_005_223, 163),  # GPEN-BFR-512
    ((256, 1, 0.5), 18_879_010, 144),  # GPEN-BFR-256
])
def test_published_sizes(architecture, parameters, keys):
    with torch.device("meta"):
        fast, plain = GPEN(*architecture), ReferenceGPEN(*architecture)
    assert sum(p.numel() for p in fast.parameters()) == parameters
    assert len(fast.state_dict()) == keys
    assert shapes(fast) == shapes(plain)
    # buffers of one and parameters of the other must not trade places
    assert {name for name, _ in fast.named_parameters()} == {name for name, _ in plain.named_parameters()}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def test_published_key_names():
    """The names as the published files spell them, for a net small enough to list in full (16 px)."""
    modulated = ("conv.weight", "conv.modulation.weight", "conv.modulation.bias")
    styled = (*modulated, "noise.weight", "activate.bias")
    expected = {f"generator.style.{i}.{name}" for i in range(1, 9) for name in ("weight", "bias")}
    expected |= {"generator.input.input", "ecd0.0.0.weight", "ecd0.0.1.bias"}
    expected |= {f"generator.conv1.{name}" for name in styled}
    expected |= {f"generator.to_rgb1.{name}" for name in (*modulated, "bias")}
    for i in range(4):
        expected |= {f"generator.convs.{i}.{name}" for name in styled}
    for i in (0, 2):
        expected.add(f"generator.convs.{i}.conv.blur.kernel")
    for i in range(2):
        expected |= {f"generator.to_rgbs.{i}.{name}" for name in (*modulated, "bias", "upsample.kernel")}
    for k in (1, 2):
        expected |= {f"ecd{k}.0.0.kernel", f"ecd{k}.0.1.weight", f"ecd{k}.0.2.bias"}
    expected |= {"final_linear.0.weight", "final_linear.0.bias"}
    assert set(GPEN(16, 1, 1 / 64).state_dict()) == expected


def test_fixed_kernels_equal_the_reference():
    fast, plain = GPEN(16, 1, 1 / 64).state_dict(), ReferenceGPEN(16, 1, 1 / 64).state_dict()
    kernels = [key for key in plain if key.endswith("kernel")]
    assert len(kernels) == 6
    for key in kernels:
        torch.testing.assert_close(fast[key], plain[key], rtol=0, atol=1e-7)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_output_float32(architecture):
    fast, plain = pair_of_models(*architecture)
    images = images_of(architecture[0])
    expected = plain(images)
    assert expected.std() > 0.05  # an all but constant output would prove nothing
    assert_same(fast(images), expected, 1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_output_and_gradients_float64(architecture):
    fast, plain = (model.double() for model in pair_of_models(*architecture))
    outputs, grads = [], []
    for model in (fast, plain):
        images = images_of(architecture[0]).double().requires_grad_()
        outputs.append(model(images))
        parameters = dict(model.named_parameters())
        found = gradients(outputs[-1], [images, *parameters.values()])
        grads.append(dict(zip(["images", *parameters], found, strict=True)))
    assert_same(*outputs, 1e-10)
    for name, expected in grads[1].items():
        assert expected.abs().max() > 0, name
        assert_same(grads[0][name], expected, 1e-9)


@torch.no_grad()
def test_published_initial_state():
    """As published, training begins with features of weight 0: only z carries the input. Ours begins with 1."""
    fast = GPEN(32, 1, 1 / 64)
    plain = ReferenceGPEN(32, 1, 1 / 64)
    for name, parameter in fast.named_parameters():
        if name.endswith("noise.weight"):
            assert parameter == 1
            parameter.zero_()
    plain.load_state_dict(fast.state_dict())
    images = images_of(32)
    assert_same(fast(images), plain(images), 1e-4)


@torch.no_grad()
def test_offset_reaches_each_layer_as_in_stylegan2():
    fast, plain = (model.double() for model in pair_of_models(32, 1, 1 / 64))
    images = images_of(32).double()
    offset = torch.randn(2, fast.config.n_latent, 32, generator=torch.Generator().manual_seed(1)).double()
    assert_same(fast(images, offset), plain(images, offset), 1e-10)
    assert torch.equal(fast(images, torch.zeros_like(offset)), fast(images))
    for layer in range(fast.config.n_latent):
        alone = torch.zeros_like(offset)
        alone[:, layer] = offset[:, layer]
        assert not torch.equal(fast(images, alone), fast(images)), layer


@torch.no_grad()
def test_samples_of_a_batch_are_independent():
    fast, _ = pair_of_models(32, 1, 1 / 64)
    fast.double()
    images = images_of(32, batch=3).double()
    together = fast(images)
    for i in range(3):
        assert_same(fast(images[i:i + 1]), together[i:i + 1], 1e-12)


@torch.no_grad()
def test_channels_last_changes_nothing():
    fast, _ = pair_of_models(32, 1, 1 / 64)
    fast.double()
    images = images_of(32).double()
    expected = fast(images)
    assert_same(fast(images.to(memory_format=torch.channels_last)), expected, 1e-12)


@torch.no_grad()
def test_one_memory_format_throughout():
    """A channels_last input stays so up to the decoder's last layer; a mixture would copy at every layer."""
    fast, _ = pair_of_models(32, 1, 1 / 64)
    formats = []
    for layer in fast.generator.convs:
        layer.register_forward_hook(lambda _, inputs, output: formats.append(layout(output)))
    for wanted in (torch.channels_last, torch.contiguous_format):
        fast(images_of(32).to(memory_format=wanted))
        assert formats == [wanted] * len(fast.generator.convs)
        formats.clear()


def test_double_backward():
    """Meta-gradients pass through the network's own gradient: the second derivative is the plain one's too."""
    second = []
    for model in pair_of_models(16, 1, 1 / 64):
        model.double()
        images = images_of(16).double()
        inner, outer = model.final_linear[0].weight, model.generator.convs[0].conv.weight
        (first,) = torch.autograd.grad(model(images).square().mean(), inner, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), outer)[0])
    assert second[1].abs().max() > 0
    assert (second[0] - second[1]).abs().max() <= 1e-9 * second[1].abs().max()


# -------------------- the fast layers

def random_maps(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("kernel_size, demodulate, upsample", [
    (3, True, False),  # the plain styled convolution
    (3, True, True),   # the up-sampling one
    (1, False, False),  # ToRGB's
])
def test_modulated_convolution(kernel_size, demodulate, upsample):
    torch.manual_seed(0)
    fast = ModulatedConv2d(6, 5, kernel_size, style_dim=8, demodulate=demodulate, upsample=upsample).double()
    plain = PlainModulatedConv2d(6, 5, kernel_size, 8, demodulate=demodulate, upsample=upsample).double()
    randomise(fast, seed=1)
    plain.load_state_dict(fast.state_dict())
    x, w = random_maps(3, 6, 8, 8), random_maps(3, 8)
    y = fast(x, w)
    assert y.shape == ((3, 5, 16, 16) if upsample else (3, 5, 8, 8))
    found = (y, *gradients(y, [x, w, *fast.parameters()]))
    for twin, parameters in ((plain, plain.parameters()), (fast.reference, fast.parameters())):
        expected = twin(x, w)
        expected = (expected, *gradients(expected, [x, w, *parameters]))
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b, 1e-12)


@pytest.mark.parametrize("gain", [1.0, 4.0])
@pytest.mark.parametrize("pad", [(0, 0), (1, 1), (2, 2), (2, 1)])
def test_blur(pad, gain):
    blur = Blur(pad, gain).double()
    x = random_maps(2, 3, 9, 8)
    found = blur(x)
    found_gradient, = gradients(found, [x])
    twins = (upfirdn2d(x, blur_kernel(gain).double(), pad=pad), blur.reference(x))
    for expected in twins:
        assert_same(found, expected, 1e-14)
        assert_same(found_gradient, *gradients(expected, [x]), 1e-14)


@pytest.fixture
def on_fir():
    """(the Triton kernel's function, a device it runs on): the GPU, or the CPU by Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed (make setup-triton)")
    from metagpen.gpen.fir import fir

    return fir, "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("pad", "batch", "channels"), [((1, 1), 1, 3), ((2, 2), 2, 2), ((2, 1), 1, 70)])
def test_the_triton_blur_is_the_plain_one(on_fir, pad, batch, channels):
    """More rows and channels than a program has, a kernel without symmetries; gradients, and their gradients too."""
    fir, device = on_fir
    blur = Blur(pad).double().to(device)
    blur.kernel = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double().to(device)
    x = random_maps(batch, channels, 18, 3).to(device).detach().requires_grad_()
    weight = random_maps(batch, channels, 18, 3).to(device)
    both = []
    for way in (lambda maps: fir(maps, blur.kernel.flip(0, 1), *pad), blur.reference):
        y = way(x)
        first, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        both.append((y, first, *torch.autograd.grad((first * weight).sum(), x)))
    for mine, plain in zip(*both, strict=True):
        assert_same(mine, plain, 1e-12)
    assert both[0][0].is_contiguous(memory_format=torch.channels_last)


def test_the_triton_blur_under_torch_func_and_in_bfloat16(on_fir):
    fir, device = on_fir
    blur = Blur((1, 1)).double().to(device)
    x = random_maps(2, 1, 2, 5, 4).to(device).detach()

    def loss(way):
        return torch.func.vmap(torch.func.grad(lambda maps: way(maps).square().sum()))

    assert_same(loss(lambda maps: fir(maps, blur.kernel, 1, 1))(x), loss(blur.reference)(x), 1e-12)
    half = fir(x[0].bfloat16(), blur.kernel.float(), 1, 1)
    assert half.dtype == torch.bfloat16 and (half.double() - blur.reference(x[0])).abs().max() < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_blurs_channels_last_maps_with_triton():
    pytest.importorskip("triton")
    blur, x = Blur((2, 1)).cuda(), random_maps(2, 64, 33, 32).cuda().float()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = blur(x.contiguous(memory_format=torch.channels_last))
    names = {event.key for event in profile.key_averages()}
    assert "metagpen::fir" in names
    torch.testing.assert_close(found, blur.reference(x), rtol=1e-4, atol=1e-5)


def test_skip_upsampling():
    up = Upsample().double()
    x = random_maps(2, 3, 5, 4)
    found = up(x)
    expected = upfirdn2d(x, blur_kernel(gain=4.0).double(), up=2, pad=skip_up_pad())
    assert found.shape == (2, 3, 10, 8)
    assert_same(found, expected, 1e-14)
    assert_same(*gradients(found, [x]), *gradients(expected, [x]), 1e-14)


def test_blurs_keep_a_constant_picture():
    """Away from the zero border, the low-pass and the doubling leave a constant as it is."""
    ones = torch.ones(1, 2, 12, 12, dtype=torch.float64)
    assert torch.allclose(down_blur(3).double()(ones)[..., 3:-3, 3:-3], torch.ones(()).double())
    assert torch.allclose(Upsample().double()(ones)[..., 3:-3, 3:-3], torch.ones(()).double())


@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("upsample", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_styled_convolution(upsample, concat, channels_last):
    """Activated in two parts before they are put together, against one step after the other."""
    torch.manual_seed(0)
    layer = StyledConv(6, 5, 3, style_dim=8, upsample=upsample, concat=concat).double()
    randomise(layer, seed=1)
    size = 16 if upsample else 8
    x, w, feature = random_maps(2, 6, 8, 8), random_maps(2, 8), random_maps(2, 5, size, size)
    given = (x, feature)
    if channels_last:
        given = [value.contiguous(memory_format=torch.channels_last) for value in given]
    found, expected = layer(given[0], w, given[1]), layer.reference(x, w, feature)
    assert_same(found, expected, 1e-12)
    inputs = [x, w, feature, *layer.parameters()]
    for a, b in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert b.abs().max() > 0
        assert_same(a, b, 1e-12)


@pytest.mark.parametrize("factor", [None, (3,), (2, 3), (1,)])
@pytest.mark.parametrize("bias", [(3,), (2, 3)])
def test_scaled_leaky_relu(factor, bias):
    x, bias = random_maps(2, 3, 4, 4), random_maps(*bias)
    factor = None if factor is None else random_maps(*factor)

    def spread(value):
        return value.reshape(*value.shape, 1, 1)

    expected = 2**0.5 * nn.functional.leaky_relu(x * (1 if factor is None else spread(factor)) + spread(bias), 0.2)
    found = scaled_leaky_relu(x, bias, factor)
    inputs = [x, bias] + ([] if factor is None else [factor])
    for a, b in zip((found, *gradients(found, inputs)), (expected, *gradients(expected, inputs)), strict=True):
        assert_same(a, b, 1e-13)


@pytest.mark.parametrize("activation", [True, False])
def test_equalised_linear_layer(activation):
    torch.manual_seed(0)
    layer, x = EqualLinear(5, 4, bias_init=1.0, lr_mul=0.1, activation=activation).double(), random_maps(3, 5)
    expected = x @ (layer.weight * layer.scale).T + layer.bias * layer.lr_mul
    if activation:
        expected = 2**0.5 * nn.functional.leaky_relu(expected, 0.2)
    inputs = [x, *layer.parameters()]
    for a, b in zip((layer(x), *gradients(layer(x), inputs)), (expected, *gradients(expected, inputs)), strict=True):
        assert_same(a, b, 1e-13)


def test_product_over_pixels():
    """Against the plain product: value, gradients, gradients of gradients, and batched by torch.func."""
    pixels, weight = random_maps(2, 7, 4), random_maps(2, 3, 4)

    def plain(pixels: Tensor, weight: Tensor) -> Tensor:
        return pixels @ weight.transpose(1, 2)

    assert_same(PixelProduct.apply(pixels, weight), plain(pixels, weight), 1e-14)
    assert torch.autograd.gradcheck(PixelProduct.apply, (pixels, weight))
    assert torch.autograd.gradgradcheck(PixelProduct.apply, (pixels, weight))
    found, expected = (torch.func.vmap(torch.func.grad(lambda p, w, way=way: way(p, w).pow(3).sum(), argnums=(0, 1)))(
        pixels.detach()[None].repeat(3, 1, 1, 1), weight.detach()[None].repeat(3, 1, 1, 1))
        for way in (PixelProduct.apply, plain))
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b, 1e-12)


def test_feature_injection_concatenates_or_adds():
    x, feature = torch.ones(1, 2, 3, 3), torch.full((1, 2, 3, 3), 2.0)
    for concat in (True, False):
        injection = NoiseInjection(concat)
        nn.init.constant_(injection.weight, 0.5)
        expected = torch.cat((x, 0.5 * feature), dim=1) if concat else x + 0.5 * feature
        assert torch.equal(injection(x, feature), expected)


def test_a_network_too_narrow_for_a_channel_is_refused():
    with pytest.raises(ConfigError, match="narrow = 0.0001, channel_multiplier = 1: too little for a channel at 16 px"):
        GPEN(16, 1, 0.0001)
