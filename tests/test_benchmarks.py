"""The benchmarks: they compare what computes the same thing, count right, run from end to end, say what they found."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_gpen import randomise

from metagpen import load
from metagpen.degrade import by_name
from metagpen.errors import ConfigError, DataError, MetagpenError
from metagpen.evaluate import curve_report, report
from metagpen.evaluate.curve import write_rows
from metagpen.faces import FFHQ_LANDMARKS, LEFT_RIGHT, load_photo, to_tensor
from metagpen.gpen import GPEN
from metagpen.identities import PackedPhotos
from metagpen.model import MetaGPEN
from metagpen.person import AdapterSpec, DecoderBases, new_parameters, personal_forward
from metagpen.person.rule import InnerRule, RuleConfig
from metagpen.person.start import Gate, band_statistics
from metagpen.restore.matching import LEGIBLE

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = ("inner_step", "many_people", "meta_gradient", "restore_speed")


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def script(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("tail_rank", [0, 2])
def test_published_way_computes_the_same(concat, tail_rank):
    """Outputs and a person's gradients in float64, or the speeds would not be comparable."""
    torch.manual_seed(0)
    gpen = GPEN(32, 2, 1 / 64, style_dim=32, concat=concat).double()
    randomise(gpen, seed=1)
    spec = AdapterSpec(2, tail_rank, latent_rank=2)
    person = {name: (value + 0.3 * torch.randn_like(value)).double().requires_grad_()
              for name, value in new_parameters(gpen, spec, 1, torch.Generator().manual_seed(0)).items()}
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64) * 2 - 1
    plain = script("published_gpen").restore
    torch.testing.assert_close(plain(gpen, images), gpen(images), rtol=1e-9, atol=1e-9)
    outputs = [plain(gpen, images, person), personal_forward(gpen, images, person, spec)]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    assert (outputs[0] - gpen(images)).abs().max() > 0.1
    direction = torch.randn_like(images)
    found, expected = (torch.autograd.grad((output * direction).sum(), list(person.values())) for output in outputs)
    for name, a, b in zip(person, found, expected, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max()))


def test_turns_are_taken_and_warm_up_does_not_count():
    order = []
    found = script("measure").take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, warmup=2)
    assert order == ["a", "b"] * 5
    assert found.keys() == {"a", "b"} and all(s.low <= s.median <= s.high for s in found.values())


def test_median_and_quartiles():
    seconds = script("measure").Seconds
    assert seconds.of([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 2.0, 4.0)
    assert seconds.of([2.0]) == (2.0, 2.0, 2.0)


def test_peak_memory_begins_again():
    measure = script("measure")
    measure.give_back_freed_memory()  # else what other tests freed would hold the tensor without growth
    if not measure.forget_peak_rss():
        pytest.skip("this system does not let a process forget its peak memory")
    before = measure.peak_rss()
    held = torch.ones(2**24)  # 64 MiB
    assert measure.peak_rss() - before > 0.9 * held.nbytes


def test_work_is_counted():
    """A convolution and a product of known size, an addition, a view and a depthwise convolution."""
    inner = script("inner_step")
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3)
    dense, _ = inner.work_of(lambda: torch.nn.functional.conv2d(x, weight, padding=1))
    assert dense == 2 * 2 * 8 * 8 * 6 * 4 * 9
    assert inner.work_of(lambda: torch.nn.functional.conv2d(x, weight))[1] == 0
    assert inner.work_of(lambda: x.flatten(1) @ torch.ones(256, 3))[1] == 256 * 3 * 4  # ones are written
    assert inner.work_of(lambda: x + x)[1] == 3 * x.nbytes
    assert inner.work_of(lambda: x.transpose(0, 1).expand(4, 2, 8, 8)) == (0, 0)
    taps = torch.randn(4, 1, 3, 3)
    assert inner.work_of(lambda: torch.nn.functional.conv2d(x, taps, padding=1, groups=4))[1] == (
        2 * x.nbytes + taps.nbytes)


def test_a_compiled_step_is_the_step_of_its_way(monkeypatch):
    """What would be compiled runs as it is: then either way's compiled step is its plain one."""
    inner, compiled = script("inner_step"), []
    monkeypatch.setattr(inner, "fused", lambda function, wanted: compiled.extend([function] * wanted) or function)
    ways = inner.Case(inner.QUICK[0], torch.device("cpu")).ways(["float32"], compiled=True)
    assert compiled == [inner.published_gpen.restore, personal_forward]
    for way in inner.WAYS:
        plain, fast = (ways[what, way, "float32"]() for what in ("step", "compiled step"))
        assert all(torch.equal(plain[name], fast[name]) for name in plain)


