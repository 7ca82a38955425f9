"""Open a freshly trained model's gate for ruined photos, and shut it as far as moderate damage asks for.

What reaches the styles is the gate's share times an offset, and training settles the product alone: shares may be small
even for ruins, and offsets large. The decoder's mixtures, which go with the mean share, would then hardly take a step.
So every layer gets the same share, sigmoid(slope · (severity - centre)), near one for ruins, and the offsets (the
start's and nobody's) are multiplied with what their layer let in at a severity of `RUIN`, about that of faces of 8 to
16 px: those restore as they did.

Every pair of `SLOPES` and `CENTRES` is tried. Of those that lose no PSNR under moderate damage (at most `HARMLESS` dB)
the one that gains most identity under heavy damage is kept; if all lose, the one that loses least. Both are measured
for the start against the generic model, by the recogniser of the losses, on people kept back from the training: nobody
of the evaluation is looked at. Comes before `metagpen meta-train`; a rule, learned for another gate, is left out.

    python benchmarks/calibrate_gate.py runs/base_128/ema.safetensors -o runs/base_128/opened.safetensors
"""

from __future__ import annotations

import argparse
import copy
from itertools import product
from pathlib import Path
from typing import NamedTuple

import measure
import torch
from rich.console import Console
from rich.table import Table

from metagpen import recognise
from metagpen.errors import ConfigError
from metagpen.evaluate import EvaluateConfig, report
from metagpen.evaluate.engine import evaluate_people, methods_for, named_degradations
from metagpen.evaluate.protocol import load_people
from metagpen.evaluate.statistics import Gain, paired_gain
from metagpen.identities import People
from metagpen.memory import keep_freed_memory
from metagpen.model import MetaGPEN

LOSSES = measure.SHARED / "weights" / "face-reidentification-retail-0095.fp16.xml"
RUIN = 0.95
SLOPES, CENTRES = (15.0, 30.0, 60.0), (0.6, 0.7, 0.8)
HARMLESS = 0.01
SHOTS = 5


class Calibrated(NamedTuple):
    """A gate (None: as trained), and the start's gains with it: identity (heavy) and PSNR in dB (moderate)."""

    gate: tuple[float, float] | None  # slope, centre
    identity: Gain
    psnr: Gain

    def cells(self) -> list[str]:
        identity, psnr = (report.interval_text(gain.mean, gain.lo, gain.hi, digits)
                          for gain, digits in ((self.identity, 3), (self.psnr, 2)))
        gate = [f"{value:g}" for value in self.gate] if self.gate else ["as trained", ""]
        return [*gate, identity, psnr]


def opened(model: MetaGPEN, slope: float, centre: float) -> MetaGPEN:
    """The model without its rule, every layer's gate with this slope and centre; ruined photos restore as they did."""
    start = copy.deepcopy(model.start)
    gate = start.gate
    with torch.no_grad():
        ruin = torch.sigmoid(gate.slope * (RUIN - gate.centre))  # what each layer lets in [L]
        gate.slope.fill_(slope)
        gate.centre.fill_(centre)
        scale = (ruin / torch.sigmoid(gate.slope * (RUIN - gate.centre)))[:, None]
        gate.nobody.mul_(scale)
        for parameter in (start.head.weight, start.head.bias):
            by_layer = parameter.view(start.n_latent, start.style_dim, -1)
            by_layer.mul_(scale[:, :, None])
    return MetaGPEN(model.gpen, start, dict(model.card), None, model.bases).frozen()


def measured(model: MetaGPEN, people: People, recogniser: recognise.Recogniser, gate: tuple[float, float] | None,
             queries: int) -> Calibrated:
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    model = opened(model, *gate) if gate else model
    for outcome in evaluate_people(model, people, named_degradations(["heavy", "moderate"]),
                                   methods_for(["generic", "start"], [SHOTS], 0), {"losses": recogniser}, shots=SHOTS,
                                   max_queries=queries):
        record = outcome.record
        for metric, value in record.values.items():
            values.setdefault((record.method, record.degradation, metric), {})[record.person] = value
    identity, psnr = (paired_gain(values["start", *what], values["generic", *what])
                      for what in (("heavy", "identity:losses"), ("moderate", "psnr")))
    return Calibrated(gate, identity, psnr)


def chosen(found: list[Calibrated]) -> Calibrated:
    """Most identity among those that lose no PSNR to speak of; if all lose, the least loss."""
    harmless = [one for one in found if one.psnr.mean >= -HARMLESS]
    return max(harmless, key=lambda one: one.identity.mean) if harmless else max(found, key=lambda one: one.psnr.mean)


def people_of(split: str, size: int, people: int, queries: int) -> People:
    """The first people of a split of celeba_wild_256 who can be measured at `size` pixels."""
    photos = measure.SHARED / "photos"
    return load_people(EvaluateConfig(data=str(photos / "celeba_wild_256"), split_file=str(measure.PEOPLE),
                                      split=split, shots=[SHOTS], max_people=people, max_queries=queries), size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--people", type=int, default=12)
    parser.add_argument("--queries", type=int, default=6)
    arguments = parser.parse_args()
    keep_freed_memory()
    console = Console()
    model = MetaGPEN.from_file(arguments.model).frozen()
    if model.start is None or model.start.mixtures is not None:
        raise ConfigError(f"{arguments.model}: needs a start, and one that guesses offsets alone")
    people = people_of("kept", model.size, arguments.people, arguments.queries)
    recogniser = recognise.load(str(LOSSES))
    found = []
    for gate in [None, *product(SLOPES, CENTRES)]:
        found.append(measured(model, people, recogniser, gate, arguments.queries))
        console.print(*found[-1].cells())
    best, table = chosen(found[1:]), Table("slope", "centre", "identity, heavy", "PSNR dB, moderate")
    for one in found:
        table.add_row(*one.cells(), style="bold" if one is best else "")
    console.print(table)
    slope, centre = best.gate
    result = opened(model, slope, centre)
    result.card["gate"] = (f"after training: slope {slope:g}, centre {centre:g} in every layer, chosen on "
                           f"{len(people)} people kept back from the training so that moderate photos lose no PSNR "
                           "(benchmarks/calibrate_gate.py)")
    console.print(f"done: {result.save(arguments.output)}")


if __name__ == "__main__":
    measure.run(main)
