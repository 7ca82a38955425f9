"""The shots curve on a tiny model: methods, a resumable runner, tables, plots and the page."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import recogniser
from torch import nn
from typer.testing import CliRunner

import metagpen
from metagpen.adaptation import AdaptConfig, adapt
from metagpen.adaptation.config import DECIDED_BY_RULE
from metagpen.adaptation.draws import album
from metagpen.adaptation.recorded import RecordedSteps
from metagpen.errors import ConfigError, DataError
from metagpen.evaluate import curve, curve_report, judges, methods, metrics, report, tasks
from metagpen.evaluate.curve import CurveConfig, CurveSettings, UnitFile, shots_curve
from metagpen.evaluate.engine import named_degradations
from metagpen.evaluate.held_out import assert_disjoint, held_out, trained_people
from metagpen.gpen import GPEN
from metagpen.identities import People
from metagpen.meta.train import MetaConfig
from metagpen.model import MetaGPEN
from metagpen.person import AdapterSpec, DecoderBases, IdentityStart
from metagpen.person.rule import InnerRule, RuleConfig
from metagpen.recognise.distil import DistilConfig
from metagpen.train import TrainConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

FAST = AdaptConfig(batch_size=2, degradation={"heavy": {"face_px": [4, 8]}}, tail_blocks=1, tail_rank=2, bf16=False,
                   warmup=1, lr_latent=0.03, lr_tail=0.01)  # fmt: skip
RIVALS = methods.Rivals(iterations=8)
EVERYBODY = list(methods.METHODS)
SMALL = CurveSettings(methods=EVERYBODY, shots=[1, 2], steps=[0, 2], degradations=["hard", "extreme"], adapt=FAST,
                      rivals=RIVALS, max_queries=2)  # fmt: skip
STEPPING = [name for name in EVERYBODY if methods.METHODS[name].steps]


def tiny() -> MetaGPEN:
    torch.manual_seed(0)
    gpen = GPEN(16, 1, 0.03125, style_dim=16, n_mlp=2)
    for name, parameter in gpen.named_parameters():
        if name.endswith("noise.weight"):
            nn.init.constant_(parameter, 0.5)
    return MetaGPEN(gpen, IdentityStart(8, gpen.config.n_latent, 16, 8), {"recogniser": "tests"}).frozen()


def with_rule() -> MetaGPEN:
    model = tiny()
    model.rule = InnerRule(model.gpen, AdapterSpec(1, 2), RuleConfig("adam", steps=2, per_step=True), 0.02, 0.02)
    return model.frozen()


def write_people(folder: Path, names: str = "abc", seed: int = 0) -> People:
    """Smooth aligned crops, six of everybody, with landmarks."""
    generator = torch.Generator().manual_seed(seed)
    lines = ["id,file,src_crop_side_px,x0,y0,x1,y1,x2,y2,x3,y3,x4,y4"]
    for name in names:
        (folder / name).mkdir(parents=True)
        base = torch.randn(1, 3, 4, 4, generator=generator)
        for i in range(6):
            rough = base + 0.3 * torch.randn(1, 3, 4, 4, generator=generator)
            face = torch.nn.functional.interpolate(rough, size=32, mode="bicubic")[0].clamp(-1, 1)
            pixels = ((face + 1) * 127.5).permute(1, 2, 0).numpy().astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
            lines.append(f"{name},{name}/{i}.png,32,11,14,21,14,16,19,13,24,19,24")
    (folder / "manifest.csv").write_text("\n".join(lines))
    return People.from_folder(folder)


def measure(people: People, settings: CurveSettings = SMALL, model: MetaGPEN | None = None, **options) -> list[dict]:
    options = {"recognisers": {"scorer": recogniser("scorer", 2)}, "recogniser": recogniser(), **options}
    return shots_curve(model or tiny(), people, settings=settings, **options)


def numbers(rows: list[dict]) -> list[dict]:
    """Rows without what may differ when a run is repeated."""
    return [{key: value for key, value in row.items() if key not in curve.MEASURED} for row in rows]


def values(rows: list[dict], **keys) -> dict[tuple, float]:
    """Values of the rows with these keys, by everything else that names a number."""
    names = ("degradation", "metric", "identity")
    return {tuple(row[name] for name in names): row["value"] for row in rows
            if all(row[key] == value for key, value in keys.items())}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("curve") / "smooth"
    write_people(folder)
    return folder


@pytest.fixture(scope="module")
def people(folder) -> People:
    return People.from_folder(folder)


@pytest.fixture(scope="module")
def rows(people) -> list[dict]:
    return measure(people)


@pytest.fixture(scope="module")
def lesson(people) -> methods.Lesson:
    photos = tasks.load_support(people, "a", 2, 16)
    return methods.Lesson(tiny(), album(list(photos), 16), FAST, RIVALS, recogniser())


def restored(lesson: methods.Lesson, name: str, stops: list[int], schedule: str = "constant") -> list[torch.Tensor]:
    poor = lesson.album.crops * 0.5
    with torch.no_grad():
        found = methods.checkpoints(methods.METHODS[name], lesson, stops, schedule)
        return [point.restore(poor).clone() for point in found]


# --- methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERYBODY)
def test_a_method_leaves_the_model_alone(lesson, name):
    model = lesson.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stops = [0, 2] if name in STEPPING else [0]
    images = restored(lesson, name, stops, "per-run" if name == "pivotal" else "constant")
    assert len(images) == len(stops) and all(image.shape == (2, 3, 16, 16) for image in images)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    if name in STEPPING:
        assert not torch.equal(*images), "steps must do something"


@pytest.mark.parametrize("name", ["finetune", "finetune@n", "lora-4", "lora-16", "latent-only", "full", "pivotal"])
def test_rivals_begin_at_the_generic_model(lesson, name):
    assert torch.equal(restored(lesson, name, [0])[0], restored(lesson, "generic", [0])[0])


@pytest.mark.parametrize("name", ["adapt", "lora-4", "latent-only", "full", "finetune", "pivotal"])
def test_recorded_steps_lead_where_plain_ones_do(lesson, name, monkeypatch):
    """What a GPU would record, run as it is; those that release weights on the way, too."""
    schedule = "per-run" if name == "pivotal" else "constant"
    plain = restored(lesson, name, [4], schedule)[0]
    taken = []

    def recorded(objective, parameters, *_):
        taken.append(RecordedSteps(objective, parameters, recorded=False))
        return taken[-1]

    monkeypatch.setattr(methods, "steps_from", recorded)
    torch.testing.assert_close(restored(lesson, name, [4], schedule)[0], plain, rtol=0, atol=1e-4)
    assert sum(taken[0].taken.values())


def test_a_curve_compiles_nobody():
    with pytest.raises(ConfigError, match="adapt.compile"):
        CurveSettings(adapt=AdaptConfig(compile=True)).check()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are a CUDA device's")
@pytest.mark.parametrize("name", ["adapt", "lora-4", "start-full", "finetune", "pivotal"])
def test_on_a_gpu_recorded_steps_lead_where_plain_ones_do(lesson, name):
    """Enough steps to warm up, record and play, twice where weights are released on the way."""
    cuda = replace(lesson, model=tiny().to("cuda"), album=album(list(lesson.album.crops), 16, "cuda"),
                   recogniser=recogniser().to("cuda"), rivals=methods.Rivals(iterations=12))
    images = [restored(replace(cuda, config=FAST.model_copy(update={"cuda_graphs": records})), name, [12], "per-run")
              for records in (False, True)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["lora-4", "latent-only", "full", "finetune@n"])
def test_rivals_lower_the_loss_on_their_photos(lesson, name):
    """Not only move: after 40 steps the degraded support photos come nearer to the true ones."""
    plain = methods.Lesson(lesson.model, lesson.album, FAST.model_copy(update={"identity": 0.0, "perceptual": 0.0}),
                           lesson.rivals, lesson.recogniser)  # fmt: skip
    before, after = restored(plain, name, [0, 40])
    error = [(image - lesson.album.crops).abs().mean() for image in (before, after)]
    assert error[1] < error[0]


def test_steps_in_float32_are_in_float32_only_there(lesson):
    """Where the configuration says bfloat16, as `adapt` does by default."""
    wanted = methods.Lesson(lesson.model, lesson.album, FAST.model_copy(update={"bf16": True}), RIVALS,
                            lesson.recogniser)
    precisions = {name: methods.METHODS[name].build(wanted).loss.config.bf16 for name in ("adapt", "adapt-float32")}
    assert precisions == {"adapt": True, "adapt-float32": False}


def test_adapt_is_what_adapt_returns(lesson):
    photos = list(lesson.album.crops)
    for steps, image in zip((0, 3), restored(lesson, "adapt", [0, 3], "per-run")):
        person = adapt(lesson.model, photos, steps, config=FAST, recogniser=lesson.recogniser)
        assert torch.equal(image, person.restore_batch(lesson.album.crops * 0.5))
    assert torch.equal(restored(lesson, "start", [0])[0], restored(lesson, "adapt", [0])[0])


def test_adapt_follows_the_learned_rule_and_no_rule_does_not(lesson):
    model = with_rule()
    own = methods.Lesson(model, lesson.album, FAST, RIVALS, lesson.recogniser)
    plain = AdaptConfig(**FAST.model_dump(exclude_unset=True, exclude=DECIDED_BY_RULE))
    person = adapt(model, list(lesson.album.crops), 3, config=plain, recogniser=lesson.recogniser)
    expected = person.restore_batch(lesson.album.crops * 0.5)
    ours, on_the_way = methods.METHODS["adapt"], restored(own, "adapt", [1, 3, 5], "learned")[1]
    assert ours.schedule_of(model, "constant") == "learned" and torch.equal(on_the_way, expected)
    assert not torch.equal(restored(own, "no-rule", [3], "per-run")[0], expected)
    assert torch.equal(restored(lesson, "no-rule", [3], "per-run")[0], restored(lesson, "adapt", [3], "per-run")[0])


def test_random_filters_stand_in_for_those_of_the_model(lesson):
    """And the model keeps its own."""
    random, model = (MetaGPEN(lesson.model.gpen, lesson.model.start, lesson.model.card, None,
                              DecoderBases.random(lesson.model.gpen, 3)).frozen() for _ in range(2))
    for own, learned in zip(random.bases.filters, model.bases.filters, strict=True):
        own.data = own.data.half().float()  # as its file would hold them
        learned.data = learned.data + 1.0
    config = FAST.model_copy(update={"decoder_rank": 3, "rule": False})
    ours, by_chance = (replace(lesson, model=one, config=config) for one in (model, random))
    found = restored(ours, "random-filters", [3], "per-run")[0]
    assert torch.equal(found, restored(by_chance, "adapt", [3], "per-run")[0])
    assert not torch.equal(found, restored(ours, "adapt", [3], "per-run")[0])
    assert torch.equal(model.bases.filters[0], DecoderBases.random(model.gpen, 3).filters[0] + 1.0)
    assert methods.with_random_filters(lesson.model) is lesson.model, "which has none of its own"


def test_the_start_has_the_initial_values_of_the_rule(lesson):
    model = with_rule()
    with torch.no_grad():
        for value in model.rule.initial.values():
            value.add_(0.1)
    own = methods.Lesson(model, lesson.album, FAST, RIVALS, lesson.recogniser)
    assert torch.equal(restored(own, "start", [0])[0], restored(own, "adapt", [0], "learned")[0])
    assert not torch.equal(restored(own, "start", [0])[0], restored(own, "no-rule", [0], "per-run")[0])


def test_rivals_may_begin_at_our_start_and_ours_without(lesson):
    start, generic = restored(lesson, "start", [0])[0], restored(lesson, "generic", [0])[0]
    for name in ("start-lora-16", "start-full"):
        begun, moved = restored(lesson, name, [0, 2], "constant")
        assert torch.allclose(begun, start, atol=2e-3), "but for the half precision of a Person"
        assert not torch.allclose(begun, generic, atol=1e-2) and not torch.equal(moved, begun)
        plain = restored(lesson, name.removeprefix("start-"), [2], "constant")[0]
        assert not torch.allclose(moved, plain, atol=1e-2)
    assert torch.equal(restored(lesson, "no-start", [0], "per-run")[0], generic)
    four_times = {name: 4 * getattr(FAST, name) for name in ("lr_latent", "lr_tail", "lr_decoder")}
    same = replace(lesson, config=FAST.model_copy(update=four_times))
    fast = restored(replace(lesson, rate=4.0), "no-start", [2], "per-run")[0]
    assert torch.allclose(fast, restored(same, "no-start", [2], "per-run")[0], atol=1e-6)
    assert not torch.allclose(fast, restored(lesson, "no-start", [2], "per-run")[0], atol=1e-2)


def test_a_strength_is_between_generic_and_personal(lesson):
    photos = list(lesson.album.crops)
    person = adapt(lesson.model, photos, 3, config=FAST, recogniser=lesson.recogniser)
    for percent in (25, 50, 75):
        expected = person.restore_batch(lesson.album.crops * 0.5, percent / 100)
        assert torch.equal(restored(lesson, f"strength-{percent}", [3], "per-run")[0], expected)


def test_stops_of_a_constant_schedule_lie_on_one_run(lesson):
    on_the_way, end = restored(lesson, "lora-4", [2, 4])
    alone, whole = restored(lesson, "lora-4", [2])[0], restored(lesson, "lora-4", [4])[0]
    assert torch.equal(on_the_way, alone) and torch.equal(end, whole)
    assert not torch.equal(restored(lesson, "lora-4", [4], "per-run")[0], end), "its cosine has fallen by then"


def test_a_fine_tune_is_frozen_then_released(lesson):
    learner = methods.finetune(methods.with_schedule(lesson, steps=8))
    first, last = learner.rates(3), learner.rates(4)
    assert set(first) < set(last) == set(dict(lesson.model.gpen.named_parameters()))
    assert {name.split(".")[0] for name in first} == {"ecd1", "ecd2", "final_linear"}
    assert last["generator.conv1.conv.weight"] == pytest.approx(last["ecd0.0.0.weight"] / 10)
    with pytest.raises(ConfigError, match="beyond the tutorial's 8"):
        restored(lesson, "finetune", [9], "tutorial")


def test_pivotal_moves_the_latent_first_and_the_weights_then(lesson):
    learner = methods.pivotal(methods.with_schedule(lesson, steps=4))
    assert set(learner.rates(1)) == {"latent.offset"}
    assert set(learner.rates(2)) == set(dict(lesson.model.gpen.named_parameters()))
    alone = methods.full(methods.with_schedule(lesson, steps=2))
    assert [learner.rates(2 + step) for step in range(2)] == [alone.rates(step) for step in range(2)]


def test_reference_average_blends_with_the_mean_face(lesson):
    generic, blended = restored(lesson, "generic", [0])[0], restored(lesson, "reference-average", [0])[0]
    assert torch.allclose(blended, 0.75 * generic + 0.25 * lesson.album.crops.mean(0), atol=1e-6)


def test_methods_by_name():
    assert methods.by_name("meta-lslr").name == "adapt"
    with pytest.raises(ConfigError, match="unknown method 'lora'; choose from input"):
        methods.by_name("lora")
    assert methods.by_name("adapt-x4").rate == 4.0 and methods.by_name("adapt").rate == 1.0
    with pytest.raises(ConfigError, match="generic is not measured at other rates"):
        methods.by_name("generic-x4")


def test_ours_at_other_rates_is_what_lr_scale_does(lesson):
    """With the rule and without: `adapt-x4` ends where `adapt` with lr_scale=4 does, and elsewhere than `adapt`."""
    for name in ("adapt", "no-rule"):
        scaled = replace(lesson, model=with_rule(), config=lesson.config.model_copy(update={"lr_scale": 4.0}))
        plain = replace(lesson, model=with_rule())
        quadruple = restored(replace(plain, rate=4.0), name, [2])[0]
        assert torch.equal(restored(scaled, name, [2])[0], quadruple)
        assert not torch.equal(restored(plain, name, [2])[0], quadruple)


# --- metrics and degradations ----------------------------------------------------------------------


def test_ms_ssim_agrees_with_torchmetrics_and_says_how_many_scales():
    from metagpen.compat import ensure_torchvision

    ensure_torchvision()  # which the next import wants
    from torchmetrics.image import MultiScaleStructuralSimilarityIndexMeasure

    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.interpolate(torch.rand(2, 3, 11, 11, generator=generator), size=176) - 0.5
    noisy = truth + 0.2 * torch.randn(truth.shape, generator=generator)
    reference = MultiScaleStructuralSimilarityIndexMeasure(data_range=2.0, reduction="none")(noisy.clamp(-1, 1), truth)
    assert torch.allclose(metrics.ms_ssim(noisy, truth), reference, atol=1e-6)
    small = truth[..., :128, :128]
    assert metrics.ms_ssim(small, small).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert [metrics.ms_ssim_name(size) for size in (176, 128, 64)] == ["ms_ssim", "ms_ssim4", None]
    assert metrics.ms_ssim(truth[..., :64, :64], truth[..., :64, :64]) is None


def test_focus_needs_no_reference_and_convicts_blur():
    from kornia.filters import gaussian_blur2d

    sharp = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (metrics.focus(gaussian_blur2d(sharp, (9, 9), (2.0, 2.0))) < 0.2 * metrics.focus(sharp)).all()
    assert metrics.focus(torch.zeros(1, 3, 32, 32)).item() == 0


def test_hard_and_extreme_leave_sixteen_and_eight_pixels():
    levels = named_degradations(["hard", "extreme", "moderate", "heavy"])
    assert (levels["hard"].face_px, levels["extreme"].face_px) == ((16, 16), (8, 8))
    assert type(levels["moderate"]).__name__ == "BSRGANDegradation" and levels["heavy"].face_px == (8, 16)


# --- rows ------------------------------------------------------------------------------------------


def test_rows_are_tidy(rows):
    assert all(tuple(row) == curve.COLUMNS for row in rows)
    keys = [tuple(v for k, v in row.items() if k not in (*curve.MEASURED, "value")) for row in rows]
    assert len(set(keys)) == len(rows) and all(math.isfinite(row["value"]) for row in rows)
    metrics_found = {row["metric"] for row in rows}
    assert metrics_found == {"psnr", "ssim", "sharpness", "focus", "identity", "deg", "person", "person_deg"}
    points = {(row["method"], row["shots"], row["steps"]) for row in rows}
    assert {(s, n) for m, s, n in points if m == "lora-4"} == {(1, 0), (1, 2), (2, 0), (2, 2)}
    assert {(s, n) for m, s, n in points if m == "generic"} == {(0, 0)}
    schedules = {row["method"]: row["schedule"] for row in rows}
    assert (schedules["generic"], schedules["adapt"], schedules["finetune"], schedules["pivotal"]) == (
        "none", "constant", "tutorial", "per-run")  # fmt: skip
    assert all(row["seconds"] > 0 for row in rows if row["steps"])
    assert {row["dataset"] for row in rows} == {"smooth"} and {row["queries"] for row in rows} == {2}


def test_generic_is_a_plain_forward_pass(people, rows):
    task = tasks.load_task(people, "b", 2, 16, max_queries=2)
    poor = tasks.damage(task, "hard", named_degradations(["hard"])["hard"])
    with torch.no_grad():
        plain = tiny().gpen(poor).clamp(-1, 1)
    found = values(rows, method="generic", degradation="hard")["hard", "psnr", "b"]
    assert found == pytest.approx(metrics.psnr(plain, task.queries).double().mean().item(), rel=1e-6)


def test_person_compares_with_the_other_photos(people, rows):
    task, scorer = tasks.load_task(people, "b", 2, 16, max_queries=2), recogniser("scorer", 2)
    poor = tasks.damage(task, "hard", named_degradations(["hard"])["hard"])
    mine, true = (metrics.embeddings(scorer, x, task.landmarks) for x in (poor, task.queries))
    expected = (float(mine[0] @ true[1]) + float(mine[1] @ true[0])) / 2
    assert values(rows, method="input")["hard", "person", "b"] == pytest.approx(expected, rel=1e-4)


def test_wrong_person_learns_from_the_lender(people, rows):
    lender = tasks.derangement(list(people))["a"]
    theirs = tasks.load_support(people, lender, 2, 16)
    task, hard = tasks.load_task(people, "a", 2, 16, max_queries=2), named_degradations(["hard"])["hard"]
    person = adapt(tiny(), list(theirs), 0, config=FAST, recogniser=recogniser())
    psnr = metrics.psnr(person.restore_batch(tasks.damage(task, "hard", hard)), task.queries).double().mean().item()
    assert values(rows, method="wrong-person", shots=2, steps=0)["hard", "psnr", "a"] == pytest.approx(psnr, rel=1e-6)


def test_order_of_people_and_batch_size_do_not_matter(people, rows):
    some = CurveSettings(**{**SMALL.model_dump(), "methods": ["generic", "adapt"], "degradations": ["hard"]})
    expected = [row for row in rows if row["method"] in some.methods and row["degradation"] == "hard"]
    backwards = measure(people.select("cba"), some)
    assert numbers(backwards) == numbers(expected), "the same seed must give the same numbers, to the bit"
    for row, other in zip(measure(people, some, batch_size=1), expected):
        assert row["value"] == pytest.approx(other["value"], rel=1e-4, abs=1e-5)
    other_seed = measure(people, some, seeds=[1])
    assert [row["value"] for row in other_seed] != [row["value"] for row in expected]


def test_a_run_that_diverged_is_scored_as_grey(people):
    wild = CurveSettings(**{**SMALL.model_dump(), "methods": ["full"], "rivals": {"lr_full": 1e30}, "shots": [1]})
    found = measure(people.select("a"), wild)
    grey = metrics.psnr(torch.zeros(2, 3, 16, 16), tasks.load_task(people, "a", 1, 16, max_queries=2).queries)
    assert values(found, steps=2)["hard", "psnr", "a"] == pytest.approx(grey.double().mean().item(), rel=1e-5)


# --- a run that is interrupted ---------------------------------------------------------------------

RUN = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from types import SimpleNamespace
if __name__ == "__main__":
    import test_curve as t
    t.measure(t.People.from_folder({people!r}), folder={folder!r}, workers=2, threads=1)
"""