def test_the_gate_is_calibrated_on_people_who_can_be_measured(shared):
    assert len(script("calibrate_gate").people_of("kept", 128, 2, 2)) == 2


def test_a_straight_line_is_found():
    rows = [{"people": n, "seconds": 2.0 + 0.25 * n} for n in (10, 100, 1000)]
    fitted = script("many_people").line(rows)
    assert fitted["a"] == pytest.approx(2.0) and fitted["b"] == pytest.approx(0.25) and fitted["error"] < 1e-6


@pytest.mark.parametrize("second_order", [False, True])
def test_every_engine_finds_the_same_meta_gradient(second_order):
    meta = script("meta_gradient")
    problem = meta.problem_of(meta.QUICK["small"], 2, torch.device("cpu"))
    digests = {name: meta.digest(meta.meta_gradient(name, problem, second_order)) for name in meta.engines()}
    assert len(digests) >= 3 and len(digests["batched"]) > 10
    meta.agree(digests, "here")
    wrong = [1.01 * value for value in digests["batched"]]
    with pytest.raises(ConfigError, match="wrong differs"):
        meta.agree({**digests, "wrong": wrong}, "here")


def test_an_engine_is_measured_in_a_process_of_its_own():
    meta = script("meta_gradient")
    case = {"model": meta.QUICK["small"]._asdict(), "steps": 2, "second_order": True, "repeats": 2, "device": "cpu",
            "threads": 1, "engine": "batched"}
    row = meta.in_a_process(case)
    assert len(row["all_seconds"]) == 2 and min(row["all_seconds"]) > 0 and row["bytes"] >= 0
    problem = meta.problem_of(meta.QUICK["small"], 2, torch.device("cpu"))
    expected = meta.digest(meta.meta_gradient("batched_reference", problem, True))
    assert row["digest"] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(MetagpenError, match="no such engine, 2 steps"):
        meta.in_a_process({**case, "engine": "no such engine"})


def rows_of(name: str, monkeypatch) -> list[dict]:
    """A script's rows at its smallest settings."""
    module, cpu = script(name), torch.device("cpu")
    if name == "inner_step":
        return module.measured(module.QUICK, cpu, quick=True, rounds=1)
    if name == "many_people":
        return module.measured(32, cpu, [1, 2], [1, 2], batch_steps=1, steps=1, rounds=1)
    if name == "meta_gradient":
        monkeypatch.setattr(module, "in_a_process", module.alone)  # a process has a test of its own
        return module.measured(module.QUICK, cpu, module.engines(), 1, 1, threads=1)
    return module.measured(module.QUICK, cpu, rounds=1)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_from_measuring_to_the_page(name, tmp_path, monkeypatch, capsys):
    """Rows become JSON and a table between the markers of a copy of docs/speed.md; another device's stay."""
    measure, module = script("measure"), script(name)
    rows = rows_of(name, monkeypatch)
    page = tmp_path / "speed.md"
    page.write_text((ROOT / "docs" / "speed.md").read_text())
    monkeypatch.setattr(measure, "PAGE", page)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    arguments = measure.parser("A test.").parse_args([])
    measure.publish(name, arguments, rows, measure.facts(torch.device("cpu"), arguments, seed=0), module.page)
    written = json.loads((tmp_path / f"{name}.json").read_text())["cpu"]
    assert written["commit"] and written["machine"]["threads"] == torch.get_num_threads()
    assert len(written["rows"]) == len(rows) and all(row["device"] == "cpu" for row in written["rows"])
    between = page.read_text().split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]
    assert "GPU: not measured yet." in between and module.page(written["rows"]) in between
    assert "| --- |" in between

    arguments.quick = True
    before = page.read_text()
    measure.publish(name, arguments, rows, {}, module.page)
    assert page.read_text() == before, "a smoke test must publish nothing"


