"""Could early steps take their loss at a lower resolution, on the decoder's RGB skip of that side?

A StyleGAN2 decoder adds up an image from 4 px up; the sum so far, the skip, is free at every side, and a step that ends
there saves the layers above, which cost most. It would have to look like the image, though, or the loss would teach a
person what the layers above undo. Here: how far each skip is from the restored image reduced to its side (by area), the
embedded model, photos of the val people of celeba_wild_256 at 16 px. Photos come from `$METAGPEN_SHARED`, or the folder
`shared` beside this repository.

    python benchmarks/skip_rgb.py    # writes benchmarks/results/skip_rgb.json and the table in docs/speed.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

import metagpen
from metagpen.evaluate import report
from metagpen.evaluate.engine import named_degradations
from metagpen.evaluate.tasks import damage, load_task
from metagpen.model import MetaGPEN

RESULTS = measure.RESULTS / "skip_rgb.json"
DAMAGE, QUERIES = "hard", 4


@torch.no_grad()
def skips(model: MetaGPEN, poor: Tensor) -> list[Tensor]:
    """The RGB skips of images [B, 3, S, S], smallest side first; the last one is the restored image."""
    found: list[Tensor] = []
    layers = [model.gpen.generator.to_rgb1, *model.gpen.generator.to_rgbs]
    hooks = [layer.register_forward_hook(lambda layer, given, rgb: found.append(rgb)) for layer in layers]
    try:
        model.restore(poor)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def measured(model: MetaGPEN, poor: Tensor) -> list[measure.Row]:
    """Of every skip but the last: PSNR against the reduced image, and its spread over that one's."""
    *found, restored = skips(model, poor)
    rows = []
    for skip in found:
        reduced = F.interpolate(restored, size=skip.shape[-2:], mode="area")
        error = (skip - reduced).square().mean(dim=(1, 2, 3)) / 4  # of a range of 2
        rows.append({"side": skip.shape[-1], "psnr": float((-10 * error.log10()).mean()),
                     "contrast": float(skip.std() / reduced.std())})
    return rows


def page(rows: Sequence[measure.Row]) -> str:
    return report.table(["side of the skip", "PSNR to the restored image of that side", "its contrast"],
                        [[f"{row['side']} px", f"{row['psnr']:.1f} dB", f"{row['contrast']:.0%}"] for row in rows])


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    model, people = metagpen.load(), measure.wild_people()
    degradation = named_degradations([DAMAGE])[DAMAGE]
    poor = torch.cat([damage(load_task(people, name, 5, model.size, max_queries=QUERIES), DAMAGE, degradation, 0)
                      for name in people])
    rows = measured(model, poor)
    report.write_json(RESULTS, rows, model=model.fingerprint, people=len(people), photos=len(poor), damage=DAMAGE,
                      commit=report.commit(), machine=report.machine())
    about = f"{len(people)} people, {len(poor)} photos at 16 px; commit {report.commit()}."
    print(page(rows))
    measure.put_on_page("skip_rgb", f"{page(rows)}\n\n{about}", RESULTS, measure.PAGE)


if __name__ == "__main__":
    measure.run(main)
