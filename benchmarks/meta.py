"""Does the learned inner rule pay? The embedded model against the same steps by hand, and against fine-tuning.

Measures, on the 25 val people of celeba_wild_256, faces of 16 px (hard), 8 px (extreme) and moderate damage:

    meta         `metagpen.adapt` as shipped: the start, then steps by the learned rule
    adapt        the same start, steps at the rates that were set by hand
    finetune@n   the usual tutorial's fine-tune of the generic model in 32 steps, at its own best rate
    full         every weight of the generic model at one rate, in 32 steps
    wrong-person, generic, input and the ceiling in kind, as controls

The fine-tune's rate is chosen first, among `RATES`, by the identity that it gains on the first people: a choice in its
favour, since the same people are measured afterwards. Rows go to benchmarks/results/meta.json, the page to
docs/results/meta.md. Photos come from `$METAGPEN_SHARED`, or the folder `shared` beside this repository.

    python benchmarks/meta.py                                  # goes on where it was interrupted
    python benchmarks/meta.py --max-people 2 --max-queries 2 --dry   # a quick look that changes no file
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import measure

from metagpen.errors import DataError
from metagpen.evaluate import curve_report, report
from metagpen.evaluate.curve import CurveConfig, run_curve
from metagpen.memory import keep_freed_memory

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("METAGPEN_SHARED", ROOT.parent / "shared"))
RESULTS = ROOT / "benchmarks" / "results" / "meta.json"
PAGE = ROOT / "docs" / "results" / "meta.md"
SCORER, IN_LOSSES = "068", "embedded (in losses)"
RATES = (2e-3, 8e-3, 3.2e-2)  # of the fine-tune's encoder; its decoder moves at a tenth
CHOICE_PEOPLE = 5


def configuration(arguments: argparse.Namespace, **changes: object) -> CurveConfig:
    photos, scorer = SHARED / "photos", SHARED / "weights" / "mobilefacenet_casia_xiaoccer_068.ckpt"
    for needed in (photos / "celeba_wild_256", scorer):
        if not needed.exists():
            raise DataError(f"{needed} is absent; point METAGPEN_SHARED at the folder that holds photos/ and weights/")
    settings = dict(
        model=arguments.model, data=str(photos / "celeba_wild_256"), split_file=str(photos / "splits.csv"), split="val",
        trained_on=[str(photos / "celeba_wild_256"), str(photos / "lfw_176")],
        recognisers={SCORER: str(scorer), IN_LOSSES: "embedded"}, degradations=["hard", "extreme", "moderate"],
        methods=["input", "generic", report.CEILING, "meta", "adapt", "finetune@n", "full", "wrong-person"],
        shots=[1, 5], steps=[0, 8, 32],
        shots_of={"adapt": [5], "finetune@n": [5], "full": [5], "wrong-person": [5]},
        steps_of={"finetune@n": [32], "full": [32], "wrong-person": [32]}, schedule="per-run",
        max_people=arguments.max_people,
        max_queries=arguments.max_queries, workers=arguments.workers, threads=arguments.threads,
        work_dir=str(ROOT / "runs" / "meta"))
    return CurveConfig.from_dict({**settings, **changes})


def best_rate(arguments: argparse.Namespace) -> tuple[float, dict[float, float]]:
    """The fine-tune's encoder rate with the largest identity after 32 steps at 16 px, and what every rate gave."""
    gains = {}
    for rate in RATES:
        config = configuration(
            arguments, degradations=["hard"], methods=["generic", "finetune@n"], shots=[5], shots_of={}, steps=[32],
            steps_of={}, max_people=min(CHOICE_PEOPLE, arguments.max_people or CHOICE_PEOPLE),
            rivals={"lr_encoder": rate, "lr_decoder": rate / 10})
        summed = curve_report.summary(run_curve(config)[0])
        gains[rate] = report.find(summed, method="finetune@n", metric="identity", recogniser=SCORER)["gain"]
    return max(gains, key=gains.__getitem__), gains


def page(rows: list[report.Row], rate: float, gains: dict[float, float]) -> str:
    first = rows[0]
    tried = ", ".join(f"{value:g}: {gain:+.3f}" for value, gain in gains.items())
    return f"""# The learned inner rule

Written by `benchmarks/meta.py`; the rows are in `benchmarks/results/meta.json`. Model: commit {first["commit"]}, on
{first["machine"]}.

*Start and learned rule*: what `metagpen.adapt` does with the embedded model. *Adapt*: here the same start, but steps at
rates set by hand, without the rule. *Every weight*: of the generic model, in 32 steps. *Fine-tune*: the usual
tutorial's, in as many, the encoder at a rate of {rate:g}, the best of those tried (identity gain on the first
{CHOICE_PEOPLE} people, 16 px, 32 steps: {tried}).

{curve_report.READING}

{curve_report.sections(rows)}
"""


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="checkpoint or name")
    parser.add_argument("--max-people", type=int, help="only the first people")
    parser.add_argument("--max-queries", type=int, default=6, help="at most so many queries per person")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in each")
    parser.add_argument("--dry", action="store_true", help="print the page; write nothing outside runs/")
    parser.add_argument("--pages", action="store_true", help="write the page anew from the published rows")
    arguments = parser.parse_args()
    if arguments.pages:
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
        gains = {float(rate): gain for rate, gain in found["settings"]["finetune_rates"].items()}
        report.write_text(PAGE, page(found["rows"], found["settings"]["finetune_rate"], gains))
        return
    rate, gains = best_rate(arguments)
    rivals = {"lr_encoder": rate, "lr_decoder": rate / 10}
    rows = curve_report.summary(run_curve(configuration(arguments, rivals=rivals))[0])
    print(page(rows, rate, gains))
    if arguments.dry:
        return
    report.write_json(RESULTS, rows, settings={"finetune_rates": gains, "finetune_rate": rate,
                                               "max_queries": arguments.max_queries}, machine=report.machine())
    report.write_text(PAGE, page(rows, rate, gains))
    print(f"written: {RESULTS.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    measure.run(main)
