"""What the shots curves say: the goals, tables and plots of docs/evidence.md and its pages, from the rows alone.

    make bench-evidence        # RUNS but curve_meta, which needs one's own trainings; then this script; or one by one:
    metagpen curve -c configs/curve_128.yml -s output=benchmarks/results/curve_128.jsonl.gz
    metagpen curve -c configs/curve_128.yml -s methods='[generic, finetune@n-x8]' -s shots_of='{finetune@n-x8: [5]}' \
        -s steps_of={} -s output=benchmarks/results/curve_128+more.jsonl.gz     # a method more, without all the others
    python benchmarks/evidence.py                # tables and plots from the rows; a minute, no model, no photos
    python benchmarks/evidence.py --dry          # print; write nothing
    python benchmarks/evidence.py --previews runs/curve/<folder>/previews    # the picture of the London run, too

Tables go between the markers of docs/evidence.md and docs/evidence/*.md, plots and the tables of everything that was
measured to docs/evidence/, and what the meta-model gains, beside the fine-tune of equal budget, to
benchmarks/results/meta.json. A run's rows are those of NAME.jsonl.gz and NAME+*.jsonl.gz; what both have must be the
same, up to rounding.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

import measure
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import beta

from metagpen.atomic import whole_file, write_text
from metagpen.errors import DataError
from metagpen.evaluate import curve_report, report
from metagpen.evaluate.names import rate_of
from metagpen.evaluate.records import Record
from metagpen.evaluate.report import label_of, table
from metagpen.evaluate.statistics import Gain

ROOT, RESULTS = measure.ROOT, measure.RESULTS
PAGE, FOLDER = ROOT / "docs" / "evidence.md", ROOT / "docs" / "evidence"
# each after its configuration
RUNS = ("curve_rates", "curve_128", "curve_start", "curve_meta", "curve_16", "curve_128_long", "curve_long_hard",
        "curve_strength", "curve_scale", "curve_scale_lfw", "curve_london", "curve_lfw", "curve_precision")
SCORER, DAMAGE = measure.SCORER, measure.DAMAGE
COMPARED = {"identity": 3, "psnr": 2, "ssim": 3, "lpips": 3, "sharpness": 2}  # digits

Row = dict[str, Any]
Point = tuple[str, int, int]  # method, photos, steps
Judge = Callable[[Sequence[Row], Sequence[Row], str], tuple[str, str]]  # rows, summary, damage -> figures, verdict
OURS, ONE, FINETUNE = ("adapt", 5, 32), ("adapt", 1, 32), ("finetune", 5, 2000)
TUNED = ("finetune@n-x4", 5, 32)  # fine-tuning at its best rate, after as many steps as ours
SCALED = "adapt-x8"  # ours, all rates eight times as large
WRONG, MEAN_FACE, GENERIC = ("wrong-person", 5, 32), ("reference-average", 5, 0), ("generic", 0, 0)
SETS = {"curve_128": ("CelebA: 25 people, 5 photos", 5), "curve_lfw": ("LFW: 30 people, 5 photos", 5),
        "curve_london": ("London: 102 people, 1 photo", 1)}  # fmt: skip
SHORT = (("identity gained", "adapt", "generic", "identity"), ("PSNR gained, dB", "adapt", "generic", "psnr"),
         ("LPIPS, less is better", "adapt", "generic", "lpips"), ("sharpness", "adapt", "generic", "sharpness"),
         ("identity gained from somebody else's photos", "wrong-person", "generic", "identity"),
         ("ours minus LoRA: identity", "adapt", "lora-16-x16", "identity"),
         ("ours minus LoRA: PSNR, dB", "adapt", "lora-16-x16", "psnr"),
         ("ours minus LoRA: LPIPS", "adapt", "lora-16-x16", "lpips"))  # LoRA at its best rate on CelebA
REACHED, UNDECIDED, MISSED = measure.REACHED, measure.UNDECIDED, measure.MISSED
NOT_YET = "Not measured yet."
ROUNDING = 1e-4  # what another processor, or another order of sums, may change in a row
SHOWN, PICTURED = 32, 5
ARMS = ("start-lora-16", "start-full", "no-start")  # of the question whose the lead is
RIVALS = ("finetune@n", "lora-4", "lora-16", "latent-only", "full", "pivotal")  # which a curve may have at other rates


def interval(gain: Gain, digits: int = 3) -> str:
    return report.interval_text(gain.mean, gain.lo, gain.hi, digits)


def against(rows: Iterable[Row], ours: Point, theirs: Point, metric: str, degradation: str = "hard") -> Gain:
    """Ours minus theirs, paired by person."""
    return curve_report.versus(rows, degradation, ours, theirs, metric, SCORER if metric == "identity" else None)


# --- what was to be reached -----------------------------------------------------------------------


def above(gain: Gain) -> str:
    return measure.not_below(gain.lo, gain.hi)


def worst(verdicts: Iterable[str]) -> str:
    return max(verdicts, key=(REACHED, UNDECIDED, MISSED).index)


def goals(curve: Sequence[Row], long: Sequence[Row] = (), sixteen: Sequence[Row] = (), lfw: Sequence[Row] = ()) -> str:
    """What was asked for, what was found, and whether that is enough. Faces of 16 px, five photos, val people."""
    lines = long_goals(long) if long else [["ours after 32 steps against the fine-tune after 2,000", NOT_YET, "–"]]
    lines += [growth_goal(rows) for rows in (curve, sixteen) if rows]
    wrong = against(curve, WRONG, GENERIC, "identity")
    lines.append(["somebody else's photos gain no identity, upper end at most +0.02", interval(wrong),
                  REACHED if wrong.hi <= 0.02 else MISSED if wrong.lo > 0 else UNDECIDED])
    for runs, who in (([curve], ""), ([curve, lfw], ", LFW too")) if lfw else (([curve], ""),):
        own = how_many_worse(runs)
        lines.append([f"fewer than 10 % of people worse than generic in identity{who}",
                      f"{own.worse} of {own.people}, {own.least:.0%} to {own.most:.0%}", own.fewer_than(0.1)])
    trick = [against(curve, OURS, MEAN_FACE, metric) for metric in ("identity", "sharpness")]
    lines.append(["above the blend with the mean face in identity and sharpness", ", ".join(map(interval, trick)),
                  worst(map(above, trick))])
    simpler = {theirs: against(curve, OURS, theirs, "identity") for theirs in rivals_of(curve)}
    closest = min(simpler, key=lambda theirs: simpler[theirs].mean)
    lines.append([f"identity above every rival after 32 steps; the closest is *{label_of(closest[0])}*",
                  interval(simpler[closest]), worst(map(above, simpler.values()))])
    return table(["to be reached at 16 px, 5 photos", "measured", "verdict"], lines)


class Worse(NamedTuple):
    """How many people of how many, and the 95 % interval of their share in the many more that there are (Clopper and
    Pearson 1934)."""

    worse: int
    people: int
    least: float
    most: float

    @classmethod
    def of(cls, worse: int, people: int) -> Worse:
        least = beta.ppf(0.025, worse, people - worse + 1) if worse else 0.0
        most = beta.ppf(0.975, worse + 1, people - worse) if worse < people else 1.0
        return cls(worse, people, float(least), float(most))

    def fewer_than(self, share: float) -> str:
        return REACHED if self.most < share else MISSED if self.least >= share else UNDECIDED


def how_many_worse(runs: Iterable[Sequence[Row]]) -> Worse:
    """People of several runs whom ours leaves with less identity than the generic model, at 16 px."""
    own = [against(rows, OURS, GENERIC, "identity") for rows in runs]
    return Worse.of(sum(gain.worse for gain in own), sum(gain.identities for gain in own))


def in_short(runs: dict[str, list[Row]], summed: dict[str, list[Row]]) -> str:
    """The sets side by side under every damage: identity before and after, and what else is gained and lost."""
    names = [name for name in SETS if name in runs]
    lines = []
    for damage, said in DAMAGE.items():
        lines.append([f"**{said}**: identity, generic model and ours",
                      *(" → ".join(mean_identity(summed[name], damage, point) for point in (GENERIC, ours_in(name)))
                        for name in names)])
        lines += [[what, *(gain_in(runs[name], (ours, *ours_in(name)[1:]), theirs, metric, damage) for name in names)]
                  for what, ours, theirs, metric in SHORT]
    return table(["", *(SETS[name][0] for name in names)], lines)


def ours_in(name: str) -> Point:
    return "adapt", SETS[name][1], OURS[2]


def mean_identity(summed: Sequence[Row], damage: str, point: Point) -> str:
    method, shots, steps = point
    row = report.find(summed, degradation=damage, method=method, shots=shots, steps=steps, metric="identity",
                      recogniser=SCORER)
    return f"{row['mean']:.2f}"


def gain_in(rows: Sequence[Row], ours: Point, theirs: str, metric: str, damage: str) -> str:
    """Ours minus a method on as many photos after as many steps, or the generic model; a dash where one was not
    measured."""
    point = GENERIC if theirs == GENERIC[0] else (theirs, *ours[1:])
    there = {(row["method"], row["shots"], row["steps"]) for row in rows}
    return interval(against(rows, ours, point, metric, damage), COMPARED[metric]) if {ours, point} <= there else "–"


def growth_goal(rows: Sequence[Row]) -> list[str]:
    shots, more = shots_of(rows, "adapt"), growth(rows, "adapt")
    people, seeds = (len({row[key] for row in rows}) for key in ("identity", "seed"))
    return [f"identity grows with the photos, {', '.join(map(str, shots))}: from each to the next ({people} people, "
            f"{seeds} {'seed' if seeds == 1 else 'seeds'})", ", ".join(map(interval, more)), worst(map(above, more))]


def shots_of(rows: Iterable[Row], method: str) -> list[int]:
    return sorted({row["shots"] for row in rows if row["method"] == method})


def growth(rows: Sequence[Row], method: str, metric: str = "identity", degradation: str = "hard") -> list[Gain]:
    """What a method after 32 steps gains from each number of photos to the next, paired by person."""
    shots = shots_of(rows, method)
    return [against(rows, (method, many, 32), (method, few, 32), metric, degradation)
            for few, many in zip(shots, shots[1:], strict=False)]


def adaptation_goals(rows: Sequence[Row], summed: Sequence[Row]) -> str:
    """What adaptation was to bring, under both damages that ruin a face."""
    lines = []
    for wish, judge in ADAPTATION_GOALS.items():
        found = [judge(rows, summed, degradation) for degradation in ("hard", "extreme")]
        lines.append([wish, *(text for one in found for text in one)])
    return table(["to be reached, 5 photos, 32 steps", "16 px", "verdict", "8 px", "verdict"], lines)


def meta_rows(rows: Sequence[Row], summed: Sequence[Row]) -> list[Row]:
    """Ours at every point beside the generic model, the ceiling, the control and the fine-tune at its best rate, in the
    format of first_light.json; `over_finetune`, `_lo`, `_hi`: against that fine-tune after 32 steps, paired."""
    found = []
    for row in summed:
        point = row["method"], row["shots"], row["steps"]
        if row["method"] == "adapt" and row["recogniser"] in (None, SCORER):
            gain = curve_report.versus(rows, row["degradation"], point, TUNED, row["metric"], row["recogniser"])
            found.append({**row, "over_finetune": gain.mean, "over_finetune_lo": gain.lo, "over_finetune_hi": gain.hi})
        elif row["method"] == report.CEILING or point in (GENERIC, WRONG, TUNED):
            found.append(row)
    return found


def at_least(bar: float, ours: Point) -> Judge:
    def judge(rows: Sequence[Row], summed: Sequence[Row], degradation: str) -> tuple[str, str]:
        gain = against(rows, ours, GENERIC, "identity", degradation)
        return interval(gain), REACHED if gain.lo >= bar else MISSED if gain.hi < bar else UNDECIDED
    return judge


def more_than(ours: Point, theirs: Point, *metrics: str) -> Judge:
    def judge(rows: Sequence[Row], summed: Sequence[Row], degradation: str) -> tuple[str, str]:
        gains = [against(rows, ours, theirs, metric, degradation) for metric in metrics]
        text = ", ".join(interval(gain, COMPARED[metric]) for metric, gain in zip(metrics, gains, strict=True))
        return text, worst(map(above, gains))
    return judge


def twice_the_tuned(rows: Sequence[Row], summed: Sequence[Row], degradation: str) -> tuple[str, str]:
    own, theirs = (against(rows, point, GENERIC, "identity", degradation).mean for point in (OURS, TUNED))
    return f"{own:+.3f} against {theirs:+.3f}: {own / theirs:.2f} times", REACHED if own >= 2 * theirs else MISSED


def near_the_ceiling(rows: Sequence[Row], summed: Sequence[Row], degradation: str) -> tuple[str, str]:
    share = report.find(summed, degradation=degradation, method="adapt", shots=5, steps=32, metric="identity",
                        recogniser=SCORER)["fraction_of_ceiling"]
    return f"{share:.2f}", REACHED if share >= 0.8 else MISSED


ADAPTATION_GOALS: dict[str, Judge] = {
    "identity gains 0.30 or more": at_least(0.30, OURS),
    "on one photo 0.20 or more": at_least(0.20, ONE),
    "without steps 0.25 or more": at_least(0.25, ("adapt", 5, 0)),
    "0.8 of the ceiling": near_the_ceiling,
    "twice what the fine-tune at its best rate gains": twice_the_tuned,
    "after 8 steps above the fine-tune after 32": more_than(("adapt", 5, 8), TUNED, "identity"),
    "32 steps add to the start, in identity and PSNR": more_than(OURS, ("adapt", 5, 0), "identity", "psnr"),
    "PSNR, SSIM, sharpness not below generic": more_than(OURS, GENERIC, "psnr", "ssim", "sharpness"),
}


def long_goals(long: Sequence[Row]) -> list[list[str]]:
    """Ours against the tutorial's 2,000 iterations."""
    lines = []
    for metric, digits in (("identity", 3), ("psnr", 2), ("ssim", 3)):
        gain = against(long, OURS, FINETUNE, metric)
        what = f"{metric}: ours after 32 steps not below the fine-tune after 2,000 ({gain.identities} people)"
        lines.append([what, interval(gain, digits), above(gain)])
    ours, theirs = (seconds(long, point) for point in (OURS, FINETUNE))
    lines.append(["at most 1/40 of its seconds", f"{ours:.1f} s against {theirs:.0f} s: 1/{theirs / ours:.0f}",
                  REACHED if theirs >= 40 * ours else MISSED])
    return lines


