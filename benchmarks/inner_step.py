"""How long do a forward pass and an inner step take, against GPEN computed the published way, and against the floor?

Both ways compute the same thing on the same weights (random ones; the largest difference of their outputs is in the
rows): `metagpen.person.personal_forward` on channels_last maps, and `published_gpen.restore` beside this script. One
person with an adapter of the default shape. *forward*: restoring without gradients. *step*: forward, L1 and
gradient L1, gradients for the person's parameters (the prior being frozen), Adam. *whole step*: fresh degradations,
all losses of the default configuration with the embedded recogniser, gradients, Adam. On a CPU also *compiled step*:
both ways' forward pass, and so its gradients, through torch.compile, as `AdaptConfig.compile` does. On a GPU also
*recorded step*: both ways' step recorded as a CUDA graph and played again, as `adapt` does there; the whole step is
recorded, too. Its photos are damaged ahead by processes, not in its time: `many_people.py` measures all of it.

The floor of a step: its multiply-adds (counted by torch.utils.flop_counter in our own way of computing) at the rate
that one large convolution reaches in the same run, plus what all other operations, the blurs among them, read and
write, at the bandwidth of a copy in the same run.

    python benchmarks/inner_step.py                    # figures for the CPU, half an hour on two idle cores
    python benchmarks/inner_step.py --device cuda      # for the GPU
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import measure
import published_gpen
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from metagpen import recognise
from metagpen.adaptation import AdaptConfig
from metagpen.adaptation.draws import Album, Support, supports
from metagpen.adaptation.objective import Objective
from metagpen.adaptation.optimise import new_optimiser
from metagpen.adaptation.recorded import RecordedSteps
from metagpen.adaptation.steps import inner_step
from metagpen.devices import has_bf16
from metagpen.errors import ConfigError
from metagpen.evaluate import report
from metagpen.faces import FFHQ_LANDMARKS
from metagpen.gpen import GPEN
from metagpen.graphs import WARM_UP
from metagpen.losses.fused import fused
from metagpen.model import MetaGPEN
from metagpen.person import Parameters, new_parameters

SEED = 0
WAYS = ("published", "metagpen")
PRECISIONS = ("float32", "bfloat16")
WHATS = ("forward", "step", "recorded step", "compiled step", "whole step")
DENSE = ("convolution", "convolution_backward", "_convolution", "mm", "bmm", "addmm", "baddbmm")


class Size(NamedTuple):
    """A network, and how many photos it restores at a time; rounds: turns that count."""

    size: int
    narrow: float
    channel_multiplier: float
    batch: int
    rounds: int


SIZES = {"cpu": [Size(128, 0.25, 1, 4, 10), Size(256, 0.5, 1, 2, 8), Size(512, 1.0, 2, 1, 3)],
         "cuda": [Size(128, 0.25, 1, 4, 30), Size(256, 0.5, 1, 4, 30), Size(512, 1.0, 2, 4, 20)]}
QUICK = [Size(32, 1 / 32, 1, 2, 1)]


class Published(Objective):
    """The same objective around the published way of computing."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.forward = published_gpen.restore

    def restore(self, parameters: Parameters, poor: Tensor) -> Tensor:
        with self.autocast():
            return self.forward(self.model.gpen, poor, parameters).float()


