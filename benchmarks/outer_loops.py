"""Which outer loop pays? Every loop that ships, trained from the same base at equal budget, then measured on held-out
people.

All begin from one model (the embedded one, or one that is cheaper to train) without its rule, with the rates of
configs/meta_128.yml, and see the same episodes in the same meta-steps; only `loop` differs. They learn initial values
and, where the loop does, rates; start and shared filters stay as they are (Reptile has no gradient for them). *adapt*
is that beginning itself, at the rates set by hand: what a loop must beat; *untrained* is the rule that every loop
begins from. First order, Adam inside. (MAML is FOMAML then; in second order it asks for SGD inside, whose rates would
need a search of their own. What second order costs: benchmarks/meta_gradient.py.) Measured on the val people of
celeba_wild_256 with a recogniser that no loss used, faces of 16 px and moderate damage, after 0, 8 and 32 inner steps.

Rows go to benchmarks/results/outer_loops.json, the page to docs/results/outer_loops.md. Photos come from
`$METAGPEN_SHARED`, or the folder `shared` beside this repository. Trainings and finished people are kept in runs/.

    python benchmarks/outer_loops.py                       # 70 meta-steps of 4 people each; goes on where it was
    python benchmarks/outer_loops.py --device cuda         # where there is a GPU
    python benchmarks/outer_loops.py --model runs/base_64/opened.safetensors    # a base of 64 px, its gate calibrated
    python benchmarks/outer_loops.py --loops lslr --meta-steps 2 --max-people 1 --max-queries 2 --steps 0 1 --dry
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

import measure

from metagpen import load
from metagpen.evaluate import curve_report, report
from metagpen.evaluate.curve import CurveConfig, run_curve
from metagpen.memory import keep_freed_memory
from metagpen.meta import OUTER_LOOPS
from metagpen.meta.train import MetaConfig, meta_train

SCORER, IN_LOSSES = measure.SCORER, "embedded (in losses)"
RESULTS = measure.RESULTS / "outer_loops.json"
PAGE = measure.ROOT / "docs" / "results" / "outer_loops.md"
CONFIG = measure.ROOT / "configs" / "meta_128.yml"
RUNS = measure.ROOT / "runs" / "outer_loops"
UNTRAINED = "untrained"
LOOPS = [name for name in OUTER_LOOPS if name != "maml"]
DAMAGE = {"hard": "16 px", "moderate": "Moderate damage"}
DIGITS = {"identity": 3, "psnr": 2, "lpips": 3}


def base(model: str) -> Path:
    """The model without its rule, in a file: where every loop begins."""
    found = load(model)
    return measure.without_rule(found, RUNS, f"base_{found.fingerprint[:12]}")


def trained(loop: str, begin: Path, arguments: argparse.Namespace) -> tuple[Path, float]:
    """(the averaged model, seconds of all meta-steps at their median) of a loop; goes on where it was stopped.
    Untrained: of a meta-step that moves nothing."""
    untrained = {"loop": "fomaml", "lr": 0.0, "lr_rates": 0.0, "meta_steps": 1, "validate_every": 1}
    folder = RUNS / f"{begin.stem}_{arguments.meta_steps}" / loop
    config = MetaConfig.from_dict({
        **measure.settings_on_shared(CONFIG), "part": "kept", "loop": loop, "base": str(begin),
        "slow": [], "learn_start": False, "lr_rates": 3e-2, "people": 4, "unroll": [8, 32], "ema": 0.9, "warmup": 5,
        "meta_steps": arguments.meta_steps, "device": arguments.device, "output_dir": folder,
        "cache_dir": RUNS / "cache",
        "validate_every": arguments.meta_steps, "validate_people": 1, "validate_queries": 1, "validate_steps": [0],
        **(untrained if loop == UNTRAINED else {}),
    })  # fmt: skip
    model = meta_train(config)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return model, len(log) * median(config.people / record["people_per_second"] for record in log)


def measured(begin: Path, models: dict[str, Path], arguments: argparse.Namespace) -> list[report.Row]:
    """All loops' models and the beginning, by hand, on the same held-out people, paired against generic; `over_hand`:
    against the beginning after as many steps, paired by person too."""
    people = measure.held_out()
    config = CurveConfig.from_dict(dict(
        model=str(begin), meta_models={loop: str(model) for loop, model in models.items()},
        **{**people, "recognisers": {**people["recognisers"], IN_LOSSES: "embedded"}}, degradations=list(DAMAGE),
        methods=["generic", report.CEILING, "adapt", *(f"meta-{loop}" for loop in models)], shots=arguments.shots,
        steps=arguments.steps, schedule="per-run", max_people=arguments.max_people, max_queries=arguments.max_queries,
        device=arguments.device, workers=arguments.workers, threads=arguments.threads, work_dir=str(RUNS / "curves")))
    rows = run_curve(config)[0]

    def over_hand(row: report.Row) -> str | None:
        if not row["method"].startswith("meta-") or row["metric"] not in DIGITS:
            return None
        return measure.over(rows, row, "adapt", DIGITS[row["metric"]])

    return [{**row, "over_hand": over_hand(row)} for row in curve_report.summary(rows)]


def comparison(rows: list[report.Row], degradation: str, shots: int) -> str:
    """A line per loop and number of steps: gains over generic, and over the rates set by hand."""
    lines = []
    for method, steps in dict.fromkeys((row["method"], row["steps"]) for row in rows if row["shots"] == shots):
        found = [report.find(rows, degradation=degradation, method=method, shots=shots, steps=steps, metric=metric,
                             recogniser=SCORER if metric == "identity" else None) for metric in DIGITS]
        cells = [cell for row in found if row is not None
                 for cell in (report.gain_text(row, DIGITS[row["metric"]]), row["over_hand"] or "–")]
        lines.append([method.removeprefix("meta-"), str(steps), *cells])
    heads = [head for metric in DIGITS if any(row["metric"] == metric for row in rows)
             for head in (f"{metric} over generic", "over by hand")]
    return report.table(["loop", "steps", *heads], lines)


def page(rows: list[report.Row], seconds: dict[str, float], arguments: argparse.Namespace, size: int) -> str:
    first = rows[0]
    cost = report.table(["loop", "minutes of training", "of the cheapest"],
                        [[loop, f"{own / 60:.1f}", f"{own / min(seconds.values()):.1f}x"]
                         for loop, own in seconds.items()])  # fmt: skip
    model = "the embedded model" if arguments.model == "embedded" else f"`{arguments.model}`"
    tables = "\n\n".join(f"### {title}, {shots} photo{'s' * (shots > 1)}\n\n{comparison(rows, degradation, shots)}"
                         for degradation, title in DAMAGE.items() for shots in arguments.shots)
    return f"""# Outer loops at equal budget