def seconds(rows: Sequence[Row], point: Point) -> float:
    """Mean over people and seeds of the seconds of learning."""
    found = {(row["identity"], row["seed"]): row["seconds"] for row in rows
             if (row["method"], row["shots"], row["steps"]) == point}
    return sum(found.values()) / len(found)


def rivals_of(rows: Sequence[Row], ours: Point = OURS) -> list[Point]:
    """The rivals on as many photos after as many steps as ours, in the order of the rows."""
    points = [(row["method"], row["shots"], row["steps"]) for row in rows]
    return [point for point in dict.fromkeys(points) if rate_of(point[0])[0] in RIVALS and point[1:] == ours[1:]]


# --- tables ---------------------------------------------------------------------------------------


def best_rates(summed: Sequence[Row]) -> dict[str, str]:
    """Rival -> its name at the rate that gains most identity, among the rates that were measured."""
    gains: dict[str, dict[str, float]] = {}
    for row in summed:
        base, _ = rate_of(row["method"])
        if base in RIVALS and (row["metric"], row["recogniser"]) == ("identity", SCORER):
            gains.setdefault(base, {})[row["method"]] = row["gain"]
    return {base: max(found, key=found.__getitem__) for base, found in gains.items()}


def by_damage(summed: Sequence[Row], shown: Callable[[Row], bool], degradations: Sequence[str] = tuple(DAMAGE)) -> str:
    """The usual tables, of the points to be shown."""
    chosen = [row for row in summed if shown(row)]
    return "\n\n".join(f"Damage: {DAMAGE[name]}.\n\n{report.figures_table(chosen, name, [SCORER])}"
                       for name in degradations)


