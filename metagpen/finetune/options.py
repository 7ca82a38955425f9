"""The options file of `metagpen train -opt`: the keys of the usual few-shot tutorial on GPEN, in BasicSR's manner.

Everything that the tutorial prints is accepted. Where a key cannot mean here what it means in BasicSR, `notes` says
what is made of it, and the run prints that. Keys that the tutorial does not have are ours; they have defaults.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from ..adaptation import AdaptConfig
from ..config import Config, Seed, Weight
from ..gpen import GPEN
from ..schedule import warmup_cosine

Dataset = Literal["SingleImageDataset", "PairedImageDataset"]
Label = Annotated[str, StringConstraints(pattern=r"^[^./\\][^/\\]*$")]  # it names a folder
DEFAULTS = AdaptConfig()


class IOBackend(Config):
    """Photos are files; there is no other backend."""

    type: Literal["disk"] = "disk"


class ColorJitter(Config):
    """Factors drawn from [1 - x, 1 + x], the same for both sides of a pair."""

    brightness: float = Field(0.0, ge=0, lt=1)
    contrast: float = Field(0.0, ge=0, lt=1)


class Pairs(Config):
    """Photos on disk: sharp ones and, under the same file names, degraded ones.

    dataroot_lq: without it every draw is degraded afresh, by `degradation` (parts as in `degrade.by_name("mixed")`).
    aligned: the photos are square FFHQ-style crops already; otherwise the face is found in the sharp one.
    """

    name: Label | None = None
    dataset_type: Dataset = "SingleImageDataset"
    dataroot_gt: Path
    dataroot_lq: Path | None = None
    io_backend: IOBackend = IOBackend()
    aligned: bool = False


class TrainPairs(Pairs):
    """resize_crop: zoom drawn from this range, the frame then laid at random. use_rot: quarter turns and upside down,
    as in BasicSR; off by default, faces have an up."""

    use_hflip: bool = True
    use_rot: bool = False
    resize_crop: tuple[float, float] | None = None
    color_jitter: ColorJitter = ColorJitter()
    degradation: dict[str, Any] = DEFAULTS.degradation
    batch_size_per_gpu: int = Field(DEFAULTS.batch_size, gt=0)

    @model_validator(mode="after")
    def a_range(self) -> TrainPairs:
        if self.resize_crop and not 0.5 <= self.resize_crop[0] <= self.resize_crop[1] <= 2:
            raise ValueError("resize_crop must be [smallest, largest] zoom, between 0.5 and 2")
        return self


class ValPairs(Pairs):
    """Held-out pairs; they are never trained on."""

    dataroot_lq: Path


class Datasets(Config):
    """val: without it one of the training pairs is held back when there are three or more."""

    train: TrainPairs
    val: ValPairs | None = None


class Network(Config):
    """nf: of no use, the width is the given model's. n_blocks: how many of the encoder's last blocks are released."""

    type: Literal["GPEN"] = "GPEN"
    nf: int | None = Field(None, gt=0)
    n_blocks: int = Field(DEFAULTS.tail_blocks, ge=1)


class Paths(Config):
    """pretrain_network_g: the model to begin from (a file, a catalogue name); none: the embedded one.
    pretrain_network_d: a GPEN discriminator of the same size; none: one learns from scratch beside stage 1."""

    pretrain_network_g: str | None = None
    pretrain_network_d: Path | None = None
    experiments_root: Path = Path("experiments")


class Scheduler(Config):
    """How the rates fall after the warm-up. CosineAnnealingLR: from lr_G to `eta_min` at `T_max` (total_iters).
    MultiStepLR: times `gamma` at each of `milestones`."""

    type: Literal["CosineAnnealingLR", "MultiStepLR"] = "CosineAnnealingLR"
    eta_min: float = Field(1e-6, ge=0)
    T_max: int | None = Field(None, gt=0)
    milestones: list[int] = []
    gamma: float = Field(0.5, gt=0, le=1)


class Losses(Config):
    """Weights of the terms (see docs/adaptation.md); `adversarial` counts from stage 2 on."""

    l1: Weight = DEFAULTS.l1
    gradient: Weight = DEFAULTS.gradient
    chroma: Weight = DEFAULTS.chroma
    perceptual: Weight = DEFAULTS.perceptual
    identity: Weight = DEFAULTS.identity
    latent_norm: Weight = DEFAULTS.latent_norm
    adversarial: Weight = DEFAULTS.adversarial


class Schedule(Config):
    """Iterations and rates. lr_G: of the encoder's tail; the latent adapter moves `latent_rate` times as fast.
    release: share of the iterations after which stage 2 begins."""

    total_iters: int = Field(2000, gt=0)
    warmup_iter: int = Field(100, ge=0)
    lr_G: float = Field(DEFAULTS.lr_tail, gt=0)
    lr_D: float = Field(DEFAULTS.lr_critic, gt=0)
    scheduler: Scheduler = Scheduler()
    release: float = Field(0.5, ge=0, le=1)
    latent_rate: float = Field(DEFAULTS.lr_latent / DEFAULTS.lr_tail, ge=0)
    losses: Losses = Losses()

    @property
    def joint_from(self) -> int:
        """The iteration at which stage 2 begins."""
        return round(self.release * self.total_iters)

    def factor(self, iteration: int) -> float:
        """What both rates are multiplied with at an iteration."""
        chosen, warmup = self.scheduler, self.warmup_iter
        if chosen.type == "CosineAnnealingLR":
            last = min(1.0, chosen.eta_min / self.lr_G)
            return warmup_cosine(iteration, chosen.T_max or self.total_iters, warmup, last)
        ramp = (iteration + 1) / (warmup + 1) if iteration < warmup else 1.0
        return ramp * chosen.gamma ** bisect_right(sorted(chosen.milestones), iteration)


class Validation(Config):
    """recogniser: of the identity column; none: the one of the losses, and the log says so."""

    val_freq: int = Field(100, gt=0)
    recogniser: str | None = None


class Logger(Config):
    print_freq: int = Field(10, gt=0)
    save_checkpoint_freq: int = Field(500, gt=0)
    use_tb_logger: bool = True


class Options(Config):
    """`metagpen train -opt`. name: of the folder below `experiments/`; none: the training data set's name."""

    name: Label | None = None
    datasets: Datasets
    network_g: Network = Network()
    path: Paths = Paths()
    start_iter: int = Field(0, ge=0, description="first iteration, for going on from another run's model")
    train: Schedule = Schedule()
    val: Validation = Validation()
    logger: Logger = Logger()
    manual_seed: Seed = 0
    device: str = "auto"

    @model_validator(mode="before")
    @classmethod
    def where_the_tutorial_puts_them(cls, data: Any) -> Any:
        """`scheduler` may stand at the top too, and `start_iter` under `train`; each of them once."""
        if not isinstance(data, dict):
            return data
        top = dict(data)
        train = top["train"] = dict(top["train"]) if isinstance(top.get("train"), dict) else top.get("train", {})
        if not isinstance(train, dict):
            return data
        for key, taken, right in (("scheduler", top, train), ("start_iter", train, top)):
            if key in taken:
                if key in right:
                    raise ValueError(f"'{key}' is given at the top and under 'train'; keep one of them")
                right[key] = taken.pop(key)
        return top

    @model_validator(mode="after")
    def possible(self) -> Options:
        if self.start_iter >= self.train.total_iters:
            raise ValueError(f"start_iter = {self.start_iter} leaves nothing of {self.train.total_iters} iterations")
        return self

    @property
    def label(self) -> str:
        """The experiment's name."""
        return self.name or self.datasets.train.name or "finetune"

    @property
    def folder(self) -> Path:
        return self.path.experiments_root / self.label

    def released_blocks(self, gpen: GPEN) -> int:
        """How many of the encoder's last blocks learn: `n_blocks`, or as many as may."""
        return min(self.network_g.n_blocks, len(gpen.encoder) - 1)

    def adapt_config(self, gpen: GPEN) -> AdaptConfig:
        """The settings of the inner loop's objective. Full matrices, as a fine-tune moves; no start and no rule."""
        losses, train = self.train.losses, self.datasets.train
        return AdaptConfig(
            **losses.model_dump(), batch_size=train.batch_size_per_gpu, degradation=train.degradation,
            steps=self.train.total_iters, warmup=self.train.warmup_iter, lr_tail=self.train.lr_G,
            lr_latent=self.train.lr_G * self.train.latent_rate, lr_critic=self.train.lr_D, seed=self.manual_seed,
            tail_blocks=self.released_blocks(gpen), tail_rank=0, decoder_rank=0, start=False, rule=False,
        )  # fmt: skip

    def notes(self, gpen: GPEN) -> list[str]:
        """What is made of the keys whose names promise something else."""
        network, blocks = self.network_g, self.released_blocks(gpen)
        begin = self.path.pretrain_network_g or "embedded"
        lines = [f"path.pretrain_network_g: {begin}, {gpen.size} px"]
        if network.nf is not None:
            lines.append(f"network_g.nf: {network.nf} has no effect; the widths are those of the model begun from "
                         f"({gpen.config.channels(gpen.size)} to {gpen.config.channels(4)} channels)")
        most = "" if blocks == network.n_blocks else f", all that this model has; {network.n_blocks} were asked for"
        lines.append(f"network_g.n_blocks: the last {blocks} blocks of the encoder are released{most}")
        lines.append("beside them the encoder's last linear layer and the latent adapter; the prior stays frozen")
        if self.datasets.train.use_rot:
            lines.append("datasets.train.use_rot: faces are turned and stood on their heads; this usually harms")
        return lines
