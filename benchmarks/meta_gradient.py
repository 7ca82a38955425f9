"""What does a meta-gradient cost: our engine against learn2learn, higher and plain torch.func, in time and memory?

The gradient of a query loss after 1 to 32 inner SGD steps (at 128 px on a CPU 1 to 8: with 32, what other engines keep
does not fit into the memory of an ordinary machine) with respect to where people begin and to their rates, first
and second order, on a small GPEN (16 px) and on one of the architecture of the embedded model (128 px), random
weights, mean squared errors, two people with two photos each. Engines: *batched* (ours), *batched_reference* (its
plain twin, which keeps every graph), *higher*, *learn2learn* and *torch.func* (`grad` of a plain loop over
`torch.func.grad` steps, all people in one batch).

On a GPU ours has its inner gradients of the first order from a recording, as meta-training does; the other engines and
the plain twin launch every kernel.

On a CPU every engine runs in a process of its own, so that its peak memory is its own: the highest resident memory
above what was there before the first measured gradient. On a GPU it is the most memory reserved (a recording's own
belongs to no tensor), which one process can tell of every engine. They come in rounds, engine after engine, so that a
busy moment of the machine does not meet one engine alone, and return a digest of their gradients: where these differ by
more than 0.1 % in float32, the benchmark stops.

    python benchmarks/meta_gradient.py                     # CPU, 8 minutes on two idle cores
    python benchmarks/meta_gradient.py --device cuda
    make setup-learn2learn                                 # learn2learn is left out, and named, where it is absent
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import measure
import torch
from torch import Tensor

from metagpen.devices import synchronise
from metagpen.errors import ConfigError, MetagpenError
from metagpen.evaluate import report
from metagpen.gpen import GPEN
from metagpen.graphs import WARM_UP
from metagpen.meta import ENGINES, Problem
from metagpen.meta.engines import batched_reference
from metagpen.meta.problem import MetaGradient, StepRates, through_the_steps
from metagpen.meta.recorded import RecordedGradient
from metagpen.person import AdapterSpec, Parameters, personal_forward
from metagpen.person.rule import InnerRule, RuleConfig

SEED, PEOPLE, PHOTOS = 0, 2, 2
OURS, OTHERS = "batched", ("learn2learn", "higher", "torch.func")
NAMES = (OURS, "batched_reference", *OTHERS)
AGREE = 1e-3
LEAST_BYTES = 32 * 2**20  # below, what a process' memory grows by says little about what an engine keeps


class Model(NamedTuple):
    size: int
    narrow: float
    tail_blocks: int
    steps: tuple[int, ...]


MODELS = {"small": Model(16, 1 / 16, 1, (1, 8, 32)), "128 px": Model(128, 0.25, 2, (1, 4, 8))}
GPU_STEPS = (1, 8, 32)
QUICK = {"small": Model(16, 1 / 32, 1, (2,))}


def problem_of(model: Model, steps: int, device: torch.device) -> Problem:
    """The same random problem for every engine: on noise, because speed does not depend on the picture."""
    torch.manual_seed(SEED)
    gpen = GPEN(model.size, 1, model.narrow).eval().requires_grad_(False).to(device)
    spec = AdapterSpec(tail_blocks=model.tail_blocks)
    generator = torch.Generator().manual_seed(SEED)

    def batch() -> tuple[Tensor, Tensor]:
        shape = (2, PEOPLE * PHOTOS, 3, model.size, model.size)
        poor, truth = (torch.rand(shape, generator=generator) * 2 - 1).to(device)
        return poor.contiguous(memory_format=torch.channels_last), truth

    def objective(parameters: Parameters, poor: Tensor, truth: Tensor) -> Tensor:
        restored = personal_forward(gpen, poor, parameters, spec, frozen=True)
        return (restored - truth).square().unflatten(0, (PEOPLE, -1)).mean(dim=(1, 2, 3, 4))

    rule = InnerRule(gpen, spec, RuleConfig("sgd", steps, per_step=True), lr_latent=1e-2, lr_tail=1e-3).to(device)
    with torch.no_grad():
        begin = {name: value + 0.01 * torch.randn(value.shape, generator=generator).to(device)
                 for name, value in rule.begin(PEOPLE).items()}
        rates = [rule.rates(step, steps) for step in range(steps)]
    return Problem(objective, objective, [batch() for _ in range(steps)], batch(), begin, rates)


def with_torch_func(problem: Problem, second_order: bool) -> MetaGradient:
    """The meta-gradient as one writes it with torch.func alone."""
    def after_steps(begin: Parameters, rates: list[StepRates]) -> Tensor:
        parameters = begin
        for support, step in zip(problem.support, rates, strict=True):
            found = torch.func.grad(lambda now, support=support: problem.inner(now, *support).sum())(parameters)
            found = found if second_order else {name: value.detach() for name, value in found.items()}
            parameters = {name: value - step[name] * found[name] for name, value in parameters.items()}
        return problem.outer(parameters, *problem.query).mean()

    (begin, rates), loss = torch.func.grad_and_value(after_steps, argnums=(0, 1))(problem.begin, list(problem.rates))
    return MetaGradient(loss, begin, rates)


def meta_gradient(engine: str, problem: Problem, second_order: bool) -> MetaGradient:
    if engine == "torch.func":
        return with_torch_func(problem, second_order)
    chosen = batched_reference if engine == "batched_reference" else ENGINES[engine]
    return through_the_steps(problem, chosen, second_order)


def digest(gradient: MetaGradient) -> list[float]:
    """Loss, and the norm of every tensor of the gradient by name and step."""
    tensors = [gradient.begin[name] for name in sorted(gradient.begin)]
    tensors += [step[name] for step in gradient.rates for name in sorted(step)]
    return [float(gradient.loss.detach()), *(float(value.detach().double().norm()) for value in tensors)]


def record(problem: Problem, warm: Problem) -> None:
    """Lets both have their inner gradients from one recording, made on the second."""
    gradient = RecordedGradient(problem.inner, list(problem.begin), list(problem.rates[0]))
    problem.gradient = warm.gradient = gradient
    for _ in range(WARM_UP + 1):
        meta_gradient(OURS, warm, second_order=False)


def alone(case: dict[str, Any]) -> measure.Row:
    """What one engine takes: the first gradient warms up, at one step so that the peak is the later ones'."""
    device, model = torch.device(case["device"]), Model(**case["model"])
    if case["threads"]:
        torch.set_num_threads(case["threads"])
    measure.exact_float32()
    problem = problem_of(model, case["steps"], device)
    warm = problem_of(model, 1, device)
    meta_gradient(case["engine"], warm, case["second_order"])
    before = begin_memory(device)
    if device.type == "cuda":
        if case["engine"] == OURS and not case["second_order"]:
            record(problem, warm)
        meta_gradient(case["engine"], problem, case["second_order"])  # which reserves the memory that the others use
    seconds = []
    for _ in range(case["repeats"]):
        synchronise(device)
        began = time.perf_counter()
        found = meta_gradient(case["engine"], problem, case["second_order"])
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return {"all_seconds": seconds, "bytes": peak_memory(device) - before, "digest": digest(found)}


