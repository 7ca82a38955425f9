"""`metagpen evaluate`: one configuration in, rows with intervals out; an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from metagpen.adaptation.config import AdaptConfig
from metagpen.adaptation.loop import default_recogniser
from metagpen.atomic import check_writable
from metagpen.config import Seed
from metagpen.errors import ConfigError
from metagpen.evaluate import report, tasks
from metagpen.evaluate.engine import METHOD_NAMES, Outcome, evaluate_people, methods_for, named_degradations
from metagpen.evaluate.held_out import MeasureConfig, held_out
from metagpen.evaluate.judges import network_fingerprint, say_who_is_in_losses
from metagpen.evaluate.names import CEILING
from metagpen.evaluate.records import Record, RecordFile
from metagpen.identities import People
from metagpen.lpips_files import load_lpips


class EvaluateConfig(MeasureConfig):
    """What `metagpen evaluate` measures."""

    model: str | None = Field(None, description="checkpoint or name; none: the embedded model")
    degradations: list[str] = Field(["heavy"], min_length=1,
                                    description="names of degradations; 'moderate' is BSRGAN at scale 1")
    methods: list[str] = Field(list(METHOD_NAMES), min_length=1, description="which methods to compare")
    shots: list[PositiveInt] = Field([5, 1], min_length=1,
                                     description="support photos; the most are set aside, fewer are the first of them")
    steps: int = Field(32, ge=0, description="gradient steps of adapt")
    seed: Seed = Field(0, description="fixes support, queries' damage, lenders and bootstrap")
    max_queries: int | None = Field(None, ge=2, description="at most so many queries per person; none: all")
    work_dir: str = Field("runs/evaluate", description="records and previews, for continuing an interrupted run")
    output: str | None = Field(None, description="JSON file for the rows")
    preview: int = Field(3, ge=0, description="how many restored queries per person to keep as pictures in work_dir")


@dataclass(frozen=True)
class Evaluation:
    """What a run found: rows, settings, machine, where LPIPS came from, and the folder of records and previews."""

    rows: list[report.Row]
    settings: dict[str, Any]
    machine: dict[str, Any]
    lpips: str
    folder: Path


def run_evaluate(config: EvaluateConfig) -> Evaluation:
    """Load what the config names, measure (continuing an earlier run of the same settings), summarise and write."""
    import metagpen
    from metagpen import recognise

    if config.output:
        check_writable(config.output, [config.model, *config.files()])
    model = metagpen.load(config.model or "embedded", device=config.device)
    people = load_people(config, model.size)
    if config.output:
        check_writable(config.output, [photo.path for photo in people.photos()])
    methods = methods_for(config.methods, config.shots, config.steps)
    degradations = named_degradations(config.degradations)
    recognisers = {label: recognise.load(name) for label, name in config.recognisers.items()}
    learns = any(method.photos != "none" for method in methods)
    say_who_is_in_losses(recognisers, [default_recogniser(model, AdaptConfig())] if learns else [], [model])
    lpips = load_lpips(path=config.lpips_backbone)
    settings = {**settings_of(config, model, people, recognisers), "lpips": lpips is not None}
    folder = Path(config.work_dir) / digest(settings)
    report.write_text(folder / "settings.json", json.dumps(settings, indent=1))
    store = RecordFile(folder / "records.jsonl")
    outcomes = evaluate_people(
        model, people, degradations, methods, recognisers, shots=max(config.shots), seed=config.seed,
        max_queries=config.max_queries, batch_size=config.batch_size, lpips=lpips, commit=report.commit(),
        done=store.records.keys(),
    )  # fmt: skip
    total = len(people) * sum(1 if method.name == CEILING else len(degradations) for method in methods)
    with progress_bar(config.progress, total, len(store.records)) as advance:
        for outcome in outcomes:
            store.append(outcome.record)
            if outcome.images is not None and config.preview:
                save_preview(folder, outcome, config.preview)
            advance(outcome.record)
    machine, dataset = report.machine(), Path(config.data).name
    rows = report.rows_of(store.records.values(), dataset, report.machine_line(machine), config.seed)
    found = Evaluation(rows, settings, machine, "alexnet, real backbone" if lpips else "not available", folder)
    if config.output:
        report.write_json(config.output, rows, settings=settings, machine=machine, lpips=found.lpips)
    return found


def load_people(config: EvaluateConfig, size: int) -> People:
    """The people of the config's split with photos enough for support and two sharp queries, at most `max_people`.

    size: of the model; a query must have been as large (see `tasks.draw`). Raises DataError for people or photos that
    the training saw, if the config says whom it saw.
    """
    people = held_out(config, strict=True)
    enough = tasks.measurable(people, max(config.shots), size, [config.seed], config.max_queries)
    if not enough:
        raise ConfigError(f"{config.data}: nobody has the {max(config.shots) + 2} photos that are needed, two of them "
                          f"of at least {size} px")
    return enough.select(list(enough)[: config.max_people])


# What a config may say without changing any number, or says by a path of this machine.
NOT_SETTINGS = {"model", "data", "layout", "split_file", "trained_on", "trained_parts", "work_dir", "output",
                "progress", "lpips_backbone", "recognisers", "batch_size", "preview", "max_people"}  # fmt: skip


def settings_of(config: EvaluateConfig, model: Any, people: Mapping[str, Any],
                recognisers: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides the numbers, without a path of this machine; its digest names the run's folder."""
    return {
        **config.model_dump(exclude=NOT_SETTINGS),
        "dataset": Path(config.data).name,
        "recognisers": {label: network_fingerprint(net) for label, net in recognisers.items()},
        "people": sorted(people),
        "model": model.fingerprint[:12],
        "code": code_fingerprint(),
    }


def digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


# What changes no number of a record: commands, pages, and what is made of records later.
NO_NUMBERS = ("__main__.py", "cli.py", "demo.py", "doctor.py", "check/", "evaluate/report.py",
              "evaluate/curve_report.py", "evaluate/statistics.py", "evaluate/folders.py")  # fmt: skip


def code_fingerprint() -> str:
    """Twelve hex digits of the SHA-256 over all source that can change a number: records never outlive their code."""
    digest = hashlib.sha256()
    for name, path in sorted(sources().items()):
        digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def sources() -> dict[str, Path]:
    """Every file of the package that can change a number, by its name in the package."""
    package = Path(__file__).resolve().parents[1]
    found = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    return {name: path for name, path in found.items() if not name.startswith(NO_NUMBERS)}


def preview_path(folder: Path, person: str, degradation: str, method: str, shots: int = 0) -> Path:
    """Where the strip of a person's first restored queries lies."""
    return folder / "previews" / person / f"{degradation}_{method}_{shots}.png"


def save_preview(folder: Path, outcome: Outcome, count: int) -> None:
    """The first restored queries side by side as one lossless strip."""
    record = outcome.record
    path = preview_path(folder, record.person, record.degradation, record.method, record.shots)
    save_strip(path, outcome.images, count)


def save_strip(path: Path, images: Tensor, count: int) -> None:
    """The first `count` of images [Q, 3, S, S] in [-1, 1] side by side as one lossless picture."""
    from metagpen import faces

    faces.save_photo(faces.to_pil(torch.cat(list(images[:count]), dim=-1)), path)


@contextmanager
def progress_bar(shown: bool, total: int, completed: int) -> Iterator[Callable[[Record], None]]:
    """A rich progress bar that names the person and method at hand; `advance(record)` moves it on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("evaluate", total=total, completed=completed)
        yield lambda r: bar.update(task, advance=1, description=f"{r.person}, {r.degradation}, {r.method} ({r.shots})")
