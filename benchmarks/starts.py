"""What may a start guess? Four starts, trained from the same base at equal budget, measured on people kept back.

A start sets the decoder's offsets from the mean embedding of somebody's photos. Trained without inner steps, as in
`configs/start_128.yml`, it can learn to guess the decoder's mixtures too (`start_mixtures`) and to look at the
encoder's mean w of the photos (`start_appearance`). Here it learns each of the four combinations over the same
episodes: the offsets alone are what any of the additions must beat, at the start and after 32 steps at hand-set rates.
The filters of the mixtures, the offset for nobody and the gate's answer learn along, here only. Measured on the people
marked `kept`, whom neither base nor start saw, by a recogniser that no loss used: nobody of the evaluation decides.

Rows go to benchmarks/results/starts.json, the table to docs/meta.md. Photos come from `$METAGPEN_SHARED`, or the folder
`shared` beside this repository. Trainings and finished people are kept in runs/.

    python benchmarks/starts.py runs/base_128/ema.safetensors      # goes on where it was
    python benchmarks/starts.py MODEL --meta-steps 2 --max-people 1 --max-queries 2 --steps 0 1 --dry
"""

from __future__ import annotations

import argparse
from pathlib import Path

import measure

from metagpen import load
from metagpen.evaluate import curve_report, report
from metagpen.evaluate.curve import CurveConfig, run_curve
from metagpen.memory import keep_freed_memory
from metagpen.meta.train import MetaConfig, meta_train

CONFIG = measure.ROOT / "configs" / "start_128.yml"
RESULTS = measure.RESULTS / "starts.json"
PAGE = measure.ROOT / "docs" / "meta.md"
RUNS = measure.ROOT / "runs" / "starts"
WIDTH = 12  # of the layer that mixtures are guessed from: 0.5 MB in the model's file
LEARN_ALONG = {"slow": ["bases.*", "start.gate.nobody", "start.gate.answer.*"], "lr": 1e-3, "lr_slow": 1e-3}
OUTER = {"l1": 1.0, "gradient": 0.25, "chroma": 1.0, "perceptual": 0.25, "identity": 0.6, "lpips": 1.2}
ARMS = {"offsets": {"start_mixtures": 0}, "mixtures": {"start_mixtures": WIDTH},
        "appearance": {"start_mixtures": 0, "start_appearance": True},
        "both": {"start_mixtures": WIDTH, "start_appearance": True}}
LABELS = {"no-rule": "the base's, untrained", "offsets": "offsets alone", "mixtures": "and mixtures",
          "appearance": "sees the photos' w too", "both": "and mixtures, sees w too"}


def trained(arm: str, base: Path, arguments: argparse.Namespace) -> Path:
    """The averaged model of an arm; goes on where it was stopped."""
    return meta_train(MetaConfig.from_dict({
        **measure.settings_on_shared(CONFIG), **LEARN_ALONG, "outer": OUTER, **ARMS[arm],
        "base": str(base), "meta_steps": arguments.meta_steps, "device": arguments.device,
        "output_dir": RUNS / f"{base.stem}_{arguments.meta_steps}" / arm, "cache_dir": RUNS / "cache",
        "validate_every": arguments.meta_steps, "validate_people": 4, "validate_queries": 2, "validate_steps": [0],
    }))  # fmt: skip


def measured(base: Path, models: dict[str, Path], arguments: argparse.Namespace) -> list[report.Row]:
    """All arms and the base as it is, on the same people: gains over the generic model, and `over_offsets`, what an
    addition gains over offsets alone, paired by person too."""
    rows = run_curve(CurveConfig.from_dict(dict(
        model=str(base), meta_models={arm: str(model) for arm, model in models.items()},
        **measure.held_out("kept", measure.PEOPLE), degradations=["hard", "moderate"],
        methods=["generic", "no-rule", *(f"meta-{arm}" for arm in models)], shots=[arguments.shots],
        steps=arguments.steps, schedule="per-run", max_people=arguments.max_people, max_queries=arguments.max_queries,
        device=arguments.device, workers=arguments.workers, threads=1, work_dir=str(RUNS / "curves"))))[0]

    def over_offsets(row: report.Row) -> str | None:
        if row["metric"] != "identity" or row["method"] not in {f"meta-{arm}" for arm in models if arm != "offsets"}:
            return None
        return measure.over(rows, row, "meta-offsets", 3)

    return [{**row, "over_offsets": over_offsets(row)} for row in curve_report.summary(rows)
            if row["metric"] in ("identity", "psnr", "ssim", "lpips", "sharpness")]


def table(rows: list[report.Row]) -> str:
    """A line per start and number of steps."""
    points = dict.fromkeys((row["method"], row["steps"]) for row in rows if row["method"] != report.BASELINE)
    lines = []
    for method, steps in points:
        found = [report.find(rows, degradation=degradation, method=method, steps=steps, metric=metric)
                 for degradation in ("hard", "moderate") for metric in ("identity", "psnr")]
        gains = [report.gain_text(row, 2 if row["metric"] == "psnr" else 3) for row in found]
        lines.append([LABELS[method.removeprefix("meta-")], str(steps), *gains, found[0]["over_offsets"] or "–"])
    heads = [f"{damage}, {metric}" for damage in ("16 px", "moderate") for metric in ("identity", "PSNR dB")]
    first, shots = rows[0], max(row["shots"] for row in rows)
    return (report.table(["start", "steps", *heads, "identity at 16 px over offsets alone"], lines)
            + f"\n\n{first['identities']} people kept back, {shots} photos; commit {first['commit']}; "
            f"{first['machine']}.")


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a base whose training left the kept people out")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--meta-steps", type=int, default=300)
    parser.add_argument("--shots", type=int, default=5, help="photos to learn from")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 32], help="inner steps to measure after")
    parser.add_argument("--max-people", type=int, help="only the first people")
    parser.add_argument("--max-queries", type=int, default=4, help="at most so many queries per person")
    parser.add_argument("--workers", type=int, default=2, help="processes that measure")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dry", action="store_true", help="print the table; write nothing outside runs/")
    arguments = parser.parse_args()
    measure.need(measure.SHARED / "photos", measure.SCORING)  # better now than after the trainings
    model = load(str(arguments.model))
    base = measure.without_rule(model, RUNS, f"base_{model.fingerprint[:12]}")
    models = {arm: trained(arm, base, arguments) for arm in arguments.arms}
    rows = measured(base, models, arguments)
    print(text := table(rows))
    if arguments.dry:
        return
    report.write_json(RESULTS, rows, meta_steps=arguments.meta_steps, machine=report.machine())
    measure.put_on_page("starts", text, RESULTS, PAGE)


if __name__ == "__main__":
    measure.run(main)