def curve_rows(points: list[tuple[str, int, int]], people: int = 4) -> list[dict]:
    """Rows of a shots curve with made-up values: ours gains 0.3 in identity and 1 dB, 0.05 less without
    steps, the others half of it."""
    rows = []
    for method, shots, steps in points:
        for degradation in ["none"] if method == "other-photo" else ["hard", "extreme", "moderate"]:
            for person in range(people):
                gain = {"generic": 0.0, "input": -0.1, "adapt": 0.3 + shots / 100, "wrong-person": -0.05,
                        "full-x4": 0.2}  # fmt: skip
                own = gain.get(method, 0.15) - 0.05 * ((method, steps) == ("adapt", 0))
                values = {"identity": 0.2 + own + person / 100, "psnr": 20 + 3 * own, "ssim": 0.5 + own / 10,
                          "lpips": 0.3 - own / 10, "sharpness": 0.6 + own / 10}
                if method == "other-photo":
                    values = {"identity": 0.7}
                rows += [{"dataset": "made_up", "degradation": degradation, "method": method, "shots": shots,
                          "steps": steps, "metric": metric, "recogniser": "068" if metric == "identity" else None,
                          "identity": str(person), "value": value, "seed": 0, "seconds": float(steps), "commit": "abc",
                          "machine": "here", "threads": 1, "workers": 2, "schedule": "per-run", "queries": 3}
                         for metric, value in values.items()]
    return rows


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    module = script("evidence")
    alone = [("input", 0, 0), ("generic", 0, 0), ("other-photo", 0, 0)]
    ours = [("adapt", shots, steps) for shots in (1, 2, 5, 8) for steps in (0, 8, 32)]
    for name, points in {
        "curve_rates": [*alone, ("adapt", 5, 32), ("full", 5, 32), ("full-x4", 5, 32), ("lora-4", 5, 32)],
        "curve_128": [*alone, *ours, ("random-filters", 5, 8), ("random-filters", 5, 32), ("lora-4", 5, 32),
                      ("full-x4", 5, 32), ("wrong-person", 5, 32),
                      ("finetune@n-x4", 5, 32), ("reference-average", 5, 0)],
        "curve_start": [*alone, ("adapt", 5, 0), ("adapt", 5, 32), ("start-full-x4", 5, 32), ("no-start", 5, 32)],
        "curve_meta": [*alone, ("adapt", 5, 0), ("adapt", 5, 32), ("meta-begins", 5, 0), ("meta-begins", 5, 32)],
        "curve_16": [*alone, *(("adapt", shots, 32) for shots in (1, 4, 16)), ("lora-16-x16", 16, 32)],
        "curve_128_long": [*alone, ("adapt", 5, 32), ("finetune@n", 5, 500), ("finetune", 5, 2000)],
        "curve_long_hard": [*alone[1:], ("adapt", 5, 32), ("finetune", 5, 2000)],
        "curve_strength": [*alone, ("strength-50", 5, 32), ("adapt", 5, 32)],
        "curve_scale": [*alone[1:], ("adapt", 5, 32), ("adapt-x8", 5, 32)],
        "curve_scale_lfw": [*alone[1:], ("adapt", 5, 32), ("adapt-x8", 5, 32), ("lora-16-x16", 5, 32)],
        "curve_london": [*alone, ("adapt", 1, 32), ("adapt-x8", 1, 32)],
        "curve_precision": [*alone, ("adapt", 5, 32), ("adapt-float32", 5, 32)],
        "curve_lfw": [*alone, *ours, ("lora-16-x16", 1, 32), ("lora-16-x16", 5, 32)],
    }.items():
        rows = curve_rows(points)
        if name in ("curve_128_long", "curve_long_hard"):  # killed while the last person's fine-tune ran
            rows = [row for row in rows if (row["identity"], row["method"]) != ("3", "finetune")]
        if name == "curve_long_hard":
            rows = [row for row in rows if row["degradation"] == "hard"]
        write_rows(tmp_path / f"{name}.jsonl.gz", rows)
    page, folder = tmp_path / "evidence.md", tmp_path / "evidence"
    folder.mkdir()
    for path in (module.PAGE, *module.FOLDER.glob("*.md")):
        (page if path == module.PAGE else folder / path.name).write_text(path.read_text())
    for name, value in {"RESULTS": tmp_path, "PAGE": page, "FOLDER": folder, "ROOT": tmp_path}.items():
        monkeypatch.setattr(module, name, value)
    return module


def pages_of(module) -> str:
    return "\n".join(path.read_text() for path in (module.PAGE, *sorted(module.FOLDER.glob("*.md"))))


