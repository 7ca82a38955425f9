"""What the shots curves say: the goals, the tables and the plots of docs/evidence.md, from the rows alone.

    metagpen curve -c configs/curve_128.yml      # and the others, see RUNS; each into its folder under runs/curve
    gzip -9nc runs/curve/<folder>/rows.jsonl > benchmarks/results/curve_128.jsonl.gz
    python benchmarks/evidence.py                # tables and plots from the rows; a minute, no model, no photos
    python benchmarks/evidence.py --dry          # print; write nothing

Tables go between the markers of docs/evidence.md, plots and the tables of everything that was measured to
docs/evidence/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure

from metagpen.evaluate import curve_report, report
from metagpen.evaluate.report import CEILING, table
from metagpen.evaluate.statistics import Gain

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, FOLDER = ROOT / "docs" / "evidence.md", ROOT / "docs" / "evidence"
RUNS = ("curve_128", "curve_128_long", "curve_strength", "curve_london")  # each after its configuration
SCORER = "068"
DAMAGE = {"hard": "16 px", "extreme": "8 px", "moderate": "moderate"}

Row = dict[str, Any]
Point = tuple[str, int, int]  # method, photos, steps
OURS, START, FINETUNE = ("meta", 5, 32), ("start", 5, 0), ("finetune", 5, 2000)
WRONG, GENERIC = ("wrong-person", 5, 32), ("generic", 0, 0)


def interval(gain: Gain, digits: int = 3) -> str:
    return f"{gain.mean:+.{digits}f} [{gain.lo:+.{digits}f}, {gain.hi:+.{digits}f}]"


def goal(name: str, found: str, reached: bool) -> list[str]:
    return [name, found, measure.verdict(reached)]


def goals(curve: Sequence[Row], long: Sequence[Row]) -> str:
    """What was asked for, what was found, and whether that is enough. Faces of 16 px, five photos, val people."""

    def against(rows: Sequence[Row], ours: Point, theirs: Point, metric: str) -> Gain:
        return curve_report.versus(rows, "hard", ours, theirs, metric, SCORER if metric == "identity" else None)

    lines = []
    for metric, digits in (("identity", 3), ("psnr", 2), ("ssim", 3)):
        gain = against(long, OURS, FINETUNE, metric)
        what = f"{metric}: ours after 32 steps not below the fine-tune after 2,000 ({gain.identities} people)"
        lines.append(goal(what, interval(gain, digits), gain.hi >= 0))
    ours, theirs = (seconds(long, point) for point in (OURS, FINETUNE))
    lines.append(goal("at most 1/40 of its seconds", f"{ours:.1f} s against {theirs:.0f} s: 1/{theirs / ours:.0f}",
                      theirs >= 40 * ours))
    shots = sorted({row["shots"] for row in curve if row["method"] == "meta"})
    gains = [against(curve, ("meta", n, 32), GENERIC, "identity").mean for n in shots]
    lines.append(goal(f"identity gain grows with the photos, {', '.join(map(str, shots))}",
                      ", ".join(f"{gain:+.3f}" for gain in gains),
                      all(more > fewer for fewer, more in zip(gains, gains[1:], strict=False))))
    wrong = against(curve, WRONG, GENERIC, "identity")
    lines.append(goal("somebody else's photos gain no identity", interval(wrong), wrong.lo <= 0))
    own = against(curve, OURS, GENERIC, "identity")
    lines.append(goal("fewer than 10 % of people worse than generic in identity", f"{own.worse} of {own.identities}",
                      own.worse < 0.1 * own.identities))
    return table(["to be reached at 16 px, 5 photos", "measured", "verdict"], lines)


def seconds(rows: Sequence[Row], point: Point) -> float:
    """Mean over people of the seconds of learning."""
    found = {row["identity"]: row["seconds"] for row in rows if (row["method"], row["shots"], row["steps"]) == point}
    return sum(found.values()) / len(found)


def rivals(summed: Sequence[Row]) -> str:
    """Everybody after 32 steps on five photos, and who takes none."""

    def shown(row: Row) -> bool:
        without_steps = row["method"] in ("start", "reference-average") and row["shots"] == 5
        return without_steps or (row["shots"], row["steps"]) in ((0, 0), (5, 32))

    return by_damage(summed, shown, ("hard", "extreme", "moderate"))


def by_damage(summed: Sequence[Row], shown: Callable[[Row], bool], degradations: Sequence[str]) -> str:
    """The usual tables, of the points to be shown."""
    chosen = [row for row in summed if shown(row)]
    return "\n\n".join(f"Damage: {DAMAGE[name]}.\n\n{report.figures_table(chosen, name, [SCORER])}"
                       for name in degradations)


def along(summed: Sequence[Row], axis: str, places: Sequence[Point]) -> str:
    """Gains over generic of a method at several places: a line per place, columns per damage and metric."""
    lines = []
    for method, shots, steps in places:
        cells = [str({"photos": shots, "steps": steps}[axis])]
        for degradation in DAMAGE:
            for metric, digits in (("identity", 3), ("psnr", 2)):
                row = report.find(summed, degradation=degradation, method=method, shots=shots, steps=steps,
                                  metric=metric, recogniser=SCORER if metric == "identity" else None)
                cells.append("{gain:+.{d}f} [{gain_lo:+.{d}f}, {gain_hi:+.{d}f}]".format(**row, d=digits))
        lines.append(cells)
    names = [f"{text}, {metric}" for text in DAMAGE.values() for metric in ("identity", "PSNR dB")]
    return table([axis, *names], lines)


def long_tune(rows: Sequence[Row]) -> str:
    """Ours after 32 steps minus the fine-tune at each of its stops; positive is ours ahead, LPIPS the other way."""
    lines = []
    for steps in sorted({row["steps"] for row in rows if row["method"] == "finetune"}):
        for degradation, text in DAMAGE.items():
            theirs = ("finetune", 5, steps)
            differences = [
                interval(curve_report.versus(rows, degradation, OURS, theirs, metric,
                                             SCORER if metric == "identity" else None), digits)
                for metric, digits in (("identity", 3), ("psnr", 2), ("ssim", 3), ("lpips", 3), ("sharpness", 2))
            ]
            lines.append([f"{steps} iterations, {text}", *differences, f"{seconds(rows, theirs):.0f}"])
    return table(["ours minus the fine-tune after", "identity, 068", "PSNR dB", "SSIM", "LPIPS (lower is better)",
                  "sharpness", "its seconds"], lines)


def machines(rows: Sequence[Row]) -> str:
    """Who measured, and where."""
    commits, found = (sorted({row[name] for row in rows}) for name in ("commit", "machine"))
    people, workers = len({row["identity"] for row in rows}), max(row["workers"] for row in rows)
    return f"{people} people; commit {', '.join(commits)}; {'; '.join(found)}, {workers} processes at a time."


def write_plots(name: str, rows: Sequence[Row], chosen: Sequence[str], title: str) -> None:
    """Plots of some methods, so that lines can be told apart."""
    records = curve_report.complete(curve_report.records_of(rows))
    records = [record for record in records if record.method in chosen]
    for axis in curve_report.AXES:
        figure = curve_report.plot(records, axis, SCORER, f"{title}: quality against {curve_report.AXES[axis]}")
        curve_report.save_figure(figure, FOLDER / f"{name}_{axis}.png")


def blocks() -> tuple[dict[str, str], dict[str, list[Row]], dict[str, list[Row]]]:
    """The page's tables by the name of their markers; the rows and summaries of all runs."""
    rows = {name: curve_report.read_rows(RESULTS / f"{name}.jsonl.gz") for name in RUNS}
    rows["curve_128_long"] = people_done(rows["curve_128_long"])
    summed = {name: curve_report.summary(found) for name, found in rows.items()}
    curve = summed["curve_128"]
    shots, steps = (sorted({row[axis] for row in curve if row["method"] == "meta"}) for axis in ("shots", "steps"))
    found = {
        "goals": goals(rows["curve_128"], rows["curve_128_long"]),
        "rivals": rivals(curve) + "\n\n" + machines(rows["curve_128"]),
        "photos": along(curve, "photos", [("meta", n, max(steps)) for n in shots]),
        "steps": along(curve, "steps", [START, *(("meta", 5, n) for n in steps)]),
        "long": long_tune(rows["curve_128_long"]) + "\n\n" + by_damage(
            summed["curve_128_long"], lambda row: True, ("hard",)) + "\n\n" + machines(rows["curve_128_long"]),
        "strength": by_damage(summed["curve_strength"], lambda row: row["method"] not in ("input", CEILING),
                              ("hard", "extreme", "moderate")) + "\n\n" + machines(rows["curve_strength"]),
        "london": by_damage(summed["curve_london"], lambda row: True, ("hard", "extreme", "moderate")) + "\n\n"
        + machines(rows["curve_london"]),
    }
    return found, rows, summed


