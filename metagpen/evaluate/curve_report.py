"""From the rows of a shots curve to tables (Markdown, CSV), plots (PNG, SVG) and one self-contained HTML page."""

from __future__ import annotations

import base64
import csv
import gzip
import html
import io
import json
import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from metagpen.atomic import whole_file
from metagpen.errors import DataError
from metagpen.evaluate import report
from metagpen.evaluate.records import Record
from metagpen.evaluate.statistics import Gain, mean_interval, paired_gain

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

Row = dict[str, Any]
AXES = {"shots": "photos to learn from", "steps": "gradient steps", "seconds": "seconds of learning"}
PLOTTED = ("psnr", "ssim", "lpips", "sharpness")  # below identity
TABLED = ("psnr", "ssim", "ms_ssim", "ms_ssim4", "lpips", "sharpness", "focus")
NEEDED = {
    "dataset",
    "degradation",
    "method",
    "shots",
    "steps",
    "metric",
    "recogniser",
    "identity",
    "value",
    "seed",
    "seconds",
    "commit",
    "machine",
}

KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("dataset", "degradation", "method", "metric", "identity", "model", "commit", "machine"), str),
    **dict.fromkeys(("shots", "steps", "seed", "queries"), int),
    "value": (int, float),
    "seconds": (int, float, type(None)),  # None: of what was made elsewhere
    **dict.fromkeys(("recogniser", "schedule"), (str, type(None))),
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A method at one place of a plot: mean over people with its 95 % interval."""

    x: float
    mean: float
    lo: float
    hi: float


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a .jsonl or .jsonl.gz file: one per line, or the lines of `units.jsonl` of a run that is under way.

    Raises DataError, naming file and line, for anything else, and for a number that is there twice.
    """
    path, rows = Path(path), []
    try:
        data = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:  # the last two: cut short, or damaged
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    lines = data.decode("utf-8", errors="replace").splitlines()
    if path.name.startswith("units.jsonl") and not data.endswith(b"\n"):
        lines = lines[:-1]  # the unit that a killed run was writing
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            found = entry["rows"] if "rows" in entry else [entry]
            missing = [sorted(NEEDED - set(row)) for row in found if NEEDED - set(row)]
            wrong = [name for row in found for name, kinds in KINDS.items()
                     if name in row and (not isinstance(row[name], kinds) or isinstance(row[name], bool))]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path}, line {number}: not a row of a shots curve ({error})") from None
        if missing:
            raise DataError(f"{path}, line {number}: not a row of a shots curve; it lacks {', '.join(missing[0])}")
        if wrong:
            raise DataError(f"{path}, line {number}: not a row of a shots curve; its '{wrong[0]}' is of the wrong type")
        if not all(finite(row[name]) for row in found for name in ("value", "seconds") if row.get(name) is not None):
            raise DataError(f"{path}, line {number}: not a row of a shots curve; a number is not finite")
        if strange := [name for name in (row["dataset"] for row in found) if not name or Path(name).name != name]:
            raise DataError(f"{path}, line {number}: dataset '{strange[0]}' cannot be the name of a file; rename it")
        rows += found
    if not rows:
        raise DataError(f"{path}: holds no rows; let metagpen curve finish at least one unit")
    seen: set[tuple] = set()
    for row in rows:
        key = key_of(row)
        if key in seen:
            raise DataError(f"{path}: two rows for {', '.join(map(str, key))}; runs must not be mixed")
        seen.add(key)
    if not recognisers_of(rows):
        raise DataError(f"{path}: holds no row of a recogniser, and identity leads the tables; measure with one")
    return rows


def finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond all floats
        return False


def key_of(row: Row) -> tuple[Any, ...]:
    """What a row's value is of."""
    return tuple(row[name] for name in ("dataset", *POINT, "metric", "recogniser", "identity", "seed"))


POINT = ("degradation", "method", "shots", "steps")