def test_how_many_are_worse_has_an_interval():
    """Clopper and Pearson's, against closed forms: nobody of n leaves 1 - 0.025^(1/n)."""
    worse = script("evidence").Worse
    assert worse.of(0, 25).most == pytest.approx(1 - 0.025 ** (1 / 25)) and worse.of(0, 25).least == 0
    assert worse.of(25, 25).least == pytest.approx(0.025 ** (1 / 25)) and worse.of(25, 25).most == 1
    verdicts = [worse.of(*one).fewer_than(0.1) for one in ((0, 25), (0, 55), (12, 25))]
    assert verdicts == ["undecided", "reached", "**missed**"]


def test_evidence_is_made_from_rows_alone(evidence, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evidence.py"])
    evidence.main()
    page = pages_of(evidence)
    assert "Not measured yet." not in page and page.count("**missed**") == 0 and page.count("| reached |") == 9 + 16
    assert "worse than generic in identity | 0 of 4, 0% to 60% | undecided |" in page, "nobody of four says little"
    assert "worse than generic in identity, LFW too | 0 of 8, 0% to 37% | undecided |" in page
    assert "| identity gained | +0.350 [+0.350, +0.350] | +0.350 [+0.350, +0.350] | +0.310 [+0.310, +0.310] |" in page
    assert "| adapt, 32 steps; 16 px | -0.200 [-0.200, -0.200]" in page, "ours at eight times its rates minus ours"
    assert "| ours minus LoRA: identity | – | +0.200 [+0.200, +0.200] | – |" in page, "measured on one set alone"
    assert "identity: ours after 32 steps not below the fine-tune after 2,000 (3 people) | +0.200" in page
    assert "| 2 | +0.320 [+0.320, +0.320] |" in page, "two photos"
    for line in ("adapt, its mixtures of random filters, 8 steps; 16 px", "meta-begins, 0 steps; moderate"):
        assert f"| {line} | +0." in page, "ours after as many steps minus theirs"
    assert "| adapt, 0 steps; 16 px | +0.050" in page
    assert "| every weight, from our start at 4 times its rates, 32 steps; 8 px | +0.200" in page
    assert "| 16 px, identity | +0.030 [+0.030, +0.030] | +0.120 [+0.120, +0.120] |" in page, "1 to 4 to 16"
    assert "gains | +0.350 against +0.150: 2.33 times | reached |" in page
    assert "the closest is *every weight at 4 times its rates* | +0.150 [+0.150, +0.150] | reached |" in page
    assert "| fine-tune, its schedule cut to n steps, 500 steps; 8 px | +0.200" in page
    rates = curve_report.summary(curve_report.read_rows(evidence.RESULTS / "curve_rates.jsonl.gz"))
    assert evidence.best_rates(rates) == {"full": "full-x4", "lora-4": "lora-4"}
    assert {path.name for path in evidence.FOLDER.iterdir()} >= {
        "val_shots.png", "lfw_shots.png", "val_frontier.png", "val_steps.svg", "val_long_steps.svg",
        "curve_128.csv"}
    of_meta = json.loads((evidence.RESULTS / "meta.json").read_text())["rows"]
    ours = report.find(of_meta, degradation="hard", method="adapt", shots=5, steps=32, metric="identity")
    assert (ours["gain"], ours["over_finetune"], ours["over_finetune_lo"]) == (0.35, 0.2, 0.2)
    assert {row["method"] for row in of_meta} == {"generic", "adapt", "other-photo", "wrong-person", "finetune@n-x4"}


def test_methods_added_later_join_their_run_if_what_both_measured_is_the_same(evidence, tmp_path):
    more = curve_rows([("generic", 0, 0), ("full-x16", 5, 32)])
    write_rows(tmp_path / "curve_128+more.jsonl.gz", more)
    joined, before = (evidence.read_run("curve_128"), curve_report.read_rows(tmp_path / "curve_128.jsonl.gz"))
    assert joined == before + [row for row in more if row["method"] == "full-x16"]
    more[0]["value"] += 1e-6  # another order of sums
    write_rows(tmp_path / "curve_128+more.jsonl.gz", more)
    assert evidence.read_run("curve_128") == joined
    more[0]["value"] *= 1.001
    write_rows(tmp_path / "curve_128+more.jsonl.gz", more)
    with pytest.raises(DataError, match=r"curve_128\+more.*'generic'.*curve_128\.jsonl\.gz"):
        evidence.read_run("curve_128")


def test_evidence_convicts(evidence, monkeypatch, tmp_path):
    rows = curve_report.read_rows(tmp_path / "curve_128.jsonl.gz")
    for row in rows:
        if row["method"] == "wrong-person" and row["metric"] == "identity":
            row["value"] += 0.2
        if row["method"] == "lora-4":
            row["value"] += {"0": 0.1, "1": 0.3}.get(row["identity"], 0.2)  # around ours: 0.35 against 0.15
    long = curve_report.read_rows(tmp_path / "curve_long_hard.jsonl.gz")
    for row in long:
        if row["method"] == "finetune":
            row["seconds"] = 40.0
            row["value"] += row["metric"] in ("identity", "psnr")
    text = evidence.goals(rows, long, [{**row, "seed": seed} for row in rows for seed in (0, 1)])
    assert text.count("(4 people, 1 seed)") == text.count("(4 people, 2 seeds)") == 1
    assert text.count("**missed**") == 4, "identity, PSNR, seconds, and the wrong person"
    assert "the closest is *LoRA on the decoder, rank 4*" in text and text.count("undecided") == 2


def test_page_shows_the_committed_evidence():
    """docs/evidence.md, its pages and the rows cannot part ways."""
    evidence = script("evidence")
    page = pages_of(evidence)
    found, rows, summed = evidence.blocks()
    assert all(text in page for text in found.values())
    kept = json.loads((evidence.RESULTS / "meta.json").read_text())["rows"]
    made = evidence.meta_rows(rows["curve_128"], summed["curve_128"])
    assert [row["gain"] for row in kept] == pytest.approx([row["gain"] for row in made], abs=1e-5)
    if "curve_rates" in rows and "curve_128" in rows:
        best = set(evidence.best_rates(summed["curve_rates"]).values())
        measured = {method for method, *_ in evidence.rivals_of(rows["curve_128"])}
        assert best <= measured, "every rival is measured at its best rate"


def test_evidence_of_the_runs_that_there_are(evidence, tmp_path):
    for name in ("curve_128_long", "curve_long_hard", "curve_london", "curve_lfw"):
        (tmp_path / f"{name}.jsonl.gz").unlink()
    found, rows, _ = evidence.blocks()
    assert found["long"] == found["long_hard"] == found["london"] == found["lfw"] == evidence.NOT_YET
    assert set(rows) == {"curve_rates", "curve_128", "curve_start", "curve_meta", "curve_16", "curve_strength",
                         "curve_scale", "curve_scale_lfw", "curve_precision"}
    assert f"| ours after 32 steps against the fine-tune after 2,000 | {evidence.NOT_YET} |" in found["goals"]
    assert found["rivals"].endswith("2 processes at a time, 1 thread(s) each.")


def test_compressing_is_measured():
    """The album's people at one step: files as small as asked."""
    many = script("many_people")
    from metagpen import recognise

    rows = many.small_files(many.measure.model_of(128, torch.device("cpu")), recognise.load("embedded"), steps=1,
                            most_people=1, limits=[64])
    by_rule, whole, small = rows
    assert small["largest_kilobytes"] <= 64 < whole["kilobytes"] and small["tail_rank"] < whole["tail_rank"]
    assert small["identity_change"] != 0 and by_rule["kilobytes"] < whole["kilobytes"]
    for row in rows:
        assert 5 < row["psnr"] < 40 and -1 < row["identity"] < 1


@pytest.mark.parametrize("name", ["inner_step", "many_people", "many_people_512", "meta_gradient", "restore_speed"])
def test_page_shows_the_committed_figures(name):
    """docs/speed.md and benchmarks/results/ cannot part ways."""
    measure = script("measure")
    begin, end = measure.markers(name)
    between = measure.PAGE.read_text().split(begin)[1].split(end)[0].strip()
    path = measure.RESULTS / f"{name}.json"
    if not path.exists():
        assert between == "Not measured yet."
        return
    module = script(name.removesuffix("_512"))
    assert between == measure.both(json.loads(path.read_text()), module.page).strip()


def test_sizes_runs_to_its_end(shared, monkeypatch, tmp_path, capsys):
    """One person, one step, the embedded model and its networks grown; nothing is published."""
    sizes = script("sizes")
    monkeypatch.setattr(sizes, "RUNS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["sizes.py", "--sizes", "64", "128", "256", "--shots", "1", "--inner", "1",
                                      "--max-people", "1", "--max-queries", "2", "--workers", "1", "--dry"])
    sizes.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1") or line.startswith("| 2")]
    assert [line.split("|")[1:4] for line in lines] == [[" 128 ", " celeba_wild_256 ", " 1 "],
                                                        [" 256 ", " celeba_wild_256 ", " 1 "]], "none given of 64 px"
    grown = load(tmp_path.glob("256_*.safetensors").__next__())
    assert grown.size == 256 and grown.rule is None and grown.bases is None


