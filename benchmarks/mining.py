"""What the thresholds of identity mining are worth: precision and recall on people whose names are known.

The first three photos of each training person of celeba_wild_256, and all photos of its val people, by the embedded
recogniser with the mean landmarks, as mining sees them. Photos come from `$METAGPEN_SHARED`, or the folder `shared`
beside this repository.

    python benchmarks/mining.py    # writes benchmarks/results/mining.json and the table in docs/datasets.md
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import measure
import torch

from metagpen.errors import MetagpenError
from metagpen.evaluate import report
from metagpen.evaluate.report import replace_between
from metagpen.identities import People, embed_photos, mining_quality, split
from metagpen.recognise import load

ROOT = Path(__file__).resolve().parents[1]
SHARED = measure.SHARED
RESULTS = ROOT / "benchmarks" / "results" / "mining.json"
PAGE = ROOT / "docs" / "datasets.md"
MARKERS = "<!-- mining:begin -->", "<!-- mining:end -->"
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
    torch.set_num_threads(2)
    parts = split(People.from_folder(SHARED / "photos" / "celeba_wild_256"), SHARED / "photos" / "splits.csv",
                  strict=False)
    rows = [row for part in PHOTOS for row in figures(part, parts[part])]
    facts = {"commit": report.commit(), "torch": torch.__version__, "machine": platform.machine(), "threads": 2}
    RESULTS.write_text(json.dumps({"rows": rows, **facts}, indent=1) + "\n")
    PAGE.write_text(replace_between(PAGE.read_text(), *MARKERS, table(rows)))


if __name__ == "__main__":
    try:
        main()
    except MetagpenError as error:
        sys.exit(f"error: {error}")
