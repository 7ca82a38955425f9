"""Quality against photos, steps and seconds: the shots curve of every method, one tidy row per measured number.

A *unit* is one person under one method, one number of photos and one seed: one run, measured at all its stops and under
all degradations. Finished units are appended to `units.jsonl`, a line each, so that a killed run loses the units it
was at and nothing else; `rows.jsonl` holds the rows of all of them in a fixed order.
"""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor

from metagpen.adaptation.config import AdaptConfig
from metagpen.adaptation.draws import album
from metagpen.atomic import check_writable, whole_file
from metagpen.config import Config, Seed
from metagpen.errors import ConfigError, DataError
from metagpen.evaluate import methods, metrics, protocol, report, tasks
from metagpen.evaluate.elsewhere import PHOTOS, Elsewhere, export
from metagpen.evaluate.engine import UNDAMAGED, Scorer, in_batches, named_degradations
from metagpen.evaluate.held_out import MeasureConfig, assert_disjoint, held_out
from metagpen.evaluate.judges import IN_LOSSES, network_fingerprint, say_who_is_in_losses
from metagpen.evaluate.methods import SCHEDULES, Rivals
from metagpen.evaluate.names import CEILING
from metagpen.evaluate.protocol import code_fingerprint
from metagpen.evaluate.records import append_line, whole_lines
from metagpen.evaluate.tasks import Degrade, Task, damage, derangement, draws_of, load_support, load_task
from metagpen.identities import People
from metagpen.lpips_files import load_lpips
from metagpen.memory import keep_freed_memory
from metagpen.model import MetaGPEN
from metagpen.recognise import Recogniser
from metagpen.recognise.recogniser import must_be_recogniser
from metagpen.workers import spread

Row = dict[str, Any]

COLUMNS = (
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
    "model",
    "commit",
    "machine",
    "threads",
    "workers",
    "schedule",
    "queries",
)
MEASURED = ("commit", "machine", "threads", "workers", "seconds")  # what may differ when a run is repeated
UNITS, ROWS, SETTINGS = "units.jsonl", "rows.jsonl", "settings.json"


class CurveSettings(Config):
    """What decides the numbers of a shots curve."""

    methods: list[str] = Field(
        [
            "input",
            "generic",
            "reference-average",
            "start",
            "adapt",
            "finetune@n",
            "lora-4",
            "lora-16",
            "latent-only",
            "full",
            "pivotal",
            "wrong-person",
        ],
        description="names of metagpen.evaluate.methods; meta-KEY: adapt with meta_models[KEY]; "
        "NAME-x4: a rival at four times its rates; folder-NAME: what another program restored (see exported)",
    )
    shots: list[int] = Field(
        [1, 2, 4, 8, 16], description="photos to learn from; the most are set aside, fewer are the first of them"
    )
    steps: list[int] = Field([0, 4, 8, 16, 32, 64], description="steps after which a method is measured")
    shots_of: dict[str, list[int]] = Field({}, description="other numbers of photos for single methods")
    steps_of: dict[str, list[int]] = Field({}, description="other numbers of steps for single methods")
    schedule: str = Field(
        "constant",
        pattern=f"^({'|'.join(SCHEDULES)})$",
        description="of methods that do not insist on one: constant rates, all stops on one run, "
        "or per-run, a run with its own cosine for every stop",
    )
    degradations: list[str] = Field(
        ["moderate", "hard", "extreme"], description="BSRGAN at scale 1, faces of 16 px, of 8 px; or others by name"
    )
    seeds: list[Seed] = Field([0], description="each fixes support, damage, lenders and the draws of learning")
    adapt: AdaptConfig = Field(AdaptConfig(), description="ours, and the losses, batch and degradations of everybody")
    rivals: Rivals = Rivals()
    max_queries: int | None = Field(None, ge=1, description="at most so many queries per person; none: all")
    min_queries: int = Field(2, ge=1, description="people with fewer sharp queries are left out")

    @field_validator("methods", "shots", "steps", "degradations", "seeds")
    @classmethod
    def _distinct(cls, values: list) -> list:
        if not values or len(set(values)) < len(values):
            raise ValueError("needs one or more different values")
        return values

    def shots_for(self, name: str) -> list[int]:
        """Numbers of photos of a method: 0 for one that needs none, or of which nothing else is said elsewhere."""
        photos = methods.by_name(name).photos
        if photos == "none":
            return [0]
        return sorted(self.shots_of.get(name, [0] if photos == methods.ELSEWHERE else self.shots))

    def stops_for(self, name: str) -> list[int]:
        """Steps after which a method is measured: 0 for one that takes none."""
        return sorted(self.steps_of.get(name, self.steps)) if methods.by_name(name).steps else [0]

    def check(self) -> CurveSettings:
        """Itself. Raises ConfigError for a method that is unknown, or numbers that nobody could measure."""
        for name in self.methods:
            shots, stops = self.shots_for(name), self.stops_for(name)
            if set(shots) - {0} - set(self.shots) or (0 in shots and methods.by_name(name).photos in ("own", "wrong")):
                raise ConfigError(f"shots_of: {name} asks for numbers of photos that are not in shots")
            for key, values in {"shots_of": shots, "steps_of": stops}.items():
                if len(set(values)) < len(values):
                    raise ConfigError(f"{key}: {name} has a number twice")
            if not shots:
                raise ConfigError(f"shots_of: {name} needs one or more numbers of photos")
            if min(stops, default=-1) < 0:
                raise ConfigError(f"steps of {name}: one or more numbers from 0 on are needed")
        if self.min_queries < 2 and CEILING in self.methods:
            raise ConfigError(f"min_queries: {CEILING} compares a person's queries, so everybody needs 2; leave either "
                              "out")
        if self.adapt.compile:
            raise ConfigError("adapt.compile: rivals take their steps as they are, and so must ours; leave it out")
        if min(self.shots) < 1:
            raise ConfigError("shots: at least 1 photo is needed to learn from")
        for name in {*self.shots_of, *self.steps_of} - set(self.methods):
            raise ConfigError(f"shots_of, steps_of: '{name}' is not among the methods")
        return self


