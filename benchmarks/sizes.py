"""Do the default rates hold without tuning, from 1 to 16 photos and for models of 64 to 512 px?

`metagpen.adapt` as it is (`AdaptConfig`, no rule, random filters for the decoder's mixtures) with one model per
size: the embedded one, its own networks grown to twice and four times the size (`metagpen.gpen.growth`: what they
compute is what the smaller one computes, until steps change it), and, where `--small` names one, a model of 64 px.
Faces of 16 px of val people of celeba_wild_256, and above 256 px, which those photos do not reach, of the London set,
whose people have one photo to learn from; by a recogniser that no loss used. Photos come from `$METAGPEN_SHARED`, or
the folder `shared` beside this repository; what is finished is kept in runs/.

    python benchmarks/sizes.py --small runs/base_128/size_64.safetensors
        # writes benchmarks/results/sizes.json and the table in docs/adaptation.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

import measure
import torch

from metagpen import load
from metagpen.evaluate import curve_report, report
from metagpen.evaluate.curve import CurveConfig, run_curve
from metagpen.memory import keep_freed_memory
from metagpen.train import grow_to

RESULTS = measure.RESULTS / "sizes.json"
PAGE = measure.ROOT / "docs" / "adaptation.md"
RUNS = measure.ROOT / "runs" / "sizes"
SHOTS = (1, 4, 16)
DEGRADATION, STEPS = "hard", 32


def models(sizes: list[int], small: Path | None) -> dict[int, Path]:
    """A file for each size, every one without a rule and filters of its own."""
    torch.manual_seed(0)  # of the layers that growing adds
    found, begin = {}, {128: load("embedded")}
    if small is not None:
        begin[64] = load(small)
    for size in sizes:
        base = begin.get(size, begin[128])
        found[size] = measure.without_rule(grow_to(base, size), RUNS, f"{size}_{base.fingerprint[:12]}")
    return found


def people(size: int, shots: list[int]) -> report.Row:
    """Settings of a curve: whose photos are sharp at this size, and how many of them to learn from."""
    if size <= 256:
        return {**measure.held_out(), "shots": shots}
    return {**measure.held_out("test_permissive", photos="london_512"), "shots": [1], "min_queries": 1}


def measured(model: Path, size: int, arguments: argparse.Namespace) -> list[report.Row]:
    config = CurveConfig.from_dict(dict(
        **people(size, arguments.shots), model=str(model), degradations=[DEGRADATION],
        methods=["generic", "adapt"], steps=[arguments.inner],
        steps_of={"adapt": [0, arguments.inner]}, schedule="per-run", max_people=arguments.max_people,
        max_queries=arguments.max_queries, workers=arguments.workers, threads=1, device=arguments.device,
        work_dir=str(RUNS / "curves")))  # fmt: skip
    return curve_report.summary(run_curve(config)[0])


def table(rows: list[report.Row]) -> str:
    """Gains over the generic model by size and number of photos, after no step and after all."""
    def gain(own: list[report.Row], metric: str, digits: int) -> list[str]:
        return [report.gain_text(row, digits) for row in own if row["metric"] == metric]

    ours = sorted((row for row in rows if row["method"] == "adapt"), key=lambda row: row["steps"])
    lines, steps = [], sorted({row["steps"] for row in ours})
    for size, shots in sorted({(row["size"], row["shots"]) for row in ours}):
        own = [row for row in ours if (row["size"], row["shots"]) == (size, shots)]
        lines.append([str(size), own[0]["dataset"], str(own[0]["identities"]), str(shots),
                      *gain(own, "identity", 3), *gain(own, "psnr", 2)])
    return report.table(["px", "photos of", "people", "photos each", *(f"identity, {n} steps" for n in steps),
                         *(f"PSNR dB, {n} steps" for n in steps)], lines)


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--small", type=Path, help="a model of 64 px; without one, that size is left out")
    parser.add_argument("--shots", type=int, nargs="+", default=list(SHOTS))
    parser.add_argument("--inner", type=int, default=STEPS, help="inner steps")
    parser.add_argument("--max-people", type=int, default=6)
    parser.add_argument("--max-queries", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dry", action="store_true", help="print the table; write nothing outside runs/")
    arguments = parser.parse_args()
    measure.need(measure.SHARED / "photos", measure.SCORING)
    sizes = [size for size in arguments.sizes if size != 64 or arguments.small]
    rows = [{"size": size, **row} for size, file in models(sizes, arguments.small).items()
            for row in measured(file, size, arguments)]
    print(text := table(rows))
    if arguments.dry:
        return
    report.write_json(RESULTS, rows, machine=report.machine())
    measure.put_on_page("sizes", text, RESULTS, PAGE)


if __name__ == "__main__":
    measure.run(main)