def records_of(rows: Iterable[Row]) -> list[Record]:
    """One record per person and point of the curve: values and seconds are means over seeds."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        groups[(row["identity"], *(row[name] for name in POINT))].append(row)
    records = []
    for key, members in groups.items():
        values: dict[str, list[float]] = defaultdict(list)
        for row in members:
            values[row["metric"] + (f":{row['recogniser']}" if row["recogniser"] else "")].append(row["value"])
        means = {name: fmean(found) for name, found in values.items()}
        queries = max(row.get("queries", 0) for row in members)
        commits = " ".join(sorted({row["commit"] for row in members}))
        records.append(Record(*key, queries, report.mean_seconds(row["seconds"] for row in members), commits, means))
    return records


def complete(rows: Iterable[Row]) -> list[Row]:
    """Rows of the people who were measured at every point, each under the seeds that have every point, so that all
    means describe the same people and draws."""
    rows, measured = list(rows), defaultdict(set)
    for row in rows:
        measured[row["identity"], row["seed"]].add(tuple(row[name] for name in POINT))
    points = set().union(*measured.values())
    kept = [row for row in rows if measured[row["identity"], row["seed"]] == points]
    if not kept:
        raise DataError("no person was measured at every point yet; let metagpen curve go on")
    return kept


def by_dataset(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["dataset"]].append(row)
    return dict(found)


def summary(rows: Sequence[Row]) -> list[Row]:
    """Means over people, gains paired against generic, intervals, who got worse (see `report.rows_of`).

    The column `schedule` says how the steps of a point are to be read (see `metagpen.evaluate.methods`).
    """
    found = []
    for dataset, own in by_dataset(rows).items():
        machines = "; ".join(sorted({row["machine"] for row in own}))
        schedules = {row["method"]: row.get("schedule") for row in own}
        seeds = " ".join(map(str, sorted({row["seed"] for row in own})))
        for row in report.rows_of(records_of(complete(own)), dataset, machines):
            found.append({**row, "schedule": schedules[row["method"]], "seed": seeds})
    return found


def versus(rows: Iterable[Row], degradation: str, ours: tuple[str, int, int], theirs: tuple[str, int, int], metric: str,
           recogniser: str | None = None) -> Gain:
    """One point of the curve against another, (method, shots, steps) each: paired by person, over those who have both.

    Raises DataError when nobody was measured at both.
    """
    found: dict[tuple[str, int, int], dict[str, float]] = {ours: {}, theirs: {}}
    key = metric + (f":{recogniser}" if recogniser else "")
    asked = [row for row in rows if row["degradation"] == degradation and row["metric"] == metric
             and row["recogniser"] == recogniser and (row["method"], row["shots"], row["steps"]) in found]
    for record in records_of(asked):
        found[record.method, record.shots, record.steps][record.person] = record.values[key]
    both = set(found[ours]) & set(found[theirs])
    if not both:
        raise DataError(f"nobody was measured at both {ours} and {theirs} under {degradation} degradation in {key}")
    return paired_gain(*({person: found[point][person] for person in both} for point in (ours, theirs)),
                       higher_is_better=metric not in report.LOWER_IS_BETTER)


def recognisers_of(rows: Iterable[Row]) -> list[str]:
    """Their labels, in the order of the rows; the first leads tables and plots."""
    return list(dict.fromkeys(row["recogniser"] for row in rows if row["recogniser"]))


# --- tables --------------------------------------------------------------------------------------


def tables(summed: Sequence[Row]) -> list[tuple[str, str]]:
    """(heading, Markdown table) of every dataset and degradation."""
    found = []
    for dataset, rows in by_dataset(summed).items():
        metrics = [metric for metric in TABLED if metric == "lpips" or any(row["metric"] == metric for row in rows)]
        for degradation in damaged((row["degradation"], row["method"]) for row in rows):
            people = rows[0]["identities"]
            heading = f"{dataset}, {degradation} degradation, {people} {'people' if people > 1 else 'person'}"
            found.append((heading, report.figures_table(rows, degradation, recognisers_of(rows), metrics)))
    return found


def sections(summed: Sequence[Row]) -> str:
    """The tables as Markdown, each under its heading."""
    return "\n\n".join(f"## {heading}\n\n{table}" for heading, table in tables(summed))


def damaged(points: Iterable[tuple[str, str]]) -> list[str]:
    """The degradations among these (degradation, method), once each; true photos in a restoration's place have none."""
    return list(dict.fromkeys(name for name, method in points if method != report.CEILING))