class CurveConfig(CurveSettings, MeasureConfig):
    """`metagpen curve`: whom, by whom and where, beside what decides the numbers."""

    model: str = Field("embedded", description="checkpoint or name")
    meta_models: dict[str, str] = Field({}, description="KEY -> a model with a rule, for the method meta-KEY")
    exported: str | None = Field(None, description="folder of `metagpen curve --export`, for the methods folder-NAME")
    people: list[Annotated[str, Field(coerce_numbers_to_str=True)]] | None = Field(
        None, min_length=1, description="only these of the split, by name: a part of a run that machines share"
    )
    workers: int = Field(1, ge=1, description="processes; people are shared among them")
    threads: int | None = Field(None, ge=1, description="of torch, per process; none: all cores, shared")
    show: list[str] = Field(
        ["*/lisa", "*/london_*", "album/*"], description="patterns of dataset/person whose photos the report may show"
    )
    preview: int = Field(2, ge=0, description="how many photos of each of them to show")
    work_dir: str = Field("runs/curve", description="a folder per combination of settings; a run continues in its own")
    output: str | None = Field(None, description="a further copy of the finished rows (.jsonl or .jsonl.gz)")


class Unit(NamedTuple):
    """One run: a person, a method, a number of photos, a seed."""

    seed: int
    person: str
    method: str
    shots: int


@dataclass
class Case:
    """One person under one seed, loaded: photos, damaged queries by degradation, scorer, and the lender's photos."""

    task: Task
    inputs: dict[str, Tensor]
    score: Scorer
    lent: Tensor | None


