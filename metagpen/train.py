"""`metagpen train`: the base model and its identity-conditioned start, trained together on many people.

Training walks through stages. A stage has a size, and when it is larger than the one before, the networks grow without
changing their function (see `metagpen.gpen.growth`). Every step's randomness comes from (seed, step), so a run that
was killed and resumed sees the batches it would have seen, and ends with the numbers it would have had.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from rich.console import Console
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from . import degrade, devices, recognise
from .atomic import forget_later_steps
from .config import Card, Config, Device, Seed, Weight, same_run, seed_of_step
from .critics import Seen, Shown, critics_of
from .errors import CheckpointError, ConfigError, DataError
from .evaluate.report import contact_sheet
from .faces import save_photo, to_pil
from .faces.align import mirror
from .gpen import GPEN
from .gpen.growth import grow
from .graphs import Captured, make_capturable, set_rate
from .identities import PackedPhotos, load_crops, pack, split
from .losses import RecogniserLoss, VGGLoss, chroma_l1, gradient_l1, l1, luma
from .model import MetaGPEN
from .person.start import IdentityStart
from .recognise.align import View
from .runs import (
    TAKE_ANOTHER,
    ema_with_warmup,
    embed_all,
    go_on_from,
    log_of_step,
    must_be_finite,
    progress_bar,
    resize,
    run_or_go_on,
    same_photos,
    save_average,
    write_state,
)
from .schedule import warmup_cosine
from .weights import load
from .workers import finishing

JUDGED = slice(1, 4)  # of VGG-16's depths; the finest costs much, and the critic sees brightness there anyway
# What a resumed run may have otherwise: nothing that shaped its numbers so far.
FREE_TO_CHANGE = {"output_dir", "cache_dir", "device", "cuda_graphs", "threads", "workers", "card",
                  "save_every", "sheet_every"}


class LossWeights(Config):
    """Weights of the terms. A term of weight 0 is not computed, but for l1, and for perceptual and identity, which come
    of one look of the recogniser's. Wherever that looks, the gate's estimate of the severity learns with weight 1:
    nothing else depends on its weights."""

    l1: Weight = 1.0
    gradient: Weight = 0.0
    chroma: Weight = 0.0
    perceptual: Weight = 0.0
    identity: Weight = 0.0
    adversarial: Weight = 0.0
    feature_matching: Weight = 0.0
    lpips: Weight = Field(0.0, description="LPIPS over VGG-16, whose weights must be installed")
    projected: Weight = Field(0.0, description="adversarial too, its critic looking through a frozen network")
    regions: Weight = Field(0.0, description="adversarial too, its critics looking at eyes, nose and mouth alone")


class Stage(Config):
    """A stretch of training at one size with one set of losses. min_source_side: native pixels that a target must
    have."""

    size: int = Field(gt=0)
    steps: int = Field(gt=0)
    batch_size: int = Field(16, gt=0)
    lr: float = Field(2e-3, gt=0)
    lr_final: float = Field(2e-4, ge=0)
    lr_d: float = Field(2e-3, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    warmup: int = Field(100, ge=0)
    loss: LossWeights = LossWeights()
    critic_sees: Literal["recogniser", "vgg"] = Field("recogniser", description="what it looks through")
    min_source_side: int = Field(0, ge=0)
    r1: float = Field(1.0, ge=0)
    r1_every: int = Field(16, gt=0)
    recogniser_share: float = Field(1.0, gt=0, le=1, description="of each batch: what the recogniser looks at, which "
                                                                 "costs more than the network itself")

    @model_validator(mode="after")
    def _regions_large_enough(self) -> Stage:
        if self.loss.regions and self.size < 32:
            raise ValueError(f"loss.regions: a stage of {self.size} px is too small to judge eyes by; take 32 or more")
        return self


class TrainConfig(Config):
    """`metagpen train`. `data`: folders of people; `split`: CSV; people marked train are trained on, val watched."""

    data: list[Path]
    split: Path
    layout: str = Field("folder", description="of `data`: folder, celeba_hq, celeba, ffhq, lfw, grouped or shards")
    output_dir: Path = Path("runs/base_128")
    cache_dir: Path | None = Field(None, description="of packed photos and their embeddings, which runs may share; "
                                                     "default: cache in output_dir")
    init: str | None = Field(None, description="model to begin from instead of random weights, e.g. embedded")
    channel_multiplier: float = Field(1, gt=0)
    narrow: float = Field(0.25, gt=0)
    mapping_rate: float = Field(100.0, gt=0, description="factor on the mapping network's rate: undoes its lr_mul of "
                                                         "0.01, with which a short training leaves it as random as it "
                                                         "began")
    critic_narrow: float = Field(0.125, gt=0, description="width of the discriminator; its size follows the stage")
    pack_size: int = Field(128, gt=0, description="side that photos are kept at; at least the largest stage's")
    degradation: dict[str, Any] = {"heavy": 0.5, "gfpgan": 0.3, "bsrgan": 0.2}
    recogniser: str = Field("embedded", description="whose embeddings the start reads; users need it too")
    loss_recogniser: str | None = Field(None, description="the one in the losses; default: the same")
    gate: tuple[float, float] | None = Field(None, description="slope and centre of every layer's gate, for good; "
                                                               "default: they are learned. Training settles only the "
                                                               "product of share and offset, and may leave shares so "
                                                               "small that a person's mixtures can hardly step")
    max_identity_photos: int = Field(8, gt=0)
    identity_dropout: float = Field(0.2, ge=0, le=1)
    stages: list[Stage] = Field(min_length=1)
    ema: float = Field(0.998, ge=0, lt=1)
    seed: Seed = 0
    device: Device = "auto"
    bf16: bool = Field(True, description="autocast to bfloat16 where the processor has it")
    compile: bool = Field(False, description="fuse the losses' passes over large maps with torch.compile, which needs "
                                             "a C++ compiler")
    cuda_graphs: bool = Field(True, description="on a GPU, record a step and play it again: the same numbers, sooner")
    threads: int | None = Field(None, ge=1)
    workers: int = Field(0, ge=0, description="processes that make batches ahead; 0: none, best beside CPU training")
    card: Card = Field({}, description="added to the model's card, e.g. its licence and training data")
    save_every: int = Field(250, gt=0)
    sheet_every: int = Field(500, gt=0)

    @field_validator("stages")
    @classmethod
    def _growing(cls, stages: list[Stage]) -> list[Stage]:
        for before, after in zip(stages, stages[1:], strict=False):
            doubled = after.size / before.size
            if doubled < 1 or not math.log2(doubled).is_integer():
                raise ValueError(f"a stage of {after.size} px cannot follow {before.size} px: sizes may stay or double")
        return stages

    @model_validator(mode="after")
    def _packed_large_enough(self) -> TrainConfig:
        largest = max(stage.size for stage in self.stages)
        if self.pack_size < largest:
            raise ValueError(f"pack_size = {self.pack_size}: a stage of {largest} px needs photos of that size")
        return self


@dataclass
class Batch:
    """`truth`, `poor` [B, 3, S, S] in [-1, 1]; `landmarks` [B, 5, 2] px; `identity` [B, D]; `known` [B] 0 or 1."""

    truth: Tensor
    poor: Tensor
    landmarks: Tensor
    identity: Tensor
    known: Tensor

    def pin_memory(self) -> Batch:
        """Where a GPU can fetch it while others work."""
        return Batch(*[getattr(self, name).pin_memory() for name in self.__dataclass_fields__])


class Placed(NamedTuple):
    """A batch where it is needed; `where` the recogniser of the losses looks."""

    truth: Tensor
    poor: Tensor
    landmarks: Tensor
    where: View
    identity: Tensor
    known: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.truth, self.poor, self.landmarks, self.where.grid, self.identity, self.known


class Batches:
    """Reproducible batches: `draw` depends on the seed, the step and the stage alone. part: of the split."""

    def __init__(self, photos: PackedPhotos, embeddings: Tensor, degradation: degrade.Degradation,
                 config: TrainConfig, part: str):
        self.photos, self.embeddings, self.degradation, self.config = photos, embeddings, degradation, config
        self.part = part
        self.members = photos.by_person()

    def allowed(self, stage: Stage) -> Tensor:
        """The photos that a stage may draw. Raises DataError where there is none."""
        sides = self.photos.source_side.nan_to_num(nan=float("inf"))  # unknown counts as sharp
        allowed = torch.nonzero(sides >= stage.min_source_side).flatten()
        if not len(allowed):
            raise DataError(f"no photo of the people marked '{self.part}' has a native side of {stage.min_source_side} "
                            "px; lower min_source_side")
        return allowed

    def draw(self, step: int, stage: Stage) -> Batch:
        generator = torch.Generator().manual_seed(seed_of_step(self.config.seed, step))
        allowed = self.allowed(stage)
        chosen = allowed[torch.randint(len(allowed), (stage.batch_size,), generator=generator)]
        truth = self.photos.batch(chosen)
        landmarks = self.photos.landmarks[chosen].clone()
        flip = torch.rand(len(chosen), generator=generator) < 0.5
        truth[flip], landmarks[flip] = truth[flip].flip(-1), mirror(landmarks[flip], truth.shape[-1])
        poor = self.degradation(truth, generator)
        identity, known = self._identities(chosen, generator)
        scale = stage.size / truth.shape[-1]
        return Batch(resize(truth, stage.size), resize(poor, stage.size), landmarks * scale, identity, known)

    def _identities(self, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean embeddings of 1 to `max_identity_photos` *other* photos of each person; left out some of the time."""
        identity = torch.zeros(len(chosen), self.embeddings.shape[1])
        known = torch.rand(len(chosen), generator=generator) >= self.config.identity_dropout
        for i, photo in enumerate(chosen):
            others = self.members[self.photos.person[photo]]
            others = others[others != photo]
            if len(others) == 0:
                known[i] = False
                continue
            count = int(torch.randint(1, self.config.max_identity_photos + 1, (1,), generator=generator))
            picked = others[torch.randperm(len(others), generator=generator)[:count]]
            identity[i] = F.normalize(self.embeddings[picked].mean(0), dim=0)
        return identity, known.float()


