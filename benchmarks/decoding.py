"""How many photos a second come out of shards, on one thread, and what do the shards weigh?

Writes shards of 600 photos of celeba_wild_256 (128, 256 px) and of 51 photos of london_512 (512 px) into a temporary
folder, and reads random batches of 16 as a trainer does, best of five rounds. Photos come from `$METAGPEN_SHARED`, or
the folder `shared` beside this repository. JPEG quality is told as the PSNR of the shard's photo to the resized one.

    python benchmarks/decoding.py    # writes benchmarks/results/decoding.json and the table in docs/datasets.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import measure
import torch

from metagpen.evaluate import report
from metagpen.identities import People, StreamedPhotos, pack, read_shards, write_shards

RESULTS = measure.RESULTS / "decoding.json"
PAGE = measure.ROOT / "docs" / "datasets.md"
SETS = {128: ("celeba_wild_256", 600), 256: ("celeba_wild_256", 600), 512: ("london_512", 51)}
BATCH, ROUNDS = 16, 5


def first_photos(collection: str, count: int) -> People:
    """The first photos of a collection, whoever is on them."""
    people = People.from_folder(measure.SHARED / "photos" / collection)
    wanted = set(list(people.photos())[:count])
    kept = {name: [photo for photo in photos if photo in wanted] for name, photos in people.items()}
    return People({name: photos for name, photos in kept.items() if photos}, collection)


def timed(work, *arguments) -> tuple[float, object]:
    start = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - start, result


def rate(photos: StreamedPhotos) -> float:
    """Photos a second of random batches, best round; the files are in the page cache."""
    best = 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(ROUNDS):
        batches = torch.randperm(len(photos), generator=generator).split(BATCH)
        seconds, _ = timed(lambda: [photos.batch(index) for index in batches])  # noqa: B023 (called at once)
        best = max(best, len(photos) / seconds)
    return best


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    error = (one.float() - other.float()).square().mean((1, 2, 3))
    return float((10 * torch.log10(255**2 / error)).mean())


def figures(size: int, folder: Path) -> dict:
    collection, count = SETS[size]
    people = first_photos(collection, count)
    written, _ = timed(write_shards, people, folder, size)
    opened, shards = timed(read_shards, folder)
    weight = sum(file.stat().st_size for file in folder.iterdir())
    photos = StreamedPhotos(shards, size)
    return {"size": size, "collection": collection, "photos": len(photos), "kB_per_photo": weight / len(photos) / 1e3,
            "psnr_of_jpeg_dB": psnr(pack(shards, size).images, pack(people, size).images),
            "decoded_per_second": rate(photos), "written_per_second": len(photos) / written,
            "opened_per_second": len(photos) / opened}


def table(rows: list[dict]) -> str:
    lines = ["| px | kB a photo | PSNR of the JPEGs | decoded a second | written a second | listed a second |",
             "|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| {r['size']} | {r['kB_per_photo']:.1f} | {r['psnr_of_jpeg_dB']:.1f} dB "
              f"| {r['decoded_per_second']:.0f} | {r['written_per_second']:.0f} | {r['opened_per_second']:.0f} |"
              for r in rows]
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in SETS:
            row = figures(size, Path(folder) / str(size))
            rows.append({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
            print(json.dumps(rows[-1]), flush=True)
    facts = {"commit": report.commit(), "torch": torch.__version__, "machine": platform.machine(), "threads": 1,
             "batch": BATCH, "load_average": round(os.getloadavg()[0], 1), "cores": os.cpu_count()}
    report.write_text(RESULTS, json.dumps({"rows": rows, **facts}, indent=1) + "\n")
    measure.put_on_page("decoding", table(rows), RESULTS, PAGE)


if __name__ == "__main__":
    measure.run(main)