def test_without_start_runs_to_its_end(shared, monkeypatch, tmp_path, capsys):
    """Two steps a stage on three people; one is measured; nothing is published."""
    benchmark, photos = script("without_start"), shared / "photos" / "celeba_wild_256"
    with open(shared / "photos" / "splits.csv", newline="") as file:
        people = [row for row in csv.DictReader(file) if row["set"] == photos.name and row["split"] == "train"][:3]
    (tmp_path / photos.name).mkdir()
    for row in people:
        (tmp_path / photos.name / row["id"]).symlink_to(photos / row["id"])
    split = "".join(f"{photos.name},{row['id']},{part}\n" for row, part in zip(people, ("train", "train", "val")))
    (tmp_path / "people.csv").write_text("set,id,split\n" + split)
    settings = benchmark.measure.settings_on_shared(benchmark.CONFIG)
    few = {"data": [tmp_path / photos.name], "split": tmp_path / "people.csv", "compile": False}
    monkeypatch.setattr(benchmark.measure, "settings_on_shared", lambda _: settings | few)
    monkeypatch.setattr(benchmark, "RUNS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["without_start.py", "--stages", "2", "--max-people", "1", "--max-queries", "2",
                                      "--dry"])
    benchmark.main()
    assert "| 8 px, identity |" in capsys.readouterr().out
    with_start, without = (load(tmp_path / f"{arm}_2" / "ema.safetensors").start for arm in ("with", "without"))
    assert not torch.equal(with_start.body[0].weight, without.body[0].weight), "only one of them learned"