@dataclass
class Bench:
    """Everything that measuring a unit needs. models: "" is the model, KEY that of the method meta-KEY. elsewhere:
    where the pictures of the methods folder-NAME lie, pictures: what these are known by.

    facts: columns that are the same in every row. A previews folder gets pictures of people who may be shown.
    """

    models: dict[str, MetaGPEN]
    losses: dict[str, Recogniser | None]
    people: People
    degradations: dict[str, Degrade]
    recognisers: Mapping[str, metrics.Embedder]
    settings: CurveSettings
    facts: dict[str, Any]
    lpips: torch.nn.Module | None = None
    batch_size: int = 16
    previews: Path | None = None
    preview: int = 2
    show: Sequence[str] = ()
    elsewhere: Elsewhere | None = None
    pictures: Mapping[str, str] = field(default_factory=dict)
    _case: tuple[Any, Case | None] = field(default=(None, None), repr=False)

    def units(self) -> list[Unit]:
        """All runs, a person's together, in a fixed order."""
        return [
            Unit(seed, person, name, shots)
            for seed in self.settings.seeds
            for person in sorted(self.people)
            for name in self.settings.methods
            for shots in self.settings.shots_for(name)
        ]

    def cost(self, unit: Unit) -> int:
        """About how long a unit takes, in steps: for the time left."""
        stops = self.settings.stops_for(unit.method)
        return 4 * len(stops) + (sum(stops) if self.schedule(unit.method) in (methods.PER_RUN, methods.LEARNED)
                                else stops[-1])

    def model(self, name: str) -> tuple[MetaGPEN, Recogniser | None]:
        """The model that a method works on, and the recogniser in its losses."""
        key = name.removeprefix("meta-") if name.startswith("meta-") else ""
        if key not in self.models:
            raise ConfigError(f"method {name}: no model under meta_models.{key}")
        if key and self.models[key].rule is None:
            raise ConfigError(f"method {name}: meta_models.{key} has no rule; metagpen meta-train makes one")
        return self.models[key], self.losses[key]

    def schedule(self, name: str) -> str:
        """The schedule of a method; "none" for one without steps."""
        chosen = methods.by_name(name)
        return chosen.schedule_of(self.model(name)[0], self.settings.schedule) if chosen.steps else "none"

    def case(self, seed: int, person: str) -> Case:
        """The loaded person; the last one is kept."""
        if self._case[0] != (seed, person):
            size, settings = self.models[""].size, self.settings
            task = load_task(
                self.people, person, max(settings.shots), size, seed, settings.max_queries, settings.min_queries
            )
            inputs = {name: damage(task, name, degrade, seed) for name, degrade in self.degradations.items()}
            lent = None
            if any(methods.by_name(name).photos == "wrong" for name in settings.methods):
                lender = derangement(list(self.people), seed)[person]
                lent = load_support(self.people, lender, max(settings.shots), size, seed)
            self._case = (seed, person), Case(task, inputs, Scorer(task, self.recognisers, self.lpips), lent)
        return self._case[1]

    def measure(self, unit: Unit) -> list[Row]:
        """Rows of one run, at every stop and under every degradation."""
        case, chosen, name = self.case(unit.seed, unit.person), methods.by_name(unit.method), unit.method
        if chosen.photos == methods.ELSEWHERE:
            return self.measure_elsewhere(unit, case)
        (model, recogniser), stops, schedule = self.model(name), self.settings.stops_for(name), self.schedule(name)
        photos = {"none": case.task.support, "own": case.task.support, "wrong": case.lent}[chosen.photos]
        own = album(list(photos[: unit.shots or None]), model.size, model.device)
        config = self.settings.adapt.model_copy(update={"seed": draws_of(unit.person, unit.seed)})
        lesson = methods.Lesson(model, own, config, self.settings.rivals, recogniser, chosen.rate or 1.0,
                                self.facts["workers"])
        if name == CEILING:
            return self.rows(unit, UNDAMAGED, 0, 0.0, case.score.ceiling(), len(case.task.queries))
        rows = []
        for point in methods.checkpoints(chosen, lesson, stops, schedule):
            for degradation, poor in case.inputs.items():
                # a run that diverged restores a grey picture, and is scored as one
                images = in_batches(point.restore, poor, self.batch_size).nan_to_num(0.0)
                if point.steps == stops[-1]:
                    self.picture(unit, degradation, case.task, images)
                rows += self.rows(unit, degradation, point.steps, point.seconds, case.score(images), len(images))
        return rows

    def measure_elsewhere(self, unit: Unit, case: Case) -> list[Row]:
        """Rows of what another program restored; nobody knows in how many seconds."""
        if unit.shots:
            self.elsewhere.must_be(unit.seed, unit.person, PHOTOS, case.task.support)
        rows = []
        for degradation, poor in case.inputs.items():
            images = self.elsewhere.restored(unit.method, unit.shots, unit.seed, unit.person, degradation, poor)
            self.picture(unit, degradation, case.task, images)
            rows += self.rows(unit, degradation, 0, None, case.score(images), len(images))
        return rows

    def rows(self, unit: Unit, degradation: str, steps: int, seconds: float | None, values: Mapping[str, float],
             queries: int) -> list[Row]:
        """A row for every metric of one point."""
        rows = []
        for key, value in values.items():
            metric, _, label = key.partition(":")
            row = {
                **self.facts,
                "degradation": degradation,
                "method": unit.method,
                "shots": unit.shots,
                "steps": steps,
                "metric": metric,
                "recogniser": label or None,
                "identity": unit.person,
                "value": value,
                "seed": unit.seed,
                "seconds": seconds,
                "model": self.pictures.get(unit.method) or self.model(unit.method)[0].fingerprint[:12],
                "threads": torch.get_num_threads(),
                "schedule": self.schedule(unit.method),
                "queries": queries,
            }
            rows.append({column: row[column] for column in COLUMNS})
        return rows

    def picture(self, unit: Unit, degradation: str, task: Task, images: Tensor) -> None:
        """Keeps the first restored photos of people who may be shown, under the first seed, of the most photos."""
        named = f"{self.facts['dataset']}/{unit.person}"
        if self.previews is None or not self.preview or unit.seed != self.settings.seeds[0]:
            return
        if unit.shots != max(self.settings.shots_for(unit.method)):
            return
        if any(fnmatch(named, pattern) for pattern in self.show):
            for name, what in ((unit.method, images), ("truth", task.queries)):
                path = protocol.preview_path(self.previews, unit.person, degradation, name, 0)
                protocol.save_strip(path, what, self.preview)


