"""From per-person records to rows with intervals, JSON, Markdown tables and contact sheets."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from metagpen.atomic import write_text
from metagpen.errors import DataError
from metagpen.evaluate.names import BASELINE, CEILING, FOLDER, rate_of
from metagpen.evaluate.statistics import mean_interval, paired_gain

if TYPE_CHECKING:
    from PIL import Image

    from metagpen.evaluate.records import Record

Row = dict[str, Any]

ROW_KEYS = (
    "dataset",
    "degradation",
    "method",
    "shots",
    "steps",
    "metric",
    "recogniser",
    "mean",
    "lo",
    "hi",
    "gain",
    "gain_lo",
    "gain_hi",
    "worse",
    "worst",
    "fraction_of_ceiling",
    "identities",
    "queries",
    "seconds_per_identity",
    "seed",
    "commit",
    "machine",
)
LOWER_IS_BETTER = {"lpips", "deg", "person_deg"}


def rows_of(records: Iterable[Record], dataset: str, machine: str, seed: int = 0) -> list[Row]:
    """One row per degradation, method and metric: mean over people, 95 % interval, gain paired against `generic`.

    Only people measured under every method take part, so that all rows describe the same people. The fraction of the
    ceiling is mean cosine(restored, truth) over mean cosine(another true photo, truth).
    """
    groups: dict[tuple, dict[str, Record]] = defaultdict(dict)
    for record in records:
        groups[(record.degradation, record.method, record.shots, record.steps)][record.person] = record
    people = set.intersection(*(set(group) for group in groups.values())) if groups else set()
    if not people:
        raise DataError("no person was measured under every method yet; let the evaluation run to its end")

    def values(group: Mapping[str, Record], key: str) -> dict[str, float]:
        return {person: group[person].values[key] for person in people}

    ceilings = {
        key: mean_interval(values(group, key), seed).mean
        for (_, method, *_), group in groups.items()
        if method == CEILING
        for key in shared_keys(group, people)
        if key.startswith("identity")
    }
    rows = []
    for (degradation, method, shots, steps), group in groups.items():
        members = [group[person] for person in sorted(people)]
        baseline = groups.get((degradation, BASELINE, 0, 0))
        for key in shared_keys(group, people):
            metric, _, recogniser = key.partition(":")
            mean = mean_interval(values(group, key), seed)
            gain = (
                paired_gain(
                    values(group, key), values(baseline, key), seed=seed, higher_is_better=metric not in LOWER_IS_BETTER
                )
                if baseline
                else None
            )
            rows.append(
                dict(
                    dataset=dataset,
                    degradation=degradation,
                    method=method,
                    shots=shots,
                    steps=steps,
                    metric=metric,
                    recogniser=recogniser or None,
                    mean=mean.mean,
                    lo=mean.lo,
                    hi=mean.hi,
                    gain=gain and gain.mean,
                    gain_lo=gain and gain.lo,
                    gain_hi=gain and gain.hi,
                    worse=gain and gain.worse,
                    worst=gain and gain.worst,
                    fraction_of_ceiling=mean.mean / ceilings[key] if key in ceilings else None,
                    identities=len(members),
                    queries=sum(m.queries for m in members),
                    seconds_per_identity=mean_seconds(m.seconds for m in members),
                    seed=seed,
                    commit=" ".join(sorted({m.commit for m in members})),
                    machine=machine,
                )
            )
    return rows


def mean_seconds(seconds: Iterable[float | None]) -> float | None:
    """Their mean; None where one is not known."""
    known = list(seconds)
    return None if None in known else fmean(known)


def shared_keys(group: Mapping[str, Record], people: Iterable[str]) -> list[str]:
    """The metrics that everybody has: a person with a single query has none against other photos."""
    first, *others = (group[person].values for person in sorted(people))
    return [key for key in first if all(key in values for values in others)]


def shown_under(degradation: str, method: str, own: str) -> bool:
    """Whether what was measured under `own` belongs into the table of a degradation: true photos into every one."""
    return method == CEILING or own == degradation


def find(rows: Iterable[Row], **keys: Any) -> Row | None:
    """The only row with these keys, or None; several are an error in the question."""
    found = [row for row in rows if all(row[key] == value for key, value in keys.items())]
    if len(found) > 1:
        raise ValueError(f"{len(found)} rows match {keys}")
    return found[0] if found else None


def machine() -> dict[str, Any]:
    """What the figures were measured on: processor, cores, threads, memory, versions, accelerator, load."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
        if hasattr(os, "sysconf")
        else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """The same in one line, for the rows."""
    threads = f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"
    parts = [f"{facts['cpu']}, {facts['cores']} cores, {threads}, {facts['memory_gib']} GiB", f"torch {facts['torch']}"]
    return ", ".join(parts + ([facts["accelerator"]] if facts["accelerator"] else []))


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The git commit of this source tree, with '+changes' when the package differs from it; 'unknown' outside one."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:  # who only asks takes no lock, which would stay behind if it died
        command = ["git", "--no-optional-locks", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(Path(__file__).resolve()))
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: str | Path, rows: Sequence[Row], **facts: Any) -> None:
    """{"...facts": ..., "rows": [...]}; refuses NaN and infinities, which JSON does not have."""
    text = json.dumps({**facts, "rows": [_rounded(row) for row in rows]}, indent=1, allow_nan=False)
    write_text(path, text + "\n")