def everybody(row: Row) -> bool:
    """Who takes no photos, and everybody after 32 steps on five, or after as many as they take."""
    without_steps = row["method"] == "reference-average" and row["shots"] == 5
    return without_steps or (row["shots"], row["steps"]) in ((0, 0), (5, 32))


def differences(rows: Sequence[Row], rivals: Sequence[Point], degradations: Sequence[str] = tuple(DAMAGE),
                ours: Point | None = OURS) -> str:
    """Ours (None: after as many steps on as many photos) minus each of them, with the seconds that they take."""
    lines = []
    for theirs in rivals:
        mine = ours or ("adapt", *theirs[1:])
        for degradation in degradations:
            gains = [interval(against(rows, mine, theirs, metric, degradation), digits)
                     for metric, digits in COMPARED.items()]
            what = f"{label_of(theirs[0])}, {theirs[2]} steps; {DAMAGE[degradation]}"
            lines.append([what, *gains, f"{seconds(rows, theirs):.0f}"])
    return table(["ours minus", "identity, 068", "PSNR dB", "SSIM", "LPIPS (lower is better)", "sharpness",
                  "its seconds"], lines)


def along(summed: Sequence[Row], axis: str, places: Sequence[Point]) -> str:
    """Gains over generic of a method at several places: a line per place, columns per damage and metric."""
    lines = []
    for method, shots, steps in places:
        cells = [str({"photos": shots, "steps": steps}[axis])]
        for degradation in DAMAGE:
            for metric, digits in (("identity", 3), ("psnr", 2)):
                row = report.find(summed, degradation=degradation, method=method, shots=shots, steps=steps,
                                  metric=metric, recogniser=SCORER if metric == "identity" else None)
                cells.append(report.gain_text(row, digits))
        lines.append(cells)
    names = [f"{text}, {metric}" for text in DAMAGE.values() for metric in ("identity", "PSNR dB")]
    return table([axis, *names], lines)