def shots_curve(
    model: MetaGPEN,
    dataset: People | str | Path,
    *,
    settings: CurveSettings | None = None,
    recognisers: Mapping[str, metrics.Embedder] | None = None,
    recogniser: Recogniser | None = None,
    meta_models: Mapping[str, MetaGPEN] | None = None,
    trained: People | None = None,
    folder: str | Path | None = None,
    workers: int = 1,
    threads: int | None = None,
    progress: bool = False,
    lpips: torch.nn.Module | None = None,
    batch_size: int = 16,
    preview: int = 2,
    show: Sequence[str] = (),
    exported: str | Path | None = None,
    **changes: Any,
) -> list[Row]:
    """Measure methods at numbers of photos and steps on held-out people: one row (`COLUMNS`) per number.

    dataset: `People`, or a folder with a sub-folder per person. settings, and single `changes` to them: methods,
    shots, steps, degradations, seeds, ... (see `CurveSettings`). recognisers: label -> scorer, default the embedded
    one; a scorer that is also in the losses must have "in losses" in its label. recogniser: of start and losses,
    default each model's own. meta_models: for the methods meta-KEY. trained: people of the training; a person or a
    photo (by SHA-256) in both is an error. exported: the folder of the methods folder-NAME (see
    `metagpen.evaluate.elsewhere`). folder: where to keep units, so that a killed run continues, and pictures
    of people whom `show` allows; none: nothing is written. workers: processes; with more than one, scripts need the
    usual `if __name__ == "__main__"`. threads: of torch in each process. The numbers do not depend on workers, nor on
    the order of people; for equal threads on one machine they are equal to the bit.

    Raises ConfigError for impossible settings or a folder of another run, DataError for people who cannot be measured.
    """
    for name, value in {"workers": workers, "threads": threads, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value}: at least 1 is needed")
    for scorer in (recogniser, *(recognisers or {}).values()):
        must_be_recogniser(scorer)
    if settings is not None and not isinstance(settings, CurveSettings):
        raise ConfigError(f"settings: CurveSettings are needed, not {type(settings).__name__}")
    people = dataset if isinstance(dataset, People) else People.from_folder(dataset)
    given = (settings or CurveSettings()).model_dump(include=set(CurveSettings.model_fields))
    settings = CurveSettings.from_dict({**given, **changes}, source="shots_curve").check()
    if trained is not None:
        assert_disjoint(people, trained)
    people = measurable(people, settings, model.size)
    models = {"": model, **(meta_models or {})}
    losses = {key: recogniser or methods.recogniser_of(one, settings.adapt) for key, one in models.items()}
    scorers = recognisers if recognisers is not None else {f"embedded ({IN_LOSSES})": embedded()}
    say_who_is_in_losses(scorers, losses.values(), models.values())
    for key, one in models.items():
        if one.size != model.size:
            raise ConfigError(f"meta_models.{key}: works at {one.size} px, the model at {model.size}; sizes must agree")
    with threads_of(threads, workers):
        machine = report.machine_line(report.machine())
    facts = {
        "dataset": people.set_name or "people",
        "commit": report.commit(),
        "workers": workers,
        "machine": machine,
    }
    bench = Bench(
        models,
        losses,
        people,
        named_degradations(settings.degradations),
        scorers,
        settings,
        facts,
        lpips,
        batch_size,
        Path(folder) if folder else None,
        preview,
        show,
        *opened_elsewhere(exported, settings.methods),
    )
    for name in settings.methods:
        bench.model(name)  # so that a missing one is said before the first hour, not after
    for unit in bench.units():
        if unit.method in bench.pictures:
            bench.elsewhere.check(unit.method, unit.shots, unit.seed, unit.person, settings.degradations)
    deciding = settings_of(settings, people, models, scorers, lpips, bench.pictures,
                           losses={key: net and network_fingerprint(net) for key, net in losses.items()})
    store = UnitFile(folder, deciding) if folder else {}
    todo = [unit for unit in bench.units() if unit not in store]
    total = sum(map(bench.cost, bench.units()))
    try:
        with progress_bar(progress, total, total - sum(map(bench.cost, todo))) as advance, threads_of(threads, workers):
            for unit, rows in run_units(bench, todo, workers):
                store[unit] = rows
                advance(unit, bench.cost(unit))
    finally:
        rows = [row for unit in bench.units() if unit in store for row in store[unit]]
        if folder:
            write_rows(Path(folder) / ROWS, rows)
    return rows