class Steps(Dataset):
    """A stage's batches by step, so that worker processes can make them ahead; the order changes nothing."""

    def __init__(self, batches: Batches, stage: Stage):
        self.batches, self.stage = batches, stage

    def __getitem__(self, step: int) -> Batch:
        return self.batches.draw(step, self.stage)


class Trainer:
    """Networks, their moving averages and optimisers, and the step at which they are."""

    def __init__(self, config: TrainConfig, batches: Batches, watched: Batches, identity_dim: int,
                 in_losses: recognise.Recogniser):
        self.config, self.batches, self.watched = config, batches, watched
        self.device = torch.device(config.device)
        self.recogniser_loss = RecogniserLoss(self._frozen(in_losses), config.compile)
        self.folder = Path(config.output_dir)
        self.step = self.stage_index = self.stage_start = 0
        torch.manual_seed(config.seed)
        self._install(self._first_model(identity_dim, self._card(in_losses)))

    def _first_model(self, identity_dim: int, card: dict[str, Any]) -> MetaGPEN:
        """A random model of the first stage's size, or `config.init`, grown to it."""
        config, size = self.config, self.config.stages[0].size
        if config.init is None:
            gpen = GPEN(size, config.channel_multiplier, config.narrow)
            start = IdentityStart(identity_dim, gpen.config.n_latent, gpen.config.style_dim)
            return self._with_gate(MetaGPEN(gpen, start, card))
        model = load(config.init)
        start = model.start or IdentityStart(identity_dim, model.gpen.config.n_latent, model.gpen.config.style_dim)
        start.mixtures = start.appearance = None  # what meta-training learns: here it would stay behind the rest
        if start.embedding_dim != identity_dim:
            raise ConfigError(f"init: the start of {config.init} reads embeddings of {start.embedding_dim} numbers, "
                              f"the recogniser '{config.recogniser}' gives {identity_dim}")
        model = MetaGPEN(model.gpen, start, {**card, "init": model.card}).requires_grad_(True)
        return self._with_gate(grow_to(model, size))

    def _with_gate(self, model: MetaGPEN) -> MetaGPEN:
        """The model with the configured gate, if one is."""
        if self.config.gate is not None:
            slope, centre = self.config.gate
            nn.init.constant_(model.gate.slope, slope)
            nn.init.constant_(model.gate.centre, centre)
        return model

    def _card(self, in_losses: recognise.Recogniser) -> dict[str, Any]:
        """What goes into the model file about how it was made; `config.card` adds to it."""
        photos = self.batches.photos
        return {"recogniser": self.config.recogniser, "loss_recogniser": in_losses.name,
                "people": len(photos.names), "photos": len(photos),
                "stages": [stage.model_dump(exclude_defaults=True) for stage in self.config.stages],
                **self.config.card}

    @property
    def stage(self) -> Stage:
        return self.config.stages[self.stage_index]

    def _install(self, model: MetaGPEN) -> None:
        """Take these networks into the present stage: fresh averages, optimisers and, if it needs one, critic."""
        self.model = model.to(self.device)
        self.average = AveragedModel(self.model, multi_avg_fn=ema_with_warmup(self.config.ema))
        self.model.requires_grad_(True)
        if self.config.gate is not None:
            self.model.gate.slope.requires_grad_(False)
            self.model.gate.centre.requires_grad_(False)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        mapping = {id(p) for p in self.model.gpen.generator.style.parameters()}
        groups = [{"params": [p for p in self.trained if id(p) not in mapping], "factor": 1.0},
                  {"params": [p for p in self.trained if id(p) in mapping], "factor": self.config.mapping_rate}]
        self.optimiser = torch.optim.Adam(groups, lr=self.stage.lr, betas=(self.stage.beta1, 0.99))
        looks_through_vgg = self.stage.loss.projected and self.stage.critic_sees == "vgg"
        wants_vgg = self.stage.loss.lpips or looks_through_vgg
        self.vgg = VGGLoss(self.config.compile).to(self.device) if wants_vgg else None
        if self.vgg is not None:
            self.vgg.trunk = self._frozen(self.vgg.trunk)
        self.critics = critics_of(self.stage, self.config.channel_multiplier, self.config.critic_narrow, self._depths,
                                  self.device)
        self._prepare_update()

    def _prepare_update(self) -> None:
        """`update`, recorded where that is wanted: with the optimisers as they are now."""
        steady = all(critic.steady for critic in self.critics.values())
        self.records = self.config.cuda_graphs and self.device.type == "cuda" and steady
        for optimiser in (self.optimiser, *(critic.optimiser for critic in self.critics.values())):
            make_capturable(optimiser, self.device, self.records)
        self.run_update = Captured(self.update) if self.records else self.update

    def _frozen(self, network: nn.Module) -> nn.Module:
        """A network that only looks, as autocast wants it; the one given stays as it is."""
        if not (self.config.bf16 and devices.has_bf16(self.device)):
            return network
        return devices.halve_convolutions(copy.deepcopy(network))

    @torch.no_grad()
    def _depths(self) -> list[int]:
        """Channels of the maps that the projected critic looks at."""
        if self.stage.critic_sees == "vgg":
            return list(VGGLoss.channels[JUDGED])
        grey = torch.zeros(1, 3, self.stage.size, self.stage.size, device=self.device)
        with devices.bf16_autocast(self.device, self.config.bf16):
            return [m.shape[1] for m in self.recogniser_loss.recogniser.perceive(grey)[0]]

    def next_stage(self) -> None:
        """Continue from the averaged weights: grow if the next stage is larger, keep critics where they fit."""
        self.stage_index, self.stage_start = self.stage_index + 1, self.step
        torch.manual_seed(seed_of_step(self.config.seed, self.stage_index))  # for new layers, resumed or not
        older = self.critics
        self._install(grow_to(self.average.module, self.stage.size))
        for name in self.critics.keys() & older.keys():
            self.critics[name].inherit(older[name])

    # -- one step ---------------------------------------------------------------------------------------------

    def forward(self, model: MetaGPEN, batch: Placed) -> Tensor:
        """Restored faces [B, 3, S, S] of a batch on the device."""
        with devices.bf16_autocast(self.device, self.config.bf16):
            poor = batch.poor.contiguous(memory_format=torch.channels_last)
            share, filling = model.look(poor)
            share = share * batch.known[:, None]
            return model.gpen(poor, filling + share[:, :, None] * model.start(batch.identity)).float()

    def losses(self, restored: Tensor, batch: Placed) -> dict[str, Tensor]:
        """The weighted terms, each a mean over the batch; what the critics judge is kept."""
        weight, terms, self.seen = self.stage.loss, {}, None
        terms["l1"] = weight.l1 * l1(restored, batch.truth).mean()
        if weight.gradient:
            terms["gradient"] = weight.gradient * gradient_l1(restored, batch.truth).mean()
        if weight.chroma:
            terms["chroma"] = weight.chroma * chroma_l1(restored, batch.truth).mean()
        with devices.bf16_autocast(self.device, self.config.bf16):
            if weight.perceptual or weight.identity or (weight.projected and self.stage.critic_sees == "recogniser"):
                terms |= self._recogniser_terms(restored, batch)
            if self.vgg is not None:
                terms |= self._vgg_terms(restored, batch.truth)
            self.shown = Shown(restored, batch.truth, batch.landmarks, self.seen)
            for critic in self.critics.values():
                terms |= critic.terms(self.shown, weight)
        return terms

    def _recogniser_terms(self, restored: Tensor, batch: Placed) -> dict[str, Tensor]:
        """Of the recogniser's share of the batch; what it saw is there for the projected critic."""
        weight, count = self.stage.loss, math.ceil(self.stage.recogniser_share * len(restored))
        restored, truth, poor = restored[:count], batch.truth[:count], batch.poor[:count]
        seen = self.recogniser_loss(restored, truth, batch.where._replace(grid=batch.where.grid[:count]), poor)
        self.seen = Seen(luma(restored), luma(truth), seen.maps, seen.true_maps)
        return {"perceptual": weight.perceptual * seen.perceptual.mean(),
                "identity": weight.identity * seen.identity.mean(),
                "severity": F.mse_loss(self.model.gate.severity(poor), seen.lost)}

    def _vgg_terms(self, restored: Tensor, truth: Tensor) -> dict[str, Tensor]:
        looked = self.vgg(restored, truth)
        if self.stage.critic_sees == "vgg":
            self.seen = Seen(luma(restored), luma(truth), looked.maps[JUDGED], looked.true_maps[JUDGED])
        return {"lpips": self.stage.loss.lpips * looked.distance.mean()}

    def critics_step(self) -> dict[str, Tensor]:
        """Every critic learns from what was shown: what each of them lost."""
        lost = {}
        for critic in self.critics.values():
            with devices.bf16_autocast(self.device, self.config.bf16):
                losses = critic.losses(self.shown, self.step)
            critic.learn(losses)
            lost |= losses
        return lost

    def upcoming(self) -> Iterator[Batch]:
        """The batches from here to the stage's end."""
        rest = range(self.step, self.stage_start + self.stage.steps)
        return iter(DataLoader(Steps(self.batches, self.stage), batch_size=None, sampler=rest,
                               num_workers=self.config.workers, pin_memory=self.device.type == "cuda",
                               generator=torch.Generator().manual_seed(0)))

    def train_step(self, batch: Batch) -> dict[str, float]:
        placed = self.to_device(batch)
        for group in self.optimiser.param_groups:
            set_rate(group, group["factor"] * self._lr())
        terms = self.run_update(*placed.tensors())
        self.average.update_parameters(self.model)
        logged = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))  # waits for the device
        must_be_finite(sum(logged.values()), self)  # of the critics, too
        logged.pop("gradient_norm")
        self.step += 1
        return logged

    def update(self, truth: Tensor, poor: Tensor, landmarks: Tensor, grid: Tensor, identity: Tensor,
               known: Tensor) -> dict[str, Tensor]:
        """A step of all optimisers on a batch's tensors: the terms, and the gradient's norm, both as they were."""
        batch = Placed(truth, poor, landmarks, View(grid, self.recogniser_loss.recogniser.spec.size), identity, known)
        restored = self.forward(self.model, batch)
        terms = self.losses(restored, batch)
        self.optimiser.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 5.0)
        if not self.records:  # a recording is judged afterwards
            must_be_finite(norm, self)
        self.optimiser.step()
        terms |= self.critics_step()
        return {name: value.detach().float() for name, value in terms.items()} | {"gradient_norm": norm.detach()}

    def _lr(self) -> float:
        stage = self.stage
        done = self.step - self.stage_start
        return stage.lr * warmup_cosine(done, stage.steps, stage.warmup, stage.lr_final / stage.lr)

    def to_device(self, batch: Batch) -> Placed:
        def place(value: Tensor) -> Tensor:
            return value.to(self.device, non_blocking=True)

        truth = place(batch.truth)
        return Placed(truth, place(batch.poor), place(batch.landmarks),
                      self.recogniser_loss.recogniser.view(batch.landmarks, truth), place(batch.identity),
                      place(batch.known))

    # -- watching ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def watch(self) -> dict[str, float]:
        """On watched people: identity cosine (by the loss's recogniser) and PSNR, generic and with the start."""
        batch = self.to_device(self.watched.draw(0, self.stage))
        model = self.average.module
        nobody = batch._replace(known=torch.zeros_like(batch.known))
        somebody = batch._replace(known=batch.identity.any(dim=1).float())  # a single photo says nothing about others
        outputs = {"generic": self.forward(model, nobody), "start": self.forward(model, somebody)}
        figures = {}
        for name, restored in outputs.items():
            with devices.bf16_autocast(self.device, self.config.bf16):
                seen = self.recogniser_loss(restored, batch.truth, batch.where)
            figures[f"{name}_cosine"] = float(1 - seen.identity.mean())
            mse = (restored.clamp(-1, 1) - batch.truth).square().mean(dim=(1, 2, 3)) / 4
            figures[f"{name}_psnr"] = float(-10 * mse.log10().mean())
        columns = {"input": batch.poor, **outputs, "truth": batch.truth}
        rows = [[(name, to_pil(images[i].cpu())) for name, images in columns.items()]
                for i in range(min(12, len(batch.truth)))]
        save_photo(contact_sheet(rows), self.folder / f"sheet_{self.step:06d}.png")
        return figures

    # -- files ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """`last.pt`: everything needed to resume exactly; `ema.safetensors`: the averaged model, ready to load."""
        state = {"step": self.step, "stage_index": self.stage_index, "stage_start": self.stage_start,
                 "config": self.config.model_dump_json(), "photos": self.batches.photos.digest,
                 "model": self.model.state_dict(), "average": self.average.state_dict(),
                 "optimiser": self.optimiser.state_dict()}
        for name, critic in self.critics.items():
            state |= {name: critic.network.state_dict(), f"{name}_optimiser": critic.optimiser.state_dict()}
        save_average(self.average.module, self.folder / "ema.safetensors")
        write_state(self.folder / "last.pt", state)

    def resume(self) -> bool:
        return go_on_from(self.folder / "last.pt", self.device, self._take_up)

    def _take_up(self, state: dict[str, Any]) -> None:
        path = self.folder / "last.pt"
        if state["stage_index"] >= len(self.config.stages):
            raise CheckpointError(f"{path}: was written in stage {state['stage_index'] + 1}, the configuration has "
                                  f"only {len(self.config.stages)} stages")
        then = TrainConfig.as_stored(state["config"], FREE_TO_CHANGE)
        now = self.config.model_dump(mode="json", exclude=FREE_TO_CHANGE)
        same_run(path, _bound(then, state["stage_index"]), _bound(now, state["stage_index"]), TAKE_ANOTHER)
        same_photos(path, state, self.batches.photos)
        self.stage_index, self.stage_start, self.step = state["stage_index"], state["stage_start"], state["step"]
        self._install(grow_to(self.model, self.stage.size))
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        for name, critic in self.critics.items():
            critic.network.load_state_dict(state[name])
            critic.optimiser.load_state_dict(state[f"{name}_optimiser"])
        self._prepare_update()  # the device may be another one

    # -- the loop ---------------------------------------------------------------------------------------------

    def run(self, console: Console) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        forget_later_steps(self.folder / "log.jsonl", self.step)
        total = sum(stage.steps for stage in self.config.stages)
        with (progress_bar("train", total, self.step, console) as show,
              (self.folder / "log.jsonl").open("a") as log):
            upcoming = self.upcoming()
            while True:
                if self.step - self.stage_start >= self.stage.steps:
                    if self.stage_index + 1 == len(self.config.stages):
                        break
                    with finishing():
                        self.save()
                        self.next_stage()
                        upcoming = self.upcoming()
                batch = next(upcoming)
                began = time.perf_counter()
                record = {"step": self.step, "size": self.stage.size, "lr": self._lr()}
                with log_of_step(log, record, self):
                    with finishing():
                        record |= self.train_step(batch)
                        record["photos_per_second"] = self.stage.batch_size / (time.perf_counter() - began)
                    if self.step % self.config.sheet_every == 0:
                        record |= self.watch()
                        console.print({k: round(v, 4) for k, v in record.items()})
                if self.step % self.config.save_every == 0:
                    self.save()
                show(self.step, f"{self.stage.size} px  loss {record['l1']:.3f}  "
                                f"{record['photos_per_second']:.0f} photos/s")
        self.save()
        return self.folder / "ema.safetensors"