def csv_text(summed: Sequence[Row]) -> str:
    """The summary with a header line; all numbers in full."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(summed[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(summed)
    return stream.getvalue()


READING = """Means over people of each person's mean over their photos; in brackets the gain over the generic model,
paired by person, with its 95 % interval over people, by the bootstrap (10,000 draws), of fewer than ten people by
Student's t. *Worse*: people whose identity cosine fell below generic, and by how much for the one who lost most.
*Identity*: cosine to the true photo under each recogniser; one that says "in losses" was trained against, and flatters.
*Of ceiling*: identity over the cosine of two different true photos of a person; it flatters too, because the restored
photo has pose and light in common with its own truth. *Likeness* is like for like: the cosine to the person's *other*
true photos over that of a true photo to them. *Sharpness* is relative to the truth, *focus* needs none: a method that
wins PSNR and loses both is only blurred. Seconds are those of learning, on the machine named in the rows. LPIPS is not
available unless its real backbone was there."""

SCHEDULES = {
    "constant": "one run at constant rates, the numbers of steps are stops on the way",
    "per-run": "a run of its own, with its own cosine, for each number of steps",
    "tutorial": "stops on the way of one run under the tutorial's full-length cosine; early ones are unfinished",
    "learned": "a run for each point, with the model's learned rates",
}


def schedule_lines(summed: Sequence[Row]) -> list[str]:
    """'**per-run** (adapt, lora-4): ...' for each schedule among the rows."""
    members: dict[str, list[str]] = defaultdict(list)
    for row in summed:
        if row["schedule"] in SCHEDULES and row["method"] not in members[row["schedule"]]:
            members[row["schedule"]].append(row["method"])
    return [f"**{name}** ({', '.join(found)}): {SCHEDULES[name]}." for name, found in members.items() if found]


def markdown(summed: Sequence[Row]) -> str:
    parts = ["# Quality against photos, steps and seconds", READING]
    parts += [f"- {line}" for line in schedule_lines(summed)]
    first = summed[0]
    parts += [sections(summed), f"Commit {first['commit']}, seeds {first['seed']}, {first['machine']}."]
    return "\n\n".join(parts) + "\n"


# --- plots ---------------------------------------------------------------------------------------


def curves(records: Sequence[Record], degradation: str, key: str, axis: str) -> dict[str, list[Point]]:
    """Lines of one plot, method -> points in ascending x; a method without photos is one point at x = 0.

    axis: "shots" at each method's most steps; "steps" and "seconds" at its most photos.
    """
    groups: dict[str, dict[tuple[int, int], list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if report.shown_under(degradation, record.method, record.degradation) and key in record.values:
            groups[record.method][(record.shots, record.steps)].append(record)
    lines = {}
    for method, places in groups.items():
        most_shots, most_steps = (max(place[i] for place in places) for i in (0, 1))
        points = []
        for (shots, steps), members in sorted(places.items()):
            if (steps if axis == "shots" else shots) != (most_steps if axis == "shots" else most_shots):
                continue
            x = {"shots": shots, "steps": steps, "seconds": report.mean_seconds(one.seconds for one in members)}[axis]
            if x is None:
                continue
            interval = mean_interval({record.person: record.values[key] for record in members})
            points.append(Point(float(x), interval.mean, interval.lo, interval.hi))
        if points:
            lines[method] = sorted(points, key=lambda point: point.x)
    return lines


def plot(records: Sequence[Record], axis: str, recogniser: str | None, title: str) -> Figure:
    """A grid: a row per metric, a column per degradation; bands are 95 % over people, dashed lines know no photos."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    degradations = damaged((record.degradation, record.method) for record in records)
    names = list(dict.fromkeys(record.method for record in records))
    colours = {name: colormaps["tab20"](i % 20) for i, name in enumerate(names)}
    measured = {key for record in records for key in record.values}
    keys = ([f"identity:{recogniser}"] if recogniser else []) + [key for key in PLOTTED if key in measured]
    figure = Figure(figsize=(1.5 + 4 * len(degradations), 0.8 + 2.7 * len(keys)), layout="constrained")
    grid = figure.subplots(len(keys), len(degradations), squeeze=False)
    for i, key in enumerate(keys):
        for j, degradation in enumerate(degradations):
            axes = grid[i][j]
            for name, points in curves(records, degradation, key, axis).items():
                if not learns_from_photos(records, name):
                    axes.axhline(points[0].mean, color=colours[name], linestyle="--", linewidth=1, label=name)
                    continue
                x = [point.x for point in points]
                axes.plot(x, [p.mean for p in points], marker=".", color=colours[name], label=name)
                if len(points) > 1:
                    lo, hi = [p.lo for p in points], [p.hi for p in points]
                    axes.fill_between(x, lo, hi, color=colours[name], alpha=0.15, linewidth=0)
                else:
                    only = points[0]
                    around = [[only.mean - only.lo], [only.hi - only.mean]]
                    axes.errorbar(x, [only.mean], around, color=colours[name], capsize=3)
            if axis == "shots":
                axes.set_xscale("log", base=2)
            else:  # which begin at 0
                axes.set_xscale("symlog", **({"linthresh": 1, "base": 2} if axis == "steps" else {"linthresh": 0.1}))
                axes.set_xlim(left=0)
            if axis != "seconds":
                axes.set_xticks(sorted({getattr(record, axis) for record in records if record.shots}))
                axes.minorticks_off()
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axes.set_xlabel(AXES[axis])
            axes.set_ylabel(axis_label(key))
            axes.grid(alpha=0.3)
            if i == 0:
                axes.set_title(degradation)
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize="small")
    figure.suptitle(title)
    return figure