def run_curve(config: CurveConfig) -> tuple[list[Row], Path]:
    """`metagpen curve`: load what the config names and measure it; the rows, and the folder that holds them."""
    import metagpen
    from metagpen import recognise

    config.check()
    if config.output:
        check_writable(config.output, [config.model, *config.meta_models.values(), *config.files()])
    model = metagpen.load(config.model, device=config.device)
    others = {key: metagpen.load(path, device=config.device) for key, path in config.meta_models.items()}
    people = people_of(config)
    if config.output:
        check_writable(config.output, [photo.path for photo in people.photos()])
    scorers = {label: recognise.load(name) for label, name in config.recognisers.items()}
    lpips = load_lpips(path=config.lpips_backbone)
    settings = CurveSettings(**config.model_dump(include=set(CurveSettings.model_fields)))
    _, pictures = opened_elsewhere(config.exported, settings.methods)
    facts = settings_of(settings, people, {"": model, **others}, scorers, lpips, pictures,
                        device=torch.device(config.device).type)
    folder = Path(config.work_dir) / protocol.digest(facts)
    rows = shots_curve(
        model,
        people,
        settings=settings,
        recognisers=scorers,
        meta_models=others,
        folder=folder,
        workers=config.workers,
        threads=config.threads,
        progress=config.progress,
        lpips=lpips,
        batch_size=config.batch_size,
        preview=config.preview,
        show=config.show,
        exported=config.exported,
    )
    if config.output:
        write_rows(config.output, rows)
    return rows, folder


def opened_elsewhere(exported: str | Path | None, names: Iterable[str]) -> tuple[Elsewhere | None, dict[str, str]]:
    """The folder of what other programs restored, and what their pictures are known by, where methods ask for it."""
    wanted = [name for name in names if methods.by_name(name).photos == methods.ELSEWHERE]
    if not wanted:
        return None, {}
    if exported is None:
        raise ConfigError(f"method {wanted[0]}: exported must name the folder that metagpen curve --export made")
    elsewhere = Elsewhere.open(exported)
    return elsewhere, {name: elsewhere.digest(name) for name in wanted}


def export_curve(config: CurveConfig, folder: str | Path) -> int:
    """`metagpen curve --export`: what the config would measure, as pictures for other programs (the layout is that of
    `metagpen.evaluate.elsewhere`); the number of damaged pictures. Raises DataError for a folder with something in it.
    """
    import metagpen

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: is there already and not empty; give another folder")
    config.check()
    size, people = metagpen.load(config.model).size, people_of(config)
    people = measurable(people, config, size)
    shots = max(config.shots)
    each = ((seed, load_task(people, person, shots, size, seed, config.max_queries, config.min_queries))
            for seed in config.seeds for person in sorted(people))
    return export(folder, each, named_degradations(config.degradations), {
        "dataset": people.set_name or "people", "size": size, "shots": shots, "seeds": config.seeds,
        "degradations": config.degradations, "code": code_fingerprint()})


# --- who is measured -----------------------------------------------------------------------------


def people_of(config: CurveConfig) -> People:
    """Those of the config's split whom it names, at most `max_people`. Raises DataError for people or photos that the
    training saw, if the config says whom it saw."""
    people = held_out(config, strict=False)
    return people.select((config.people or list(people))[: config.max_people])


