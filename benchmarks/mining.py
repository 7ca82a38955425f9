"""What the thresholds of identity mining are worth: precision and recall on people whose names are known.

The first three photos of each training person of celeba_wild_256, and all photos of its val people, by the embedded
recogniser with the mean landmarks, as mining sees them. Photos come from `$METAGPEN_SHARED`, or the folder `shared`
beside this repository.

    python benchmarks/mining.py    # writes benchmarks/results/mining.json and the table in docs/datasets.md
"""

from __future__ import annotations

import argparse
import json
import platform

import measure
import torch

from metagpen.evaluate import report
from metagpen.identities import People, embed_photos, mining_quality
from metagpen.recognise import load

RESULTS = measure.RESULTS / "mining.json"
PAGE = measure.ROOT / "docs" / "datasets.md"
THRESHOLDS = (0.4, 0.45, 0.5, 0.55, 0.6)
PHOTOS = {"train": 3, "val": None}  # of each person; None: all


def figures(part: str, people: People) -> list[dict]:
    chosen = [(name, photo) for name, photos in people.items()
              for photo in sorted(photos, key=lambda photo: photo.path.name)[:PHOTOS[part]]]
    names = [name for name, _ in chosen]
    embeddings = embed_photos([photo for _, photo in chosen], load().embed)
    person = torch.tensor([sorted(people).index(name) for name in names])
    strangers = (embeddings @ embeddings.T)[person[:, None] < person]  # each pair of two people once
    return [{"part": part, "people": len(people), "photos": len(chosen), "threshold": threshold,
             **mining_quality(embeddings, names, threshold), "stranger_pairs": len(strangers),
             "stranger_pairs_above": int((strangers > threshold).sum())} for threshold in THRESHOLDS]


def table(rows: list[dict]) -> str:
    heads = [f"{r['people']} {r['part']} people, {r['photos']} photos: precision | recall | strangers above"
             for r in rows if r["threshold"] == THRESHOLDS[0]]
    lines = [f"| threshold | {' | '.join(heads)} |", "|---:|" + "---:|" * 3 * len(heads)]
    for threshold in THRESHOLDS:
        cells = [f"{r['precision']:.1%} ({r['wrong']:,} of {r['pairs']:,} pairs wrong) | {r['recall']:.0%} "
                 f"| {r['stranger_pairs_above']} of {r['stranger_pairs']:,}"
                 for r in rows if r["threshold"] == threshold]
        lines.append(f"| {threshold:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(2)
    rows = [row for part in PHOTOS for row in figures(part, measure.wild_people(part))]
    facts = {"commit": report.commit(), "torch": torch.__version__, "machine": platform.machine(), "threads": 2}
    report.write_text(RESULTS, json.dumps({"rows": rows, **facts}, indent=1) + "\n")
    measure.put_on_page("mining", table(rows), RESULTS, PAGE)


if __name__ == "__main__":
    measure.run(main)
