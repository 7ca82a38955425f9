"""What do many people cost: learning them together, starting a thousand, restoring them together, keeping them small?

*together*: `adapt_many` of n people, at most 64 in a batch, against one person alone, seconds per person (the speed
does not depend on the picture, so the photos are noise); and one person with all 32 steps. *growth*: `adapt_many` with
the start alone (0 steps) into a store on disk, fed from a generator, with a straight line through the seconds and the
memory that the process had at most. *serving*: `restore_many` of n photos of n people against one by one. *small
files*: the people of the package's own album, compressed to 64 KB and less: bytes, and what it costs on the photos that
they were not learned from. That album was sampled from the model: it tells the difference to the uncompressed Person,
not how good either is.

At 128 px the embedded model; at other sizes random weights, for which everything but the quality is measured.

    python benchmarks/many_people.py                              # CPU, 128 px, 7 minutes on two idle cores
    python benchmarks/many_people.py --device cuda --size 512     # GPU; each size keeps its own figures
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial

import measure
import numpy as np
import torch
from torch import Tensor

from metagpen import AdaptConfig, MetaGPEN, Person, PersonStore, adapt, adapt_many, recognise, restore_many
from metagpen.album import read_album
from metagpen.errors import MetagpenError
from metagpen.evaluate import report
from metagpen.evaluate.engine import named_degradations
from metagpen.evaluate.metrics import cosine, psnr
from metagpen.evaluate.tasks import damage, load_task

SEED, SHOTS, STEPS = 0, 5, 32
PEOPLE = {"cpu": {128: [1, 4, 16], 512: [1]}, "cuda": {128: [1, 4, 16, 64, 256], 512: [1, 4, 16]}}
MOST_TOGETHER = 64
KILOBYTES = (64,)
BY_RULE, WITH_TAIL = "by the model's rule", "with the encoder's tail, at hand-set rates"
MOST_KILOBYTES, MOST_COSINE, MOST_DB = 64, 0.005, 0.05


def photos_of(person: int, size: int) -> Tensor:
    """Noise [SHOTS, 3, size, size], which counts as aligned photos."""
    return torch.rand(SHOTS, 3, size, size, generator=torch.Generator().manual_seed(person)) * 2 - 1


def people(count: int, size: int) -> Iterator[tuple[str, Tensor]]:
    """One after the other, as a source of millions would come."""
    return ((f"{i:07}", photos_of(i, size)) for i in range(count))


def config_of(steps: int) -> AdaptConfig:
    """The default configuration without the rule, so that every size takes the same steps."""
    return AdaptConfig(rule=False, seed=SEED, steps=steps)


def learning(model: MetaGPEN, recogniser: recognise.Recogniser, counts: Sequence[int], steps: int,
             rounds: int) -> list[measure.Row]:
    """Seconds per person by people in the batch."""
    def learn(count: int) -> None:
        adapt_many(model, people(count, model.size), steps, config=config_of(steps), recogniser=recogniser,
                   batch=min(count, MOST_TOGETHER))

    ways = {f"{count} people, {steps} steps": partial(learn, count) for count in counts}
    found = measure.take_turns(ways, rounds, model.device).values()
    return [{"what": "learning", "people": count, "steps": steps,
             **{key: value / count for key, value in seconds.row().items()}}
            for count, seconds in zip(counts, found, strict=True)]


def one_person(model: MetaGPEN, recogniser: recognise.Recogniser, steps: int, rounds: int) -> measure.Row:
    """All the steps, for one person."""
    learn = partial(adapt, model, photos_of(0, model.size), steps, config=config_of(steps), recogniser=recogniser)
    return {"what": "one person", "people": 1, "steps": steps,
            **measure.take_turns({"one person": learn}, rounds, model.device)["one person"].row()}


def growth(model: MetaGPEN, recogniser: recognise.Recogniser, counts: Sequence[int]) -> list[measure.Row]:
    """The start alone, written into a store; each count once, after a warm-up."""
    rows = []
    for count in (counts[0], *counts):
        knows_memory = measure.forget_peak_rss()
        with tempfile.TemporaryDirectory() as folder:
            store = PersonStore(folder, model)
            learn = partial(adapt_many, model, people(count, model.size), 0, config=config_of(0), recogniser=recogniser,
                            store=store)
            found = measure.take_turns({f"{count} people, 0 steps": learn}, 1, model.device, warmup=0)
            seconds, = (one.median for one in found.values())
            if len(store) != count:
                raise MetagpenError(f"{len(store)} people are in the store in place of {count}")
        peak = measure.peak_rss() if knows_memory else None
        rows.append({"what": "growth", "people": count, "steps": 0, "seconds": seconds, "peak_bytes": peak})
    return rows[1:]


def line(rows: Sequence[measure.Row]) -> measure.Row:
    """seconds = a + b · people by least squares, and the largest relative error at a measured point."""
    counts, seconds = (np.array([row[key] for row in rows], float) for key in ("people", "seconds"))
    b, a = np.polyfit(counts, seconds, 1, w=1 / seconds)  # relative errors: small runs count as much as large ones
    return {"what": "line", "steps": 0, "a": float(a), "b": float(b),
            "error": float(np.abs((a + b * counts) / seconds - 1).max())}


def serving(model: MetaGPEN, counts: Sequence[int], rounds: int) -> list[measure.Row]:
    """Photos of different people restored in one pass, and one by one; seconds per photo."""
    generator = torch.Generator().manual_seed(SEED)
    rows = []
    for count in counts:
        generic = [Person.generic(model) for _ in range(count)]
        persons = [Person(model, one.spec, {name: value + 0.01 * torch.randn(value.shape, generator=generator).to(value)
                                            for name, value in one.parameters.items()}) for one in generic]
        images = torch.rand(count, 3, model.size, model.size, generator=generator) * 2 - 1
        ways = {"together": partial(restore_many, model, persons, images, batch=count),
                "one by one": lambda persons=persons, images=images: [
                    person.restore_batch(image[None]) for person, image in zip(persons, images, strict=True)]}
        found = measure.take_turns(ways, rounds, model.device)
        rows += [{"what": "serving", "way": way, "people": count,
                  **{key: value / count for key, value in seconds.row().items()}} for way, seconds in found.items()]
    return rows


def small_files(model: MetaGPEN, recogniser: recognise.Recogniser, steps: int, most_people: int | None,
                limits: Sequence[int]) -> list[measure.Row]:
    """How large the album's people are as the rule learns them, and with the encoder's tail learned too, and what
    compressing the latter costs: mean over people of their held-out photos' means."""
    album, heavy, judge = read_album("own"), named_degradations(["heavy"])["heavy"], recognise.load()
    found: dict[str | int, list[tuple[float, float, float, int]]] = {kind: [] for kind in (BY_RULE, WITH_TAIL, *limits)}
    for name in list(album)[:most_people]:
        task = load_task(album, name, SHOTS, model.size, SEED, min_queries=1)
        poor = damage(task, "heavy", heavy, SEED)
        by_rule, whole = (adapt(model, task.support, steps, recogniser=recogniser,
                                config=config_of(steps).model_copy(update={"rule": rule})) for rule in (True, False))
        truth = judge.embed(task.queries, task.landmarks)
        for kind in found:
            person = {BY_RULE: by_rule, WITH_TAIL: whole}.get(kind) or whole.compress(max_bytes=kind * 1024)
            restored = person.restore_batch(poor).cpu()
            found[kind].append((len(person.to_bytes()) / 1024, float(psnr(restored, task.queries).mean()),
                                float(cosine(judge.embed(restored, task.landmarks), truth).mean()),
                                person.spec.tail_rank))
    means = {kind: np.mean(values, axis=0) for kind, values in found.items()}
    return [{"what": "small file", "kind": kind if isinstance(kind, str) else f"{WITH_TAIL}, at most {kind} KB",
             "limit_kilobytes": None if isinstance(kind, str) else kind, "people": len(found[kind]), "steps": steps,
             "kilobytes": float(mean[0]), "largest_kilobytes": max(value[0] for value in found[kind]),
             "psnr": float(mean[1]), "identity": float(mean[2]), "tail_rank": float(mean[3]),
             **({} if isinstance(kind, str) else {"psnr_change": float(mean[1] - means[WITH_TAIL][1]),
                                                  "identity_change": float(mean[2] - means[WITH_TAIL][2])})}
            for kind, mean in means.items()]