@pytest.mark.parametrize("name", ["starts", "sizes", "without_start"])
def test_page_shows_the_committed_table(name):
    benchmark, measure = script(name), script("measure")
    begin, end = measure.markers(name)
    between = benchmark.PAGE.read_text().split(begin)[1].split(end)[0].strip()
    rows = json.loads(benchmark.RESULTS.read_text())["rows"] if benchmark.RESULTS.exists() else []
    assert between == (benchmark.table(rows) if rows else "Not measured yet.")


def test_first_light_runs_to_its_end(shared, monkeypatch, tmp_path):
    """Two people, one step, to the page and the contact sheets; nothing is published."""
    first_light = script("first_light")
    whole = first_light.configuration
    short = {"steps": 1, "max_people": 2, "max_queries": 2, "work_dir": str(tmp_path), "progress": False}
    monkeypatch.setattr(first_light, "configuration", lambda arguments: whole(arguments).model_copy(update=short))
    monkeypatch.setattr(sys, "argv", ["first_light.py", "--dry"])
    first_light.main()
    assert len(list(tmp_path.glob("*/sheets/heavy_*.png"))) == 2 and list(tmp_path.glob("*/page.md"))


def test_an_opened_gate_restores_ruins_as_before():
    calibrate_gate = script("calibrate_gate")
    model = load()
    torch.nn.init.zeros_(model.gate.judge[-1].weight)  # everything is a ruin
    torch.nn.init.constant_(model.gate.judge[-1].bias, calibrate_gate.RUIN)
    images = torch.rand(2, 3, model.size, model.size) * 2 - 1
    found = []
    for own in (model, calibrate_gate.opened(model, 20.0, 0.6)):
        share, filling = own.look(images)
        found.append((filling, share[:, :, None] * own.start(torch.eye(2, own.start.embedding_dim))))
    assert own.gate.slope.unique().tolist() == [20.0] and own.rule is None
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-5)


