"""Degradations: closed forms for every step, the published rules for every recipe, and reproducibility."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from metagpen.degrade import (
    BSRGANDegradation,
    GFPGANDegradation,
    HeavyDegradation,
    MixedDegradation,
    bsrgan,
    by_name,
    full_size,
    ops,
)
from metagpen.errors import ConfigError

ALL = [
    ("bsrgan", {}),
    ("bsrgan", {"scale": 2}),
    ("bsrgan", {"scale": 4}),
    ("gfpgan", {}),
    ("heavy", {}),
    ("mixed", {}),
]
each_degradation = pytest.mark.parametrize(("name", "settings"), ALL, ids=lambda x: str(x))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth_images(count, height, width=None, seed=0):
    """Smooth coloured patterns [count, 3, height, width] in [-1, 1]."""
    coarse = torch.rand(count, 3, 9, 9, generator=rng(seed))
    shape = (height, width or height)
    return F.interpolate(coarse, shape, mode="bicubic", align_corners=True).clamp(0, 1) * 2 - 1


def ramp(height, width):
    """[3, height, width] whose value is a plane a + b*y + c*x: linear filters have closed forms on it."""
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return (0.1 + 0.004 * y + 0.002 * x).expand(3, -1, -1)


def plane(ys, xs):
    return (0.1 + 0.004 * ys[:, None] + 0.002 * xs[None, :]).expand(3, -1, -1)


# Dice


def test_dice_stay_in_their_ranges_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    dice = ops.Dice(rng())
    drawn = [dice.log_uniform(8, 16) for _ in range(2000)]
    assert 8 <= min(drawn) < max(drawn) <= 16
    below = np.mean([d < math.sqrt(8 * 16) for d in drawn])  # half of the mass below the geometric mean
    assert abs(below - 0.5) < 0.04
    assert {dice.integer(1, 3) for _ in range(100)} == {1, 2, 3}
    assert sorted(dice.order(7)) == list(range(7))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_seed_is_not_a_generator():
    with pytest.raises(ConfigError, match=r"torch\.Generator"):
        HeavyDegradation()(smooth_images(1, 16), 3)


# Blur


def moments(kernel):
    """Mean (x, y) and covariance of a kernel taken as a distribution, in pixels from its middle."""
    position = torch.arange(kernel.shape[0]).double() - (kernel.shape[0] - 1) / 2
    y, x = torch.meshgrid(position, position, indexing="ij")
    points, weights = torch.stack([x.flatten(), y.flatten()]), kernel.double().flatten()
    mean = points @ weights
    centred = points - mean[:, None]
    return mean, (centred * weights) @ centred.T


@pytest.mark.parametrize("sigma", [0.0, 0.05, 0.7, 2.0, 9.0])
@pytest.mark.parametrize("size", [1, 7, 25])
def test_kernels_sum_to_one(size, sigma):
    kernel = ops.gaussian_kernel(size, sigma, 2 * sigma, 0.3)
    assert kernel.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert (kernel >= 0).all()


def test_isotropic_kernel_has_its_variance():
    mean, covariance = moments(ops.gaussian_kernel(41, 3.0))
    assert torch.allclose(mean, torch.zeros(2).double(), atol=1e-6)
    assert torch.allclose(covariance, 9.0 * torch.eye(2).double(), atol=1e-3)


def test_anisotropic_kernel_is_turned_by_its_angle():
    angle = 0.6
    _, covariance = moments(ops.gaussian_kernel(61, 5.0, 2.0, angle))
    axis = torch.tensor([math.cos(angle), math.sin(angle)]).double()
    across = torch.tensor([-math.sin(angle), math.cos(angle)]).double()
    assert (axis @ covariance @ axis).item() == pytest.approx(25.0, rel=1e-3)
    assert (across @ covariance @ across).item() == pytest.approx(4.0, rel=1e-3)
    assert (axis @ covariance @ across).item() == pytest.approx(0.0, abs=1e-3)


def test_shifted_kernel_has_its_mean_there():
    mean, _ = moments(ops.gaussian_kernel(25, 1.5, shift=1.5))
    assert torch.allclose(mean, torch.full((2,), 1.5).double(), atol=1e-4)


@pytest.mark.parametrize("margin", [1, 4, 23])
def test_mirror_pad_is_numpy_reflect_even_beyond_the_image(margin):
    image = torch.arange(2 * 5 * 7).view(2, 5, 7)
    expected = np.pad(image.numpy(), [(0, 0), (margin, margin), (margin, margin)], mode="reflect")
    assert np.array_equal(ops.mirror_pad(image, margin, margin).numpy(), expected)
    assert np.array_equal(ops.mirror_pad(image[None].double(), margin, margin)[0].numpy(), expected)
    assert ops.mirror_pad(image[:, :1], 2, 0).shape == (2, 5, 7)


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 7), (33, 50, 25), (9, 5, 25), (1, 1, 7)])
def test_fourier_blur_agrees_with_the_plain_one(height, width, size):
    images = torch.rand(3, 3, height, width, generator=rng(), dtype=torch.float64)
    kernels = torch.stack([ops.gaussian_kernel(size, 0.5 + i, 3.0, 0.4 * i, shift=0.5 * i) for i in range(3)])
    assert torch.allclose(ops.blur(images, kernels), ops.blur_plain(images, kernels), atol=1e-12)


def test_blur_shift_moves_the_picture_up_and_left():
    # The kernel's weight lies right and below, so each pixel takes the value from there.
    image = ramp(40, 40)[None]
    blurred = ops.blur(image, ops.gaussian_kernel(25, 1.0, shift=1.5)[None])[0]
    inner = slice(14, 26)
    expected = plane(torch.arange(40).double() + 1.5, torch.arange(40).double() + 1.5)
    assert torch.allclose(blurred[:, inner, inner], expected[:, inner, inner], atol=1e-5)


@pytest.mark.parametrize(("length", "sigma"), [(40, 2.0), (16, 6.0)])
def test_gaussian_matrix_agrees_with_the_kernel(length, sigma):
    image = torch.rand(3, length, length, generator=rng())
    matrix = ops.gaussian_matrix(length, sigma)
    size = 2 * math.ceil(3 * sigma) + 1
    expected = ops.blur_plain(image[None], ops.gaussian_kernel(size, sigma)[None])[0]
    assert torch.allclose(ops.separable(image, matrix, matrix), expected, atol=1e-5)


# Resize


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_resize_to_one_over_scale_keeps_pixel_centres(mode, scale):
    small = ops.resize(ramp(32, 48), (32 // scale, 48 // scale), mode)
    centre = (scale - 1) / 2
    expected = plane(torch.arange(32 // scale) * scale + centre, torch.arange(48 // scale) * scale + centre)
    assert small.shape == expected.shape
    assert torch.allclose(small[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1].double(), atol=1e-8)


@pytest.mark.parametrize("target", [1, 5, 12, 13, 29, 30, 31, 47])
def test_area_is_the_exact_mean_of_each_footprint(target):
    image = torch.rand(3, 30, 30, generator=rng(), dtype=torch.float64)
    fine = image.repeat_interleave(target, 1).repeat_interleave(target, 2)  # each footprint is now 30 x 30 whole pixels
    expected = F.avg_pool2d(fine[None], 30)[0]
    assert torch.allclose(ops.resize(image, (target, target), "area"), expected, atol=1e-12)


@pytest.mark.parametrize("mode", ops.RESIZE_MODES)
@pytest.mark.parametrize("target", [7, 90])
def test_resize_matrices_agree_with_resize(mode, target):
    image = torch.rand(3, 31, 64, generator=rng())
    matrices = [ops.resize_matrix(length, target, mode, antialias=True) for length in (31, 64)]
    expected = ops.resize(image, (target, target), mode, antialias=True)
    assert torch.allclose(ops.separable(image, *matrices), expected, atol=1e-5)


# Noise, JPEG, grey


def test_noise_has_its_sigma_and_its_kind():
    image = torch.full((3, 200, 200), 0.5)
    colour = ops.add_noise(image, 0.05, 7) - 0.5
    assert colour.std().item() == pytest.approx(0.05, rel=0.02)
    assert torch.corrcoef(colour.flatten(1))[0, 1].abs() < 0.02
    grey = ops.add_noise(image, 0.05, 7, "grey") - 0.5
    assert grey.std().item() == pytest.approx(0.05, rel=0.02)
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    covariance = 1e-3 * torch.tensor([[2.0, 0.8, 0.1], [0.8, 1.5, 0.4], [0.1, 0.4, 1.0]])
    mixed = ops.add_noise(image, 0.0, 7, "covariance", covariance) - 0.5
    assert torch.allclose(torch.cov(mixed.flatten(1)), covariance, atol=6e-5)


def test_noise_depends_on_its_seed_only():
    image = torch.full((3, 8, 8), 0.5)
    assert torch.equal(ops.add_noise(image, 0.1, 5), ops.add_noise(image, 0.1, 5))
    assert not torch.equal(ops.add_noise(image, 0.1, 5), ops.add_noise(image, 0.1, 6))


def test_noise_stays_in_range():
    noisy = ops.add_noise(torch.rand(3, 64, 64, generator=rng()), 0.5, 1)
    assert noisy.min() == 0 and noisy.max() == 1


def test_jpeg_error_falls_with_quality_and_sizes_may_differ():
    texture = ops.add_noise(smooth_images(1, 96)[0].add(1).div(2), 0.05, 1)
    errors = [(ops.jpeg([texture], [q])[0] - texture).square().mean().item() for q in (10, 30, 60, 80, 95)]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0
    small = torch.rand(3, 9, 5, generator=rng())
    decoded = ops.jpeg([texture, small, texture], [80, 95, None])
    assert [d.shape for d in decoded] == [texture.shape, small.shape, texture.shape]
    assert torch.equal(decoded[2], texture)
    assert torch.equal(decoded[0], ops.jpeg([texture], [80])[0])


def test_grey_and_8bit():
    image = torch.rand(3, 4, 4, generator=rng())
    grey = ops.to_grey(image)
    assert torch.equal(grey[0], grey[2])
    assert torch.allclose(grey[0], 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2])
    levels = ops.to_8bit(image) * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4) and not torch.allclose(image * 255, levels, atol=1e-3)


# Every degradation


@each_degradation
def test_shape_range_and_dtype(name, settings):
    degrade = by_name(name, **settings)
    for images in (smooth_images(3, 32, 48), smooth_images(2, 37).to(torch.bfloat16)):
        original = images.clone()
        poor = degrade(images, rng())
        assert poor.shape == (len(images), 3, *(side // degrade.scale for side in images.shape[-2:]))
        assert poor.dtype == images.dtype
        assert poor.min() >= -1 and poor.max() <= 1 and poor.isfinite().all()
        assert torch.equal(images, original)
    assert degrade(images[:0], rng()).shape[0] == 0


@each_degradation
def test_a_seed_reproduces_a_batch_bit_for_bit(name, settings):
    degrade = by_name(name, **settings)
    images = smooth_images(6, 32)
    first = degrade(images, rng(3))
    torch.rand(5)  # whatever the global generator does
    np.random.rand(5)
    assert torch.equal(first, degrade(images, rng(3)))
    assert not torch.equal(first, degrade(images, rng(4)))


@each_degradation
def test_threads_change_no_picture(name, settings):
    images, threads = smooth_images(12, 64), torch.get_num_threads()
    found = []
    try:
        for own in (1, 2):
            torch.set_num_threads(own)
            found.append(by_name(name, **settings)(images, rng(3)))
            assert torch.get_num_threads() == own
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@each_degradation
def test_each_image_draws_for_itself(name, settings):
    images = smooth_images(1, 32).expand(4, -1, -1, -1)
    poor = by_name(name, **settings)(images, rng())
    assert all(not torch.equal(poor[0], other) for other in poor[1:])


@each_degradation
def test_a_batch_is_its_images_one_by_one(name, settings):
    degrade = by_name(name, **settings)
    images = smooth_images(12, 32, 40).add(1).div(2)
    dice = ops.Dice(rng(1))
    recipes = [degrade.draw(dice, 32, 40) for _ in images]
    together = degrade.apply(images, recipes)
    alone = torch.cat([degrade.apply(image[None], [recipe]) for image, recipe in zip(images, recipes, strict=True)])
    # A rounding in the last bit may tip one 8-bit value, and through the JPEG its block; nothing more.
    assert (together - alone).abs().mean() < 1e-4
    assert torch.allclose(together, alone, atol=4 / 255)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_degradation
def test_cuda_gives_the_same_pictures(name, settings):
    degrade = by_name(name, **settings)
    images = smooth_images(8, 64)
    poor = degrade(images.cuda(), rng())
    assert poor.is_cuda
    assert (poor.cpu() - degrade(images, rng())).abs().mean() < 0.005


@each_degradation
def test_it_degrades(name, settings):
    degrade = by_name(name, **settings)
    images = smooth_images(8, 64)
    truth = F.avg_pool2d(images, degrade.scale)
    assert (degrade(images, rng()) - truth).abs().mean() > 0.02


def test_wrong_shapes_are_named():
    with pytest.raises(ConfigError, match=r"\[3, 8, 8\]"):
        HeavyDegradation()(torch.zeros(3, 8, 8), rng())
    with pytest.raises(ConfigError, match="too small"):
        BSRGANDegradation(4)(torch.zeros(1, 3, 3, 3), rng())
    with pytest.raises(ConfigError, match="floats in .* not torch.uint8"):
        HeavyDegradation()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), rng())


# BSRGAN


def draw_many(degradation, count=600, side=128):
    dice = ops.Dice(rng(0))
    return [degradation.draw(dice, side, side) for _ in range(count)]


def share(flags):
    flags = list(flags)
    return sum(flags) / len(flags)


DOWNSAMPLE2 = (bsrgan.Shrink, bsrgan.BlurAndSkip)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_bsrgan_order_is_random_but_the_exact_downsample_comes_later(scale):
    orders = Counter()
    for recipe in draw_many(BSRGANDegradation(scale)):
        seven, last = recipe.steps[-8:-1], recipe.steps[-1]
        kinds = [type(step) for step in seven]
        exact = kinds.index(bsrgan.ShrinkToScale)
        loose = next(i for i, kind in enumerate(kinds) if kind in DOWNSAMPLE2)
        assert loose < exact
        merged = Counter("loose" if kind in DOWNSAMPLE2 else kind.__name__ for kind in kinds)
        assert merged == {"Blur": 2, "loose": 1, "ShrinkToScale": 1, "Noise": 1, "Jpeg": 1, "CameraISP": 1}
        assert isinstance(last, bsrgan.Jpeg) and 30 <= last.quality <= 95
        orders[tuple(k.__name__ for k in kinds)] += 1
    assert len(orders) > 300  # of 7! / 2 / 2 = 1260 distinguishable ones, times the two forms of downsample2
    assert max(orders.values()) < 20


def test_bsrgan_settings_are_the_published_ones():
    scale = 2
    steps = [step for recipe in draw_many(BSRGANDegradation(scale), 1500) for step in recipe.steps[:-1]]
    blurs = [s for s in steps if isinstance(s, bsrgan.Blur)]
    isotropic = [b for b in blurs if b.sigma_x == b.sigma_y]
    anisotropic = [b for b in blurs if b.sigma_x != b.sigma_y]
    assert share(b.sigma_x != b.sigma_y for b in blurs) == pytest.approx(0.5, abs=0.03)
    assert {b.size for b in blurs} == set(range(7, 26, 2))
    assert 2.2 < max(b.sigma_x for b in isotropic) <= 2.0 + 0.2 * scale
    assert 0.95 * (4 + scale) < max(b.sigma_x**2 for b in anisotropic) <= 4 + scale
    assert np.mean([b.sigma_x**2 for b in anisotropic]) == pytest.approx((4 + scale) / 2, rel=0.05)
    loose = [s for s in steps if isinstance(s, DOWNSAMPLE2)]
    shrinks = [s for s in loose if isinstance(s, bsrgan.Shrink)]
    skips = [s for s in loose if isinstance(s, bsrgan.BlurAndSkip)]
    assert share(isinstance(s, bsrgan.Shrink) for s in loose) == pytest.approx(0.75, abs=0.04)
    assert 1 <= min(s.factor for s in shrinks) < 1.05 and 3.9 < max(s.factor for s in shrinks) <= 2 * scale
    assert all(s.step == scale and s.blur.shift == (scale - 1) / 2 and s.blur.size == 25 for s in skips)
    assert all(0.1 <= s.blur.sigma_x <= 0.6 * scale for s in skips)
    noises = [s for s in steps if isinstance(s, bsrgan.Noise)]
    kinds = Counter(n.kind for n in noises)
    shares = [kinds[kind] / len(noises) for kind in ("colour", "grey", "covariance")]
    assert shares == pytest.approx([0.4, 0.4, 0.2], abs=0.04)
    assert {round(n.sigma * 255, 6) for n in noises} == set(range(2, 26))
    jpegs = [s.quality for s in steps if isinstance(s, bsrgan.Jpeg)]
    assert share(q is not None for q in jpegs) == pytest.approx(0.9, abs=0.03)
    assert {q for q in jpegs if q is not None} == set(range(30, 96))


def test_bsrgan_noise_covariances_are_covariances():
    drawn = (step for recipe in draw_many(BSRGANDegradation(1)) for step in recipe.steps)
    matrices = [torch.tensor(s.covariance) for s in drawn if isinstance(s, bsrgan.Noise) and s.covariance]
    stacked = torch.stack(matrices).double()
    assert torch.allclose(stacked, stacked.mT)
    values = torch.linalg.eigvalsh(stacked)
    assert values.min() > -1e-9 and 0 < values.max() <= 3 * (25 / 255) ** 2
    assert (stacked >= 0).all()


def test_bsrgan_halves_first_only_at_scale_four():
    first = [recipe.steps[:-8] for recipe in draw_many(BSRGANDegradation(4))]
    assert share(len(f) == 1 for f in first) == pytest.approx(0.25, abs=0.06)
    assert all(f[0].factor == 2.0 for f in first if f)
    assert 0.3 < share(f[0].antialias for f in first if f) < 0.7
    # After halving, the rest works at scale 2.
    skips = [s for r in draw_many(BSRGANDegradation(4)) for s in r.steps if isinstance(s, bsrgan.BlurAndSkip)]
    assert {s.step for s in skips} == {2, 4}
    for scale in (1, 2, 3):
        assert all(len(recipe.steps) == 8 for recipe in draw_many(BSRGANDegradation(scale), 100))


@pytest.mark.parametrize("scale", [2, 4])
def test_bsrgan_blur_and_skip_keeps_pixel_centres(scale):
    step = bsrgan._downsample
    dice = ops.Dice(rng(0))
    skip = next(s for s in (step(dice, scale) for _ in range(100)) if isinstance(s, bsrgan.BlurAndSkip))
    small = bsrgan._carry_out([ramp(96, 96)], [skip], None)[0]
    centres = torch.arange(96 // scale).double() * scale + (scale - 1) / 2
    inner = slice(16 // scale, -16 // scale)
    assert torch.allclose(small[:, inner, inner], plane(centres, centres)[:, inner, inner], atol=1e-4)


def test_bsrgan_crops_to_a_multiple_of_its_scale():
    images = smooth_images(2, 35, 42)
    degrade = BSRGANDegradation(4)
    assert degrade(images, rng()).shape == (2, 3, 8, 10)
    assert torch.equal(degrade(images, rng()), degrade(images[..., :32, :40], rng()))


# GFPGAN


def test_gfpgan_settings_scale_with_the_image():
    at_512, at_128 = (draw_many(GFPGANDegradation(), 600, side) for side in (512, 128))
    assert all(a.sigma_x == pytest.approx(4 * b.sigma_x) for a, b in zip(at_512, at_128, strict=True))
    assert all(a.downsample == b.downsample for a, b in zip(at_512, at_128, strict=True))
    sigmas = [r.sigma_x for r in at_512]
    assert 0.1 <= min(sigmas) < 0.3 and 9.8 < max(sigmas) <= 10
    assert share(r.sigma_x == r.sigma_y for r in at_512) == pytest.approx(0.5, abs=0.06)
    assert 0.8 <= min(r.downsample for r in at_512) < 0.9 and 7.8 < max(r.downsample for r in at_512) <= 8
    assert max(r.noise for r in at_512) <= 20 / 255 and {r.quality for r in at_512} == set(range(60, 101))
    assert 0 < share(r.grey for r in at_512) < 0.04


def test_gfpgan_does_next_to_nothing_when_told_so():
    gentle = GFPGANDegradation(sigma=(0, 0), downsample=(1, 1), noise=(0, 0), jpeg=(100, 100), grey=0.0)
    images = smooth_images(2, 64)[:, :1].repeat(1, 3, 1, 1)  # grey: JPEG halves the resolution of colour
    assert (gentle(images, rng()) - images).abs().max() < 0.02


def test_gfpgan_grey_is_grey():
    poor = GFPGANDegradation(grey=1.0)(smooth_images(2, 32), rng())
    assert torch.equal(poor[:, 0], poor[:, 1]) and torch.equal(poor[:, 0], poor[:, 2])


# Heavy


def test_none_leaves_the_photo_as_a_file_would_hold_it():
    images = torch.rand(3, 3, 8, 8, generator=rng(1)) * 2 - 1
    kept = by_name("none")(images, rng())
    assert (kept - images).abs().max() <= 1 / 255 + 1e-6  # half of a level, in [-1, 1]
    levels = (kept + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


def test_heavy_leaves_as_many_pixels_as_it_says():
    recipes = draw_many(HeavyDegradation(face_px=(8, 16)))
    sides = Counter(r.side for r in recipes)
    assert set(sides) == set(range(8, 17))
    assert share(r.side <= 11 for r in recipes) == pytest.approx(math.log(11.5 / 8) / math.log(2), abs=0.06)
    assert share(r.quality is not None for r in recipes) == pytest.approx(0.7, abs=0.06)
    assert 0.11 < max(r.noise for r in recipes) <= 30 / 255
    assert {r.down for r in recipes} == {"area", "bilinear", "bicubic"}
    assert {r.up for r in recipes} == {"nearest", "bilinear", "bicubic"}
    images = smooth_images(1, 60, 120).add(1).div(2)
    recipe = next(r for r in recipes if r.up == "nearest" and r.side == 10)
    blocks = HeavyDegradation().apply(images, [recipe])[0].view(3, 10, 6, 20, 6)
    assert torch.equal(blocks, blocks[:, :, :1, :, :1].expand_as(blocks))  # 10 x 20 pixels, the rest repeats


def test_heavy_is_the_same_at_any_crop_size():
    gentle = HeavyDegradation(noise=(0, 0), jpeg_p=0.0)
    images = smooth_images(8, 256)
    large = F.avg_pool2d(gentle(images, rng(1)), 4)
    small = gentle(F.avg_pool2d(images, 4), rng(1))
    assert (large - small).abs().mean() < 0.02


def test_heavy_noise_and_jpeg_strike_at_the_small_size():
    grey = torch.full((1, 3, 64, 64), 0.0)
    noisy = HeavyDegradation(face_px=(16, 16), noise=(30, 30), jpeg_p=0.0, blur_p=0.0)
    levels = torch.cat([noisy(grey, rng(s)) for s in range(40)])
    levels = torch.stack([image for image in levels if _is_blocky(image, 4)])  # those enlarged by "nearest"
    assert len(levels) > 5
    assert levels[:, :, ::4, ::4].std().item() == pytest.approx(2 * 30 / 255, rel=0.1)


def _is_blocky(image, block):
    tiles = image.unfold(1, block, block).unfold(2, block, block)
    return bool((tiles == tiles[..., :1, :1]).all())


# Mixtures and names


def test_mixture_draws_by_weight_and_carries_out_each_part():
    heavy, gfpgan = HeavyDegradation(), GFPGANDegradation()
    mixture = MixedDegradation([(3, heavy), (0, BSRGANDegradation()), (1, gfpgan)])
    recipes = draw_many(mixture)
    counts = Counter(which for which, _ in recipes)
    assert counts[0] / len(recipes) == pytest.approx(0.75, abs=0.05) and counts[1] == 0
    images = smooth_images(8, 32).add(1).div(2)
    poor = mixture.apply(images, recipes[:8])
    for image, result, (which, recipe) in zip(images, poor, recipes[:8], strict=True):
        expected = mixture.parts[which].apply(image[None], [recipe])[0]
        assert torch.allclose(result, expected, atol=4 / 255)


@pytest.mark.parametrize("weights", [[], [0.0], [-1.0, 2.0]])
def test_impossible_mixtures(weights):
    with pytest.raises(ConfigError, match="weight"):
        MixedDegradation([(weight, HeavyDegradation()) for weight in weights])


def test_mixture_needs_one_scale():
    with pytest.raises(ConfigError, match="scale"):
        MixedDegradation([(1, HeavyDegradation()), (1, BSRGANDegradation(2))])


def test_names():
    assert isinstance(by_name("bsrgan", scale=4), BSRGANDegradation)
    assert isinstance(by_name("BSRGAN", scale=4), BSRGANDegradation)
    assert by_name("heavy", face_px=[12, 21]).face_px == (12, 21)
    mixture = by_name("mixed", heavy={"weight": 2, "face_px": [9, 9]}, gfpgan=1)
    assert mixture.weights == [2.0, 1.0] and mixture.parts[0].face_px == (9, 9)
    with pytest.raises(ConfigError, match="did you mean 'bsrgan'"):
        by_name("bsrgam")
    with pytest.raises(ConfigError, match="bsrgan, extreme, gfpgan, hard, heavy, mixed, moderate, none"):
        by_name("zzz")
    with pytest.raises(ConfigError, match="did you mean 'downsample'"):
        by_name("gfpgan", downsampel=(1, 2))
    with pytest.raises(ConfigError, match="did you mean 'heavy'"):
        by_name("mixed", heavi=1)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gfpgan", {"sigma": (3, 1)}),
        ("gfpgan", {"sigma": 3}),
        ("gfpgan", {"kernel_size": 40}),
        ("gfpgan", {"jpeg": (0, 50)}),
        ("gfpgan", {"grey": 1.5}),
        ("gfpgan", {"downsample": (0, 1)}),
        ("heavy", {"face_px": (0, 8)}),
        ("heavy", {"jpeg_p": -0.1}),
        ("bsrgan", {"scale": 0}),
        ("bsrgan", {"scale": 1.5}),
    ],
)
def test_impossible_settings_are_named(name, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        by_name(name, **settings)


def test_levels_of_damage_are_names_like_others():
    assert by_name("hard").face_px == (16, 16) and by_name("extreme").face_px == (8, 8)
    assert isinstance(by_name("moderate"), BSRGANDegradation) and by_name("Moderate").scale == 1
    assert by_name("hard", face_px=(12, 12), jpeg_p=0.0).face_px == (12, 12)


@pytest.mark.parametrize("value", [1.5, -0.1, None, "often"])
def test_a_probability_is_one_number(value):
    with pytest.raises(ConfigError, match="blur_p must be a number from 0 to 1"):
        by_name("heavy", blur_p=value)


@pytest.mark.parametrize("parts, message", [
    ({"name": "heavy"}, "no degradation 'name'"),
    ({"heavy": "much"}, "weights of a mixture must be numbers"),
    ({"gfpgan": {"kernel_size": "x"}}, "kernel_size must be odd"),
    ({"gfpgan": {"reference_size": None}}, "reference_size must be a number"),
    ({"bsrgan": {"scale": 2}}, "scale = 2 makes smaller photos"),
])
def test_parts_that_cannot_be(parts, message):
    with pytest.raises(ConfigError, match=message):
        full_size(parts)