def test_a_killed_run_of_two_workers_goes_on_without_them(folder, people, rows, tmp_path):
    """Real SIGKILL in the middle: nothing lost, nothing doubled, the workers gone, and the same numbers as in one."""
    run, script = tmp_path / "run", tmp_path / "run.py"
    script.write_text(RUN.format(tests=str(Path(__file__).parent), people=str(folder), folder=str(run)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, script], env=environment, start_new_session=True)
    units, deadline = run / curve.UNITS, time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if units.exists() and units.read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was to be killed half-way"
    wait_for_the_end_of(process.pid)
    known = units.read_bytes().count(b"\n")
    assert 3 <= known < len({(row["identity"], row["method"], row["shots"]) for row in rows})
    with units.open("a") as file:
        file.write('{"unit": [0, "c", "ful')  # killed while writing
    again = measure(people, folder=run)
    assert numbers(again) == numbers(rows)
    assert [row["workers"] for row in again].count(2) > 0, "units of the killed run were kept"
    assert numbers(curve_report.read_rows(run / curve.ROWS)) == numbers(rows)
    assert len(curve_report.read_rows(units)) == len(rows)


def wait_for_the_end_of(session: int) -> None:
    """Until no process of that session is left; workers must not outlive their parent."""
    deadline = time.monotonic() + 60
    while True:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, "workers outlived the killed run"
        time.sleep(0.05)


