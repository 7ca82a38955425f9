"""What does a base lose by learning its identity-conditioned start along? The same base with and without one.

Two trainings of `configs/base_64.yml` from the same random weights, over the same photos, damaged alike, in the same
order: one is told who it sees four times in five, as every base is, the other never, so that its start learns nothing.
Compared are their generic models, which are told nothing, on the val people of celeba_wild_256, by a recogniser that
no loss used; beside them stands what the first one's start gains for five photos.

Rows go to benchmarks/results/without_start.json, the table to docs/training.md. Photos come from `$METAGPEN_SHARED`, or
the folder `shared` beside this repository. Trainings and finished people are kept in runs/.

    python benchmarks/without_start.py              # goes on where it was
    python benchmarks/without_start.py --stages 2 --max-people 1 --max-queries 2 --dry     # two steps a stage
"""

from __future__ import annotations

import argparse
from pathlib import Path

import measure

from metagpen.evaluate import curve_report, report
from metagpen.evaluate.curve import CurveConfig, run_curve
from metagpen.memory import keep_freed_memory
from metagpen.train import TrainConfig, train

CONFIG = measure.ROOT / "configs" / "base_64.yml"
RESULTS = measure.RESULTS / "without_start.json"
PAGE = measure.ROOT / "docs" / "training.md"
RUNS = measure.ROOT / "runs" / "without_start"
SHOTS = 5
DROPOUT = {"with": 0.2, "without": 1.0}  # how often the identity is left out
DEGRADATIONS = ("extreme", "hard", "moderate")
FIGURES = {"identity": ("identity", 3), "psnr": ("PSNR, dB", 2), "ssim": ("SSIM", 3), "lpips": ("LPIPS", 3),
           "sharpness": ("sharpness", 2)}
ALONE = "generic-without"  # the second base's generic model, in the rows


def trained(arm: str, arguments: argparse.Namespace) -> Path:
    """The averaged model of an arm; goes on where it was stopped."""
    settings = measure.settings_on_shared(CONFIG)
    if arguments.stages:
        settings["stages"] = [{**stage, "steps": arguments.stages} for stage in settings["stages"]]
    return train(TrainConfig.from_dict({
        **settings, "identity_dropout": DROPOUT[arm], "threads": arguments.threads,
        "output_dir": RUNS / f"{arm}_{arguments.stages}" if arguments.stages else RUNS / arm,
        "cache_dir": RUNS / "cache"}))  # fmt: skip


def measured(model: Path, methods: list[str], arguments: argparse.Namespace) -> list[report.Row]:
    """A row per person and figure."""
    return run_curve(CurveConfig.from_dict(dict(
        **measure.held_out(), model=str(model), degradations=list(DEGRADATIONS),
        methods=methods, shots=[SHOTS], steps=[0], max_people=arguments.max_people,
        max_queries=arguments.max_queries, workers=1, threads=arguments.threads, work_dir=str(RUNS / "curves"))))[0]


def table(rows: list[report.Row]) -> str:
    """A line for every damage and figure; gains are over the generic model that was trained with a start."""
    lines = []
    for damage in DEGRADATIONS:
        for metric, (label, digits) in FIGURES.items():
            told, alone, start = (report.find(rows, degradation=damage, method=method, metric=metric)
                                  for method in ("generic", ALONE, "adapt"))
            if told is not None:  # LPIPS is absent where its backbone is
                means = [f"{row['mean']:.{digits}f}" for row in (told, alone)]
                lines.append([f"{measure.DAMAGE[damage]}, {label}", *means, report.gain_text(alone, digits),
                              report.gain_text(start, digits)])
    heads = ["damage, figure", "generic, of a base with a start", "of one without", "without over with",
             f"the start, {SHOTS} photos, over generic"]
    return (report.table(heads, lines) + f"\n\n{rows[0]['identities']} people, paired, 95 % intervals; commit "
            f"{rows[0]['commit']}; {rows[0]['machine']}.")


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, metavar="STEPS", help="steps of every stage, for a quick look")
    parser.add_argument("--max-people", type=int, help="only the first people")
    parser.add_argument("--max-queries", type=int, default=8, help="at most so many queries per person")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--dry", action="store_true", help="print the table; write nothing outside runs/")
    arguments = parser.parse_args()
    measure.need(measure.SHARED / "photos", measure.SCORING)  # better now than after the trainings
    models = {arm: trained(arm, arguments) for arm in DROPOUT}
    found = measured(models["with"], ["generic", "adapt"], arguments)
    found += [{**row, "method": ALONE} for row in measured(models["without"], ["generic"], arguments)]
    rows = [row for row in curve_report.summary(found) if row["metric"] in FIGURES]
    print(text := table(rows))
    if arguments.dry:
        return
    report.write_json(RESULTS, rows, machine=report.machine())
    measure.put_on_page("without_start", text, RESULTS, PAGE)


if __name__ == "__main__":
    measure.run(main)
