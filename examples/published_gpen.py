"""Published GPEN weights: loaded by name or from a file, then adapted like any model.

    python examples/published_gpen.py [NAME_OR_FILE]

NAME_OR_FILE is a name that `metagpen weights` lists (downloaded once; later reads are checked against the SHA-256 of
that download), or any GPEN generator, .pth or .safetensors, whose size and widths are read off its tensors. Without one
this takes what was downloaded before; if that is nothing, it makes a random file of the published layout, which shows
the way and restores nothing. Published weights bring no identity-conditioned start: learning a person begins at zero.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import metagpen
from metagpen.album import OWN_ALBUM
from metagpen.evaluate.report import contact_sheet
from metagpen.faces import load_photo, save_photo
from metagpen.gpen import GPEN
from metagpen.weights import available

OUTPUT = Path("example_out/published_gpen")
SHOTS = 2
STEPS = 2
RANDOM_SHAPE = {"size": 128, "channel_multiplier": 1, "narrow": 0.25}  # GPEN-BFR-512: 512, 2 and 1


def random_checkpoint() -> Path:
    """A generator with random weights, in a .pth as the authors publish theirs: its state dict alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = GPEN(**RANDOM_SHAPE).state_dict()
    file = OUTPUT / "random.pth"
    torch.save(state, file)
    return file


def source() -> str | Path:
    """What was downloaded before, else a random file; says which."""
    for name, what, size, where in available():
        print(f"{name}: {what}, {size}, {where}")
        if name != "embedded" and Path(where).is_file():
            return name
    print(f"No published weights are here; give a name or a file to load them. With RANDOM weights of the same layout "
          f"({RANDOM_SHAPE}) the pictures below are noise.")
    return random_checkpoint()


def main(weights: str | Path | None = None) -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    model = metagpen.load(weights or source())
    parameters = sum(value.numel() for value in model.parameters())
    print(f"loaded {model.card['source']}: {model.size} px, {parameters / 1e6:.0f} M parameters, start: {model.start}")

    *photos, old = sorted((OWN_ALBUM / "ada").glob("*.jpg"))[: SHOTS + 1]
    person = metagpen.adapt(model, photos, steps=STEPS)
    file = person.save(OUTPUT / "ada.safetensors")
    sheet = OUTPUT / "restored.png"
    tiles = [("photo", load_photo(old)), ("generic", person.restore(old, 0.0, aligned=True)),
             ("personal", person.restore(old, aligned=True))]
    save_photo(contact_sheet([tiles]), sheet)
    print(f"the Person: {file.resolve()}")
    print(f"photo, generic, personal: {sheet.resolve()}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
