"""Teach a model's gate to judge photos as they are found, and not only crops that were degraded where they lie.

The gate lets in as much of a person as a photo leaves open, and judges that by the strength of its bands. In training
it saw crops as they were degraded: blocks, noise and blur aligned to its pixels. A face of a real photo is saved at
another size, turned, and cut out by landmarks that are a little off: resampled, the same ruin looks smoother, and the
gate took it for a clear photo. Here it learns to say of the crop that is found what it said of the crop as it was
degraded (of which it is left as it is), on the people of the base's training. Everything else of the model stays.

    python benchmarks/calibrate_judge.py embedded -o runs/judge/judged.safetensors    # a few minutes, one core
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator
from pathlib import Path

import measure
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from train_landmarks import Spread, cut, similarity

from metagpen import degrade, load
from metagpen.degrade import ops
from metagpen.degrade.base import Degradation
from metagpen.errors import ConfigError
from metagpen.evaluate import report
from metagpen.evaluate.engine import named_degradations
from metagpen.identities import PackedPhotos, pack
from metagpen.model import MetaGPEN
from metagpen.person.start import Gate, band_statistics

DAMAGE = {"heavy": {"weight": 0.45, "face_px": (8, 32)}, "gfpgan": 0.15, "bsrgan": 0.15, "none": 0.25}
SIZES = math.log(0.5), math.log(4.0)  # of the face in the photo that is found, over that of the model
AS_IT_WAS, JPEG, QUALITY = 0.15, 0.5, (60, 100)  # shares: not saved at another size; saved as JPEG
OFF = Spread(0.15, 0.15, 0.06)  # how far its crop lies from where it should
MODES = ("bicubic", "bilinear", "area")
BATCH, STEPS, RATE = 64, 12000, 3e-3
EXACT = 0.5  # of a batch's pictures: as they were degraded
CLEAR, CARE = 0.7, 3.0  # pictures below that severity count so many times: a person must not be let into a clear photo
SHARPNESS = 20.0  # of the gate that the two should open alike, softer than the model's own
WATCHED = {"none": "none", **measure.DAMAGE}


def found_in_photos(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Degraded crops [B, 3, S, S] as they are cut out of photos of other sizes: the same shape."""
    size, found = crops.shape[-1], []
    wrong = similarity(len(crops), OFF, generator)
    for crop, lies in zip(crops, wrong):
        photo = crop[None]
        if float(torch.rand(1, generator=generator)) > AS_IT_WAS:
            low, high = SIZES
            side = round(size * math.exp(low + (high - low) * float(torch.rand(1, generator=generator))))
            mode = MODES[int(torch.randint(len(MODES), (1,), generator=generator))]
            photo = F.interpolate(photo, (side, side), mode=mode, antialias=mode != "area").clamp(-1, 1)
        if float(torch.rand(1, generator=generator)) < JPEG:
            quality = int(torch.randint(*QUALITY, (1,), generator=generator))
            photo = ops.jpeg([photo[0] / 2 + 0.5], [quality])[0][None] * 2 - 1
        finer = max(1, math.ceil(photo.shape[-1] / size))  # sampled at the photo's pitch, then reduced, as `crop_face`
        found.append(F.avg_pool2d(cut(photo, lies[None] * photo.shape[-1], finer * size), finer))
    return torch.cat(found)


def batches(photos: PackedPhotos, count: int, damage: Degradation, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Degraded crops, and the same as they are found, each [B, 3, S, S]."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        poor = damage(photos.batch(torch.randint(len(photos), (BATCH,), generator=generator)), generator)
        yield poor, found_in_photos(poor, generator)


def statistics(gate: Gate, photos: PackedPhotos, count: int, damage: Degradation,
               seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of `count` batches: the bands of the degraded crops and of the found ones, [N, 6 * bands], and what the gate says
    of the former, [N]."""
    pairs = [tuple(band_statistics(part, gate.bands) for part in pair)
             for pair in track(batches(photos, count, damage, seed), total=count, description="photos")]
    exact, found = (torch.cat(parts) for parts in zip(*pairs))
    return exact, found, gate.judge(exact).squeeze(1)


def taught(gate: Gate, exact: Tensor, found: Tensor, said: Tensor) -> Gate:
    """A gate that says of both what this one says of the former: in severity, and in whether it opens."""
    pupil, centre = copy.deepcopy(gate).requires_grad_(True), gate.centre.mean()
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(pupil.judge.parameters(), RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS)
    for _ in track(range(STEPS), description="steps"):
        chosen = torch.randint(len(said), (2 * BATCH,), generator=generator)
        as_degraded = torch.rand(len(chosen), generator=generator) < EXACT
        says = pupil.judge(torch.where(as_degraded[:, None], exact[chosen], found[chosen])).squeeze(1)
        wanted = torch.sigmoid(SHARPNESS * (said[chosen] - centre))
        apart = (says - said[chosen]).abs() + 0.1 * F.binary_cross_entropy_with_logits(
            SHARPNESS * (says - centre), wanted, reduction="none")
        loss = (apart * torch.where(said[chosen] < CLEAR, CARE, 1.0)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return pupil.requires_grad_(False)


@torch.no_grad()
def shares(gate: Gate, statistics: Tensor) -> float:
    """How much it lets in, in the mean over pictures and layers."""
    severity = gate.judge(statistics)
    return float(torch.sigmoid(gate.slope * (severity - gate.centre)).mean())


def watched(before: Gate, after: Gate, photos: PackedPhotos) -> list[report.Row]:
    """How far both open, by damage, on crops as they were degraded and as they are found."""
    rows = []
    for level, damage in named_degradations(list(WATCHED)).items():
        exact, found, _ = statistics(before, photos, 8, damage, seed=2)
        rows += [{"level": level, "crop": name, "before": shares(before, part), "after": shares(after, part)}
                 for name, part in (("as degraded", exact), ("as found", found))]
    return [measure.rounded(row) for row in rows]


def table(rows: list[report.Row]) -> str:
    """How far the gate opens before and after; the model's card keeps the rows."""
    return report.table(["damage", "crop", "let in before", "after"], [
        [WATCHED[row["level"]], row["crop"], f"{row['before']:.2f}", f"{row['after']:.2f}"] for row in rows])


@torch.no_grad()
def judged(model: MetaGPEN, gate: Gate, rows: list[report.Row]) -> MetaGPEN:
    """The model with this gate; its card says what was done."""
    start = copy.deepcopy(model.start)
    start.gate = gate
    card = {**model.card, "judge": {"script": "benchmarks/calibrate_judge.py", "commit": report.commit(),
                                    "from": model.fingerprint, "opens": rows}}
    return MetaGPEN(model.gpen, start, card, model.rule, model.bases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a name or a file")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load(arguments.model)
    if model.start is None:
        raise ConfigError(f"{arguments.model}: has no start, so no gate that could be taught")
    people = measure.our_people()
    train, kept = (pack(people[part], model.size, arguments.output.parent / "cache") for part in ("train", "kept"))
    gate, damage = model.start.gate, degrade.by_name("mixed", **DAMAGE)
    with torch.no_grad():
        seen = statistics(gate, train, arguments.batches, damage, seed=1)
    after = taught(gate, *seen)
    rows = watched(gate, after, kept)
    print(table(rows))
    print(f"done: {judged(model, after, rows).save(arguments.output)}")


if __name__ == "__main__":
    measure.run(main)