def test_a_finished_run_measures_nothing_again(people, tmp_path, monkeypatch):
    some = CurveSettings(**{**SMALL.model_dump(), "methods": ["generic"]})
    first = measure(people, some, folder=tmp_path)
    monkeypatch.setattr(curve.Bench, "measure", lambda *_: pytest.fail("everything was known"))
    assert measure(people, some, folder=tmp_path) == first
    with pytest.raises(ConfigError, match="a run of other settings .seeds.; give another folder"):
        measure(people, some, folder=tmp_path, seeds=[1])


def test_interruption_writes_what_is_known(people, tmp_path, monkeypatch):
    some = CurveSettings(**{**SMALL.model_dump(), "methods": ["input", "generic"]})
    measured = curve.Bench.measure

    def interrupted(bench, unit):
        if unit.person == "b":
            raise KeyboardInterrupt
        return measured(bench, unit)

    monkeypatch.setattr(curve.Bench, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(people, some, folder=tmp_path)
    assert {row["identity"] for row in curve_report.read_rows(tmp_path / curve.ROWS)} == {"a"}


def test_unit_file_keeps_whole_units_only(tmp_path):
    store = UnitFile(tmp_path, {"seed": 1})
    unit = curve.Unit(0, "a", "full", 1)
    store[unit] = [{"value": 1.0}]
    with pytest.raises(ValueError):
        store[curve.Unit(0, "b", "full", 1)] = [{"value": math.nan}]
    assert dict(UnitFile(tmp_path, {"seed": 1})) == {unit: [{"value": 1.0}]}


# --- who is measured -------------------------------------------------------------------------------


def test_training_and_evaluation_share_nobody_and_no_photo(people, tmp_path):
    with pytest.raises(DataError, match="'smooth/b' .of 1. is measured and was in training"):
        assert_disjoint(people, people.select("b"))
    other = write_people(tmp_path / "other", "xy", seed=9)
    assert_disjoint(people, other)
    stolen = tmp_path / "other" / "x" / "0.png"
    stolen.write_bytes(people["c"][4].path.read_bytes())
    with pytest.raises(DataError, match="4.png: the same photo was in training as .*0.png"):
        measure(people, trained=People.from_folder(tmp_path / "other"))


def test_every_part_of_the_split_that_training_saw_counts(people, tmp_path):
    folder, file = people["a"][0].path.parents[1], tmp_path / "split.csv"
    file.write_text("id,split\na,val\nb,train\nc,kept\n")

    def config(*parts: str) -> CurveConfig:
        return CurveConfig.from_dict(dict(data=str(folder), trained_on=[str(folder)], split_file=str(file),
                                          **({"trained_parts": list(parts)} if parts else {})))

    everybody = People.from_folder(folder)
    assert list(trained_people(everybody, file, ["train"])) == ["b"]
    assert list(trained_people(everybody, file, ["train", "kept"])) == ["b", "c"]
    assert list(held_out(config(), strict=True)) == list(held_out(config("train", "kept"), strict=True)) == ["a"]
    with pytest.raises(DataError, match="'smooth/a' .of 1. is measured and was in training"):
        held_out(config("train", "val"), strict=True)
    with pytest.raises(ConfigError, match="split.csv: trained_on has nobody in its split 'keep'"):
        held_out(config("keep"), strict=True)


@pytest.mark.parametrize("given, message", [
    ({"workers": 0}, "workers = 0: at least 1"), ({"threads": -1}, "threads = -1: at least 1"),
    ({"batch_size": 0}, "batch_size = 0: at least 1"), ({"settings": {"shots": [1]}}, "settings: CurveSettings are"),
    ({"recognisers": {"a": "embedded"}}, "a Recogniser is needed, not its name"),
    ({"recogniser": "embedded"}, "a Recogniser is needed, not its name"),
])
def test_what_is_given_in_the_wrong_kind_is_named(people, given, message):
    with pytest.raises(ConfigError, match=message):
        measure(people, **{"settings": SMALL, **given})


def test_a_split_without_its_file_is_refused():
    with pytest.raises(ConfigError, match="split: of no effect without split_file"):
        CurveConfig.from_dict({"data": "x", "split": "test"})


def test_a_query_is_no_support_photo(tmp_path):
    people = write_people(tmp_path / "twice", "a")
    for i in range(1, 6):
        (tmp_path / "twice" / "a" / f"{i}.png").write_bytes(people["a"][0].path.read_bytes())
    with pytest.raises(DataError, match="the same photo as .*, a support photo"):
        measure(People.from_folder(tmp_path / "twice"), methods=["generic"])


def test_people_without_photos_enough_are_left_out(people):
    with pytest.raises(DataError, match="nobody .* has 5 photos to learn from and 2 more"):
        measure(people, shots=[5])
    single = {row["metric"] for row in measure(people, methods=["input"], shots=[5], min_queries=1)}
    assert {"psnr", "identity"} <= single and "person" not in single, "one query has no others to compare with"


def test_a_scorer_in_the_losses_must_say_so(people):
    with pytest.raises(ConfigError, match="'mine' is also in the losses"):
        measure(people, recognisers={"mine": recogniser()})
    measure(people, recognisers={"mine (in losses)": recogniser()}, methods=["input"])


def test_impossible_settings_are_named(people):
    for changes, message in [
        ({"methods": ["generic", "magic"]}, "unknown method 'magic'"),
        ({"methods": ["meta-x"]}, "no model under meta_models.x"),
        ({"stepz": [1]}, "did you mean 'steps'"),
        ({"shots": [1, 1]}, "different values"),
        ({"shots_of": {"full": [3]}}, "full asks for numbers of photos that are not in shots"),
        ({"shots_of": {"full": [0, 1]}}, "full asks for numbers of photos that are not in shots"),
        ({"shots_of": {"full": [1, 1]}}, "shots_of: full has a number twice"),
        ({"steps_of": {"full": [2, 2]}}, "steps_of: full has a number twice"),
        ({"steps_of": {"fulll": [3]}}, "'fulll' is not among the methods"),
        ({"methods": ["generic"], "shots": [0]}, "at least 1 photo"),
        ({"methods": ["generic", "other-photo"], "min_queries": 1}, "min_queries: other-photo compares"),
    ]:
        with pytest.raises(ConfigError, match=message):
            measure(people, **changes)


def test_run_curve_from_a_configuration(folder, tmp_path, monkeypatch):
    from metagpen import recognise

    monkeypatch.setattr(metagpen, "load", lambda *_, **__: tiny(), raising=False)
    monkeypatch.setattr(recognise, "load", lambda name, device=None: recogniser(str(name), len(str(name))))
    config = CurveConfig(
        **{**SMALL.model_dump(), "methods": ["generic", "start"]}, data=str(folder), recognisers={"r": "elsewhere/net"},
        work_dir=str(tmp_path / "runs"), output=str(tmp_path / "rows.jsonl"), show=["smooth/a"], preview=1,
        progress=False, max_people=2,
    )  # fmt: skip
    found, where = curve.run_curve(config)
    assert curve_report.read_rows(tmp_path / "rows.jsonl") == found and {row["identity"] for row in found} == {"a", "b"}
    assert str(folder) not in (where / curve.SETTINGS).read_text(), "no path of this machine"
    assert sorted(path.name for path in (where / "previews").iterdir()) == ["a"], "only who may be shown"
    sheets = curve_report.contact_sheets(where / "previews")
    assert set(sheets) == {"a, hard", "a, extreme"} and sheets["a, hard"].width == 3 * 132 + 4
    assert curve_report.contact_sheets(where / "previews", people=0) == {}
    with pytest.raises(DataError, match="nowhere: no such folder of pictures"):
        curve_report.write_report(tmp_path / "rows.jsonl", tmp_path / "report", tmp_path / "nowhere")
    (where / "previews" / "a" / "hard_truth_0.png").unlink()
    with pytest.raises(DataError, match="a: no picture of the truth under hard"):
        curve_report.contact_sheets(where / "previews")
    with pytest.raises(IsADirectoryError):  # before the first hour, not after
        curve.run_curve(config.model_copy(update={"output": str(tmp_path)}))


def test_parts_of_a_run_put_together_are_the_run(folder, tmp_path, monkeypatch):
    """Two machines measure some people each; the files behind one another are those of one run, but for the seconds."""
    from metagpen import recognise

    monkeypatch.setattr(metagpen, "load", lambda *_, **__: tiny(), raising=False)
    monkeypatch.setattr(recognise, "load", lambda name, device=None: recogniser(str(name), len(str(name))))

    def measured(name: str, **who) -> Path:
        config = CurveConfig(
            **{**SMALL.model_dump(), "methods": ["generic", "adapt"]}, data=str(folder), recognisers={"r": "nets/net"},
            work_dir=str(tmp_path / "runs"), output=str(tmp_path / name), show=[], progress=False, **who,
        )  # fmt: skip
        curve.run_curve(config)
        return tmp_path / name

    parts = measured("1.jsonl.gz", people=["c"]), measured("2.jsonl.gz", people=["b", "a"], max_people=2)
    (tmp_path / "both.jsonl.gz").write_bytes(b"".join(part.read_bytes() for part in parts))
    both, whole = (
        sorted(({**row, "seconds": 0} for row in curve_report.read_rows(path)), key=curve_report.key_of)
        for path in (tmp_path / "both.jsonl.gz", measured("whole.jsonl.gz"))
    )
    assert both == whole and {row["identity"] for row in both} == {"a", "b", "c"}
    with pytest.raises(DataError, match="nobody is called 'd'"):
        measured("3.jsonl.gz", people=["d"])
    assert CurveConfig(data="x", people=[7201]).people == ["7201"], "folders are often called by a number"


# --- reports ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    curve.write_rows(folder / "rows.jsonl", rows)
    result = CliRunner().invoke(_app(), ["curve-report", str(folder / "rows.jsonl"), "-o", str(folder / "out")])
    assert result.exit_code == 0, result.output
    return folder / "out"


def _app():
    from metagpen.cli import app

    return app


def test_the_report_has_tables_and_plots(reported):
    names = {path.name for path in reported.iterdir()}
    plots = {f"smooth_{axis}.{kind}" for axis in ("shots", "steps", "seconds") for kind in ("png", "svg")}
    assert names == {"curve.md", "curve.csv", "curve.html"} | plots
    text = (reported / "curve.md").read_text()
    assert "| LoRA on the decoder, rank 4, 2 photos, 2 steps |" in text
    assert "## smooth, extreme degradation, 3 people" in text
    assert "**tutorial** (finetune)" in text and "not available" in text
    assert Image.open(reported / "smooth_steps.png").width > 600
    assert "<svg" in (reported / "smooth_shots.svg").read_text()


def test_the_csv_holds_the_means(reported, rows):
    import csv

    lines = list(csv.DictReader((reported / "curve.csv").open()))
    line = next(x for x in lines if (x["method"], x["shots"], x["steps"], x["metric"], x["degradation"]) == (
        "full", "2", "2", "psnr", "hard"))  # fmt: skip
    found, generic = (values(rows, degradation="hard", metric="psnr", **keys) for keys in (
        {"method": "full", "shots": 2, "steps": 2}, {"method": "generic"}))  # fmt: skip
    assert float(line["mean"]) == pytest.approx(np.mean(list(found.values())))
    gains = [found[key] - generic[key] for key in found]
    assert float(line["gain"]) == pytest.approx(np.mean(gains)) and int(line["worse"]) == sum(g < 0 for g in gains)
    assert float(line["worst"]) == pytest.approx(max(0, -min(gains)))


def test_two_points_are_compared_person_by_person(rows):
    ours, theirs = ("adapt", 2, 2), ("full", 1, 0)
    rows = [row for row in rows if (row["identity"], row["method"]) != ("c", "full")]
    mine, others = (values(rows, degradation="hard", metric="deg", recogniser="scorer", method=method, shots=shots,
                           steps=steps) for method, shots, steps in (ours, theirs))  # fmt: skip
    found = curve_report.versus(rows, "hard", ours, theirs, "deg", "scorer")
    differences = [mine[person] - others[person] for person in others]
    assert found.mean == pytest.approx(np.mean(differences)) and (len(mine), len(others), found.identities) == (3, 2, 2)
    assert found.worse == sum(difference > 0 for difference in differences), "more degrees are worse"
    with pytest.raises(DataError, match="nobody was measured at both"):
        curve_report.versus(rows, "hard", ours, ("adapt", 2, 7), "psnr")


def test_the_page_needs_no_other_file(reported):
    page = (reported / "curve.html").read_text()
    sources = [part.split('"')[0] for part in page.split('src="')[1:]]
    assert len(sources) == 3 and all(source.startswith("data:image/png;base64,") for source in sources)
    words = re.sub(r'src="[^"]*"', "", page)  # a picture's base64 can hold any four letters
    assert "http" not in words and "<script" not in words and "<td>every weight, 1 photo, 2 steps</td>" in words


def test_the_same_rows_give_the_same_report(rows, reported, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    curve.write_rows(path, rows)
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    assert [json.loads(line) for line in lines] == rows
    curve_report.write_report(path, tmp_path / "again")
    for name in ("curve.md", "curve.csv", "smooth_seconds.svg", "curve.html"):
        assert (tmp_path / "again" / name).read_bytes() == (reported / name).read_bytes(), name


def test_lines_of_a_plot_follow_their_axis(rows):
    records = curve_report.records_of(rows)
    by_shots = curve_report.curves(records, "hard", "psnr", "shots")
    assert [point.x for point in by_shots["full"]] == [1, 2] and [p.x for p in by_shots["generic"]] == [0]
    by_steps = curve_report.curves(records, "hard", "identity:scorer", "steps")
    assert [point.x for point in by_steps["adapt"]] == [0, 2]
    assert all(point.lo <= point.mean <= point.hi for line in by_steps.values() for point in line)
    seconds = [point.x for point in curve_report.curves(records, "hard", "psnr", "seconds")["full"]]
    assert seconds == sorted(seconds) and seconds[1] > 0


def test_seeds_are_averaged_within_a_person(rows):
    doubled = rows + [{**row, "seed": 1, "value": row["value"] + 2} for row in rows]
    first, both = curve_report.records_of(rows)[0], curve_report.records_of(doubled)[0]
    assert first.key == both.key and both.values["psnr"] == pytest.approx(first.values["psnr"] + 1)


def test_unusable_row_files_are_named(rows, tmp_path):
    for name, text, message in [
        ("none.jsonl", "", "holds no rows"),
        ("other.jsonl", '{"a": 1}\n', "line 1: not a row of a shots curve; it lacks"),
        ("broken.jsonl", json.dumps(rows[0]) + "\n{\n", "line 2: not a row"),
        ("double.jsonl", 2 * (json.dumps(rows[0]) + "\n"), "two rows for smooth"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=message):
            curve_report.read_rows(tmp_path / name)
    with pytest.raises(DataError, match="absent.jsonl: cannot be read"):
        curve_report.read_rows(tmp_path / "absent.jsonl")


def test_only_people_measured_everywhere_are_compared(rows):
    missing = [row for row in rows if (row["identity"], row["method"]) != ("c", "full")]
    assert {row["identities"] for row in curve_report.summary(missing)} == {2}
    with pytest.raises(DataError, match="at every point"):
        curve_report.summary([row for row in rows if (row["identity"] == "a") == (row["method"] == "full")])


def test_a_seed_that_is_not_done_counts_for_nobody(rows):
    """A run of two seeds that was killed: what the second has of a person must not be set against the first."""
    second = [{**row, "seed": 1, "value": row["value"] + 1} for row in rows]
    done = rows + [row for row in second if (row["identity"], row["method"]) != ("b", "full")]
    kept = curve_report.complete(done)
    assert {(row["identity"], row["seed"]) for row in kept} == {(who, s) for who in "abc" for s in (0, 1)} - {("b", 1)}
    gains = curve_report.versus(kept, "hard", ("adapt", 2, 2), ("generic", 0, 0), "psnr")
    alone = curve_report.versus(rows, "hard", ("adapt", 2, 2), ("generic", 0, 0), "psnr")
    assert gains.mean == pytest.approx(alone.mean), "one is added to both or to neither"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("curve_*.yml")), ids=lambda path: path.stem)
def test_the_shipped_configurations_are_valid(path):
    config = CurveConfig.from_yaml(path)
    assert config.check() is config


@pytest.mark.parametrize(("kind", "name"), [(TrainConfig, "base_128"), (TrainConfig, "base_128_on"),
                                            (MetaConfig, "start_128"), (MetaConfig, "meta_128"),
                                            (DistilConfig, "recogniser")])
def test_the_shipped_configurations_of_trainings_are_valid(kind, name):
    assert isinstance(kind.from_yaml(CONFIGS / f"{name}.yml"), kind)


def test_a_recogniser_that_trained_the_model_must_say_so():
    """Found in the card, however many trainings ago."""
    card = {"recogniser": "embedded", "init": {"init": {"loss_recogniser": "somewhere/scorer.fp16.xml"}}}
    scorers = {"judge": SimpleNamespace(name="scorer")}
    with pytest.raises(ConfigError, match="'judge' is also in the losses"):
        judges.say_who_is_in_losses(scorers, [], [SimpleNamespace(card=card)])
    judges.say_who_is_in_losses({"judge (in losses)": scorers["judge"]}, [], [SimpleNamespace(card=card)])
    judges.say_who_is_in_losses({"judge": SimpleNamespace(name="other")}, [], [SimpleNamespace(card=card)])


@pytest.mark.parametrize(("said", "name"), [("nets/glint.r100.pth", "glint.r100"), ("glint.r100", "glint.r100"),
                                            ("nets/retail.fp16.xml", "retail")])
def test_a_recogniser_is_known_however_its_loader_calls_it(said, name):
    model = SimpleNamespace(card={"meta": {"loss_recogniser": said}})
    with pytest.raises(ConfigError, match="'judge' is also in the losses"):
        judges.say_who_is_in_losses({"judge": SimpleNamespace(name=name)}, [], [model])


def test_a_recogniser_of_the_losses_is_known_by_its_weights_under_any_name():
    in_loss, renamed, another = recogniser("student"), recogniser("scorer"), recogniser("scorer", 2)
    with pytest.raises(ConfigError, match="'judge' is also in the losses"):
        judges.say_who_is_in_losses({"judge": renamed}, [in_loss])
    judges.say_who_is_in_losses({"judge": another}, [in_loss])


def test_a_rival_at_other_rates(lesson):
    """`full-x4` is `full` whose rates are four times as large, and nothing else."""
    fast = methods.by_name("full-x4")
    assert (fast.name, fast.rate, fast.build) == ("full-x4", 4.0, methods.METHODS["full"].build)
    plain, faster = (methods.full(replace(lesson, rate=rate)).rates(3) for rate in (1.0, 4.0))
    assert set(plain) == set(faster) and all(faster[name] == 4 * plain[name] > 0 for name in plain)
    assert report.label_of("lora-16-x4") == "LoRA on the decoder, rank 16 at 4 times its rates"
    for name, said in {"meta-x4": None, "input-x4": "not measured", "full-x1": "unknown",
                       "nothing-x4": "unknown"}.items():
        if said is None:
            assert methods.by_name(name) is methods.METHODS["adapt"], "a model called x4"
        else:
            with pytest.raises(ConfigError, match=said):
                methods.by_name(name)