def _rounded(row: Row) -> Row:
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}


def table(headers: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table: first column left, the others right."""
    ruler = ["---"] + ["---:"] * (len(headers) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [headers, ruler, *lines])


LABELS = {
    "input": "degraded input",
    "generic": "generic model",
    "start": "start",
    "adapt": "adapt",
    "no-rule": "adapt at rates set by hand",
    "no-start": "adapt without the start, at rates set by hand",
    "zero": "adapt without the start",
    "wrong-start": "wrong person's photos, start",
    "wrong-adapt": "wrong person's photos, adapt",
    CEILING: "another true photo (ceiling in kind)",
    "finetune": "fine-tune, its whole schedule",
    "finetune@n": "fine-tune, its schedule cut to n steps",
    "lora-4": "LoRA on the decoder, rank 4",
    "lora-16": "LoRA on the decoder, rank 16",
    "start-lora-16": "LoRA on the decoder, rank 16, from our start",
    "latent-only": "W+ offset alone",
    "full": "every weight",
    "start-full": "every weight, from our start",
    "pivotal": "pivotal tuning",
    "null-space": "adapt in the null space",
    "adapt-float32": "adapt, its steps in float32",
    "adapt-gated": "adapt, its mixtures gated",
    "random-filters": "adapt, its mixtures of random filters",
    "strength-25": "adapt at strength 0.25",
    "strength-50": "adapt at strength 0.5",
    "strength-75": "adapt at strength 0.75",
    "wrong-person": "wrong person's photos",
    "reference-average": "blended with the mean face",
}


def label_of(method: str) -> str:
    """The method's name in tables and plots."""
    if method.startswith(FOLDER):
        return f"{method.removeprefix(FOLDER)} (restored elsewhere)"
    base, times = rate_of(method)
    return LABELS.get(base, base) + (f" at {times:g} times its rates" if times != 1 else "")


def method_label(row: Row) -> str:
    """'adapt, 5 photos, 32 steps'."""
    label = label_of(row["method"])
    if not row["shots"]:
        return label
    return f"{label}, {row['shots']} photo{'s' if row['shots'] > 1 else ''}, {row['steps']} steps"


def interval_text(mean: float, lo: float, hi: float, digits: int, unit: str = "") -> str:
    """'+0.213 [+0.180, +0.247]'."""
    return f"{mean:+.{digits}f}{unit} [{lo:+.{digits}f}, {hi:+.{digits}f}]"


def gain_text(row: Row, digits: int) -> str:
    """The gain of a row and its interval."""
    return interval_text(row["gain"], row["gain_lo"], row["gain_hi"], digits)


def with_gain(row: Row | None, digits: int) -> str:
    """'0.412 (+0.213 [+0.180, +0.247])', or a dash where the metric does not apply. More sharpness is no gain."""
    if row is None:
        return "–"
    text = f"{row['mean']:.{digits}f}"
    if row["gain"] is None or row["method"] == BASELINE or row["metric"] in ("sharpness", "focus"):
        return text
    return f"{text} ({gain_text(row, digits)})"


def percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.0f} %"