def people_done(rows: Sequence[Row]) -> list[Row]:
    """Rows of the people who were measured at every point: the long run ends when the time is over."""
    kept = {record.person for record in curve_report.complete(curve_report.records_of(rows))}
    return [row for row in rows if row["identity"] in kept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="print the tables; write nothing")
    arguments = parser.parse_args()
    found, rows, summed = blocks()
    for name, text in found.items():
        print(f"\n## {name}\n\n{text}")
    if arguments.dry:
        return
    page = PAGE.read_text(encoding="utf-8")
    for name, text in found.items():
        page = report.replace_between(page, *measure.markers(name), text)
    report.write_text(PAGE, page)
    for name in RUNS:
        report.write_text(FOLDER / f"{name}.csv", curve_report.csv_text(summed[name]))
    everybody = [name for name in dict.fromkeys(row["method"] for row in rows["curve_128"]) if name != "null-space"]
    write_plots("val", rows["curve_128"], everybody, "25 people of CelebA")
    write_plots("val_long", rows["curve_128_long"], ["input", "generic", CEILING, "start", "meta", "finetune"],
                "against the tutorial's 2,000 iterations")
    print(f"written: {PAGE.relative_to(ROOT)}, {FOLDER.relative_to(ROOT)}/")


if __name__ == "__main__":
    measure.run(main)