def begin_memory(device: torch.device) -> int:
    """Bytes in use now; the peak begins here."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)
    measure.give_back_freed_memory()
    if not measure.forget_peak_rss():
        raise MetagpenError("this system does not let a process forget its peak memory (/proc/self/clear_refs)")
    return measure.peak_rss()


def peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else measure.peak_rss()


def in_a_process(case: dict[str, Any]) -> measure.Row:
    done = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], capture_output=True, text=True)
    if done.returncode:
        raise MetagpenError(f"{case['engine']}, {case['steps']} steps: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def engines() -> list[str]:
    """Those whose libraries are here."""
    return [name for name in NAMES if name in (OURS, "batched_reference", "torch.func")
            or importlib.util.find_spec(name)]


def measured(models: dict[str, Model], device: torch.device, names: Sequence[str], rounds: int, repeats: int,
             threads: int | None) -> list[measure.Row]:
    rows, take = [], alone if device.type == "cuda" else in_a_process
    for label, model in models.items():
        for steps in model.steps:
            for second_order in (False, True):
                case = {"model": model._asdict(), "steps": steps, "second_order": second_order, "repeats": repeats,
                        "device": device.type, "threads": threads}
                found: dict[str, list[measure.Row]] = {name: [] for name in names}
                for _ in range(rounds):
                    for name in names:
                        found[name].append(take({**case, "engine": name}))
                agree({name: runs[0]["digest"] for name, runs in found.items()}, f"{label}, {steps} steps")
                rows += [{"device": device.type, "model": label, "steps": steps, "engine": name,
                          "order": 2 if second_order else 1, "rounds": rounds, "repeats": repeats,
                          **measure.Seconds.of([s for run in runs for s in run["all_seconds"]]).row(),
                          "bytes": median(run["bytes"] for run in runs)} for name, runs in found.items()]
    return rows


def agree(digests: dict[str, list[float]], where: str) -> None:
    """Engines that do not compute the same gradient must not be compared."""
    expected = digests[OURS]
    scale = max(expected[1:])
    for name, found in digests.items():
        worst = max(abs(a - b) / max(abs(b), AGREE * scale) for a, b in zip(found, expected, strict=True))
        if len(found) != len(expected) or worst > AGREE:
            raise ConfigError(f"{where}: the gradient of {name} differs from that of {OURS} by {worst:.1e}")


def of(rows: Sequence[measure.Row], **keys: Any) -> measure.Row | None:
    return report.find(rows, **keys)


def targets_table(rows: Sequence[measure.Row]) -> str:
    """The wishes at the largest measured number of steps of each model."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        steps = max(row["steps"] for row in rows if row["model"] == model)
        for name in ("learn2learn", "higher"):
            first, other = (of(rows, model=model, steps=steps, order=1, engine=e) for e in (OURS, name))
            if other is None:
                continue
            ratio = other["seconds"] / first["seconds"]
            lines.append([f"{model}, {steps} steps, first order: at least 2x faster than {name}", f"{ratio:.1f}x",
                          measure.verdict(ratio >= 2)])
            second, other = (of(rows, model=model, steps=steps, order=2, engine=e) for e in (OURS, name))
            if other["bytes"] < LEAST_BYTES:
                continue
            share = second["bytes"] / other["bytes"]
            lines.append([f"{model}, {steps} steps, second order: at most half of the memory of {name}", f"{share:.0%}",
                          measure.verdict(share <= 0.5)])
    return report.table(["to be reached", "measured", "verdict"], lines) if lines else ""