def test_compiled_steps_say_when_they_pay():
    """What is slower never pays; a distance is relative to all gradients together."""
    compiled = script("compiled_step")
    first, other = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, {"a": torch.tensor([3.0]), "b": torch.zeros(1)}
    assert compiled.apart(other, first) == pytest.approx(0.8)
    seconds = {f"{way}_seconds{end}": value for way, value in (("plain", 0.5), ("compiled", 0.4))
               for end in ("", "_low", "_high")}
    row = {"people": 8, "compile_seconds": 100.0, "pays_after_people": 250.0, **seconds,
           "plain_apart": 0.1, "compiled_apart": 0.12}
    text = compiled.page([row, {**row, "pays_after_people": None}])
    assert "| 1.25x | 100 | 250 | 10.0% | 12.0% |" in text and "| never |" in text


def test_what_is_timed_compiled_is_an_inner_step(monkeypatch, tiny_model, tiny_recogniser):
    compiled = script("compiled_step")
    """What would be compiled runs as it is: then it is as far from float32 as the plain one."""
    wanted = []
    monkeypatch.setattr(compiled, "fused", lambda function, compile: wanted.append(compile) or function)
    row = compiled.measured(tiny_model, tiny_recogniser, 2, rounds=2)
    assert wanted == [False, True, False] and row["people"] == 2 and row["compiled_apart"] == row["plain_apart"]
    assert 0 < row["plain_seconds_low"] <= row["plain_seconds_high"]


