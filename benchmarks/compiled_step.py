"""What does `AdaptConfig.compile` gain on a CPU, and how many people must there be before it pays?

The gradient of an inner step, which is all but its damage and a few products, of the embedded model after its rule and
with all losses, plain and with torch.compile, in turns, by people in the batch; how long compiling takes, once for each
size of batch; and how far gradients of bfloat16 lie from those in float32, plain and compiled. People are those of the
package's own album.

    python benchmarks/compiled_step.py    # writes benchmarks/results/compiled_step.json and the table in docs/speed.md
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice

import measure
import torch
from torch import Tensor

import metagpen
from metagpen import recognise
from metagpen.adaptation.config import AdaptConfig
from metagpen.adaptation.draws import Album, album, supports
from metagpen.adaptation.loop import mean_identities, start_guess
from metagpen.adaptation.objective import Objective
from metagpen.adaptation.steps import begin, inner_gradient, step_rates
from metagpen.album import read_album
from metagpen.devices import has_bf16
from metagpen.errors import ConfigError
from metagpen.evaluate import report
from metagpen.evaluate.tasks import load_support
from metagpen.losses.fused import check_compiles, fused
from metagpen.model import MetaGPEN
from metagpen.person import personal_forward

RESULTS = measure.RESULTS / "compiled_step.json"
PEOPLE, SHOTS, STEPS, ROUNDS = (1, 8), 5, 32, 8
WAYS = ("plain", "compiled", "float32")


def albums_of(model: MetaGPEN, count: int) -> list[Album]:
    people = read_album("own")
    return [album(list(load_support(people, name, SHOTS, model.size)), model.size)
            for name in islice(cycle(people), count)]


def steps(model: MetaGPEN, recogniser: recognise.Recogniser, count: int) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """The first step's gradients of so many people, by way."""
    albums, config = albums_of(model, count), AdaptConfig(steps=STEPS).for_model(model)
    guess = start_guess(model, albums, mean_identities(albums, recogniser))
    begun = begin(model, config, count, torch.Generator().manual_seed(0), guess)
    support = next(supports(albums, config, model.device, recogniser))
    parameters = {name: value.requires_grad_() for name, value in begun.items()}

    def gradient(objective: Objective) -> dict[str, Tensor]:
        return inner_gradient(objective, parameters, support, step_rates(model, config, 0, begun))[0]

    found = {}
    for way in WAYS:
        own = config.model_copy(update={"bf16": way != "float32"})
        objective = Objective(model, own, recogniser, begun["latent.offset"].detach())
        objective.forward = fused(personal_forward, way == "compiled")
        found[way] = partial(gradient, objective)
    return found


def apart(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Relative distance of all gradients together."""
    a, b = (torch.cat([one[name].flatten() for name in truth]) for one in (found, truth))
    return float((a - b).norm() / b.norm())


def measured(model: MetaGPEN, recogniser: recognise.Recogniser, count: int, rounds: int) -> measure.Row:
    ways = steps(model, recogniser, count)
    began = time.perf_counter()
    found = {"compiled": ways["compiled"]()}
    first = time.perf_counter() - began
    found |= {way: ways[way]() for way in ("plain", "float32")}
    seconds = measure.take_turns({way: ways[way] for way in ("plain", "compiled")}, rounds)
    saved = seconds["plain"].median - seconds["compiled"].median
    return {"people": count, "rounds": rounds, "compile_seconds": first,
            **seconds["plain"].row("plain_"), **seconds["compiled"].row("compiled_"),
            "pays_after_people": count * first / (STEPS * saved) if saved > 0 else None,
            **{f"{way}_apart": apart(found[way], found["float32"]) for way in ("plain", "compiled")}}


def page(rows: Sequence[measure.Row]) -> str:
    heads = ["people in the batch", "gradient, ms", "compiled, ms", "faster", "compiling, s",
             f"pays after so many people ({STEPS} steps)", "distance from float32", "compiled, distance"]
    return report.table(heads, [
        [str(row["people"]), measure.milliseconds(row, "plain_"), measure.milliseconds(row, "compiled_"),
         f"{row['plain_seconds'] / row['compiled_seconds']:.2f}x", f"{row['compile_seconds']:.0f}",
         "never" if row["pays_after_people"] is None else f"{row['pays_after_people']:.0f}",
         f"{row['plain_apart']:.1%}", f"{row['compiled_apart']:.1%}"] for row in rows])


def main() -> None:
    arguments = measure.parser(__doc__).parse_args()
    device = measure.begin(arguments)
    if device.type != "cpu":
        raise ConfigError("compiled steps are a CPU's; a GPU's are recorded: benchmarks/inner_step.py")
    check_compiles()
    torch.compiler.config.force_disable_caches = True  # or a second run would hardly compile
    model = metagpen.load(device=device)
    recogniser = recognise.load(model.card["recogniser"])
    rows = [measured(model, recogniser, count, 1 if arguments.quick else arguments.rounds or ROUNDS)
            for count in (PEOPLE[:1] if arguments.quick else PEOPLE)]
    print(page(rows))
    if arguments.quick or arguments.dry:
        return
    facts = {**measure.facts(device, arguments), "model": model.fingerprint, "bf16": has_bf16(device)}
    report.write_json(RESULTS, [measure.rounded(row) for row in rows], **facts)
    about = f"{report.machine_line(facts['machine'])}; commit {facts['commit']}."
    measure.put_on_page("compiled_step", f"{page(rows)}\n\n{about}", RESULTS, measure.PAGE)


if __name__ == "__main__":
    measure.run(main)
