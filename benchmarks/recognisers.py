"""How well do the recognisers tell people apart whom no training of ours saw, and how fast are they?

Verification accuracy (ten folds, as in the LFW protocol) on the 25 val people of celeba_wild_256 and on the 102
people of london_512 (neutral against smiling), mean cosines, the cosine between a photo and its copy reduced to
16 and 32 pixels, and photos a second on one CPU thread. Photos and weights come from `$METAGPEN_SHARED`, or the
folder `shared` beside this repository.

    python benchmarks/recognisers.py    # writes benchmarks/results/recognisers.json, the table in docs/recognisers.md
    python benchmarks/recognisers.py --speed    # measures the speeds again, keeps the other figures
"""

from __future__ import annotations

import argparse
import json
import platform
import time

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from metagpen.evaluate import report
from metagpen.identities import People
from metagpen.recognise import Recogniser, load, verification
from metagpen.recognise.distil import read_photo

RESULTS = measure.RESULTS / "recognisers.json"
PAGE = measure.ROOT / "docs" / "recognisers.md"
RECOGNISERS = {"embedded": "embedded",
               "0095 (its teacher)": measure.SHARED / "weights/face-reidentification-retail-0095.fp16.xml",
               f"{measure.SCORER} (scores only)": measure.SCORING}
MOST_PAIRS = 3000  # of one person, and as many of two


def collections() -> dict[str, People]:
    london = People.from_folder(measure.SHARED / "photos" / "london_512")
    return {"celeba_wild_256 val": measure.wild_people(),
            "london_512": london.select(name for name in london if name != "lisa")}


def reduced(images: Tensor, side: int) -> Tensor:
    """As seen by a camera with `side` pixels across the crop, enlarged again."""
    small = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return F.interpolate(small, images.shape[-2:], mode="bicubic").clamp(-1, 1)


@torch.no_grad()
def figures(recogniser: Recogniser, people: People) -> dict[str, float]:
    names, sharp, coarse = [], [], {16: [], 32: []}
    for name, photos in people.items():
        for photo in photos:
            pixels, landmarks = read_photo(photo)
            image = pixels[None].float() / 127.5 - 1
            names.append(name)
            sharp.append(recogniser.embed(image, landmarks[None]))
            for side, found in coarse.items():
                found.append(recogniser.embed(reduced(image, side), landmarks[None]))
    sharp = torch.cat(sharp)
    row = {"people": len(people), "photos": len(names), **verification(sharp, names, MOST_PAIRS)}
    for side, found in coarse.items():
        row[f"cosine_to_itself_at_{side}px"] = float((sharp * torch.cat(found)).sum(1).mean())
        row[f"accuracy_at_{side}px"] = verification(torch.cat(found), names, MOST_PAIRS)["accuracy"]
    return row


def speed(recogniser: Recogniser, backward: bool, batch: int = 16, rounds: int = 3) -> float:
    """Photos of 128 px a second, float32, best of some rounds; with `backward`, the gradient to the photo too."""
    images = torch.rand(batch, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    best = float("inf")
    for _ in range(rounds):
        images = images.clone().requires_grad_(backward)
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            embeddings = recogniser.embed(images)
            if backward:
                embeddings[:, 0].sum().backward()
        best = min(best, time.perf_counter() - start)
        images = images.detach()
    return batch / best


def table(rows: list[dict]) -> str:
    """Markdown: a line for each recogniser and data set."""
    lines = ["| recogniser | parameters | people | right | at 32 px | at 16 px | same / different person "
             "| photos a second (with gradient) |", "|---|---|---|---|---|---|---|---|"]
    lines += [f"| {r['recogniser']} | {r['parameters'] / 1e6:.2f} M | {r['dataset']} ({r['people']}) "
              f"| {100 * r['accuracy']:.1f} ± {100 * r['standard_error']:.1f} % | {100 * r['accuracy_at_32px']:.1f} % "
              f"| {100 * r['accuracy_at_16px']:.1f} % | {r['cosine_same']:.2f} / {r['cosine_different']:.2f} "
              f"| {r['photos_per_second']:.0f} ({r['photos_per_second_with_gradient']:.0f}) |" for r in rows]
    return "\n".join(lines)


def speeds(recognisers: dict[str, Recogniser], rounds: int = 5) -> dict[str, dict[str, float]]:
    """In turns, so that whatever else the machine does falls on all of them."""
    best = {label: {"photos_per_second": 0.0, "photos_per_second_with_gradient": 0.0} for label in recognisers}
    for _ in range(rounds):
        for label, recogniser in recognisers.items():
            for key, backward in zip(best[label], (False, True)):
                best[label][key] = max(best[label][key], round(speed(recogniser, backward), 1))
    return best


def accuracies(recognisers: dict[str, Recogniser]) -> list[dict]:
    rows = []
    for label, recogniser in recognisers.items():
        common = {"recogniser": label, "name": recogniser.name,
                  "parameters": sum(p.numel() for p in recogniser.parameters()),
                  "input": list(recogniser.spec.size), "dimensions": recogniser.dim}
        for dataset, people in collections().items():
            row = common | {"dataset": dataset} | figures(recogniser, people)
            rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speed", action="store_true", help="measure the speeds again, keep the other figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recognisers = {label: load(source) for label, source in RECOGNISERS.items()}
    if arguments.speed:
        result = json.loads(RESULTS.read_text())
    else:
        result = {"rows": accuracies(recognisers), "commit": report.commit(), "torch": torch.__version__,
                  "machine": platform.machine(), "threads": 1,
                  "protocol": f"ten folds; at most {MOST_PAIRS} pairs of one person, as many of two; seed 0"}
    measured = speeds(recognisers)
    result["rows"] = [row | measured[row["recogniser"]] for row in result["rows"]]
    report.write_text(RESULTS, json.dumps(result, indent=1) + "\n")
    measure.put_on_page("embedded", table(result["rows"]), RESULTS, PAGE)


if __name__ == "__main__":
    measure.run(main)
