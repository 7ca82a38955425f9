"""The comparison itself: which methods, on which people, scored how. One generator yields every outcome."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metagpen.errors import ConfigError
from metagpen.evaluate import metrics, report
from metagpen.evaluate.judges import say_who_is_in_losses
from metagpen.evaluate.names import CEILING
from metagpen.evaluate.records import Record
from metagpen.evaluate.tasks import Degrade, Task, damage, derangement, draws_of, load_support, load_task
from metagpen.identities import People


@dataclass(frozen=True)
class Method:
    """What is compared: whose photos are used (`own`, `wrong` or `none`), how many, and for how many steps."""

    name: str
    photos: str = "none"
    shots: int = 0
    steps: int = 0
    start: bool = True


UNDAMAGED = "none"
METHOD_NAMES = ("input", "generic", "start", "adapt", "zero", "wrong-start", "wrong-adapt", CEILING)


def methods_for(names: Sequence[str], shots: Sequence[int], steps: int) -> list[Method]:
    """The methods of these names: the start once per number of shots, everything that takes steps with the most.

    input: the degraded photo itself. generic: the model without a person. start: the identity-conditioned
    start, no steps. adapt: the start and `steps` steps. zero: `steps` steps without the start. wrong-start,
    wrong-adapt: with another person's photos. other-photo: another true photo of the person, the ceiling in
    kind of identity.
    """
    unknown = sorted(set(names) - set(METHOD_NAMES))
    if unknown:
        raise ConfigError(f"unknown method {', '.join(unknown)}; choose from {', '.join(METHOD_NAMES)}")
    descending = sorted(set(shots), reverse=True)
    table = {
        "input": [Method("input")],
        "generic": [Method("generic")],
        "start": [Method("start", "own", k, 0) for k in descending],
        "adapt": [Method("adapt", "own", descending[0], steps)],
        "zero": [Method("zero", "own", descending[0], steps, start=False)],
        "wrong-start": [Method("wrong-start", "wrong", descending[0], 0)],
        "wrong-adapt": [Method("wrong-adapt", "wrong", descending[0], steps)],
        CEILING: [Method(CEILING)],
    }
    return [method for name in names for method in table[name]]


@dataclass(frozen=True)
class Outcome:
    """A record and the images behind it, [Q, 3, S, S] in [-1, 1] (None for the ceiling)."""

    record: Record
    images: Tensor | None


@torch.no_grad()
def in_batches(restore: Callable[[Tensor], Tensor], images: Tensor, batch_size: int) -> Tensor:
    """`restore` over chunks of at most `batch_size` images, the result on the CPU and clamped to [-1, 1]."""
    return torch.cat([restore(chunk).float().clamp(-1, 1).cpu() for chunk in images.split(batch_size)])


class Scorer:
    """All metrics against one person's truths, whose embeddings are computed once."""

    def __init__(self, task: Task, recognisers: Mapping[str, metrics.Embedder], lpips: torch.nn.Module | None):
        self.task, self.recognisers, self.lpips = task, recognisers, lpips
        self.truth = {name: metrics.embeddings(net, task.queries, task.landmarks) for name, net in recognisers.items()}

    def __call__(self, images: Tensor) -> dict[str, float]:
        """Means over the queries of every metric of restored images [Q, 3, S, S].

        identity: against the true photo itself; person: against each *other* true query of the person, so that it
        asks for who it is and not for this photo; absent with a single query.
        """
        truth = self.task.queries
        values = {
            "psnr": metrics.psnr(images, truth),
            "ssim": metrics.ssim(images, truth),
            "sharpness": metrics.sharpness(images, truth),
            "focus": metrics.focus(images),
        }
        if name := metrics.ms_ssim_name(truth.shape[-1]):
            values[name] = metrics.ms_ssim(images, truth)
        if (distance := metrics.lpips(self.lpips, images, truth)) is not None:
            values["lpips"] = distance
        for name, net in self.recognisers.items():
            embedded = metrics.embeddings(net, images, self.task.landmarks)
            cosines = metrics.cosine(embedded, self.truth[name])
            values |= {f"identity:{name}": cosines, f"deg:{name}": metrics.degrees(cosines)}
            if len(truth) > 1:
                others = off_diagonal(embedded @ self.truth[name].T)
                values |= {f"person:{name}": others, f"person_deg:{name}": metrics.degrees(others)}
        return {key: value.double().mean().item() for key, value in values.items()}

    def ceiling(self) -> dict[str, float]:
        """Another true photo in the restoration's place: the mean over all ordered pairs of different queries; {} for a
        single query."""
        values = {}
        if len(self.task.queries) < 2:
            return values
        for name, truth in self.truth.items():
            cosines = off_diagonal(truth @ truth.T)
            values |= {
                f"identity:{name}": cosines.double().mean().item(),
                f"deg:{name}": metrics.degrees(cosines).double().mean().item(),
            }
        return values


