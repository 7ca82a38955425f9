"""Shut a freshly trained model's gate as far as moderate damage asks for, on people kept back from the training.

Training weighs identity against PSNR over all damage at once, and where a photo still shows who it is the gate as
trained may let in more of a person than helps. Here its slopes are multiplied and its centres moved, every pair of
`SLOPES` and `CENTRES` in turn, and of those that lose no PSNR under moderate damage the one that gains most identity
under heavy damage is kept (if all lose, the one that loses least). Both are measured for the start against the generic
model, by the recogniser of the losses, on people kept back from the training: nobody of the evaluation is looked at.

    python benchmarks/calibrate_gate.py runs/base_128/ema.safetensors -o runs/base_128/calibrated.safetensors
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
from metagpen.evaluate import EvaluateConfig, report
from metagpen.evaluate.engine import evaluate_people, methods_for, named_degradations
from metagpen.evaluate.protocol import load_people
from metagpen.evaluate.statistics import Gain, paired_gain
from metagpen.identities import People
from metagpen.memory import keep_freed_memory
from metagpen.model import MetaGPEN

ROOT = Path(__file__).resolve().parents[1]
SHARED = measure.SHARED
LOSSES = SHARED / "weights" / "face-reidentification-retail-0095.fp16.xml"
SLOPES, CENTRES = (1.0, 2.0, 4.0), (-0.1, 0.0, 0.1, 0.2, 0.3)
SHOTS = 5


class Calibrated(NamedTuple):
    """A gate's slope factor and centre shift, and the start's gains: identity (heavy) and PSNR in dB (moderate)."""

    slope: float
    centre: float
    identity: Gain
    psnr: Gain

    def cells(self) -> list[str]:
        identity, psnr = (report.interval_text(gain.mean, gain.lo, gain.hi, digits)
                          for gain, digits in ((self.identity, 3), (self.psnr, 2)))
        return [f"x {self.slope:g}", f"{self.centre:+g}", identity, psnr]


def turned(model: MetaGPEN, slope: float, centre: float) -> MetaGPEN:
    """The model, its gate's slopes times `slope` and its centres higher by `centre`."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.gate.slope.mul_(slope)
        model.gate.centre.add_(centre)
    return model


def measured(model: MetaGPEN, people: People, recogniser: recognise.Recogniser, slope: float, centre: float,
             queries: int) -> Calibrated:
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    for outcome in evaluate_people(turned(model, slope, centre), people, named_degradations(["heavy", "moderate"]),
                                   methods_for(["generic", "start"], [SHOTS], 0), {"losses": recogniser}, shots=SHOTS,
                                   max_queries=queries):
        record = outcome.record
        for metric, value in record.values.items():
            values.setdefault((record.method, record.degradation, metric), {})[record.person] = value
    identity, psnr = (paired_gain(values["start", *what], values["generic", *what])
                      for what in (("heavy", "identity:losses"), ("moderate", "psnr")))
    return Calibrated(slope, centre, identity, psnr)


def chosen(found: list[Calibrated]) -> Calibrated:
    """Most identity among those that lose no PSNR; if all lose, the least loss."""
    harmless = [one for one in found if one.psnr.mean >= 0]
    return max(harmless, key=lambda one: one.identity.mean) if harmless else max(found, key=lambda one: one.psnr.mean)


def people_of(split: str, size: int, people: int, queries: int) -> People:
    """The first people of a split of celeba_wild_256 who can be measured at `size` pixels."""
    photos = SHARED / "photos"
    return load_people(EvaluateConfig(data=str(photos / "celeba_wild_256"), split_file=str(measure.PEOPLE),
                                      split=split, shots=[SHOTS], recognisers={}, max_people=people,
                                      max_queries=queries), size)


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
    people = people_of("kept", model.size, arguments.people, arguments.queries)
    recogniser = recognise.load(str(LOSSES))
    found = []
    for slope, centre in product(SLOPES, CENTRES):
        found.append(measured(model, people, recogniser, slope, centre, arguments.queries))
        console.print(*found[-1].cells())
    best, table = chosen(found), Table("slopes", "centres", "identity, heavy", "PSNR dB, moderate")
    for one in found:
        table.add_row(*one.cells(), style="bold" if one is best else "")
    console.print(table)
    result = turned(model, best.slope, best.centre)
    result.card["gate"] = (f"after training: slopes times {best.slope:g}, centres {best.centre:+g}, chosen on "
                           f"{len(people)} people kept back from the training so that moderate photos lose no PSNR "
                           "(benchmarks/calibrate_gate.py)")
    console.print(f"done: {result.save(arguments.output)}")


if __name__ == "__main__":
    measure.run(main)
