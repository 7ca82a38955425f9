"""What does it cost to restore a person instead of nobody?

`person.restore_batch` (a Person with every tensor moved away from zero, gate and all) against `model.restore`, on
aligned faces, in turns: the embedded model at 128 px, and random weights at 256 and 512 px.

    python benchmarks/restore_speed.py                     # CPU, 2 minutes on two idle cores
    python benchmarks/restore_speed.py --device cuda
"""

from __future__ import annotations

from collections.abc import Sequence

import measure
import torch

from metagpen import MetaGPEN, Person
from metagpen.adaptation.config import AdaptConfig
from metagpen.adaptation.steps import begin
from metagpen.errors import MetagpenError
from metagpen.evaluate import report

SEED, ALLOWED = 0, 0.05
CASES = {"cpu": [(128, 1, 40), (128, 8, 12), (256, 1, 16), (512, 1, 6)],  # px, photos in a batch, rounds
         "cuda": [(128, 1, 100), (128, 64, 40), (256, 16, 40), (512, 1, 40), (512, 16, 20)]}
QUICK = [(32, 2, 2)]


def somebody(model: MetaGPEN) -> Person:
    """A Person of the kind that `adapt` makes of this model, decoder mixtures and all."""
    generator = torch.Generator().manual_seed(SEED)
    config = AdaptConfig().for_model(model)
    parameters = begin(model, config, 1, generator, None)
    return Person(model, config.spec, {name: value + 0.02 * torch.randn(value.shape, generator=generator).to(value)
                                       for name, value in parameters.items()})


def measured(cases: Sequence[tuple[int, int, int]], device: torch.device, rounds: int | None) -> list[measure.Row]:
    rows = []
    for size, batch, own_rounds in cases:
        model = measure.model_of(size, device)
        person = somebody(model)
        images = (torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(SEED)) * 2 - 1).to(device)
        if torch.equal(person.restore_batch(images), model.restore(images)):
            raise MetagpenError("the person changes nothing: that would not be a comparison")
        ways = {"generic": lambda model=model, images=images: model.restore(images),
                "personal": lambda person=person, images=images: person.restore_batch(images)}
        found = measure.take_turns(ways, rounds or own_rounds, device, warmup=2)
        rows.append({"device": device.type, "size": size, "batch": batch, "rounds": rounds or own_rounds,
                     **found["generic"].row("generic_"), **found["personal"].row("personal_")})
    return rows


def page(rows: Sequence[measure.Row]) -> str:
    lines = []
    for row in rows:
        more = row["personal_seconds"] / row["generic_seconds"] - 1
        lines.append([f"{row['size']} px", str(row["batch"]), measure.milliseconds(row, "generic_"),
                      measure.milliseconds(row, "personal_"), f"{more:+.1%}", measure.verdict(more <= ALLOWED)])
    return report.table(["", "photos", "generic, ms", "personal, ms", "personal takes", "within 5 %"], lines)


def main(given: Sequence[str] | None = None) -> list[measure.Row]:
    arguments = measure.parser(__doc__).parse_args(given)
    device = measure.begin(arguments)
    rows = measured(QUICK if arguments.quick else CASES[device.type], device, arguments.rounds)
    measure.publish("restore_speed", arguments, rows, measure.facts(device, arguments, seed=SEED), page)
    return rows


if __name__ == "__main__":
    measure.run(main)