def engines_table(rows: Sequence[measure.Row]) -> str:
    names = list(dict.fromkeys(row["engine"] for row in rows))
    lines = []
    for key in dict.fromkeys((row["model"], row["order"], row["steps"]) for row in rows):
        cells = []
        for name in names:
            row = of(rows, model=key[0], order=key[1], steps=key[2], engine=name)
            cells.append("" if row is None else f"{1e3 * row['seconds']:.0f} ms, {row['bytes'] / 2**20:.0f} MiB")
        lines.append([f"{key[0]}, order {key[1]}, {key[2]} step{'s' if key[2] > 1 else ''}", *cells])
    return report.table(["", *names], lines)


def page(rows: Sequence[measure.Row]) -> str:
    absent = [name for name in NAMES if name not in {row["engine"] for row in rows}]
    note = f"Not installed, and left out: {', '.join(absent)}." if absent else ""
    return "\n\n".join(part for part in (targets_table(rows), engines_table(rows), note) if part)


def main(given: Sequence[str] | None = None) -> list[measure.Row]:
    parser = measure.parser(__doc__)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # what a process of its own is asked for, as JSON
    parser.add_argument("--repeats", type=int, default=3, help="gradients that a process measures")
    arguments = parser.parse_args(given)
    if arguments.case:
        print(json.dumps(alone(json.loads(arguments.case))))
        return []
    device = torch.device(arguments.device)
    models = MODELS if device.type == "cpu" else {name: m._replace(steps=GPU_STEPS) for name, m in MODELS.items()}
    rounds = arguments.rounds or 1
    rows = (measured(QUICK, device, engines(), 1, 1, arguments.threads) if arguments.quick
            else measured(models, device, engines(), rounds, arguments.repeats, arguments.threads))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)  # for what is said about the machine
    measure.publish("meta_gradient", arguments, rows,
                    measure.facts(device, arguments, seed=SEED, people=PEOPLE, photos=PHOTOS), page)
    return rows


if __name__ == "__main__":
    measure.run(main)