def measurable(people: People, settings: CurveSettings, size: int) -> People:
    """Those with photos enough for the largest support and the queries under every seed. DataError for nobody."""

    shots = max(settings.shots)
    kept = tasks.measurable(people, shots, size, settings.seeds, settings.max_queries, settings.min_queries)
    if not kept:
        raise DataError(
            f"nobody in {people} has {shots} photos to learn from and {settings.min_queries} "
            f"more of at least {size} px; lower shots or min_queries"
        )
    return kept


def embedded() -> Recogniser:
    from metagpen import recognise

    return recognise.load("embedded")


# --- running -------------------------------------------------------------------------------------


def run_units(bench: Bench, todo: Sequence[Unit], workers: int) -> Iterator[tuple[Unit, list[Row]]]:
    """Units as they are done: here, in order, or by worker processes, in the order in which they finish; each of them
    with as many threads as torch has here."""
    if workers == 1 or not todo:
        yield from ((unit, bench.measure(unit)) for unit in todo)
        return
    yield from spread(measure_in_worker, todo, workers, prepare_worker, pickled(bench), torch.get_num_threads())


def pickled(bench: Bench) -> bytes:
    try:
        return pickle.dumps(bench)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(f"workers: this cannot be sent to another process ({error}); use workers=1") from error


_worker: Bench | None = None


def prepare_worker(bench: bytes, threads: int) -> None:
    global _worker
    keep_freed_memory()  # the process is ours
    torch.set_num_threads(threads)
    _worker = pickle.loads(bench)


def measure_in_worker(unit: Unit) -> list[Row]:
    return _worker.measure(unit)


@contextmanager
def threads_of(threads: int | None, workers: int) -> Iterator[None]:
    """Torch's threads while units run: as told, or with several workers each its share of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or (before if workers == 1 else max(1, before // workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def progress_bar(shown: bool, total: int, completed: int) -> Iterator[Callable[[Unit, int], None]]:
    """A bar over gradient steps with the time left; `advance(unit, cost)` moves it on."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("curve", total=total, completed=completed)
        yield lambda u, cost: bar.update(task, advance=cost, description=f"{u.person}, {u.method}, {u.shots} photos")


# --- files ---------------------------------------------------------------------------------------


class UnitFile(dict[Unit, list[Row]]):
    """Rows of finished units, kept in a folder as JSON Lines: setting a unit appends its line, whole or not at all.

    Raises ConfigError when the folder holds units of other settings.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        super().__init__()
        folder = Path(folder)
        self.path, known, settings = folder / UNITS, folder / SETTINGS, json.loads(json.dumps(settings))
        if known.exists():
            try:
                before = dict(json.loads(known.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise DataError(f"{known}: damaged ({error}); move {folder} away to measure again") from None
            different = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
            if different:
                raise ConfigError(
                    f"{folder}: holds a run of other settings ({', '.join(different)}); give another folder"
                )
        else:
            report.write_text(known, json.dumps(settings, indent=1))
        for number, line in enumerate(whole_lines(self.path), start=1):
            try:
                entry = json.loads(line)
                super().__setitem__(Unit(*entry["unit"]), entry["rows"])
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{self.path}, line {number}: damaged ({error}); delete the line, and its unit is "
                                "measured again") from None

    def __setitem__(self, unit: Unit, rows: list[Row]) -> None:
        append_line(self.path, json.dumps({"unit": list(unit), "rows": rows}, allow_nan=False))
        super().__setitem__(unit, rows)


def settings_of(settings: CurveSettings, people: People, models: Mapping[str, MetaGPEN],
                recognisers: Mapping[str, metrics.Embedder], lpips: torch.nn.Module | None,
                pictures: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """Everything that decides the numbers, without a path of this machine."""
    return {
        **settings.model_dump(),
        "dataset": people.set_name or "people",
        "people": sorted(people),
        "models": {key: model.fingerprint[:12] for key, model in models.items()},
        "recognisers": {label: network_fingerprint(net) for label, net in recognisers.items()},
        "lpips": lpips is not None,
        "pictures": dict(pictures),
        "code": code_fingerprint(),
        **more,
    }


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """JSON Lines, whole or not at all, compressed where the name ends in .gz (the same rows give the same bytes);
    refuses NaN and infinities."""
    data = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode("utf-8")
    with whole_file(path) as temporary:
        temporary.write_bytes(gzip.compress(data, mtime=0) if Path(path).suffix == ".gz" else data)