def machines(rows: Sequence[Row]) -> str:
    """Who measured, and where."""
    commits = sorted({row["commit"] for row in rows})
    models = sorted({row.get("model", "of the commit") for row in rows})  # older runs did not write it down
    where = sorted({re.sub(r", \d+ threads?", "", row["machine"]) for row in rows})
    people, workers, threads = (len({row["identity"] for row in rows}), *(
        max(row[name] for row in rows) for name in ("workers", "threads")))
    return (f"{people} people; model {', '.join(models)}; commit {', '.join(commits)}; {'; '.join(where)}; "
            f"{workers} processes at a time, {threads} thread(s) each.")


def write_plots(name: str, rows: Sequence[Row], title: str, axes: Sequence[str]) -> None:
    """Whoever was measured at several places along an axis, against it; against steps and seconds, on five photos."""
    records = curve_report.records_of(curve_report.complete(rows))
    for axis in axes:
        shown = [record for record in records if axis == "shots" or record.shots in (0, 5)]
        places: dict[str, set[int]] = {}
        for record in shown:
            places.setdefault(kind_of(record), set()).add(record.shots if axis == "shots" else record.steps)
        shown = [record for record in shown if not record.shots or len(places[kind_of(record)]) > 1]
        figure = curve_report.plot(shown, axis, SCORER, f"{title}: quality against {curve_report.AXES[axis]}")
        curve_report.save_figure(figure, FOLDER / f"{name}_{axis}.png")