def _bound(config: dict[str, Any], stage: int) -> dict[str, Any]:
    """What a resumed run must have in common with the one that it goes on with: all that shaped its numbers so far."""
    stages = [dict(own) for own in config["stages"][:stage + 1]]
    stages[-1].pop("steps")  # the present one may be made longer, and others follow
    return {**config, "stages": stages}


def grow_to(model: MetaGPEN, size: int) -> MetaGPEN:
    """The model, doubled until it has this size."""
    begun = model.size
    while model.size < size:
        model = MetaGPEN(grow(model.gpen), model.start.grow(), model.card)
    if model.size != size:
        raise ConfigError(f"a model of {begun} px cannot become one of {size} px: sizes may stay or double")
    return model


def prepare(config: TrainConfig) -> Trainer:
    """Read and pack the photos, embed them, and build the trainer."""
    parts_of_people = split(load_crops(*config.data, layout=config.layout), config.split)
    recogniser = recognise.load(config.recogniser, device=config.device)
    degradation = degrade.full_size(config.degradation)
    if any(stage.loss.lpips or (stage.loss.projected and stage.critic_sees == "vgg") for stage in config.stages):
        VGGLoss()  # its weights had better be missing now than after the stages before
    parts, cache = {}, config.cache_dir or config.output_dir / "cache"
    for name in ("train", "val"):
        if name not in parts_of_people:
            raise DataError(f"{config.split}: no person of these folders is marked '{name}'")
        photos = pack(parts_of_people[name], config.pack_size, cache, workers=2)
        parts[name] = Batches(photos, embed_all(recogniser, photos, config.bf16, cache), degradation, config, name)
        for stage in config.stages:
            parts[name].allowed(stage)  # it had better be told now that a later stage will have none
    in_losses = recognise.load(config.loss_recogniser, config.device) if config.loss_recogniser else recogniser
    return Trainer(config, parts["train"], parts["val"], recogniser.dim, in_losses)


def train(config: TrainConfig, resume: bool = True) -> Path:
    """Train, resuming `output_dir/last.pt` if there is one; returns the path of the averaged model."""
    console = Console()
    if config.threads:
        torch.set_num_threads(config.threads)
    path = run_or_go_on(prepare(config), console, resume)
    console.print(f"done: {path}, contact sheets and log.jsonl beside it")
    return path
