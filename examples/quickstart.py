"""Quickstart: load the model, learn a person from a few photos, restore with them, turn the dial, save and load.

    python examples/quickstart.py

The person is ada of the demo album, who does not exist. Four of her photos are learned from, another one is degraded
and restored. For somebody real put paths of their photos into `photos` and an old photo into `restore`.
"""

from __future__ import annotations

from pathlib import Path

import torch

import metagpen
from metagpen import degrade
from metagpen.album import OWN_ALBUM
from metagpen.evaluate.report import contact_sheet
from metagpen.faces import load_photo, save_photo, to_pil, to_tensor

OUTPUT = Path("example_out/quickstart")
SHOTS = 4  # photos to learn from
STEPS = 8  # gradient steps; 32 is the default, 0 is the identity-conditioned start alone
STRENGTHS = (0.0, 0.5, 1.0)  # the dial: the generic model ... fully personal
SEED = 2  # of the damage; another one draws another mixture of blur, noise and blocks


def degraded_photo(path: Path) -> Path:
    """The photo with most of its identity taken out, written to OUTPUT."""
    generator = torch.Generator().manual_seed(SEED)
    poor = degrade.by_name("heavy")(to_tensor(load_photo(path))[None], generator)[0]
    file = OUTPUT / "degraded.png"
    save_photo(to_pil(poor), file)
    return file


def main() -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    *photos, held_out = sorted((OWN_ALBUM / "ada").glob("*.jpg"))[: SHOTS + 1]

    model = metagpen.load()  # or a checkpoint: metagpen.load("GPEN-BFR-512.pth")
    person = metagpen.adapt(model, photos, steps=STEPS)  # `model` itself is never changed
    print(f"learned from {person.metadata['shots']} photos in {person.metadata['seconds']} s")

    file = person.save(OUTPUT / "ada.safetensors")
    person = metagpen.Person.load(file, model)  # refuses a file of another model

    old = degraded_photo(held_out)
    dial = [(f"strength {strength:g}", person.restore(old, strength, aligned=True)) for strength in STRENGTHS]
    sheet = OUTPUT / "strengths.png"
    save_photo(contact_sheet([[("degraded", load_photo(old)), *dial, ("truth", load_photo(held_out))]]), sheet)

    print(f"the Person, {file.stat().st_size / 1000:.0f} kB: {file.resolve()}")
    print(f"degraded, restored at strengths {', '.join(map(str, STRENGTHS))}, truth: {sheet.resolve()}")


if __name__ == "__main__":
    main()