class Case:
    """What is measured for one size: random weights, a person who is somebody, five photos."""

    def __init__(self, wanted: Size, device: torch.device):
        self.wanted, self.device = wanted, device
        torch.manual_seed(SEED)
        gpen = GPEN(wanted.size, wanted.channel_multiplier, wanted.narrow)
        self.model = MetaGPEN(gpen).frozen().to(device)
        self.config = AdaptConfig(batch_size=wanted.batch, decoder_rank=0, start=False, rule=False)
        generator = torch.Generator().manual_seed(SEED)
        person = new_parameters(gpen, self.config.spec, 1, generator)
        self.person = {name: (value + 0.05 * torch.randn(value.shape, generator=generator).to(device)).requires_grad_()
                       for name, value in person.items()}
        photos = torch.rand(5, 3, wanted.size, wanted.size, generator=generator) * 2 - 1
        self.rates = {name: 1e-3 for name in self.person}
        landmarks = torch.from_numpy(FFHQ_LANDMARKS * wanted.size).float().expand(5, -1, -1)
        self.album = Album(photos.to(device), landmarks.to(device))
        self.recogniser = recognise.load("embedded", device=str(device))
        endless = self.config.model_copy(update={"steps": 10**6})
        self.fresh = supports([self.album], endless, device, self.recogniser)
        self.support = next(self.fresh)

    def objective(self, way: str, precision: str, recogniser: recognise.Recogniser | None = None,
                  compiled: bool = False) -> Objective:
        """With the recogniser's losses if one is given."""
        terms = {} if recogniser else {"perceptual": 0.0, "identity": 0.0}
        config = self.config.model_copy(update={"bf16": precision == "bfloat16", **terms})
        found = (Published if way == "published" else Objective)(self.model, config, recogniser, None)
        found.forward = fused(found.forward, compiled)
        return found

    @torch.no_grad()
    def forward(self, way: str, precision: str) -> Tensor:
        return self.objective(way, precision).restore(self.person, self.support[1])

    def step(self, objective: Objective, support: Support) -> Parameters:
        return inner_step(objective, self.person, support, self.rates, new_optimiser("adam"))[0]

    def recorded(self, objective: Objective) -> Callable[[Support], Tensor]:
        """A step as a CUDA graph."""
        return partial(RecordedSteps(objective, self.person), rates=self.rates)

    def ways(self, precisions: Sequence[str], compiled: bool) -> dict[tuple[str, str, str], Callable[[], Any]]:
        """(what, way, precision) -> the thing to time; compiled: steps through torch.compile, too."""
        found, on_gpu = {}, self.device.type == "cuda"
        for precision in precisions:
            for way in WAYS:
                plain, whole = (self.objective(way, precision, judge) for judge in (None, self.recogniser))
                found["forward", way, precision] = partial(self.forward, way, precision)
                found["step", way, precision] = partial(self.step, plain, self.support)
                if on_gpu:
                    found["recorded step", way, precision] = partial(self.recorded(plain), self.support)
                if compiled:
                    fast = self.objective(way, precision, compiled=True)
                    found["compiled step", way, precision] = partial(self.step, fast, self.support)
                whole_step = self.recorded(whole) if on_gpu else partial(self.step, whole)
                found["whole step", way, precision] = lambda whole_step=whole_step: whole_step(next(self.fresh))
        return found


def difference(case: Case) -> float:
    """Largest difference of the two ways' float32 outputs, relative to the largest value."""
    plain, ours = (case.forward(way, "float32") for way in WAYS)
    return float((plain - ours).abs().max() / plain.abs().max())