def kind_of(record: Record) -> str:
    """The method without its rate and without how its schedule is cut."""
    return rate_of(record.method)[0].partition("@")[0]


def frontier(summed: Sequence[Row], title: str) -> Figure:
    """Identity against LPIPS on five photos, a panel for each damage: every rival along its rates after 32 steps, ours
    along its steps. Up and to the left is better. The generic model's identity lies far below: a line marks its LPIPS.
    Rates above SHOWN times the usual ruin pictures and lie beyond the margin."""
    damages = [name for name in DAMAGE if any(row["degradation"] == name for row in summed)]
    figure = Figure(figsize=(3.5 + 5 * len(damages), 5), layout="constrained")
    grid = figure.subplots(1, len(damages), squeeze=False)[0]
    for axes, name in zip(grid, damages, strict=True):
        draw_frontier(axes, [row for row in summed if row["degradation"] == name])
        axes.set_title(DAMAGE[name])
    grid[0].set_ylabel(f"identity, {SCORER}")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize="small")
    figure.suptitle(title)
    return figure


def draw_frontier(axes: Axes, summed: Sequence[Row]) -> None:
    """One panel, from the rows of one damage."""
    lines: dict[str, list[tuple[float, float, float, str]]] = {}
    for row in summed:
        base, times = rate_of(row["method"])
        shown = base in (*RIVALS, "adapt", "no-rule") and row["shots"] == 5
        if shown and row["metric"] == "identity" and row["recogniser"] == SCORER:
            ours = base in ("adapt", "no-rule")
            point = {key: row[key] for key in ("method", "shots", "steps")}
            lpips = report.find(summed, metric="lpips", **point)["mean"]
            place, text = (row["steps"], f"{row['steps']}") if ours else (times, f"x{times:g}")
            lines.setdefault(base, []).append((place, lpips, row["mean"], text))
    for base, points in lines.items():
        _, x, y, texts = zip(*sorted(points), strict=True)
        bold = base == "adapt"
        axes.plot(x, y, marker="o", linewidth=2.5 if bold else 1, markersize=6 if bold else 4,
                  color="black" if bold else None, label=label_of(base))
        for point in zip(x, y, texts, strict=True):
            axes.annotate(point[2], point[:2], textcoords="offset points", xytext=(4, -9), fontsize=7)
    worst_shown = max(point[1] for points in lines.values() for point in points if point[0] <= SHOWN)
    axes.set_xlim(right=worst_shown + 0.01)
    generic = report.find(summed, method=report.BASELINE, metric="lpips")["mean"]
    axes.axvline(generic, color="black", linestyle=":", linewidth=1, label=f"LPIPS of the {label_of(report.BASELINE)}")
    axes.set_xlabel("LPIPS (lower is better)")
    axes.grid(alpha=0.3)