def off_diagonal(square: Tensor) -> Tensor:
    """The entries [Q·(Q - 1)] of a square [Q, Q] that compare two different photos."""
    return square[~torch.eye(len(square), dtype=torch.bool)]


def personalise(
    model: Any, method: Method, support: Tensor | None, seed: int, adapt: Callable
) -> tuple[Callable[[Tensor], Tensor], float]:
    """The method's restorer [B, 3, S, S] -> [B, 3, S, S], and the seconds that `adapt` took."""
    if method.name == "input":
        return lambda images: images, 0.0
    if method.photos == "none":
        return model.restore, 0.0
    began = time.perf_counter()
    person = adapt(model, list(support), steps=method.steps, seed=seed, start=method.start)
    return person.restore_batch, time.perf_counter() - began


def evaluate_people(
    model: Any,
    people: People,
    degradations: Mapping[str, Degrade],
    methods: Sequence[Method],
    recognisers: Mapping[str, metrics.Embedder],
    *,
    shots: int = 5,
    seed: int = 0,
    max_queries: int | None = None,
    batch_size: int = 16,
    lpips: torch.nn.Module | None = None,
    adapt: Callable | None = None,
    commit: str = "",
    done: Container[tuple] = (),
) -> Iterator[Outcome]:
    """Measure every person under every method and degradation; yields each outcome as soon as it is known.

    model: needs `size`, `restore` ([B, 3, S, S] -> the same) and whatever `adapt` (default: metagpen.adapt) takes.
    shots: how many photos are set aside as support; methods with fewer shots use the first of them.
    done: record keys (`Record.key`) that are known already and are skipped, so that an interrupted run can go on.
    A person is adapted once per method, whatever the number of degradations.
    """
    if adapt is None and any(method.photos != "none" for method in methods):
        from metagpen.adaptation import adapt
    lenders = derangement(list(people), seed) if any(method.photos == "wrong" for method in methods) else {}
    for person in people:
        todo = {method: _missing(person, method, degradations, done) for method in methods}
        if not any(todo.values()):
            continue
        task = load_task(people, person, shots, model.size, seed, max_queries)
        inputs = {name: damage(task, name, degrade, seed) for name, degrade in degradations.items()}
        score = Scorer(task, recognisers, lpips)
        for method in [method for method in methods if todo[method]]:
            if method.name == CEILING:
                yield Outcome(_record(task, UNDAMAGED, method, score.ceiling(), 0.0, commit), None)
                continue
            support = task.support
            if method.photos == "wrong":
                support = load_support(people, lenders[person], shots, model.size, seed)
            own_seed = draws_of(person, seed)
            restore, seconds = personalise(model, method, support[: method.shots], own_seed, adapt)
            for name in todo[method]:
                images = in_batches(restore, inputs[name], batch_size)
                yield Outcome(_record(task, name, method, score(images), seconds, commit), images)


def _missing(person: str, method: Method, degradations: Iterable[str], done: Container[tuple]) -> list[str]:
    """The degradations under which this person and method are not measured yet; true photos are not degraded."""
    names = [UNDAMAGED] if method.name == CEILING else degradations
    return [name for name in names if (person, name, method.name, method.shots, method.steps) not in done]


def _record(task: Task, degradation: str, method: Method, values: dict, seconds: float, commit: str) -> Record:
    identity = (task.person, degradation, method.name, method.shots, method.steps)
    return Record(*identity, queries=len(task.queries), seconds=seconds, commit=commit, values=values)


def evaluate(
    model: Any,
    people: People,
    degradation: str | Mapping[str, Degrade] = "heavy",
    shots: Sequence[int] = (5, 1),
    methods: Sequence[str] = METHOD_NAMES,
    *,
    steps: int = 32,
    recognisers: Mapping[str, metrics.Embedder],
    dataset: str = "",
    seed: int = 0,
    **options: Any,
) -> list[report.Row]:
    """Measure and summarise in one call: rows with means, paired gains and bootstrap intervals (see report.rows_of).

    degradation: a name of `metagpen.degrade.by_name`, or a mapping name -> degradation. Other options as in
    `evaluate_people`. Raises ConfigError for a recogniser that trained the model, by its card, and does not say so.
    """
    say_who_is_in_losses(recognisers, [], [model])
    degradations = named_degradations([degradation]) if isinstance(degradation, str) else degradation
    chosen, commit = methods_for(methods, shots, steps), options.pop("commit", None) or report.commit()
    outcomes = evaluate_people(
        model, people, degradations, chosen, recognisers, shots=max(shots), seed=seed, commit=commit, **options
    )
    machine = report.machine_line(report.machine())
    return report.rows_of([outcome.record for outcome in outcomes], dataset=dataset, seed=seed, machine=machine)


def named_degradations(names: Sequence[str]) -> dict[str, Degrade]:
    """Degradations by name, as `degrade.by_name` knows them."""
    from metagpen import degrade

    return {name: degrade.by_name(name) for name in names}