class Traffic(TorchDispatchMode):
    """Bytes that operations other than dense convolutions and matrix products read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not (is_view(func) or is_dense(func, args)):
            self.bytes += sum(stored(value) for value in tree_leaves((args, kwargs, out)) if isinstance(value, Tensor))
        return out


def is_view(func: Any) -> bool:
    """Views and mere allocations move nothing."""
    returns = [value.alias_info for value in func._schema.returns]
    return func._schema.name.startswith("aten::empty") or any(alias and not alias.is_write for alias in returns)


def is_dense(func: Any, args: Any) -> bool:
    """Whether it is bound by its multiply-adds; a depthwise convolution, one channel per group, is not."""
    name = func._schema.name.removeprefix("aten::")
    if name not in DENSE:
        return False
    if "convolution" not in name:
        return True
    weight = args[2] if name == "convolution_backward" else args[1]
    return weight.shape[1] > 1


def stored(value: Tensor) -> int:
    """Bytes behind a tensor; what is only expanded counts once."""
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


def work_of(step: Callable[[], Any]) -> tuple[float, float]:
    """(floating-point operations, bytes moved by other operations) of one step."""
    step()  # so that nothing is set up inside the count
    with FlopCounterMode(display=False) as flops:
        step()
    with Traffic() as traffic:
        step()
    return float(flops.get_total_flops()), float(traffic.bytes)


class Yardsticks:
    """One large convolution per precision, and one large copy."""

    def __init__(self, device: torch.device, quick: bool):
        batch, channels, side = (2, 16, 16) if quick else (4, 256, 64) if device.type == "cpu" else (32, 512, 128)
        self.flops = 2.0 * batch * side**2 * channels**2 * 9
        self.maps = {name: [torch.randn(*shape).to(device, getattr(torch, name), memory_format=torch.channels_last)
                            for shape in ((batch, channels, side, side), (channels, channels, 3, 3))]
                     for name in PRECISIONS}
        self.source = torch.zeros(2**16 if quick else 2**26, device=device)
        self.target = torch.zeros_like(self.source)

    def ways(self, precisions: Sequence[str]) -> dict[Any, Callable[[], Any]]:
        found: dict[Any, Callable[[], Any]] = {("convolution", name): partial(self.convolve, name)
                                               for name in precisions}
        return {**found, "copy": lambda: self.target.copy_(self.source)}

    @torch.no_grad()
    def convolve(self, precision: str) -> Tensor:
        return torch.nn.functional.conv2d(*self.maps[precision], padding=1)

    def rates(self, found: dict[Any, measure.Seconds], precision: str) -> tuple[float, float]:
        """(floating-point operations, bytes read and written) per second."""
        return (self.flops / found["convolution", precision].median,
                2 * self.source.nbytes / found["copy"].median)


def rows_of(wanted: Size, device: torch.device, quick: bool, rounds: int | None) -> list[measure.Row]:
    case, yardsticks = Case(wanted, device), Yardsticks(device, quick)
    precisions = PRECISIONS if quick or has_bf16(device) else PRECISIONS[:1]
    apart = difference(case)
    if apart > 1e-3:
        raise ConfigError(f"the two ways differ by {apart:.1e} at {wanted.size} px: they compute different things, "
                          "so their speeds must not be compared")
    rounds = rounds or wanted.rounds
    ways = case.ways(precisions, compiled=device.type == "cpu" and not quick)  # minutes, which a smoke test has not
    found = measure.take_turns({**ways, **yardsticks.ways(precisions)}, rounds, device,
                               warmup=WARM_UP + 2 if device.type == "cuda" else 1)  # until recorded, and once more
    work = {name: work_of(partial(case.step, case.objective("metagpen", name), case.support)) for name in precisions}
    rows = []
    for (what, way, precision), seconds in ((key, value) for key, value in found.items() if len(key) == 3):
        row = {**wanted._asdict(), "rounds": rounds, "what": what, "way": way, "precision": precision,
               "difference": apart, **seconds.row()}
        if (what, way) == (as_taken(device.type), "metagpen"):
            row |= floor(*work[precision], *yardsticks.rates(found, precision))
        rows.append(row)
    return rows


def floor(flops: float, moved: float, rate: float, bandwidth: float) -> measure.Row:
    return {"flops": flops, "bytes": moved, "flops_per_second": rate, "bytes_per_second": bandwidth,
            "dense_floor_seconds": flops / rate, "floor_seconds": flops / rate + moved / bandwidth}


def as_taken(device: str) -> str:
    """How `adapt` takes its steps there."""
    return "recorded step" if device == "cuda" else "step"


def find(rows: Sequence[measure.Row], **keys: Any) -> measure.Row | None:
    return report.find(rows, **keys)


def speed_up(rows: Sequence[measure.Row], size: int, what: str, precision: str) -> float | None:
    """How many times faster than the published way in float32."""
    plain = find(rows, size=size, what=what, way="published", precision="float32")
    ours = find(rows, size=size, what=what, way="metagpen", precision=precision)
    return plain["seconds"] / ours["seconds"] if plain and ours else None


def speeds_table(rows: Sequence[measure.Row]) -> str:
    heads = ["", "batch", "published float32, ms", "published bf16", "metagpen float32", "metagpen bf16",
             "faster in float32", "faster with bf16"]
    lines = []
    for size in dict.fromkeys(row["size"] for row in rows):
        for what in WHATS:
            cells = [find(rows, size=size, what=what, way=way, precision=precision)
                     for way in WAYS for precision in PRECISIONS]
            if cells[0] is None:
                continue
            ratios = [speed_up(rows, size, what, precision) for precision in PRECISIONS]
            lines.append([f"{size} px, {what}", str(cells[0]["batch"]),
                          *("" if cell is None else measure.milliseconds(cell) for cell in cells),
                          *("" if ratio is None else f"{ratio:.1f}x" for ratio in ratios)])
    return report.table(heads, lines)


def floor_table(rows: Sequence[measure.Row]) -> str:
    heads = ["step", "GFLOP", "at GFLOP/s", "elsewhere GB", "at GB/s", "floor, ms", "measured, ms", "of the floor",
             "published way"]
    lines = []
    for row in (row for row in rows if "floor_seconds" in row):
        plain = find(rows, size=row["size"], what=row["what"], way="published", precision=row["precision"])
        lines.append([f"{row['size']} px, {row['precision']}", f"{row['flops'] / 1e9:.1f}",
                      f"{row['flops_per_second'] / 1e9:.0f}", f"{row['bytes'] / 1e9:.2f}",
                      f"{row['bytes_per_second'] / 1e9:.1f}", f"{1e3 * row['floor_seconds']:.1f}",
                      f"{1e3 * row['seconds']:.1f}", f"{row['floor_seconds'] / row['seconds']:.0%}",
                      f"{row['floor_seconds'] / plain['seconds']:.0%}"])
    return report.table(heads, lines)


def targets_table(rows: Sequence[measure.Row], device: str) -> str:
    aims = {"cpu": [(256, "float32", 4), (256, "bfloat16", 6)], "cuda": [(512, "float32", 4), (512, "bfloat16", 4)]}
    lines = []
    for size, precision, aim in aims[device]:
        ratio = speed_up(rows, size, as_taken(device), precision)
        if ratio is not None:
            lines.append([f"{size} px, {precision}: step at least {aim}x the published way in float32",
                          f"{ratio:.1f}x", measure.verdict(ratio >= aim)])
    return report.table(["to be reached", "measured", "verdict"], lines) if lines else ""


def page(rows: Sequence[measure.Row]) -> str:
    device = rows[0]["device"]
    return "\n\n".join(part for part in (targets_table(rows, device), speeds_table(rows), floor_table(rows)) if part)


def measured(sizes: Sequence[Size], device: torch.device, quick: bool = False,
             rounds: int | None = None) -> list[measure.Row]:
    return [{"device": device.type, **row} for wanted in sizes for row in rows_of(wanted, device, quick, rounds)]


def main(given: Sequence[str] | None = None) -> list[measure.Row]:
    parser = measure.parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", help="only these, e.g. 128 256; publishes none")
    arguments: argparse.Namespace = parser.parse_args(given)
    device = measure.begin(arguments)
    sizes = [s for s in SIZES[device.type] if not arguments.sizes or s.size in arguments.sizes]
    arguments.dry |= bool(arguments.sizes)
    rows = measured(QUICK if arguments.quick else sizes, device, arguments.quick, arguments.rounds)
    measure.publish("inner_step", arguments, rows, measure.facts(device, arguments, seed=SEED), page)
    return rows


if __name__ == "__main__":
    measure.run(main)
