"""How well a degraded face says who it is: cosines to its own person's template and to everybody else's.

Templates are unit mean embeddings by the recogniser of the embedded model's card, as a Person file holds them. A face
is looked at as it came ("input"), as the generic model restores it ("generic"), by the better of the two for each
person ("better"), and by the unit mean of both embeddings ("mean"). People whom no training saw: london_512 (a
template from one photo; lisa from four) and the val people of celeba_wild_256 (from five). Photos come from
`$METAGPEN_SHARED`, or the folder `shared` beside this repository; a set that is not there is left out.

    python benchmarks/matching.py    # writes benchmarks/results/matching.json and the table in docs/restore.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import measure
import torch
from torch import Tensor
from torch.nn.functional import normalize

import metagpen
from metagpen import recognise
from metagpen.errors import MetagpenError
from metagpen.evaluate import report
from metagpen.evaluate.engine import named_degradations
from metagpen.evaluate.tasks import Task, damage, load_crop, load_task
from metagpen.identities import People, fixed_episode
from metagpen.model import MetaGPEN
from metagpen.person import mean_identity
from metagpen.restore import Gallery
from metagpen.restore.matching import LEGIBLE, SAME_PERSON

RESULTS = measure.RESULTS / "matching.json"
PAGE = measure.ROOT / "docs" / "restore.md"
PHOTOS = measure.SHARED / "photos"
DEGRADATIONS = ("none", "moderate", "heavy", "hard", "extreme")
WAYS = ("input", "generic", "better", "mean")
USED = "better"  # what `metagpen.restore` does
MAX_QUERIES = 4
THRESHOLDS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)


def sets() -> Iterator[tuple[str, People, dict[str, int]]]:
    """(name, people, photos for each one's template) of every set that is there."""
    if (PHOTOS / "london_512").is_dir():
        london = People.from_folder(PHOTOS / "london_512")
        yield "london_512", london, {name: 4 if name == "lisa" else 1 for name in london}
    if (PHOTOS / "celeba_wild_256").is_dir():
        val = measure.wild_people()
        yield "celeba_wild_256, val", val, dict.fromkeys(val, 5)


def template(people: People, task: Task, shots: int, recogniser: recognise.Recogniser) -> Tensor:
    """The unit mean embedding [D] of the person's support photos."""
    crops = [load_crop(photo, task.support.shape[-1])
             for photo in fixed_episode(people, task.person, shots, 0, largest=shots).support]
    return mean_identity(recogniser.embed(*map(torch.stack, zip(*crops, strict=True))))


@torch.no_grad()
def cosines(model: MetaGPEN, recogniser: recognise.Recogniser, people: People,
            shots: dict[str, int]) -> dict[str, dict[str, tuple[Tensor, Tensor, float]]]:
    """degradation -> way -> (cosines [faces, people], whose face it is [faces], share of legible faces)."""
    gallery = Gallery({}, model, recogniser)
    tasks = [load_task(people, name, shots[name], model.size, max_queries=MAX_QUERIES, min_queries=1)
             for name in people]
    templates = torch.stack([template(people, task, shots[task.person], recogniser) for task in tasks])
    owner = torch.cat([torch.full((len(task.queries),), i) for i, task in enumerate(tasks)])
    found = {}
    levels = named_degradations([name for name in DEGRADATIONS if name != "none"])
    for name in DEGRADATIONS:
        seen, legible = {"input": [], "generic": []}, []
        for task in tasks:
            poor = task.queries if name == "none" else damage(task, name, levels[name])
            legible += gallery.legible(poor)
            seen["input"].append(recogniser.embed(poor, task.landmarks))
            seen["generic"].append(recogniser.embed(model.restore(poor), task.landmarks))
        raw, generic = (torch.cat(parts) for parts in seen.values())
        by_way = {"input": raw @ templates.T, "generic": generic @ templates.T}
        by_way["better"] = torch.maximum(by_way["input"], by_way["generic"])
        by_way["mean"] = normalize(raw + generic, dim=1) @ templates.T
        found[name] = {way: (by_way[way], owner, sum(legible) / len(legible)) for way in WAYS}
    return found


def figures(cosine: Tensor, owner: Tensor, legible: float) -> dict[str, float]:
    """What one way of looking is worth on one set."""
    own = torch.arange(cosine.shape[1]) == owner[:, None]
    mine, others = cosine[own], cosine[~own]
    at_1_percent = others.quantile(0.99)
    return {"faces": len(cosine), "people": cosine.shape[1], "pairs": others.numel(), "legible": legible,
            "own_mean": mine.mean().item(), "own_5_percent": mine.quantile(0.05).item(),
            "others_mean": others.mean().item(), "others_99_percent": at_1_percent.item(),
            "others_99.9_percent": others.quantile(0.999).item(),
            "closest_is_own": (cosine.argmax(dim=1) == owner).double().mean().item(),
            "own_above_others_99_percent": (mine > at_1_percent).double().mean().item(),
            "at": {str(t): {"own": (mine >= t).double().mean().item(), "others": (others >= t).double().mean().item()}
                   for t in sorted({*THRESHOLDS, SAME_PERSON})}}


def page_table(rows: list[dict]) -> str:
    heads = ["set", "degradation", "own person", "5 % below", "others", "1 % above", "nearest is own", "legible",
             f"own >= {SAME_PERSON}", f"others >= {SAME_PERSON}"]
    lines = []
    for row in (row for row in rows if row["way"] == USED):
        at = row["at"][str(SAME_PERSON)]
        lines.append([row["set"], row["degradation"], *(f"{row[key]:.2f}" for key in (
            "own_mean", "own_5_percent", "others_mean", "others_99_percent")), f"{row['closest_is_own']:.0%}",
            f"{row['legible']:.0%}", f"{at['own']:.0%}", f"{at['others']:.1%}"])
    return report.table(heads, lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    model = metagpen.load()
    recogniser = recognise.load(model.card["recogniser"])
    rows = []
    for name, people, shots in sets():
        for degradation, ways in cosines(model, recogniser, people, shots).items():
            rows += [{"set": name, "degradation": degradation, "way": way, **measure.rounded(figures(*found))}
                     for way, found in ways.items()]
    if not rows:
        raise MetagpenError(f"neither london_512 nor celeba_wild_256 is in {PHOTOS}; set METAGPEN_SHARED")
    facts = {"model": model.fingerprint, "recogniser": recogniser.name, "used": USED, "same_person": SAME_PERSON,
             "severity_legible": LEGIBLE, "commit": report.commit(), "machine": report.machine()}
    report.write_json(RESULTS, rows, **facts)
    by = f"Model {model.fingerprint[:12]}, commit {facts['commit']}, {report.machine_line(facts['machine'])}."
    measure.put_on_page("matching", f"{page_table(rows)}\n\n{by}", RESULTS, PAGE)


if __name__ == "__main__":
    measure.run(main)
