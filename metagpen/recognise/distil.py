"""Distilling a teacher recogniser into the small embedded one.

First every stage of the student learns alone to turn the teacher's map at its entrance into the teacher's map at
its exit, and the head the teacher's last map into its embedding: shallow problems with an answer at every pixel,
solved in minutes, where the whole network needs hours (blockwise distillation, as in Li et al. 2020). Then the
stages are joined and learn together.

Function matching (Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and consistent"): the
student learns to give the teacher's answer for the very same augmented picture, on pictures far more various
than the photos at hand, among them blends of two aligned faces, which are people that no photo shows. Degraded
copies of a picture are to get the answer for the sharp one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from ..atomic import forget_later_steps
from ..config import Config, Device, Seed, same_run
from ..devices import bf16_autocast
from ..errors import CheckpointError, ConfigError, DataError, MetagpenError
from ..graphs import Captured, make_capturable, set_rate
from ..identities import People, Photo, split
from ..runs import go_on_from, must_be_finite, resize, run_or_go_on, write_state
from ..schedule import warmup_cosine
from ..tensors import write_tensors
from ..workers import finishing
from .align import warp
from .loading import load
from .recogniser import Recogniser
from .student import ARCHITECTURE, TEMPLATE, StudentNet, recogniser
from .verify import verification

VIEW = 128  # side of the picture that the teacher sees
MARGIN = 16  # pixels kept around it, so that jitter finds real pixels

# What a resumed run may have otherwise: nothing that shaped its numbers so far.
FREE_TO_CHANGE = {"output", "threads", "device", "compile", "save_every", "check_every"}


class DistilConfig(Config):
    """Everything the training depends on."""

    teacher: str
    photos: str  # folder of collections with manifests
    split_file: str = ""  # who trains and who is val; default: splits.csv in `photos`
    sets: list[str] = ["celeba_wild_256", "lfw_176"]
    output: str = "runs/recogniser"
    faces: int = 32  # different pictures a step
    degraded: int = 16  # of them also shown degraded, once the stages are joined
    apart: int = 600  # steps in which the stages learn apart
    steps: int = 2800
    rate: float = 3e-3  # while apart
    rate_joined: float = 1.5e-3
    weight_decay: float = 0.02
    warmup: int = 50
    ema: float = 0.998
    maps: float = 0.5  # weight of matching the teacher's maps, once the stages are joined; fades to zero
    relation: float = 4.0  # weight of matching the cosines between the faces of a batch
    blends: float = 0.35  # share of pictures made of two faces
    seed: Seed = 0
    threads: int = 1
    device: Device = "auto"  # random draws but the noise are the CPU's on every device
    compile: bool = False  # fuse with torch.compile, which needs a C++ compiler
    save_every: int = 200
    check_every: int = 200


# ---------------------------------------------------------------------------------------------------- photos


def people_of(config: DistilConfig, part: str) -> People:
    """Everybody of the collections who belongs to `part` ("train", "val") of the split file."""
    root = Path(config.photos)
    file = Path(config.split_file or root / "splits.csv")
    collections = [split(People.from_folder(root / name), file, strict=False) for name in config.sets]
    found = [parts[part] for parts in collections if part in parts]
    if not found:
        raise DataError(f"{file}: nobody of {', '.join(config.sets)} belongs to \"{part}\"")
    return People.merge(*found)


def read_photo(photo: Photo) -> tuple[Tensor, Tensor]:
    """Photo [3, H, W] uint8 and landmarks [5, 2] in its pixels."""
    if photo.landmarks is None:
        raise DataError(f"{photo.path}: no landmarks in the manifest")
    pixels = torch.from_numpy(np.array(photo.load())).permute(2, 0, 1)
    return pixels, torch.as_tensor(photo.landmarks, dtype=torch.float32)


def read_faces(photos: list[Photo], margin: int = MARGIN) -> Tensor:
    """All faces on the student's template with a margin around: [N, 3, S, S] uint8, S = VIEW + 2 margin."""
    template = torch.tensor(TEMPLATE) * VIEW + margin
    side = VIEW + 2 * margin
    faces = torch.empty(len(photos), 3, side, side, dtype=torch.uint8)
    for index, photo in enumerate(photos):
        pixels, landmarks = read_photo(photo)
        faces[index] = warp(pixels[None], landmarks[None], template, (side, side))[0].round().clamp(0, 255).byte()
    return faces


# ---------------------------------------------------------------------------------------------- augmentation