def of_kind(rows: Sequence[measure.Row], what: str, **keys: object) -> list[measure.Row]:
    return [row for row in rows if row["what"] == what and all(row[key] == value for key, value in keys.items())]


def targets_table(rows: Sequence[measure.Row]) -> str:
    device, size = rows[0]["device"], rows[0]["size"]
    batches = {row["people"]: row["seconds"] for row in of_kind(rows, "learning")}
    lines = []

    def judge(wish: str, measured: str, reached: bool) -> None:
        lines.append([wish, measured, measure.verdict(reached)])

    alone = of_kind(rows, "one person")[0]
    most = {("cpu", 128): 8, ("cuda", 512): 3}.get((device, size))
    if most and alone["steps"] == STEPS:
        judge(f"{size} px, 5 photos, 32 steps, alone: under {most} s", f"{alone['seconds']:.2f} s",
              alone["seconds"] < most)
    if device == "cuda" and {1, 64} <= batches.keys():
        ratio = batches[1] / batches[64]
        judge("64 people: at least 10x the throughput of one at a time", f"{ratio:.1f}x", ratio >= 10)
    together = [seconds for people, seconds in batches.items() if people > 1]
    if (device, size) == ("cuda", 512) and together:
        best = min(together)
        judge("512 px, 5 photos, 32 steps, in a batch: under 1 s per person", f"{best:.2f} s", best < 1)
    for row in of_kind(rows, "small file", kind=BY_RULE):
        judge(f"a Person at {size} px: at most {MOST_KILOBYTES} KB", f"{row['largest_kilobytes']:.1f} KB",
              row["largest_kilobytes"] <= MOST_KILOBYTES)
    for row in of_kind(rows, "small file", limit_kilobytes=MOST_KILOBYTES):
        judge(f"one with the encoder's tail, compressed: at most {MOST_KILOBYTES} KB",
              f"{row['largest_kilobytes']:.1f} KB", row["largest_kilobytes"] <= MOST_KILOBYTES)
        judge(f"at most {MOST_COSINE} identity cosine and {MOST_DB} dB lost by it",
              f"{row['identity_change']:+.4f}, {row['psnr_change']:+.3f} dB",
              row["identity_change"] >= -MOST_COSINE and row["psnr_change"] >= -MOST_DB)
    return report.table(["to be reached", "measured", "verdict"], lines) if lines else ""