# --- the page -------------------------------------------------------------------------------------


def blocks() -> tuple[dict[str, str], dict[str, list[Row]], dict[str, list[Row]]]:
    """The page's tables by the name of their markers; the rows and summaries of the runs that there are."""
    rows = {name: curve_report.complete(read_run(name)) for name in RUNS if (RESULTS / f"{name}.jsonl.gz").exists()}
    summed = {name: curve_report.summary(found) for name, found in rows.items()}
    found = dict.fromkeys(("short", "goals", "adaptation", "rivals", "rates", "start", "filters", "meta", "photos",
                           "sixteen", "steps", "long", "long_hard", "strength", "scale", "scale_lfw", "london", "lfw",
                           "precision"), NOT_YET)
    for name, make in {"curve_128": of_curve, "curve_start": of_start, "curve_meta": of_meta, "curve_16": of_sixteen,
                       "curve_rates": of_rates, "curve_128_long": of_long, "curve_long_hard": of_long_hard,
                       "curve_strength": of_strength, "curve_scale": of_scale, "curve_scale_lfw": of_scale_lfw,
                       "curve_london": of_london, "curve_lfw": of_lfw, "curve_precision": of_precision}.items():
        if name in rows:
            found |= make(rows[name], summed[name])
    if "curve_128" in rows:
        found["short"] = in_short(rows, summed)
        found["goals"] = goals(*(rows.get(name, ()) for name in ("curve_128", "curve_long_hard", "curve_16",
                                                                 "curve_lfw")))
    return found, rows, summed


def read_run(name: str) -> list[Row]:
    """All rows of a run, those of methods that were added later among them. Raises DataError where nothing was measured
    twice, or differs by more than another order of sums: then nobody knows whether it was on the same photos by the
    same model."""
    rows = curve_report.read_rows(RESULTS / f"{name}.jsonl.gz")
    key_of = curve_report.key_of
    values = {key_of(row): row["value"] for row in rows}
    for path in sorted(RESULTS.glob(f"{name}+*.jsonl.gz")):
        added = curve_report.read_rows(path)
        twice = [row for row in added if key_of(row) in values]
        if not twice:
            raise DataError(f"{path}: has nothing in common with {name}.jsonl.gz; measure the generic model there, too")
        for row in twice:
            known = values[key_of(row)]
            if not isclose(row["value"], known, rel_tol=ROUNDING, abs_tol=ROUNDING):
                raise DataError(f"{path}: {key_of(row)} is {row['value']} here and {known} in {name}.jsonl.gz; measure "
                                "that one anew, too")
        new = [row for row in added if key_of(row) not in values]
        values |= {key_of(row): row["value"] for row in new}
        rows += new
    return rows


def of_curve(rows: Sequence[Row], summed: Sequence[Row]) -> dict[str, str]:
    ours = [row for row in rows if row["method"] == "adapt"]
    steps = sorted({row["steps"] for row in ours})
    tables = by_damage(summed, everybody), differences(rows, rivals_of(rows)), machines(rows)
    return {"rivals": "\n\n".join(tables), "steps": along(summed, "steps", [("adapt", 5, n) for n in steps]),
            "photos": photos(rows, summed), "adaptation": adaptation_goals(rows, summed),
            "filters": f"{after_as_many(rows, ['random-filters'])}\n\n{machines(rows)}"}