class Draws:
    """Random numbers from a CPU generator, moved to a device, one row for each of `count` pictures."""

    def __init__(self, generator: torch.Generator, like: Tensor) -> None:
        self.generator, self.count, self.device = generator, len(like), like.device

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """[count, *shape] from [low, high)."""
        return (torch.rand((self.count, *shape), generator=self.generator) * (high - low) + low).to(self.device)

    def chance(self, p: float) -> Tensor:
        """[count, 1, 1, 1] of 0 and 1."""
        return (self.uniform(0, 1, 1, 1, 1) < p).float()


def jitter(faces: Tensor, generator: torch.Generator) -> Tensor:
    """Faces with margin [B, 3, S, S] -> views [B, 3, VIEW, VIEW]: flipped, turned, shifted and stretched.

    A stretched face is another face to a recogniser, so this too makes people that no photo shows.
    """
    draw = Draws(generator, faces)
    turn, shear = draw.uniform(-0.08, 0.08), draw.uniform(-0.06, 0.06)
    stretch, shift = draw.uniform(-0.09, 0.09, 2).exp(), draw.uniform(-0.04, 0.04, 2)
    flip = torch.where(draw.uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = turn.cos(), turn.sin()
    linear = torch.stack([torch.stack([flip * cos * stretch[:, 0], -sin + shear], 1),
                          torch.stack([flip * sin, cos * stretch[:, 1]], 1)], 1)
    theta = torch.cat([linear, shift[:, :, None]], 2) * (VIEW / faces.shape[-1])
    grid = F.affine_grid(theta, [len(faces), 3, VIEW, VIEW], align_corners=False)
    return F.grid_sample(faces, grid, padding_mode="reflection", align_corners=False)


def blend(views: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A `share` of the views mixed with their neighbour in the batch: evenly, or one half of a face each."""
    draw = Draws(generator, views)
    along = torch.linspace(-1, 1, views.shape[-1], device=views.device)
    angle = draw.uniform(0, 2 * math.pi, 1, 1, 1)
    edge = angle.cos() * along + angle.sin() * along[:, None] - draw.uniform(-0.3, 0.3, 1, 1, 1)
    halves = torch.sigmoid(edge * draw.uniform(4, 25, 1, 1, 1))
    evenly = draw.uniform(0.2, 0.5, 1, 1, 1)
    amount = torch.lerp(evenly.expand_as(halves), halves, draw.chance(0.5)) * draw.chance(share)
    return torch.lerp(views, views.roll(1, 0), amount)


def tint(views: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Gamma, contrast, gain per channel, offset, and sometimes grey; [-1, 1] stays [-1, 1]."""
    draw = Draws(generator, views)
    x = (views + 1) / 2
    x = x.clamp(1e-3, 1) ** (strength * draw.uniform(-0.3, 0.3, 1, 1, 1)).exp()
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * (strength * draw.uniform(-0.3, 0.3, 1, 1, 1)).exp() + mean
    x = x * (strength * draw.uniform(-0.12, 0.12, 3, 1, 1)).exp()
    x = x + strength * draw.uniform(-0.1, 0.1, 1, 1, 1)
    x = torch.lerp(x, x.mean(1, keepdim=True).expand_as(x), draw.chance(0.1))
    return x.clamp(0, 1) * 2 - 1


def degrade(views: Tensor, generator: torch.Generator) -> Tensor:
    """Coarser pixels, other colours, noise, and sometimes a covered patch; the person stays the same."""
    draw = Draws(generator, views)
    coarse = []
    for part in views.split(4):  # one coarseness for four pictures keeps this a batched operation
        side = math.exp(math.log(18) + math.log(110 / 18) * float(torch.rand((), generator=generator)))
        small = F.interpolate(part, (int(side), int(side)), mode="bilinear", antialias=True)
        coarse.append(F.interpolate(small, views.shape[-2:], mode="bicubic"))
    x = tint(torch.lerp(views, torch.cat(coarse), draw.chance(0.5)), generator, 0.7)
    seed = int(torch.randint(2 ** 62, (), generator=generator))  # so many numbers are made where they are needed
    noise = torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(seed), device=x.device)
    x = x + noise * draw.uniform(0, 0.15, 1, 1, 1) * draw.chance(0.5)
    along = torch.arange(views.shape[-1], device=views.device)
    half = draw.uniform(8, 22, 1, 1, 1)
    inside = (along - draw.uniform(0, VIEW, 1, 1, 1)).abs() < half
    inside = inside & ((along[:, None] - draw.uniform(0, VIEW, 1, 1, 1)).abs() < half)
    patch = draw.uniform(-1, 1, 3, 1, 1).expand_as(x)
    return torch.lerp(x, patch, inside * draw.chance(0.2)).clamp(-1, 1)


# -------------------------------------------------------------------------------------------------- training


class Trainer:
    """Student, its running average, the optimiser and the random state: all that a resumed run needs."""

    def __init__(self, config: DistilConfig) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.output = Path(config.output)
        self.output.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(config.device)
        self.teacher = load(config.teacher, self.device).to(torch.bfloat16)
        if self.teacher.spec.size != (VIEW, VIEW):
            raise ConfigError(f"{config.teacher}: a teacher with {VIEW} px input is needed, this one has "
                              f"{self.teacher.spec.size}")
        self.student = StudentNet(dim=self.teacher.dim).to(self.device, memory_format=torch.channels_last)
        self.average = StudentNet(dim=self.teacher.dim).to(self.device, memory_format=torch.channels_last).eval()
        self.average.load_state_dict(self.student.state_dict())
        self.run_teacher = self.teacher.net.run
        self.run_apart, self.run_joined = self.student.apart, self.student.perceive
        if config.compile:
            self.run_teacher, self.run_apart, self.run_joined = (
                torch.compile(run, dynamic=False) for run in (self.run_teacher, self.run_apart, self.run_joined))
        parameters = list(self.student.parameters())
        # Mean and scale of each channel of the teacher's maps; the student's maps are the standardised ones.
        self.moments = [torch.zeros(2, 1, width, 1, 1, device=self.device) for width in self.student.widths]
        decayed = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW([{"params": decayed, "weight_decay": config.weight_decay},
                                            {"params": others, "weight_decay": 0.0}], lr=config.rate)
        self.prepare_updates()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step, self.photos = 0, None

    def prepare_updates(self) -> None:
        """A step of either phase, recorded on a GPU: with the optimiser as it is now."""
        updates = [partial(self.update, losses) for losses in (self.losses_apart, self.losses_joined)]
        records = self.device.type == "cuda"
        make_capturable(self.optimiser, self.device, records)
        self.update_apart, self.update_joined = map(Captured, updates) if records else updates

    def rate(self) -> float:
        """For either phase: linear warm-up, then a cosine; to a tenth while apart, to zero when joined."""
        c = self.config
        apart = self.step < c.apart
        peak, floor, start, end = (c.rate, 0.1, 0, c.apart) if apart else (c.rate_joined, 0.0, c.apart, c.steps)
        return peak * warmup_cosine(self.step - start, end - start, c.warmup, floor)

    def pixels(self, faces: Tensor) -> Tensor:
        """uint8 -> [-1, 1] on the device."""
        return faces.to(self.device).float() / 127.5 - 1

    def view(self, views: Tensor) -> Tensor:
        """The student's input: the same picture, smaller."""
        return resize(views, self.student.size)

    @torch.no_grad()
    def teach(self, views: Tensor) -> tuple[list[Tensor], Tensor]:
        """The teacher's map at the end of each stage, and its unit embedding, for views [B, 3, VIEW, VIEW]."""
        spec, net = self.teacher.spec, self.teacher.net
        x = views * spec.pixel_scale + spec.pixel_shift
        x = x.flip(1) if spec.bgr else x
        *maps, embedding = self.run_teacher(x.bfloat16(), [*net.trunk, net.output])
        return maps, F.normalize(embedding.flatten(1).float(), dim=1)

    @torch.no_grad()
    def measure(self, faces: Tensor, count: int = 256) -> None:
        """Mean and scale of the teacher's maps over some unchanged faces."""
        middle = faces[:: max(1, len(faces) // count), :, MARGIN:MARGIN + VIEW, MARGIN:MARGIN + VIEW]
        maps = [self.teach(self.pixels(part))[0] for part in middle.split(64)]
        for moments, parts in zip(self.moments, zip(*maps)):
            whole = torch.cat(parts).float()
            moments[0] = whole.mean((0, 2, 3), keepdim=True)
            moments[1] = whole.std((0, 2, 3), keepdim=True) + 1e-3

    def targets(self, views: Tensor) -> tuple[list[Tensor], Tensor]:
        maps, embedding = self.teach(views)
        return [(m.float() - mean) / scale for m, (mean, scale) in zip(maps, self.moments)], embedding

    def losses_apart(self, views: Tensor) -> dict[str, Tensor]:
        """Every stage, and the head, fed with what the teacher has there."""
        wanted, target = self.targets(views)
        with bf16_autocast(self.device):
            maps, embedding = self.run_apart(self.view(views), wanted)
        cosine = F.cosine_similarity(embedding.float(), target).mean()
        errors = {f"map{i}": F.mse_loss(m.float(), w) for i, (m, w) in enumerate(zip(maps, wanted))}
        return {"loss": 1 - cosine + sum(errors.values()), "cosine": cosine, **errors}

    def losses_joined(self, views: Tensor, copies: Tensor, fading: Tensor) -> dict[str, Tensor]:
        """The whole network, on the pictures and on degraded copies of the first ones; `fading`: weight of the maps."""
        count = len(views)
        wanted, target = self.targets(views)
        with bf16_autocast(self.device):
            maps, embedding = self.run_joined(self.view(torch.cat([views, copies])))
        embedding = F.normalize(embedding.float(), dim=1)
        target = torch.cat([target, target[:len(copies)]])
        errors = {f"map{i}": F.mse_loss(m[:count].float(), w) for i, (m, w) in enumerate(zip(maps, wanted))}
        cosine = (embedding * target).sum(1)
        every = len(target)  # of the cosines with others
        relation = (embedding @ target.T - target @ target.T).square().fill_diagonal_(0).sum() / (every * (every - 1))
        loss = 1 - cosine.mean() + self.config.relation * relation + fading * sum(errors.values())
        return {"loss": loss, "relation": relation, "cosine": cosine[:count].mean(),
                "cosine_degraded": cosine[count:].mean(), **errors}

    def update(self, losses: Callable[..., dict[str, Tensor]], *inputs: Tensor) -> dict[str, Tensor]:
        """A step of the optimiser; the terms as they were."""
        terms = losses(*inputs)
        self.optimiser.zero_grad(set_to_none=True)
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 5.0)
        self.optimiser.step()
        return {name: value.detach() for name, value in terms.items()}

    def train_step(self, faces: Tensor) -> dict[str, Tensor]:
        c = self.config
        chosen = faces[torch.randint(len(faces), (c.faces,), generator=self.generator).to(faces.device)]
        views = blend(jitter(self.pixels(chosen), self.generator), c.blends, self.generator)
        views = tint(views, self.generator)
        for group in self.optimiser.param_groups:
            set_rate(group, self.rate())
        if self.step < c.apart:
            terms = self.update_apart(views)
        else:
            copies = degrade(views[:c.degraded], self.generator)
            fading = c.maps * (c.steps - self.step) / (c.steps - c.apart)  # a guide at first, a distraction at last
            terms = self.update_joined(views, copies, torch.tensor(fading).to(self.device))
        self.step += 1
        self.update_average()
        return terms

    @torch.no_grad()
    def update_average(self) -> None:
        keep = min(self.config.ema, self.step / (self.step + 10))  # young averages forget faster
        pairs = list(zip(self.average.state_dict().values(), self.student.state_dict().values()))
        torch._foreach_lerp_(*map(list, zip(*(pair for pair in pairs if pair[0].is_floating_point()))), 1 - keep)
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)

    def save(self) -> None:
        state = {"step": self.step, "student": self.student.state_dict(), "average": self.average.state_dict(),
                 "moments": self.moments, "optimiser": self.optimiser.state_dict(),
                 "generator": self.generator.get_state(), "config": self.config.model_dump_json(),
                 "photos": self.photos}
        must_be_finite(float(sum(value.float().sum() for value in state["average"].values())), self)
        write_state(self.output / "state.pt", state)

    def resume(self) -> bool:
        return go_on_from(self.output / "state.pt", self.device, self._take_up)

    def _take_up(self, state: dict[str, Any]) -> None:
        same_run(self.output / "state.pt", DistilConfig.as_stored(state["config"], FREE_TO_CHANGE),
                 self.config.model_dump(mode="json", exclude=FREE_TO_CHANGE),
                 "take another output, or the settings it began with")
        for name in ("student", "average"):
            getattr(self, name).load_state_dict(state[name])
        self.moments = state["moments"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.prepare_updates()
        self.generator.set_state(state["generator"].cpu())
        self.step, self.photos = state["step"], state.get("photos")

    def must_be_of(self, photos: str) -> None:
        """Raises CheckpointError when a run that began on other photos would go on: its draws name them by number."""
        if self.photos not in (None, photos):
            raise CheckpointError(f"{self.output / 'state.pt'}: the run began on other photos than those now in data; "
                                  "bring them back, or take another output")
        self.photos = photos

    @torch.no_grad()
    def embed(self, views: Tensor) -> Tensor:
        """Unit embeddings of the averaged student for views [N, 3, VIEW, VIEW] uint8."""
        parts = [self.average(self.view(self.pixels(part))) for part in views.split(64)]
        return F.normalize(torch.cat(parts), dim=1).cpu()

    def run(self, console: Console) -> Path:
        """The steps from here to the end, with a log in JSON Lines."""
        config, log_file = self.config, self.output / "log.jsonl"
        faces = read_faces(list(people_of(config, "train").photos()))
        self.must_be_of(hashlib.sha256(faces.numpy()).hexdigest())
        faces = faces.to(self.device)
        if not self.step:
            self.measure(faces)
        held_out = people_of(config, "val")
        views = read_faces(list(held_out.photos()), margin=0)
        truth = torch.cat([self.teach(self.pixels(part))[1] for part in views.split(64)]).cpu()
        people = [name for name, photos in held_out.items() for _ in photos]
        means, start, first = Means(), time.monotonic(), self.step
        forget_later_steps(log_file, self.step + 1)
        with log_file.open("a") as log:
            def write(**entry: object) -> None:
                log.write(json.dumps(entry) + "\n")
                log.flush()

            write(event="start", step=self.step, resumed=self.step > 0, faces=len(faces), config=config.model_dump(),
                  teacher=verification(truth, people))
            while self.step < config.steps:
                with finishing():
                    means.add(self.train_step(faces))
                last = self.step == config.steps
                if last or self.step % 50 == 0:
                    terms, seconds = means.take(), time.monotonic() - start
                    must_be_finite(terms["loss"], self)
                    write(event="train", step=self.step, rate=self.rate(), seconds=round(seconds, 1),
                          steps_per_second=round((self.step - first) / seconds, 3), **terms)
                if last or self.step % config.check_every == 0:
                    embeddings = self.embed(views)
                    write(event="check", step=self.step, cosine_to_teacher=float((embeddings * truth).sum(1).mean()),
                          **verification(embeddings, people))
                if last or self.step % config.save_every == 0:
                    self.save()
        return self.output / "state.pt"


class Means:
    """Of what steps report: everything's over those steps that reported it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Adds them up, because the next step may overwrite them."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts.update(terms.keys())

    def take(self) -> dict[str, float]:
        """The means since it was last asked."""
        sums, counts = self.sums, self.counts
        self.sums, self.counts = {}, Counter()
        return {name: float(value) / counts[name] for name, value in sums.items()}


def distil(config: DistilConfig) -> Trainer:
    """Train, or go on with the state that lies in `config.output`."""
    torch.set_num_threads(config.threads)
    trainer = Trainer(config)
    run_or_go_on(trainer, Console(stderr=True))
    return trainer


def card(config: DistilConfig, trainer: Trainer, people: People) -> dict[str, str]:
    """What a user of the weights should know, as the metadata of a safetensors file."""
    return {
        "architecture": ARCHITECTURE, "name": "embedded", "input": f"{trainer.student.size} px RGB in [-1, 1]",
        "template": json.dumps(TEMPLATE), "teacher": f"{trainer.teacher.name} (Open Model Zoo, Apache-2.0)",
        "data": f"{sum(map(len, people.values()))} photos of {len(people)} people, split train of "
                f"{', '.join(config.sets)} (CelebA, LFW)",
        "training": f"distilled from a random start: {config.faces * trainer.step} pictures in {trainer.step} steps",
        "terms": "research use: trained on CelebA and LFW photos",
    }


def verified(recogniser: Recogniser, people: People) -> dict[str, float]:
    """Verification figures of a recogniser for photos with landmarks, one at a time from file to embedding."""
    embeddings, names = [], []
    for name, photos in people.items():
        for photo in photos:
            pixels, landmarks = read_photo(photo)
            with torch.no_grad():
                embeddings.append(recogniser.embed(pixels[None].float() / 127.5 - 1, landmarks[None]))
            names.append(name)
    return verification(torch.cat(embeddings), names)


def export(config: DistilConfig, trainer: Trainer, path: Path) -> dict[str, float]:
    """Write the averaged student in half precision, with its card, and return its figures on val people."""
    state = {name: value.half().cpu() for name, value in trainer.average.state_dict().items()
             if value.is_floating_point()}
    metadata = card(config, trainer, people_of(config, "train"))
    rounded = {name: value.float() for name, value in state.items()}
    figures = verified(recogniser(rounded, metadata), people_of(config, "val"))
    metadata["accuracy"] = json.dumps({"val": {name: round(value, 4) for name, value in figures.items()}})
    write_tensors(path, state, metadata)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, default=Path("metagpen/weights/embedded_recogniser.safetensors"))
    arguments = parser.parse_args()
    from ..cli import in_words  # errors read as those of the other commands

    try:
        config = DistilConfig.from_yaml(arguments.config)
        print(export(config, distil(config), arguments.output))
    except (MetagpenError, OSError) as error:
        parser.exit(2, f"error: {in_words(error)}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")


if __name__ == "__main__":
    main()