def worse_off(row: Row) -> str:
    """'3 of 25, by 0.041': how many people lost against generic, and how much the one who lost most."""
    if row["gain"] is None:
        return "–"
    return f"{row['worse']} of {row['identities']}" + (f", by {row['worst']:.3f}" if row["worse"] else "")


DIGITS = {"psnr": 2, "ssim": 3, "ms_ssim": 3, "ms_ssim4": 3, "lpips": 3, "sharpness": 2, "focus": 3}
HEADINGS = {"psnr": "PSNR dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "ms_ssim4": "MS-SSIM, 4 scales", "lpips": "LPIPS",
            "sharpness": "sharpness", "focus": "focus"}  # fmt: skip


def figures_table(
    rows: Sequence[Row],
    degradation: str,
    recognisers: Sequence[str],
    metrics: Sequence[str] = ("psnr", "ssim", "lpips", "sharpness"),
) -> str:
    """The table of one degradation: a line per method; gains against generic with 95 % intervals in brackets.

    The first recogniser also gives the fraction of the ceiling, the likeness and how many people are worse off.
    Likeness is like for like what the fraction of the ceiling is not: a restored photo, and in the ceiling a true one,
    against the person's *other* photos.
    """
    lines: dict[tuple, list[Row]] = {}
    for row in rows:
        if shown_under(degradation, row["method"], row["degradation"]):
            lines.setdefault((row["method"], row["shots"], row["steps"]), []).append(row)
    measured = {row["metric"] for row in rows}
    ceiling = find(rows, method=CEILING, metric="identity", recogniser=recognisers[0])
    identity = [f"identity, {name}" for name in recognisers]
    others = [HEADINGS[metric] for metric in metrics]
    headers = ["method", *identity, "of ceiling", "likeness", "worse", *others, "s per person"]

    def cells(line: list[Row]) -> list[str]:
        identities = [find(line, metric="identity", recogniser=name) for name in recognisers]
        first, shots = identities[0], line[0]["shots"]
        person = first if line[0]["method"] == CEILING else find(line, metric="person", recogniser=recognisers[0])
        others = [
            with_gain(find(line, metric=metric), DIGITS[metric]) if metric in measured else "not available"
            for metric in metrics
        ]
        return [
            method_label(line[0]),
            *(with_gain(row, 3) for row in identities),
            percent(first["fraction_of_ceiling"]),
            percent(person["mean"] / ceiling["mean"] if person and ceiling else None),
            worse_off(first) if shots else "–",
            *others,
            "–" if not shots or first["seconds_per_identity"] is None else f"{first['seconds_per_identity']:.1f}",
        ]

    return table(headers, [cells(line) for line in lines.values()])


def replace_between(text: str, begin: str, end: str, new: str) -> str:
    """`text` with everything between the two marker lines replaced; missing or swapped markers are an error."""
    start, stop = text.find(begin), text.find(end)
    if start < 0 or stop < start:
        raise DataError(f"the markers '{begin}' and '{end}' are needed, in this order, to know where the table goes")
    return text[: start + len(begin)] + "\n" + new.strip() + "\n" + text[stop:]


def contact_sheet(lines: Sequence[Sequence[tuple[str, Image.Image]]], tile: int = 192) -> Image.Image:
    """Labelled tiles in rows: each line is a list of (label, square image), resized to `tile` pixels."""
    from PIL import Image, ImageDraw

    caption, gap = 18, 4
    width = max(len(line) for line in lines) * (tile + gap) + gap
    sheet = Image.new("RGB", (width, len(lines) * (tile + caption + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        for j, (label, image) in enumerate(line):
            x, y = gap + j * (tile + gap), gap + i * (tile + caption + gap)
            draw.text((x + 2, y + 3), label, fill="black")
            sheet.paste(image.convert("RGB").resize((tile, tile), Image.Resampling.BICUBIC), (x, y + caption))
    return sheet