def test_skips_of_a_decoder_add_up_to_its_image(tiny_model):
    """The last skip is the image; what is said of the others is what they are."""
    skips = script("skip_rgb")
    randomise(tiny_model.gpen, seed=2)
    poor = torch.rand(3, 3, tiny_model.size, tiny_model.size) * 2 - 1
    found = skips.skips(tiny_model, poor)
    assert [skip.shape[-1] for skip in found] == [4 * 2**k for k in range(len(found))]
    torch.testing.assert_close(found[-1].clamp(-1, 1), tiny_model.restore(poor).clamp(-1, 1))
    rows = skips.measured(tiny_model, poor)
    reduced = torch.nn.functional.avg_pool2d(found[-1], found[-1].shape[-1] // 4)
    mse = (found[0] - reduced).square().flatten(1).mean(1) / 4
    assert rows[0]["side"] == 4 and rows[0]["psnr"] == pytest.approx(float((-10 * mse.log10()).mean()), rel=1e-4)


def test_only_the_filters_of_a_meta_training_are_kept(tiny_model):
    """Who begins there begins as before, whatever else was learned."""
    keep = script("keep_filters")
    spec = AdapterSpec(0, 1, decoder_rank=2)
    base, trained = (MetaGPEN(tiny_model.gpen, tiny_model.start, {}, InnerRule(tiny_model.gpen, spec, RuleConfig()),
                              DecoderBases.random(tiny_model.gpen, 2)) for _ in range(2))
    for own in (*trained.bases.filters, *trained.rule.initial.values()):
        own.data += 1.0
    kept = keep.with_filters_of(base, trained)
    for own, expected in zip(kept.bases.filters, trained.bases.filters, strict=True):
        assert torch.equal(own, expected)
    for name, value in kept.rule.initial.items():
        assert torch.equal(value, base.rule.initial[name])
    assert kept.card["filters"]["kept"].startswith("the shared filters alone")
    with pytest.raises(ConfigError, match="shares no decoder filters"):
        keep.with_filters_of(base, MetaGPEN(tiny_model.gpen, tiny_model.start))
    mixed = InnerRule(tiny_model.gpen, spec, RuleConfig())
    mixed.initial["decoder-0-up"].data += 1.0
    with pytest.raises(ConfigError, match="begins with mixtures of its own filters"):
        keep.with_filters_of(MetaGPEN(tiny_model.gpen, tiny_model.start, {}, mixed, base.bases), trained)
    other = GPEN(**tiny_model.gpen.config.to_dict())
    with pytest.raises(ConfigError, match="did not begin from this base"):
        keep.with_filters_of(base, MetaGPEN(other, tiny_model.start, bases=trained.bases))


def test_landmarks_are_drawn_where_the_face_is():
    """On photos whose colours are their coordinates, the network sees at its landmarks what lies at the face's."""
    train, size, count = script("train_landmarks"), 160, 6
    axis = (torch.arange(size) + 0.5) / size * 255
    ramp = torch.stack([axis.expand(size, size), axis[:, None].expand(size, size), torch.zeros(size, size)])
    landmarks = torch.as_tensor(FFHQ_LANDMARKS, dtype=torch.float32) * size + torch.randn(
        count, 5, 2, generator=torch.Generator().manual_seed(0))
    photos = PackedPhotos(ramp.round().to(torch.uint8).expand(count, 3, size, size), torch.zeros(count), ["a"],
                          landmarks, torch.full((count,), float("nan")))
    generator = torch.Generator().manual_seed(1)
    seen, truth = train.draw(photos, torch.arange(count), by_name("none"), generator)
    assert seen.shape == (count, 3, 64, 64) and (truth - 0.5).abs().max() < 0.5
    found = torch.nn.functional.grid_sample(seen, 2 * truth[:, None] - 1, align_corners=False)[:, :2, 0].transpose(1, 2)
    mirrored = found[:, 0, 0] > found[:, 1, 0]  # the eye on the left is from the photo's right
    assert mirrored.any() and not mirrored.all()
    expected = torch.where(mirrored[:, None, None], landmarks[:, LEFT_RIGHT], landmarks) / size * 2 - 1
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_landmark_error_is_a_share_of_the_eyes_distance():
    train, truth = script("train_landmarks"), torch.as_tensor(FFHQ_LANDMARKS).float()[None]
    eyes = truth[0, 1, 0] - truth[0, 0, 0]
    off = truth + torch.stack([torch.zeros(5), torch.tensor([0.3, 0, 0, 0, 0.2]) * eyes], 1)
    torch.testing.assert_close(train.error(off, truth), torch.tensor([0.1]))


def test_a_photo_that_is_found_as_it_was_degraded_is_left_as_it_is(monkeypatch):
    calibrate = script("calibrate_judge")
    crops, generator = torch.rand(3, 3, 32, 32) * 2 - 1, torch.Generator().manual_seed(0)
    again = calibrate.found_in_photos(crops, generator)
    assert again.shape == crops.shape and again.abs().max() <= 1 and (again - crops).abs().mean() > 0.05
    for name, value in (("AS_IT_WAS", 1.0), ("JPEG", 0.0), ("OFF", script("train_landmarks").Spread(0, 0, 0))):
        monkeypatch.setattr(calibrate, name, value)
    torch.testing.assert_close(calibrate.found_in_photos(crops, generator), crops, rtol=0, atol=1e-5)


def test_the_gate_learns_to_say_of_found_photos_what_it_said_of_them(monkeypatch):
    """Found photos have other bands; the old answers hold for the crops themselves, and nothing else has changed."""
    calibrate = script("calibrate_judge")
    monkeypatch.setattr(calibrate, "STEPS", 400)
    torch.manual_seed(0)
    gate = Gate(4, 8, bands=2)
    exact = torch.randn(500, 12)
    found = exact + torch.linspace(-1, 1, 12)
    said = gate.judge(exact).squeeze(1).detach()
    pupil = calibrate.taught(gate, exact, found, said)
    with torch.no_grad():
        before, after = ((one.judge(found).squeeze(1) - said).abs().mean() for one in (gate, pupil))
        assert after < 0.5 * before and (pupil.judge(exact).squeeze(1) - said).abs().mean() < before
    for name, value in gate.state_dict().items():
        assert torch.equal(pupil.state_dict()[name], value) != name.startswith("judge."), name


def test_the_embedded_gate_sees_ruins_that_were_resampled():
    """Faces of 16 px, saved at another size and cut out a little off, are open; of moderate ones and clear ones nearly
    none, and every clear one is legible."""
    calibrate, gate = script("calibrate_judge"), load().start.gate
    photos = [to_tensor(load_photo(path)) for path in sorted((ROOT / "metagpen/weights/album").glob("*/*.jpg"))]
    generator = torch.Generator().manual_seed(0)
    crops, shares = torch.stack(photos), {}
    for level in ("hard", "moderate"):
        found = calibrate.found_in_photos(by_name(level)(crops, generator), generator)
        shares[level] = calibrate.shares(gate, band_statistics(found, gate.bands))
    assert shares["hard"] > 0.7 and shares["moderate"] < 0.12
    for clear in (crops, calibrate.found_in_photos(crops, generator)):
        assert calibrate.shares(gate, band_statistics(clear, gate.bands)) < 0.02
        assert (gate.severity(clear) < LEGIBLE).all()