def learning_table(rows: Sequence[measure.Row]) -> str:
    batches = of_kind(rows, "learning")
    alone, steps = batches[0]["seconds"], batches[0]["steps"]
    times = "" if steps == STEPS else f" (these {steps}, {STEPS / steps:g} times)"
    lines = [[str(row["people"]), measure.milliseconds(row), f"{alone / row['seconds']:.2f}x",
              duration(1e6 * row["seconds"] * STEPS / row["steps"])] for row in batches]
    return report.table([f"people, at most {MOST_TOGETHER} in a batch", f"ms per person, {steps} steps",
                         "against one at a time", f"a million people, {STEPS} steps{times}"], lines)


def growth_table(rows: Sequence[measure.Row]) -> str:
    lines = [[str(row["people"]), f"{row['seconds']:.1f}", f"{1e3 * row['seconds'] / row['people']:.1f}",
              "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"]
             for row in of_kind(rows, "growth")]
    table = report.table(["people, 0 steps", "seconds", "ms per person", "memory at most, MiB"], lines)
    if len(lines) < 3:  # through two points there is always a line
        return table
    fitted = of_kind(rows, "line")[0]
    return (f"{table}\n\nseconds = {fitted['a']:.2f} + {fitted['b']:.5f} · people, within {fitted['error']:.1%} of the "
            f"measured ones; a million people: {duration(fitted['a'] + 1e6 * fitted['b'])} on this machine.")