def learns_from_photos(records: Iterable[Record], method: str) -> bool:
    """Whether a method learns from photos at all."""
    return any(record.shots for record in records if record.method == method)


def axis_label(key: str) -> str:
    metric, _, label = key.partition(":")
    return f"{metric}, {label}" if label else report.HEADINGS.get(metric, metric)


def save_figure(figure: Figure, path: Path) -> None:
    """The same figure as PNG and SVG; the same figure gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "metagpen"}), whole_file(path.with_suffix(".svg")) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    with whole_file(path.with_suffix(".png")) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


# --- the page ------------------------------------------------------------------------------------


def write_report(rows_file: str | Path, folder: str | Path, previews: str | Path | None = None,
                 sheets_of: int = 8) -> list[Path]:
    """`metagpen curve-report`: everything from a file of rows into a folder; returns the files.

    curve.md, curve.csv; {dataset}_{shots, steps, seconds}.png and .svg; curve.html, which needs no other file.
    previews: the run's folder of pictures of people who may be shown, default `previews` beside the rows; without it
    the page has no contact sheets. sheets_of: the first so many of those people are in the page. Raises DataError for a
    file of anything else, and for pictures that are not there.
    """
    rows_file, folder = Path(rows_file), Path(folder)
    if previews is not None and not Path(previews).is_dir():
        raise DataError(f"{previews}: no such folder of pictures; leave it out for a page without contact sheets")
    rows = read_rows(rows_file)
    summed = summary(rows)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "curve.md", folder / "curve.csv"]
    report.write_text(written[0], markdown(summed))
    report.write_text(written[1], csv_text(summed))
    plots: dict[str, list[Path]] = {}
    for dataset, own in by_dataset(rows).items():
        records = records_of(complete(own))
        for axis in AXES:
            path = folder / f"{dataset}_{axis}.png"
            figure = plot(records, axis, (recognisers_of(own) or [None])[0], f"{dataset}: quality against {AXES[axis]}")
            save_figure(figure, path)
            plots.setdefault(dataset, []).append(path)
            written += [path, path.with_suffix(".svg")]
    sheets = contact_sheets(Path(previews) if previews else rows_file.parent / "previews", sheets_of)
    page = folder / "curve.html"
    report.write_text(page, html_page(summed, [path for paths in plots.values() for path in paths], sheets))
    return [*written, page]


def contact_sheets(previews: Path, people: int = 8) -> dict[str, Image.Image]:
    """From the strips of a run, a sheet for each of its first people and each degradation: a column per method, a line
    per photo."""
    return {f"{person.name}, {degradation}": report.contact_sheet(lines, tile=128)
            for person in people_shown(previews)[:people] for degradation, lines in preview_lines(person).items()}


def people_shown(previews: Path) -> list[Path]:
    """The folders of the people whose pictures a run kept, in order."""
    return sorted(folder for folder in _inside(previews, "previews") if folder.is_dir())


def preview_lines(person: Path) -> dict[str, list[list[tuple[str, Image.Image]]]]:
    """By degradation, for each photo of a person the pictures by method: input, generic, the others, truth."""
    from metagpen import faces

    strips: dict[str, dict[str, Image.Image]] = defaultdict(dict)
    for path in sorted(person.glob("*_*_0.png")):
        degradation, method = path.stem.removesuffix("_0").split("_", 1)
        strips[degradation][method] = faces.load_photo(path)
    found = {}
    for degradation, columns in strips.items():
        order = [name for name in ("input", "generic") if name in columns]
        order += [name for name in columns if name not in (*order, "truth")] + ["truth"]
        if "truth" not in columns:
            raise DataError(f"{person}: no picture of the truth under {degradation} there; let metagpen curve "
                            "finish, or move that folder away")
        size = columns["truth"].height
        found[degradation] = [
            [(name, columns[name].crop((i * size, 0, (i + 1) * size, size))) for name in order]
            for i in range(columns["truth"].width // size)
        ]
    return found


def _inside(folder: Path, name: str) -> list[Path]:
    """What lies in the folder, or in a folder of this name in it."""
    if (folder / name).is_dir():
        folder = folder / name
    return list(folder.iterdir()) if folder.is_dir() else []


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}td,th{padding:2px 8px;text-align:right;
border-bottom:1px solid #ddd;white-space:nowrap}td:first-child,th:first-child{text-align:left}img{max-width:100%}"""