Written by `benchmarks/outer_loops.py`; the rows are in `benchmarks/results/outer_loops.json`.
{first["identities"]} people, commit {first["commit"]}, {first["machine"]}.

Every loop begins from {model} ({size} px) without its rule and sees the same people in {arguments.meta_steps}
meta-steps of four. `adapt`: that beginning itself, at the rates set by hand, which is what a loop must beat;
`untrained`: the rule that every loop begins from. Gains are paired by person, with 95 % intervals; identity is by
{SCORER}, which no loss used; LPIPS is better when it falls.

## What they gain

{tables}

## What they cost

{cost}

## All that was measured

{curve_report.READING}

{curve_report.sections(rows)}
"""


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="checkpoint or name")
    parser.add_argument("--loops", nargs="+", default=LOOPS, choices=list(OUTER_LOOPS))
    parser.add_argument("--meta-steps", type=int, default=70)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5], help="photos to learn from")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 8, 32], help="inner steps to measure after")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-people", type=int, help="only the first people")
    parser.add_argument("--max-queries", type=int, default=6, help="at most so many queries per person")
    parser.add_argument("--workers", type=int, default=1, help="processes that measure")
    parser.add_argument("--threads", type=int, help="threads of torch in each")
    parser.add_argument("--dry", action="store_true", help="print the page; write nothing outside runs/")
    arguments = parser.parse_args()
    measure.need(measure.SHARED / "photos", measure.SCORING)  # better now than after the training
    begin = base(arguments.model)
    runs = {loop: trained(loop, begin, arguments) for loop in (UNTRAINED, *arguments.loops)}
    seconds = {loop: runs[loop][1] for loop in arguments.loops}
    rows = measured(begin, {loop: model for loop, (model, _) in runs.items()}, arguments)
    text = page(rows, seconds, arguments, load(str(begin)).size)
    print(text)
    if arguments.dry:
        return
    report.write_json(RESULTS, rows, seconds=seconds, model=arguments.model, meta_steps=arguments.meta_steps,
                      machine=report.machine())
    report.write_text(PAGE, text)
    print(f"written: {RESULTS.relative_to(measure.ROOT)}, {PAGE.relative_to(measure.ROOT)}")


if __name__ == "__main__":
    measure.run(main)
