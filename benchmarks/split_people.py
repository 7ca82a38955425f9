"""Who trains, who sets the rates, who judges: the split that the embedded models are made with.

From the shared split file: its val people stay val. Of its training people some are kept back from the recogniser and
the base (`kept`), so that the inner rule is learned on people whom neither knows, and some people of LFW are for
evaluation alone (`test`). Names differ between collections, so two folders could hold one person: the highest cosine
of mean embeddings between people of different parts is printed, by face-reidentification-retail-0095, beside the
lowest between halves of one person's photos.

    python benchmarks/split_people.py    # writes configs/people_128.csv
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import measure
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize

from metagpen import recognise
from metagpen.identities import PackedPhotos, People, load_people, pack, split, write_split
from metagpen.runs import embed_all

RECOGNISER = measure.SHARED / "weights" / "face-reidentification-retail-0095.fp16.xml"
KEPT = {"celeba_wild_256": (36, 8), "lfw_176": (24, 8)}  # set: people, photos that each must have
TEST = {"lfw_176": (30, 12)}  # room for eight shots and four queries


def drawn(people: People, wanted: dict[str, tuple[int, int]], generator: torch.Generator) -> list[str]:
    """People who have enough photos, drawn from each set."""
    chosen = []
    for name, (count, photos) in wanted.items():
        enough = sorted(one for one in people.min_photos(photos) if one.startswith(f"{name}/"))
        chosen += [enough[i] for i in torch.randperm(len(enough), generator=generator)[:count].tolist()]
    return chosen


def parts_of(people: People, file: Path) -> dict[str, People]:
    """Train, kept, val and test of the merged sets."""
    parts = split(people, file, strict=False)
    generator = torch.Generator().manual_seed(0)
    for part, wanted in (("test", TEST), ("kept", KEPT)):
        parts[part] = parts["train"].select(drawn(parts["train"], wanted, generator))
        parts["train"] = parts["train"].select(name for name in parts["train"] if name not in parts[part])
    return parts


def mean_embeddings(embeddings: Tensor, photos: PackedPhotos, every: slice = slice(None)) -> Tensor:
    """[people, D], over each person's photos or a part of them."""
    return torch.stack([normalize(embeddings[photos.person == i][every].mean(0), dim=0)
                        for i in range(len(photos.names))])


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    console = Console()
    folder = measure.SHARED / "photos"
    people = load_people(*(folder / name for name in measure.SETS))
    parts = parts_of(people, folder / "splits.csv")
    with TemporaryDirectory() as cache:
        photos = pack(people, 128, Path(cache), workers=2)
        embeddings = embed_all(recognise.load(str(RECOGNISER)), photos, True, Path(cache))
    means = mean_embeddings(embeddings, photos)
    alike = (means @ means.T).fill_diagonal_(-1)
    halves = (mean_embeddings(embeddings, photos, slice(0, None, 2))
              * mean_embeddings(embeddings, photos, slice(1, None, 2))).sum(1)
    console.print(f"one person's halves: lowest cosine {float(halves.min()):.2f}, median {float(halves.median()):.2f}")
    places = {part: [photos.names.index(name) for name in of] for part, of in parts.items()}
    for one, other in combinations(places, 2):
        console.print(f"{one} and {other}: highest cosine {float(alike[places[one]][:, places[other]].max()):.2f}")
    write_split(parts, measure.PEOPLE)
    for part, of in parts.items():
        console.print(f"{part}: {len(of)} people, {sum(map(len, of.values()))} photos")
    console.print(f"done: {measure.PEOPLE}")


if __name__ == "__main__":
    measure.run(main)
