"""Your own folder of people: read it, split it by identity, draw episodes, and meta-train on it.

    python examples/own_dataset.py [FOLDER]

FOLDER has a sub-folder of photos per person; without one it is the demo album. The split is written as a file, so that
every later command keeps the same people apart. One meta-step of the smallest size follows, to show the way; the real
run is printed at the end. Other layouts (CelebA-HQ, FFHQ, LFW, shards) are read by `load_people(..., layout=)`, see
docs/datasets.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import metagpen
from metagpen.album import OWN_ALBUM
from metagpen.identities import episode, load_people, split, write_split
from metagpen.meta.train import MetaConfig, meta_train

OUTPUT = Path("example_out/own_dataset")
FRACTIONS = {"train": 2 / 3, "val": 1 / 3}  # of the people; nobody is in two parts
SHOTS, QUERIES = 2, 2
META_STEPS = 1  # some hundreds for a result
INNER_STEPS = 1  # 8 for a result


def main(folder: Path = OWN_ALBUM) -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    people = load_people(folder).min_photos(SHOTS + QUERIES)
    parts = split(people, fractions=FRACTIONS, seed=0)
    split_file = OUTPUT / "split.csv"
    write_split(parts, split_file)
    for part, own in parts.items():
        print(f"{part}: {', '.join(own)}")

    task = episode(parts["train"], SHOTS, QUERIES, torch.Generator().manual_seed(0))
    print(f"an episode: learn {task.person} from {[photo.path.name for photo in task.support]}, "
          f"be judged on {[photo.path.name for photo in task.query]}")

    config = MetaConfig(
        data=[folder],
        split=split_file,
        output_dir=OUTPUT / "meta",
        loop="lslr",  # or reptile, fomaml, maml, anil, meta_sgd, multi_step
        inner={"steps": INNER_STEPS, "batch_size": 1},
        people=1,
        shots=(1, SHOTS),
        queries=1,
        meta_steps=META_STEPS,
        validate_people=1,
        validate_queries=1,
        validate_degradations=["heavy"],
    )
    trained = meta_train(config, resume=False)
    person = metagpen.adapt(metagpen.load(trained), [photo.path for photo in task.support], steps=INNER_STEPS)
    print(f"adapt follows the rule that was learned, here {person.metadata['steps']} step: {trained.resolve()}")
    print(f"the split: {split_file.resolve()}")
    print(f"in earnest (after make setup-lpips): metagpen meta-train -c configs/meta_128.yml -s 'data=[{folder}]' "
          f"-s split={split_file} -s part=train -s validate_part=val -s 'shots=[1, 4]' -s loss_recogniser=null")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