def photos(rows: Sequence[Row], summed: Sequence[Row]) -> str:
    """Ours after 32 steps on more and more photos, and against whoever was measured on a single one."""
    gains = along(summed, "photos", [("adapt", n, OURS[2]) for n in shots_of(rows, "adapt")])
    return f"{gains}\n\nOn one photo:\n\n{differences(rows, rivals_of(rows, ONE), ours=ONE)}"


def of_start(rows: Sequence[Row], summed: Sequence[Row]) -> dict[str, str]:
    """Whose the lead is: rivals from our start, ours without it, and the start alone."""
    points = dict.fromkeys((row["method"], row["shots"], row["steps"]) for row in rows)
    others = [point for point in points if rate_of(point[0])[0] in ARMS or point == ("adapt", 5, 0)]
    return {"start": f"{differences(rows, others)}\n\n{by_damage(summed, lambda row: True)}\n\n{machines(rows)}"}


def of_meta(rows: Sequence[Row], summed: Sequence[Row]) -> dict[str, str]:
    """Ours, which keeps the filters that were learned, against all that was learned with them."""
    methods = [method for method in dict.fromkeys(row["method"] for row in rows) if method.startswith("meta-")]
    return {"meta": f"{after_as_many(rows, methods)}\n\n{machines(rows)}"}


def after_as_many(rows: Sequence[Row], methods: Sequence[str]) -> str:
    """Ours minus each of these on five photos, both after as many steps."""
    damage = [name for name in DAMAGE if any(row["degradation"] == name for row in rows)]
    points = dict.fromkeys((row["method"], row["shots"], row["steps"]) for row in rows)
    theirs = sorted(point for point in points if point[0] in methods and point[1] == 5)
    return differences(rows, theirs, damage, ours=None) if theirs else NOT_YET


def of_sixteen(rows: Sequence[Row], summed: Sequence[Row]) -> dict[str, str]:
    """Ours on up to 16 photos, what each doubling brings, and ours minus whoever was measured on the most."""
    shots = shots_of(rows, "adapt")
    most = ("adapt", shots[-1], OURS[2])
    doublings = [[f"{DAMAGE[degradation]}, {metric}",
                  *(interval(gain, COMPARED[metric]) for gain in growth(rows, "adapt", metric, degradation))]
                 for degradation in ("hard", "extreme") for metric in ("identity", "psnr")]
    tables = (along(summed, "photos", [("adapt", n, OURS[2]) for n in shots]),
              table(["more photos", *(f"{a} to {b}" for a, b in zip(shots, shots[1:], strict=False))], doublings),
              differences(rows, rivals_of(rows, most), ours=most), machines(rows))
    return {"sixteen": "\n\n".join(tables)}


def of_rates(rows: Sequence[Row], summed: Sequence[Row]) -> dict[str, str]:
    everything = by_damage(summed, lambda row: True, ("hard",))
    return {"rates": "\n\n".join([everything, differences(rows, rivals_of(rows), ("hard",)), machines(rows)])}


def of_long(rows: Sequence[Row], summed: Sequence[Row]) -> dict[str, str]:
    tunes = [("finetune@n", 5, n) for n in sorted({row["steps"] for row in rows if row["method"] == "finetune@n"})]
    tables = differences(rows, [*tunes, FINETUNE]), by_damage(summed, lambda row: True, ("hard",)), machines(rows)
    return {"long": "\n\n".join(tables)}


def of_long_hard(rows: Sequence[Row], summed: Sequence[Row]) -> dict[str, str]:
    hard = ("hard",)
    tables = differences(rows, [FINETUNE], hard), by_damage(summed, lambda row: True, hard), machines(rows)
    return {"long_hard": "\n\n".join(tables)}


def of_strength(rows: Sequence[Row], summed: Sequence[Row]) -> dict[str, str]:
    dial = by_damage(summed, lambda row: row["method"] != "input")
    return {"strength": dial + "\n\n" + machines(rows)}


def of_scale(rows: Sequence[Row], summed: Sequence[Row]) -> dict[str, str]:
    return {"scale": scaled(rows, summed)}


def of_scale_lfw(rows: Sequence[Row], summed: Sequence[Row]) -> dict[str, str]:
    return {"scale_lfw": scaled(rows, summed)}


