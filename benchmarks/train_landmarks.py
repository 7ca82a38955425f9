"""Train the network that corrects landmarks of degraded faces (`metagpen.faces.landmarks`).

The people of the base's training, by `configs/people_128.csv`. Every draw: a photo's crop, perhaps mirrored, turned by
up to 26 degrees and 1 to 1.4 times as wide as the face's own, is degraded as a photo of 128 px; the network sees it
through a crop that lies wrong, and says where the landmarks are. The loss is the error that is reported: the mean
distance of the five points, as a share of the eyes' distance (NME). Watched on the people kept back.

    python benchmarks/train_landmarks.py    # runs/landmarks/landmarks.safetensors; an hour on one core
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import measure
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from metagpen import degrade, runs
from metagpen.degrade.base import Degradation
from metagpen.evaluate import report
from metagpen.faces.align import FFHQ_LANDMARKS, crop_matrix, invert, mirror
from metagpen.faces.landmarks import SIDE, LandmarkNet
from metagpen.identities import PackedPhotos, pack
from metagpen.tensors import write_tensors

STORED, PHOTO = 160, 128  # px of the packed crops, and of the photo that is degraded
BATCH, RATE, DECAY, CLIP = 64, 1.5e-3, 0.998, 1.0
DAMAGE = {"heavy": {"weight": 0.6, "face_px": (8, 40)}, "gfpgan": 0.15, "bsrgan": 0.15, "none": 0.1}
WATCHED, WATCHED_PHOTOS, EVERY = ("hard", "extreme", "moderate"), 512, 500


class Spread(NamedTuple):
    """Half widths of a random similarity: turn in radians, logarithm of the scale, shift in sides."""

    turn: float
    scale: float
    shift: float


IN_PHOTO = Spread(0.45, 0.0, 0.1)  # how a face lies in its photo
WIDE, NARROW, SHARE_OF_WIDE = Spread(0.35, 0.3, 0.14), Spread(0.1, 0.1, 0.05), 0.6  # how the first crop lies wrong


# Maps [B, 2, 3] take points of one square to another; sides of squares are 1 unless they are pixels.


def moved(maps: Tensor, points: Tensor) -> Tensor:
    return points @ maps[:, :, :2].transpose(1, 2) + maps[:, None, :, 2]


def after(second: Tensor, first: Tensor) -> Tensor:
    return torch.cat([second[:, :, :2] @ first[:, :, :2], second[:, :, :2] @ first[:, :, 2:] + second[:, :, 2:]], 2)


def inverse(maps: Tensor) -> Tensor:
    linear = torch.linalg.inv(maps[:, :, :2])
    return torch.cat([linear, -(linear @ maps[:, :, 2:])], 2)


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator) * 2 - 1


def about_the_centre(linear: Tensor, shift: Tensor) -> Tensor:
    centre = torch.full((len(linear), 2, 1), 0.5)
    return torch.cat([linear, centre - linear @ centre + shift[:, :, None]], 2)


def similarity(count: int, spread: Spread, generator: torch.Generator) -> Tensor:
    turn, scale = uniform(generator, count) * spread.turn, torch.exp(uniform(generator, count) * spread.scale)
    c, s = scale * turn.cos(), scale * turn.sin()
    linear = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], 1)
    return about_the_centre(linear, uniform(generator, count, 2) * spread.shift)


def cut(images: Tensor, maps: Tensor, size: int) -> Tensor:
    """What lies under a square: images [B, 3, S, S], maps from the square to their pixels -> [B, 3, size, size]."""
    axis = (torch.arange(size) + 0.5) / size
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, -1, 2)
    places = (2 * moved(maps, grid) / images.shape[-1] - 1).view(len(images), size, size, 2)
    return F.grid_sample(images, places, mode="bilinear", padding_mode="reflection", align_corners=False)


def draw(photos: PackedPhotos, chosen: Tensor, damage: Degradation,
         generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the network sees of these photos, [B, 3, 64, 64], and where the landmarks [B, 5, 2] are in it."""
    images, landmarks, count = photos.batch(chosen), photos.landmarks[chosen], len(chosen)
    flip = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    landmarks = torch.where(flip[:, None, None], mirror(landmarks, photos.size), landmarks)
    face = torch.from_numpy(np.stack([invert(crop_matrix(points, 1)) for points in landmarks.double().numpy()])).float()
    lies = similarity(count, IN_PHOTO, generator)
    shift = lies[:, :, :2] @ torch.full((count, 2, 1), 0.5) + lies[:, :, 2:] - 0.5
    wider = torch.exp(torch.rand(count, generator=generator) * 0.35)
    photo = about_the_centre(lies[:, :, :2] * wider[:, None, None], shift[:, :, 0])  # photo -> the face's own crop
    poor = damage(cut(images, after(face, photo), PHOTO), generator)
    wide = torch.rand(count, generator=generator) < SHARE_OF_WIDE
    wrong = torch.where(wide[:, None, None], similarity(count, WIDE, generator), similarity(count, NARROW, generator))
    seen = F.avg_pool2d(cut(poor, after(inverse(photo), wrong) * PHOTO, 2 * SIDE), 2)
    return seen, moved(inverse(after(face, wrong)), landmarks)


