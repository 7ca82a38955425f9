"""Sample portraits of people who do not exist from a model's own prior: how the demo's album was made.

    python examples/sample_album.py PEOPLE_FOLDER OUTPUT_FOLDER --people 3 --photos 7 --seed 1

Nobody's face is copied. A sampled person is the identity-conditioned start of a *mixture* of several people's
embeddings; a photo of that person is what the model restores from a blend of several people's photos that was reduced
to a few pixels, which leaves pose, tone and background and no identity. PEOPLE_FOLDER has a sub-folder of aligned
crops per person (with or without manifest.csv).
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import metagpen
from metagpen import recognise
from metagpen.evaluate.report import contact_sheet
from metagpen.evaluate.tasks import load_crop
from metagpen.faces import FFHQ_LANDMARKS, to_pil
from metagpen.identities import load_people
from metagpen.person import mean_identity

NAMES = ("ada", "bob", "eve", "dan", "fay", "gus")


def blend(crops: Tensor, pixels: int) -> Tensor:
    """Mean of [K, 3, S, S], reduced to pixels x pixels and enlarged again: [1, 3, S, S]."""
    size = crops.shape[-1]
    small = F.interpolate(crops.mean(dim=0, keepdim=True), size=(pixels, pixels), mode="area")
    return F.interpolate(small, size=(size, size), mode="bicubic").clamp(-1, 1)


@torch.no_grad()
def sample_person(model: metagpen.MetaGPEN, recogniser: recognise.Recogniser, albums: list[Tensor], photos: int,
                  pixels: int, emphasis: float, generator: torch.Generator) -> Tensor:
    """Portraits [photos, 3, S, S] of one invented person, mixed from the people of `albums` ([K_i, 3, S, S] each)."""
    identity = mean_identity(torch.stack([mean_identity(recogniser.embed(crops)) for crops in albums]))
    offset = emphasis * model.start(identity[None])
    portraits = []
    for _ in range(photos):
        one_each = torch.stack([crops[torch.randint(len(crops), (), generator=generator)] for crops in albums])
        poor = blend(one_each, pixels)
        share, filling = model.look(poor)
        portraits.append(model.gpen(poor, filling + share[:, :, None] * offset).clamp(-1, 1)[0])
    return torch.stack(portraits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--people", type=int, default=3)
    parser.add_argument("--photos", type=int, default=7)
    parser.add_argument("--mixed", type=int, default=3, help="people mixed into one")
    parser.add_argument("--pixels", type=int, default=20, help="side to which the blends are reduced")
    parser.add_argument("--emphasis", type=float, default=0.9, help="times the start's offset")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = metagpen.load(arguments.model)
    recogniser = recognise.load(model.card["recogniser"])
    generator = torch.Generator().manual_seed(arguments.seed)
    people = load_people(arguments.folder).min_photos(5)
    names, lines = list(people), []
    arguments.output.mkdir(parents=True, exist_ok=True)
    with open(arguments.output / "manifest.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "file", *(f"{axis}{i}" for i in range(5) for axis in "xy")])
        for name in NAMES[:arguments.people]:
            chosen = torch.randperm(len(names), generator=generator)[:arguments.mixed]
            albums = [torch.stack([load_crop(photo, model.size)[0] for photo in people[names[i]]]) for i in chosen]
            portraits = sample_person(model, recogniser, albums, arguments.photos, arguments.pixels,
                                      arguments.emphasis, generator)
            (arguments.output / name).mkdir(exist_ok=True)
            for i, portrait in enumerate(portraits, start=1):
                to_pil(portrait).save(arguments.output / name / f"{i}.jpg", quality=95)
                marks = (FFHQ_LANDMARKS * model.size).round(2).ravel().tolist()
                table.writerow([name, f"{name}/{i}.jpg", *marks])
            lines.append([(f"{name} {i + 1}", to_pil(portrait)) for i, portrait in enumerate(portraits)])
    sheet = arguments.output.with_name(arguments.output.name + "_sheet.png")
    contact_sheet(lines, tile=128).save(sheet)
    print(f"portraits: {arguments.output}; all of them on one sheet: {sheet}")


if __name__ == "__main__":
    main()