def scaled(rows: Sequence[Row], summed: Sequence[Row]) -> str:
    """Ours at larger rates, minus ours at the rule's, and minus the rivals there are."""
    ours = SCALED, *OURS[1:]
    tables = differences(rows, [OURS, *rivals_of(rows)], ours=ours), by_damage(summed, everybody), machines(rows)
    return "\n\n".join(tables)


def of_london(rows: Sequence[Row], summed: Sequence[Row]) -> dict[str, str]:
    blend = [("reference-average", 1, 0)] if any(row["method"] == "reference-average" for row in rows) else []
    tables = [differences(rows, [*rivals_of(rows, ONE), *blend], ours=ONE)]
    if any(row["method"] == SCALED for row in rows):
        others = [ONE, *rivals_of(rows, ONE), *blend]
        tables += ["Ours at eight times its rates:", differences(rows, others, ours=(SCALED, *ONE[1:]))]
    return {"london": "\n\n".join([*tables, by_damage(summed, lambda row: True), machines(rows)])}


def of_precision(rows: Sequence[Row], summed: Sequence[Row]) -> dict[str, str]:
    return {"precision": f"{differences(rows, [('adapt-float32', 5, 32)])}\n\n{machines(rows)}"}


def of_lfw(rows: Sequence[Row], summed: Sequence[Row]) -> dict[str, str]:
    tables = by_damage(summed, everybody), differences(rows, rivals_of(rows)), photos(rows, summed), machines(rows)
    return {"lfw": "\n\n".join(tables)}


def write_picture(previews: Path) -> None:
    """docs/evidence/london.jpg: the first people of the London run, unchosen, under two damages."""
    chosen = curve_report.people_shown(previews)[:PICTURED]
    lines = [[(f"{name}, {DAMAGE[damage]}" if name == "input" else name, picture)
              for name, picture in curve_report.preview_lines(person)[damage][0] if name != WRONG[0]]
             for damage in ("hard", "extreme") for person in chosen]
    with whole_file(FOLDER / "london.jpg") as temporary:
        report.contact_sheet(lines, tile=128).save(temporary, format="JPEG", quality=90)


def put_on_pages(found: dict[str, str]) -> None:
    """Every table between its markers, on whichever page has them. Raises DataError for one that has no place."""
    pages = {path: path.read_text(encoding="utf-8") for path in (PAGE, *sorted(FOLDER.glob("*.md")))}
    for name, text in found.items():
        begin, end = measure.markers(name)
        path = next((path for path, page in pages.items() if begin in page), PAGE)
        pages[path] = report.replace_between(pages[path], begin, end, text)
    for path, page in pages.items():
        write_text(path, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="print the tables; write nothing")
    parser.add_argument("--previews", type=Path, help="pictures of the London run, for docs/evidence/london.jpg")
    arguments = parser.parse_args()
    found, rows, summed = blocks()
    for name, text in found.items():
        print(f"\n## {name}\n\n{text}")
    if arguments.dry:
        return
    put_on_pages(found)
    for name, own in summed.items():
        write_text(FOLDER / f"{name}.csv", curve_report.csv_text(own))
    if "curve_128" in rows:
        report.write_json(RESULTS / "meta.json", meta_rows(rows["curve_128"], summed["curve_128"]))
    if "curve_rates" in rows:
        figure = frontier(summed["curve_rates"], "Identity and texture at other rates, five people")
        curve_report.save_figure(figure, FOLDER / "frontier.png")
    if "curve_128" in rows:
        figure = frontier(summed["curve_128"], "Identity and texture, 25 people, five photos: rivals after 32 steps at "
                                               "a multiple of their rates, ours after so many steps")
        curve_report.save_figure(figure, FOLDER / "val_frontier.png")
    for name, picture, title, axes in (
            ("curve_128", "val", "25 people of CelebA", ["shots", "steps", "seconds"]),
            ("curve_lfw", "lfw", "30 people of LFW", ["shots"]),
            ("curve_16", "val_sixteen", "21 people of CelebA, three seeds", ["shots"]),
            ("curve_128_long", "val_long", "Beside 2,000 iterations", ["steps", "seconds"])):
        if name in rows:
            write_plots(picture, rows[name], title, axes)
    if arguments.previews:
        write_picture(arguments.previews)
    print(f"written: {PAGE.relative_to(ROOT)}, {FOLDER.relative_to(ROOT)}/")


if __name__ == "__main__":
    measure.run(main)
