"""Many people on one model: learn them in one batch into a store, then restore everybody's photos in one pass.

    python examples/many_people.py

Run it twice: the second time nobody is learned again, because a store goes on where it was. With other STEPS it
refuses, because its people would no longer have been learned alike: delete the store's folder, or name another one.
"""

from __future__ import annotations

from pathlib import Path

import torch

import metagpen
from metagpen import degrade
from metagpen.album import OWN_ALBUM
from metagpen.evaluate.report import contact_sheet
from metagpen.faces import load_photo, save_photo, to_pil, to_tensor
from metagpen.identities import People

OUTPUT = Path("example_out/many_people")
SHOTS = 3  # photos to learn each person from
STEPS = 4


def main() -> None:
    model = metagpen.load()
    album = People.from_folder(OWN_ALBUM)  # a folder with a sub-folder of photos per person
    support = {name: [photo.path for photo in photos[:SHOTS]] for name, photos in album.items()}

    store = metagpen.PersonStore(OUTPUT / "people", model)  # a folder, or a URL such as s3://bucket/people
    there = len(store)
    metagpen.adapt_many(model, support, steps=STEPS, store=store, on_error=print)
    print(f"learned {len(store) - there} people, {there} were in the store: {', '.join(store)}")

    held_out = torch.stack([to_tensor(load_photo(album[name][SHOTS].path)) for name in store])
    degraded = degrade.by_name("heavy")(held_out, torch.Generator().manual_seed(0))
    restored = metagpen.restore_many(model, [store[name] for name in store], degraded)

    sheet = OUTPUT / "restored.png"
    columns = {"degraded": degraded, "generic": model.restore(degraded), "personal": restored, "truth": held_out}
    save_photo(contact_sheet([[(f"{name}: {label}", to_pil(images[i])) for label, images in columns.items()]
                              for i, name in enumerate(store)]), sheet)
    print(f"a line per person: {sheet.resolve()}")
    print(f"one file per person: {Path(store.where).resolve()}")


if __name__ == "__main__":
    main()
