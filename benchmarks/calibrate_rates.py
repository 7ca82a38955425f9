"""Set how far a rule steps, on people whom the base never saw.

A rule that was learned on the people of the base's training has small rates: base and start know these people, further
steps gain no identity on them (`--split train` shows it), and on new people a run of 32 steps ends below one of 8. How
the rates of tensors compare is kept; what all of them are multiplied with is measured instead, in runs of T steps,
which the rule is for, and of 4 T. Each of `SHORT` and `LONG` is tried, and the one is kept under which the outer loss's
weights of identity and LPIPS like the restored photos best (heavy damage; identity by the recogniser of the losses,
never by the one that scores). The rule's exponent joins the two. These few people are of those kept back from base
and recogniser; nobody of the evaluation is looked at.

    python benchmarks/calibrate_rates.py runs/meta_128/ema.safetensors -o runs/meta_128/calibrated.safetensors
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import NamedTuple

import measure
import torch
from calibrate_gate import LOSSES, SHOTS, people_of
from rich.console import Console
from rich.table import Table

from metagpen import recognise
from metagpen.errors import ConfigError
from metagpen.evaluate.engine import evaluate_people, methods_for, named_degradations
from metagpen.identities import People
from metagpen.lpips_files import load_lpips
from metagpen.memory import keep_freed_memory
from metagpen.model import MetaGPEN
from metagpen.workers import spread

SHORT, LONG = (0.25, 0.5, 1.0, 2.0), (0.125, 0.25, 0.5, 1.0)
TIMES = 4  # LONG is of runs so many times as long
IDENTITY, LPIPS = 0.6, 1.2  # as configs/meta_128.yml weighs them


class Job(NamedTuple):
    """All rates of T steps times `factor`, in runs of `steps`."""

    steps: int
    factor: float


class Found(NamedTuple):
    """Means over people of the adapted model's figures, heavy damage."""

    identity: float
    lpips: float
    psnr: float

    @property
    def value(self) -> float:
        return IDENTITY * self.identity - LPIPS * self.lpips


def stepping(model: MetaGPEN, factor: float, exponent: float = 0.0) -> MetaGPEN:
    """The model, its rule's rates times `factor` in runs of T steps, and in runs of n times (T/n)^exponent."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for own in model.rule.log_rates.values():
            own.add_(math.log(factor))
        model.rule.shrink.fill_(exponent)
    return model


def exponent_between(short: float, long: float) -> float:
    """The exponent s with short · (1 / TIMES)^s = long."""
    return math.log(short / long) / math.log(TIMES)


class Measurer:
    """What a worker needs."""

    def __init__(self, path: Path, people: People, queries: int):
        self.model, self.people, self.queries = MetaGPEN.from_file(path).frozen(), people, queries
        self.recogniser, self.lpips = recognise.load(str(LOSSES)), load_lpips()
        if self.lpips is None:
            raise ConfigError("LPIPS is needed, and its backbone is not installed: make setup-lpips")

    def __call__(self, job: Job) -> Found:
        outcomes = evaluate_people(
            stepping(self.model, job.factor), self.people, named_degradations(["heavy"]),
            methods_for(["adapt"], [SHOTS], job.steps), {"losses": self.recogniser}, shots=SHOTS,
            max_queries=self.queries, lpips=self.lpips)
        values = [outcome.record.values for outcome in outcomes]
        return Found(*(sum(own[key] for own in values) / len(values) for key in ("identity:losses", "lpips", "psnr")))


_measurer: Measurer | None = None


def prepare(*arguments: object) -> None:
    global _measurer
    keep_freed_memory()
    torch.set_num_threads(1)
    _measurer = Measurer(*arguments)


def measured(job: Job) -> Found:
    return _measurer(job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--split", default="kept")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--queries", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2, help="processes, a thread each")
    arguments = parser.parse_args()
    console = Console()
    model = MetaGPEN.from_file(arguments.model).frozen()
    if model.rule is None:
        raise ConfigError(f"{arguments.model}: this model has no rule; metagpen meta-train makes one")
    people = people_of(arguments.split, model.size, arguments.people, arguments.queries)
    steps = model.rule.config.steps
    jobs = [*(Job(TIMES * steps, factor) for factor in LONG), *(Job(steps, factor) for factor in SHORT)]
    found = {}
    for job, one in spread(measured, jobs, arguments.workers, prepare, arguments.model, people, arguments.queries):
        found[job] = one
        console.print(job, one)
    long, short = (max((job for job in jobs if job.steps == n), key=lambda job: found[job].value)
                   for n in (TIMES * steps, steps))
    table = Table("steps", "rates", "identity, losses", "LPIPS", "PSNR dB", "value")
    for job in jobs:
        figures = (f"{value:.3f}" for value in (*found[job], found[job].value))
        table.add_row(str(job.steps), f"x {job.factor:g}", *figures, style="bold" if job in (long, short) else "")
    console.print(table)
    result = stepping(model, short.factor, exponent_between(short.factor, long.factor))
    result.card["rates"] = (f"after meta-training: times {short.factor:g} in runs of {steps} steps, {long.factor:g} in "
                            f"runs of {TIMES * steps}, chosen on {len(people)} people of the split {arguments.split} "
                            "(benchmarks/calibrate_rates.py)")
    console.print(f"done: {result.save(arguments.output)}")


if __name__ == "__main__":
    measure.run(main)