def error(found: Tensor, truth: Tensor) -> Tensor:
    """NME [B] of landmarks [B, 5, 2]."""
    return (found - truth).norm(dim=-1).mean(1) / (truth[:, 0] - truth[:, 1]).norm(dim=-1)


class Trainer:
    """The run and all it needs to go on."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps, self.step = folder, steps, 0
        people = measure.our_people()
        self.photos, kept = (pack(people[part], STORED, folder / "cache") for part in ("train", "kept"))
        torch.manual_seed(0)
        self.net = LandmarkNet().to(memory_format=torch.channels_last)
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
        self.optimiser = torch.optim.AdamW(self.net.parameters(), RATE, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, RATE, total_steps=steps, pct_start=0.05)
        self.generator, self.damage = torch.Generator().manual_seed(1), degrade.by_name("mixed", **DAMAGE)
        self.watched = {}
        for name in WATCHED:
            generator = torch.Generator().manual_seed(7)
            chosen = torch.randperm(len(kept), generator=generator)[:WATCHED_PHOTOS]
            self.watched[name] = draw(kept, chosen, degrade.by_name(name), generator)

    def take_step(self) -> float:
        chosen = torch.randint(len(self.photos), (BATCH,), generator=self.generator)
        seen, truth = draw(self.photos, chosen, self.damage, self.generator)
        loss = error(self.net.train()(seen.contiguous(memory_format=torch.channels_last)), truth).mean()
        self.optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        runs.must_be_finite(norm, self)
        self.optimiser.step()
        self.schedule.step()
        self.average.update_parameters(self.net)
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def watch(self) -> dict[str, float]:
        """Median error on people kept back, after one look, and of the mean landmarks, which look at nothing."""
        mean, found = torch.from_numpy(FFHQ_LANDMARKS).float(), {}
        for name, (seen, truth) in self.watched.items():
            found[name] = error(self.average.eval()(seen), truth).median().item()
            found[f"{name}, mean landmarks"] = error(mean.expand_as(truth), truth).median().item()
        return measure.rounded(found)

    def save(self) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("net", "average", "optimiser", "schedule")}
        runs.write_state(self.folder / "last.pt", parts | {"step": self.step, "generator": self.generator.get_state()})

    def resume(self) -> bool:
        return runs.go_on_from(self.folder / "last.pt", torch.device("cpu"), self.take_up)

    def take_up(self, state: dict) -> None:
        for name in ("net", "average", "optimiser", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]
        self.generator.set_state(state["generator"])

    def run(self, console: Console) -> Path:
        with (open(self.folder / "log.jsonl", "a", encoding="utf-8") as log,
              runs.progress_bar("landmarks", self.steps, self.step, console) as show):
            while self.step < self.steps:
                loss = self.take_step()
                show(self.step, f"error {loss:.3f}")
                if self.step % EVERY == 0 or self.step == self.steps:
                    log.write(json.dumps({"step": self.step, "loss": round(loss, 4), **self.watch()}) + "\n")
                    log.flush()
                    self.save()
        state = {name: value.half() for name, value in self.average.module.state_dict().items()
                 if value.is_floating_point()}
        card = {"steps": self.steps, "batch": BATCH, "commit": report.commit(), **self.watch()}
        return write_tensors(self.folder / "landmarks.safetensors", state,
                             {"format": "metagpen-landmarks-1", "card": json.dumps(card)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("-o", "--output", type=Path, default=measure.ROOT / "runs" / "landmarks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    print(f"done: {runs.run_or_go_on(Trainer(arguments.output, arguments.steps), console)}")


if __name__ == "__main__":
    measure.run(main)