def html_page(summed: Sequence[Row], plots: Sequence[Path], sheets: Mapping[str, Image.Image]) -> str:
    """One HTML file with everything inside: no script, no other file, no address."""
    body = ["<h1>Quality against photos, steps and seconds</h1>", f"<p>{emphasised(READING)}</p>"]
    body += [f"<p>{emphasised(line)}</p>" for line in schedule_lines(summed)]
    body += [f'<p><img alt="{html.escape(path.stem)}" src="{data_address(path.read_bytes())}"></p>' for path in plots]
    body += [f"<h2>{html.escape(heading)}</h2>{html_table(table)}" for heading, table in tables(summed)]
    for caption, sheet in sheets.items():
        stream = io.BytesIO()
        sheet.save(stream, "PNG")
        body.append(
            f'<h2>{html.escape(caption)}</h2><img alt="{html.escape(caption)}" src="{data_address(stream.getvalue())}">'
        )
    first = summed[0]
    facts = f"Commit {first['commit']}, seeds {first['seed']}, {first['machine']}."
    body.append(f"<p>{html.escape(facts)}</p>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Shots curve</title><style>{STYLE}</style>'
        f"<body>{''.join(body)}</body></html>\n"
    )


def emphasised(text: str) -> str:
    """HTML of a text with Markdown's *emphasis* and **strong emphasis**."""
    for mark, tag in (("**", "b"), ("*", "i")):
        parts = (html.escape(text) if mark == "**" else text).split(mark)
        text = "".join(f"<{tag}>{part}</{tag}>" if i % 2 else part for i, part in enumerate(parts))
    return text


def html_table(markdown: str) -> str:
    """A table of `report.table` as HTML."""
    header, _, *lines = (line.strip("| ").split(" | ") for line in markdown.splitlines())

    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(cells, "td") for cells in lines) + "</table>"


def data_address(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