def serving_table(rows: Sequence[measure.Row]) -> str:
    lines = []
    for count in dict.fromkeys(row["people"] for row in of_kind(rows, "serving")):
        single, = of_kind(rows, "serving", people=count, way="one by one")
        together, = of_kind(rows, "serving", people=count, way="together")
        lines.append([str(count), measure.milliseconds(single), measure.milliseconds(together),
                      f"{single['seconds'] / together['seconds']:.2f}x"])
    return report.table(["photos of different people", "ms each, one by one", "ms each, together", "faster"], lines)


def files_table(rows: Sequence[measure.Row]) -> str:
    lines = [[row["kind"], f"{row['tail_rank']:.1f}", f"{row['kilobytes']:.1f}", f"{row['psnr']:.2f}",
              f"{row['psnr_change']:+.3f}" if "psnr_change" in row else "–", f"{row['identity']:.3f}",
              f"{row['identity_change']:+.4f}" if "identity_change" in row else "–"]
             for row in of_kind(rows, "small file")]
    return report.table(["file", "tail rank", "KB", "PSNR dB", "change", "identity", "change"], lines) if lines else ""


def duration(seconds: float) -> str:
    for name, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.1f} s"


def page(rows: Sequence[measure.Row]) -> str:
    parts = [targets_table(rows), learning_table(rows), growth_table(rows), serving_table(rows), files_table(rows)]
    return "\n\n".join(part for part in parts if part)


def measured(size: int, device: torch.device, counts: Sequence[int], growing: Sequence[int], batch_steps: int,
             steps: int = STEPS, rounds: int = 2, album_people: int | None = None,
             limits: Sequence[int] = KILOBYTES) -> list[measure.Row]:
    model = measure.model_of(size, device)
    recogniser = recognise.load("embedded", device=str(device))
    rows = [*learning(model, recogniser, counts, batch_steps, rounds), one_person(model, recogniser, steps, rounds),
            *(grown := growth(model, recogniser, growing)), line(grown), *serving(model, counts, 2 * rounds)]
    if size == 128:
        rows += small_files(model, recogniser, steps, album_people, limits)
    return [{"device": device.type, "size": size, **row} for row in rows]


def main(given: Sequence[str] | None = None) -> list[measure.Row]:
    parser = measure.parser(__doc__)
    parser.add_argument("--size", type=int, default=128, choices=(128, 512))
    parser.add_argument("--people", type=int, nargs="+",
                        help="together; default: 1 4 16, on a GPU at 128 px also 64 256")
    parser.add_argument("--growth", type=int, nargs="+", default=[10, 100, 300, 1000],
                        help="people with the start only")
    parser.add_argument("--batch-steps", type=int,
                        help="inner steps where people learn together; default: 8, on a GPU 32")
    arguments = parser.parse_args(given)
    device = measure.begin(arguments)
    if arguments.quick:
        rows = measured(32, device, [1, 2], [1, 3], 1, steps=1, rounds=1)
    else:
        counts = arguments.people or PEOPLE[device.type][arguments.size]
        batch_steps = arguments.batch_steps or (STEPS if device.type == "cuda" else 8)
        rows = measured(arguments.size, device, counts, arguments.growth, batch_steps, rounds=arguments.rounds or 2)
    name = "many_people" if arguments.size == 128 else f"many_people_{arguments.size}"
    measure.publish(name, arguments, rows, measure.facts(device, arguments, seed=SEED, shots=SHOTS), page)
    return rows


if __name__ == "__main__":
    measure.run(main)
