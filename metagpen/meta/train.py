"""`metagpen meta-train`: the outer loop over people, resumable to the number, on one process or several.

Every random draw comes from (seed, step, place in the meta-batch), so a killed and resumed run, or two processes in the
place of one with twice the people, take the same meta-steps.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TextIO

import torch
import torch.distributed as dist
from pydantic import Field, field_validator
from rich.console import Console
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from .. import degrade, recognise
from ..adaptation import AdaptConfig, adapt
from ..adaptation.config import DECIDED_BY_RULE
from ..adaptation.draws import Album, draw, helpers, placed
from ..adaptation.objective import Objective
from ..atomic import forget_later_steps, write_text
from ..config import SEEDS, Card, Config, Device, Seed, Weight, same_run, seed_of_step
from ..errors import CheckpointError, ConfigError, DataError
from ..evaluate import tasks
from ..evaluate.engine import Scorer, named_degradations
from ..evaluate.judges import is_one_of
from ..evaluate.report import contact_sheet
from ..faces import save_photo, to_pil
from ..identities import PackedPhotos, load_crops, pack, split
from ..losses import VGGLoss
from ..lpips_files import load_lpips
from ..model import MetaGPEN
from ..person import Parameters, mean_identity
from ..person.bases import DecoderBases
from ..person.rule import InnerRule, RuleConfig
from ..person.start import MixtureHead
from ..recognise.align import View
from ..runs import (
    TAKE_ANOTHER,
    ema_with_warmup,
    embed_all,
    go_on_from,
    log_of_step,
    must_be_finite,
    progress_bar,
    run_or_go_on,
    same_photos,
    save_average,
    tensorboard,
    write_state,
)
from ..schedule import warmup_cosine
from ..weights import load
from ..workers import finishing
from . import ENGINES, OUTER_LOOPS, Problem, Progress
from .problem import where_people_begin
from .recorded import RecordedGradient

# What validation reports, and what the scorer calls it; LPIPS (AlexNet, lower is better) where its backbone is
# installed.
WATCHED = {"identity": "identity:scorer", "psnr": "psnr", "lpips": "lpips", "sharpness": "sharpness"}
# How validation measures: gains under other settings cannot be compared.
MEASURE = {"scorer", "validate_part", "validate_people", "validate_queries", "validate_steps", "validate_degradations"}
WHILE_ONE_VALIDATES = timedelta(days=1)  # the other processes wait, where torch gives up after ten or thirty minutes
# What a resumed run may have otherwise; `people` when they are shared out among other processes. Only meta_steps has a
# part in the weights so far: rates fall along it, so that a run made longer goes on at larger ones, and is not what it
# would have been at that length from the beginning.
FREE_TO_CHANGE = {"output_dir", "cache_dir", "device", "threads", "workers", "card", "save_every", "meta_steps",
                  "validate_every", "people"} | MEASURE


class OuterLoss(Config):
    """Weights of the query loss."""

    l1: Weight = 1.0
    gradient: Weight = 0.5
    chroma: Weight = 1.0
    perceptual: Weight = 0.5
    identity: Weight = 0.5
    lpips: Weight = Field(0.0, description="LPIPS over VGG-16, whose weights must be installed: no term of the "
                                           "inner loss minds texture, so that only this keeps steps from blurring")


class QueryObjective(Objective):
    """The query's loss: that of a step under other weights, and LPIPS over VGG-16 where it counts."""

    def __init__(self, model: MetaGPEN, config: AdaptConfig, recogniser: recognise.Recogniser | None, lpips: float,
                 vgg: VGGLoss | None):
        super().__init__(model, config, recogniser, None)
        self.lpips, self.vgg = lpips, vgg

    def terms(self, parameters: Parameters, restored: Tensor, truth: Tensor, poor: Tensor, landmarks: Tensor) -> Tensor:
        """The loss of each person [P]."""
        loss = super().terms(parameters, restored, truth, poor, landmarks)
        if self.vgg is None:
            return loss
        with self.autocast():
            distance = self.vgg(restored, truth).distance
        return loss + self.lpips * distance.unflatten(0, (len(loss), -1)).mean(dim=1)


class InnerConfig(AdaptConfig):
    """As in `adapt`, for a rule of fewer steps."""

    steps: int = Field(8, gt=0)
    cuda_graphs: bool | None = Field(None, exclude=True, description="on a GPU, record the gradient of an inner step "
                                                                     "and play it again; default: wherever that can "
                                                                     "be done: in first order, engine batched")
    compile: bool = Field(False, exclude=True, description="never here")
    rule: Literal[True] = Field(True, exclude=True, description="never otherwise: the rule is what is learned")
    lr_scale: float = Field(1.0, ge=1, le=1, exclude=True, description="never here: rates are what is learned")
    adversarial_steps: Literal[0] = Field(0, exclude=True, description="never here: a critic's steps have no rule")

    @field_validator("compile")
    @classmethod
    def _differentiable(cls, value: bool) -> bool:
        if value:
            raise ValueError("steps that are learned through want derivatives that compiled ones lack; leave it out")
        return value


class MetaConfig(Config):
    """`metagpen meta-train`. `data`: folders of people; `split`: CSV that marks who learns (`part`) and who is watched
    (`validate_part`).

    `inner`: the inner loss and its degradations, the adapter's shape, the optimiser, and the rates to begin from where
    `base` has no rule for this optimiser and `schedule` (its `steps` is how many the rule has rates for). `people`: per
    process and meta-step.
    """

    data: list[Path]
    split: Path
    layout: str = Field("folder", description="of `data`: folder, celeba_hq, celeba, ffhq, lfw, grouped or shards")
    part: str = Field("train", description="of the split, whom to learn on: best people whom the base's training left "
                                           "out, because on people it knows hardly any step is worth taking")
    output_dir: Path = Path("runs/meta_128")
    cache_dir: Path | None = Field(None, description="of packed photos and their embeddings, which runs may share; "
                                                     "default: cache in output_dir")
    base: str = Field("embedded", description="the model to begin from")
    loss_recogniser: str | None = Field(None, description="the one in the losses; default: the start's")
    loop: str = Field("lslr", description="one of " + ", ".join(OUTER_LOOPS))
    first_order: bool = Field(True, description="inner gradients count as constants; a fraction of the cost")
    engine: str = Field("batched", description="one of " + ", ".join(ENGINES))
    schedule: str = Field("flat", pattern="^(flat|cosine)$",
                          description="what the rule's rates are multiplied with along a run of any length: nothing, "
                                      "or a warm-up and a cosine")
    inner: InnerConfig = InnerConfig()
    outer: OuterLoss = OuterLoss()
    unroll: tuple[int, int] | None = Field(None, description="fewest and most inner steps that are trained through, "
                                                              "drawn per meta-step, even on a logarithmic scale; "
                                                              "default: always inner.steps; [0, 0]: none, where "
                                                              "people begin is judged at once, at a fraction of the "
                                                              "cost")
    people: int = Field(4, gt=0)
    shots: tuple[int, int] = (1, 8)
    queries: int = Field(4, gt=0)
    min_query_side: int = Field(0, ge=0, description="native pixels that a query photo must have")
    learn_start: bool = True
    start_mixtures: int = Field(0, ge=0, description="width of the layer from which a start that sets offsets alone "
                                                     "learns to guess the decoder's mixtures too; 0: it does not")
    start_appearance: bool = Field(False, description="whether a start that sees embeddings alone learns to look at "
                                                      "the encoder's mean w of the photos too")
    slow: list[str] = Field([], description="patterns of names of shared weights to learn too, e.g. "
                                            "bases.*, gpen.generator.*.modulation.*, start.gate.slope")
    meta_steps: int = Field(1000, gt=0)
    outer_optimiser: str = Field("adam", pattern="^(adam|sgd)$")
    lr: float = Field(3e-3, ge=0, description="of where people begin")
    lr_rates: float = Field(3e-2, ge=0, description="of the logarithms of the inner rates")
    lr_start: float = Field(1e-4, ge=0)
    lr_slow: float = Field(1e-5, ge=0)
    lr_final: float = Field(0.05, ge=0, le=1, description="last rate as a fraction of the first, by a cosine")
    warmup: int = Field(20, ge=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient of each of the groups")
    ema: float = Field(0.99, ge=0, lt=1)
    pack_size: int | None = Field(None, gt=0, description="default: the model's size")
    seed: Seed = 0
    device: Device = "auto"
    threads: int | None = Field(None, ge=1)
    workers: int | None = Field(None, ge=0, description="processes that draw and damage episodes ahead; default: "
                                                        "beside a GPU, on Linux, one per core but one, at most 32, "
                                                        "shared by the run's processes; beside a CPU none")
    save_every: int = Field(50, gt=0)
    validate_every: int = Field(200, gt=0)
    validate_part: str = Field("val", description="of the split, who is watched")
    validate_people: int = Field(8, gt=0)
    validate_queries: int = Field(6, gt=0)
    validate_steps: list[Annotated[int, Field(ge=0)]] = Field(
        [], description="inner steps to validate at; the last decides which model is best; default: 0 and inner.steps")
    validate_degradations: list[str] = Field(["heavy", "moderate"], min_length=1)
    scorer: str | None = Field(None, description="recogniser that judges validation; default: the start's")
    card: Card = Field({}, description="added to the model's card")


class InnerObjective(Objective):
    """An inner step's loss, as whoever adapts will have it, as a function of tensors alone, so that it can be recorded.

    grid: where the recogniser looks; origin: [P, L, D], where everybody's latent offset began.
    """

    def __call__(self, parameters: Parameters, truth: Tensor, poor: Tensor, grid: Tensor, origin: Tensor) -> Tensor:
        self.origin = origin
        return super().__call__(parameters, truth, poor, View(grid, self.recogniser_loss.recogniser.spec.size))


class Episode(NamedTuple):
    """A meta-step's people, on the CPU: of every inner step the truth, the poor photos [T, P·B, 3, S, S] and landmarks
    [T, P·B, 5, 2] (nothing without a step); the same of the query; mean embeddings [P, E], and, where the start looks
    at it, mean w [P, D]."""

    step: int
    support: tuple[Tensor, ...]
    query: tuple[Tensor, Tensor, Tensor]
    identities: Tensor
    appearances: Tensor | None


@dataclass
class Data:
    """Packed training photos with their embeddings, and the tasks of those who are watched."""

    photos: PackedPhotos
    embeddings: Tensor
    watched: list[tasks.Task]


class Episodes(Dataset):
    """A process' episodes by meta-step, so that worker processes can make them ahead: everybody in the process' places
    of the meta-batch draws from (seed, step, place) alone.

    appearances: of all photos [N, D], where the start looks at them.
    """

    def __init__(self, config: MetaConfig, photos: PackedPhotos, embeddings: Tensor, appearances: Tensor | None,
                 rank: int):
        self.config, self.photos, self.embeddings, self.appearances = config, photos, embeddings, appearances
        self.rank, self.degradation = rank, degrade.full_size(config.inner.degradation)
        self.places = self.eligible()

    def eligible(self) -> list[tuple[Tensor, Tensor]]:
        """Of everybody who can be an episode: all photos, and those that may be queries."""
        config, photos = self.config, self.photos
        least = config.shots[0]
        unroll = config.unroll if any(config.unroll or ()) else (1, 1)  # [0, 0], no step, is no range to be wrong
        for name, (low, high) in {"shots": config.shots, "unroll": unroll}.items():
            if not 1 <= low <= high:
                raise ConfigError(f"{name}: {[low, high]} is no range; give [smallest, largest] from 1 up")
        sharp = photos.source_side.nan_to_num(nan=float("inf")) >= config.min_query_side
        found = []
        for own in photos.by_person():
            queries = own[sharp[own]]
            if len(queries) and len(own) >= least + 1:
                found.append((own, queries))
        if not found:
            raise DataError(f"no training person has {least} photos to learn from and another of "
                            f"{config.min_query_side} native px to be judged on; lower shots or min_query_side, or "
                            "add photos")
        return found

    def __getitem__(self, step: int) -> Episode:
        config, photos = self.config, self.photos
        albums, generators, identities, appearances, query = [], [], [], [], []
        for place in range(self.rank * config.people, (self.rank + 1) * config.people):
            number = seed_of_step(config.seed, step) * 65_537 + place
            generator = torch.Generator().manual_seed(number % SEEDS)
            own, may_be_query = self.places[int(torch.randint(len(self.places), (), generator=generator))]
            shots = int(torch.randint(config.shots[0], min(config.shots[1], len(own) - 1) + 1, (), generator=generator))
            first = may_be_query[torch.randint(len(may_be_query), (), generator=generator)]
            rest = own[own != first]
            rest = rest[torch.randperm(len(rest), generator=generator)]
            support, others = rest[:shots], rest[shots:]
            candidates = torch.cat((first[None], others[torch.isin(others, may_be_query)]))[:config.queries]
            candidates = candidates[torch.arange(config.queries) % len(candidates)]  # few photos: damaged repeatedly
            truth = photos.batch(candidates)
            query.append((truth, self.degradation(truth, generator), photos.landmarks[candidates]))
            albums.append(Album(photos.batch(support), photos.landmarks[support]))
            identities.append(mean_identity(self.embeddings[support]))
            if self.appearances is not None:
                appearances.append(self.appearances[support].mean(dim=0))
            generators.append(generator)
        drawn = [draw(albums, self.degradation, config.inner, generators) for _ in range(self.inner_steps(step))]
        return Episode(step, together(drawn, torch.stack), together(query, torch.cat), torch.stack(identities),
                       torch.stack(appearances) if appearances else None)

    def inner_steps(self, step: int) -> int:
        """How many inner steps a meta-step trains through; the same in every process."""
        if self.config.unroll is None:
            return self.config.inner.steps
        fewest, most = self.config.unroll
        if most == 0:
            return 0
        generator = torch.Generator().manual_seed(seed_of_step(self.config.seed, step))
        place = torch.rand((), generator=generator).item()
        return min(most, int(fewest * ((most + 1) / fewest) ** place))


class Trainer:
    """The model whose rule, start and slow weights are learned, its average, and the step it is at."""

    def __init__(self, config: MetaConfig, data: Data, model: MetaGPEN, recogniser: recognise.Recogniser,
                 in_losses: recognise.Recogniser, scorer: recognise.Recogniser):
        self.config, self.data = config, data
        self.recogniser, self.in_losses, self.scorer = recogniser, in_losses, scorer
        self.folder, self.device = Path(config.output_dir), torch.device(config.device)
        self.rank, self.world = process_of_run(config.device)
        self.loop, self.engine = choose(OUTER_LOOPS, "loop", config.loop), choose(ENGINES, "engine", config.engine)
        if config.loop == "maml" and config.first_order:
            raise ConfigError("loop: maml in first order is fomaml; take loop: fomaml, or first_order: false beside "
                              "inner.optimiser: sgd")
        self.step, self.best, self.validated, self.base = 0, float("-inf"), 0, model.fingerprint
        self.degradations, self.lpips = named_degradations(config.validate_degradations), load_lpips()
        self.model = self._with_rule(model).to(self.device)
        looks = self.model.start is not None and self.model.start.appearance is not None
        appearances = see_all(self.model, data.photos) if looks else None
        self.episodes = Episodes(config, data.photos, data.embeddings, appearances, self.rank)
        self.inner_objective = InnerObjective(self.model, config.inner, self.recogniser, None)
        self.query_objective = QueryObjective(self.model, outer_config(config), in_losses, config.outer.lpips,
                                              VGGLoss().to(self.device) if config.outer.lpips else None)
        self.groups = self._groups()
        self.slow = list(self.groups["slow"].values())
        rates = {"begin": config.lr, "rates": config.lr_rates, "start": config.lr_start, "slow": config.lr_slow}
        groups = [{"params": list(own.values()), "lr": rates[name], "base_lr": rates[name], "name": name}
                  for name, own in self.groups.items() if own]
        self.optimiser = (torch.optim.Adam(groups, betas=(0.9, 0.99)) if config.outer_optimiser == "adam"
                          else torch.optim.SGD(groups))
        self.average = AveragedModel(self.model, multi_avg_fn=ema_with_warmup(config.ema))
        rule = self.model.rule
        self.gradient = (RecordedGradient(self.inner_objective, rule.names, rule.moving)
                         if records_gradients(config, self.device) else None)

    def _with_rule(self, model: MetaGPEN) -> MetaGPEN:
        config = self.config
        moving = {} if self.loop.moving is None else {"moving": self.loop.moving}
        shape = RuleConfig(config.inner.optimiser, config.inner.steps, self.loop.per_step, self.loop.elementwise,
                           **moving, schedule=config.schedule)
        inner = config.inner
        rule = InnerRule(model.gpen, inner.spec, shape, inner.lr_latent, inner.lr_tail, inner.lr_decoder, config.seed)
        if model.rule is not None:
            rule.take(model.rule)
        bases = model.bases
        if inner.decoder_rank and bases is None:
            bases = DecoderBases.random(model.gpen, inner.decoder_rank)
        card = {**model.card, **config.card, "meta": {
            "loop": config.loop, "first_order": config.first_order, "inner_steps": config.inner.steps,
            "part": config.part, "people": len(self.data.photos.names), "photos": len(self.data.photos),
            "loss_recogniser": self.in_losses.name}}
        if config.start_mixtures and model.start is not None and model.start.mixtures is None:
            model.start.mixtures = self._new_mixtures(model)
        if config.start_appearance and model.start is not None and model.start.appearance is None:
            model.start.look_at_appearance()
        return MetaGPEN(model.gpen, model.start, card, rule, bases).requires_grad_(False)

    def _new_mixtures(self, model: MetaGPEN) -> MixtureHead:
        rank = self.config.inner.decoder_rank
        if not rank:
            raise ConfigError("start_mixtures: with inner.decoder_rank 0 people have no mixtures; give it a rank")
        channels = [layer.conv.weight.shape[1] for layer in model.gpen.generator.styled]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return MixtureHead(model.start.hidden, channels, rank, self.config.start_mixtures)

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        """What is learned, by group and name; asks for their gradients."""
        config, rule = self.config, self.model.rule
        rates = dict(rule.log_rates.named_parameters(prefix="rule.log_rates")) | {"rule.shrink": rule.shrink}
        groups: dict[str, dict[str, Tensor]] = {
            "begin": dict(rule.initial.named_parameters(prefix="rule.initial")),
            "rates": rates if self.loop.learns_rates else {},
            "start": {}, "slow": {}}
        taken = set(groups["begin"]) | set(rates)
        if config.learn_start:
            if self.model.start is None:
                raise ConfigError(f"learn_start: the base {config.base} has no start; set learn_start to false")
            if not config.inner.start:
                raise ConfigError("learn_start: with inner.start false nobody begins at the start, so nothing would be "
                                  "learned of it; set learn_start to false")
            groups["start"] = {name: value for name, value in self.model.named_parameters()
                               if name.startswith(("start.body.", "start.head.", "start.mixtures.",
                                                "start.appearance."))}
            taken |= set(groups["start"])
        for pattern in config.slow:
            matching = {name: value for name, value in self.model.named_parameters()
                        if fnmatch(name, pattern) and name not in taken}
            if not matching:
                raise ConfigError(f"slow: no shared weight is called '{pattern}' (or it is learned already)")
            groups["slow"] |= matching
        for own in groups.values():
            for value in own.values():
                value.requires_grad_(True)
        moving = sorted(name for name in groups["slow"] if name.startswith(("gpen.ecd", "gpen.final_linear.",
                                                                            "gpen.generator.style.")))
        if moving and self.episodes.appearances is not None:
            raise ConfigError(f"slow: {moving[0]} makes the w that the start looks at, which is computed once; take it "
                              "out")
        return groups

    # -- one meta-step ----------------------------------------------------------------------------------------

    def upcoming(self) -> Iterator[Episode]:
        """The episodes from here to the end."""
        rest, workers = range(self.step, self.config.meta_steps), self.config.workers
        if workers is None:
            workers = helpers(self.device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        workers = min(workers, len(rest))
        context = "fork" if sys.platform == "linux" else None  # elsewhere a worker gets the photos anew
        ahead = {"num_workers": workers, "multiprocessing_context": context, "prefetch_factor": 1} if workers else {}
        return iter(DataLoader(self.episodes, batch_size=None, sampler=rest, pin_memory=self.device.type == "cuda",
                               generator=torch.Generator().manual_seed(0), **ahead))

    def problem(self, episode: Episode) -> Problem:
        """What an outer loop is given of an episode, on the device."""
        config, rule = self.config, self.model.rule

        def on_device(value: Tensor) -> Tensor:
            return value.to(self.device, non_blocking=True)

        guess = None
        if config.inner.start:
            seen = None if episode.appearances is None else on_device(episode.appearances)
            guess = self.model.guess(on_device(episode.identities), seen)
        begin = rule.begin(config.people, guess)
        origin = begin["latent.offset"].detach()
        drawn = [placed(own, self.device, self.recogniser) for own in zip(*episode.support, strict=True)]
        support = [(truth, poor, where.grid, origin) for truth, poor, where in drawn]
        return Problem(self.inner_objective, self.query_objective, support,
                       tuple(on_device(part) for part in episode.query), begin,
                       [rule.rates(k, len(support)) for k in range(len(support))], config.inner.optimiser, self.slow,
                       self.gradient)

    def meta_gradient(self, episode: Episode) -> Tensor:
        """Fills `.grad` of everything learned with the mean over all processes' people; returns the outer loss."""
        problem = self.problem(episode)
        progress = Progress(episode.step / self.config.meta_steps, not self.config.first_order)
        if problem.support:
            found = self.loop.gradient(problem, self.engine, progress)
        else:
            found = where_people_begin(problem)
        self.optimiser.zero_grad(set_to_none=True)
        outputs = [problem.begin[name] for name in found.begin]
        inwards = list(found.begin.values())
        for rates, own in zip(problem.rates, found.rates, strict=True):
            outputs += [rates[name] for name in own]
            inwards += list(own.values())
        torch.autograd.backward(outputs, inwards)
        for (name, value), gradient in zip(self.groups["slow"].items(), found.slow, strict=True):
            if gradient is None:
                raise ConfigError(f"slow: {name} does not influence the query loss (the encoder before the tail is "
                                  "frozen, reptile has no query gradient, and where people begin is the start's only "
                                  "with learn_start); take it out")
            value.grad = gradient
        if self.world == 1:
            return found.loss
        learned = [value for own in self.groups.values() for value in own.values()]
        for value in learned:
            value.grad = torch.zeros_like(value) if value.grad is None else value.grad
        loss = found.loss.detach().clone()
        average_over_processes([*(value.grad for value in learned), loss])
        return loss

    def train_step(self, episode: Episode) -> dict[str, float]:
        loss = self.meta_gradient(episode)
        factor = self._factor()
        record = {"step": self.step, "loss": float(loss), "factor": factor}
        for group in self.optimiser.param_groups:
            group["lr"] = factor * group["base_lr"]
            norm = torch.nn.utils.clip_grad_norm_(group["params"], self.config.clip)
            must_be_finite(norm, self)
            record[f"gradient_{group['name']}"] = float(norm)
        self.optimiser.step()
        self.average.update_parameters(self.model)
        self.step += 1
        return record

    def _factor(self) -> float:
        """What every group's rate is multiplied with."""
        return warmup_cosine(self.step, self.config.meta_steps, self.config.warmup, self.config.lr_final)

    # -- watching ---------------------------------------------------------------------------------------------

    @property
    def validate_steps(self) -> list[int]:
        return self.config.validate_steps or [0, self.config.inner.steps]

    def validate(self) -> dict[str, float]:
        """On watched people, with the averaged model: gains of WATCHED over generic, by inner steps."""
        config, model = self.config, self.average.module
        model.weights_changed()
        figures, rows = {}, []
        followed = AdaptConfig(**config.inner.model_dump(exclude_unset=True, exclude=DECIDED_BY_RULE))
        if config.inner.cuda_graphs is False:  # which no file of a run holds
            followed = followed.model_copy(update={"cuda_graphs": False})
        for task in self.data.watched:
            score, seed = Scorer(task, {"scorer": self.scorer}, self.lpips), tasks.draws_of(task.person, config.seed)
            persons = {steps: adapt(model, task.support, steps, seed=seed, config=followed, recogniser=self.recogniser)
                       for steps in self.validate_steps}
            for kind, degradation in self.degradations.items():
                poor = tasks.damage(task, kind, degradation, config.seed).to(self.device)
                generic = model.restore(poor).cpu()
                outputs = {steps: person.restore_batch(poor).cpu() for steps, person in persons.items()}
                without = score(generic)
                for steps, images in outputs.items():
                    values = score(images)
                    for metric, key in WATCHED.items():
                        if self.lpips is not None or metric != "lpips":
                            figures.setdefault(f"{kind}_{metric}_gain_{steps}", []).append(values[key] - without[key])
                columns = [("input", poor.cpu()), ("generic", generic),
                           *((f"steps {steps}", images) for steps, images in outputs.items()), ("truth", task.queries)]
                rows.append([(label, to_pil(images[0])) for label, images in columns])
        save_photo(contact_sheet(rows), self.folder / f"sheet_{self.step:06d}.png")
        return {name: sum(values) / len(values) for name, values in figures.items()}

    # -- files ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """`last.pt`: everything needed to resume exactly; `ema.safetensors`: the averaged model, ready to load."""
        if self.rank:
            return
        state = {"step": self.step, "best": self.best, "validated": self.validated, "people": self.people,
                 "config": self.config.model_dump_json(), "base": self.base, "photos": self.data.photos.digest,
                 "learned": {name: value for own in self.groups.values() for name, value in own.items()},
                 "average": self.average.state_dict(), "optimiser": self.optimiser.state_dict()}
        save_average(self.average.module, self.folder / "ema.safetensors")
        write_state(self.folder / "last.pt", state)

    @property
    def people(self) -> int:
        """Of a meta-step, in all processes."""
        return self.world * self.config.people

    def resume(self) -> bool:
        found = go_on_from(self.folder / "last.pt", self.device, self._take_up)
        if self.world > 1:
            steps = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.world)]
            dist.all_gather(steps, torch.full_like(steps[0], self.step))
            if len({int(step) for step in steps}) > 1:
                raise CheckpointError(f"{self.folder / 'last.pt'}: not all processes find the same state there; "
                                      "output_dir must be on a disk that all of them see")
        return found

    def _take_up(self, state: dict[str, Any]) -> None:
        path = self.folder / "last.pt"
        same_run(path, MetaConfig.as_stored(state["config"], FREE_TO_CHANGE),
                 self.config.model_dump(mode="json", exclude=FREE_TO_CHANGE), TAKE_ANOTHER)
        same_photos(path, state, self.data.photos)
        if state.get("base", self.base) != self.base:
            raise CheckpointError(f"{path}: the run began from another model than {self.config.base} is now; give it "
                                  "that one, or take another output_dir")
        people = state.get("people", json.loads(state["config"])["people"])  # of one process, before this was said
        if people != self.people:
            raise CheckpointError(f"{path}: the run has {people} people in a meta-step, now they are {self.people} (in "
                                  f"{self.world} processes); let people times processes be {people}")
        mine = {name: value for own in self.groups.values() for name, value in own.items()}
        if mine.keys() != state["learned"].keys():
            raise CheckpointError(f"{path}: learned other weights than this configuration does; take another "
                                  "output_dir, or the configuration that the run began with")
        with torch.no_grad():
            for name, value in mine.items():
                value.copy_(state["learned"][name])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        measured, now = json.loads(state["config"]), self.config.model_dump(mode="json", include=MEASURE)
        same = all(measured.get(key, value) == value for key, value in now.items())
        self.step, self.best = state["step"], state["best"] if same else float("-inf")
        self.validated = state.get("validated", self.step)

    # -- the loop ---------------------------------------------------------------------------------------------

    def run(self, console: Console) -> Path:
        log_file = self.folder / f"log{self.rank or ''}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        forget_later_steps(log_file, self.step)
        with tensorboard(self.folder, self.step, wanted=self.rank == 0) as board:
            if self.validated < self.step and self._looks():
                self._make_up_for_validation(console, board)
            with log_file.open("a") as log:
                self._walk(console, board, log)
        return self.folder / "ema.safetensors"

    def _walk(self, console: Console, board: Any | None, log: TextIO) -> None:
        """The meta-steps from here to the end."""
        config, upcoming = self.config, self.upcoming()
        with progress_bar("meta-train", config.meta_steps, self.step, console, hidden=self.rank > 0) as show:
            while self.step < config.meta_steps:
                record, began = {"step": self.step}, time.perf_counter()
                with log_of_step(log, record, self):
                    episode = next(upcoming)
                    with finishing():
                        record |= self.train_step(episode)
                        record["people_per_second"] = config.people * self.world / (time.perf_counter() - began)
                    if self._looks():
                        self._validate_and_keep(record, console)
                self._show(board, record)
                if self.step % config.save_every == 0 or self.step == config.meta_steps:
                    self.save()
                show(self.step, f"loss {record['loss']:.3f}  {record['people_per_second']:.2f} people/s")

    def _looks(self) -> bool:
        """Whether validation follows the step just taken."""
        return self.step % self.config.validate_every == 0 or self.step == self.config.meta_steps

    def _show(self, board: Any | None, record: dict[str, float]) -> None:
        for name, value in record.items() if board else ():
            board.add_scalar(name, value, self.step)

    def _make_up_for_validation(self, console: Console, board: Any | None) -> None:
        """The validation during which a run was interrupted; its figures go where they would have gone."""
        if self.rank:
            return
        path = self.folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        record = {"step": self.step - 1}
        if lines and json.loads(lines[-1])["step"] == record["step"]:
            record = json.loads(lines.pop())
        self._validate_and_keep(record, console)
        write_text(path, "".join(f"{line}\n" for line in [*lines, json.dumps(record)]))
        self._show(board, record)
        self.save()

    def _validate_and_keep(self, record: dict[str, float], console: Console) -> None:
        """Adds the validation's figures to the record; `best.safetensors` is the model of the largest identity gain
        after all steps under the first degradation so far, by the present measure."""
        if self.rank:
            return
        record |= self.validate()
        console.print({name: round(value, 4) for name, value in record.items()})
        value = record[f"{self.config.validate_degradations[0]}_identity_gain_{self.validate_steps[-1]}"]
        if value > self.best:
            save_average(self.average.module, self.folder / "best.safetensors")
            self.best = value
        self.validated = self.step


def together(parts: Sequence[tuple[Tensor, ...]], join: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """The first tensors of all parts as one, the second ones, and so on."""
    return tuple(join(own) for own in zip(*parts, strict=True))


def records_gradients(config: MetaConfig, device: torch.device) -> bool:
    """Whether inner gradients are recorded as a CUDA graph. Raises ConfigError where that is asked for and cannot
    be."""
    wanted = config.inner.cuda_graphs
    possible = config.first_order and config.engine == "batched"
    if wanted and device.type == "cuda" and not possible:
        raise ConfigError("inner.cuda_graphs: gradients are recorded in first order and by engine: batched only; take "
                          "it out")
    return device.type == "cuda" and possible and wanted is not False


def outer_config(config: MetaConfig) -> AdaptConfig:
    """The query's loss as an objective: its own weights, and nothing that holds people back."""
    return config.inner.model_copy(update={**config.outer.model_dump(exclude={"lpips"}), "latent_norm": 0.0})


@torch.no_grad()
def see_all(model: MetaGPEN, photos: PackedPhotos, batch: int = 64) -> Tensor:
    """What the start sees of the appearance [N, D] on all packed photos, by the model where it lies."""
    return torch.cat([model.appearance(photos.batch(index).to(model.device)).cpu()
                      for index in torch.arange(len(photos)).split(batch)])


def choose(table: dict[str, Any], key: str, name: str) -> Any:
    if name not in table:
        raise ConfigError(f"{key}: '{name}' is none of {', '.join(table)}")
    return table[name]


def process_of_run(device: str) -> tuple[int, int]:
    """(rank, processes) under torchrun, joining its group; (0, 1) without it.

    device: of the run. With "cuda" every process takes the GPU of its place on the machine, and they speak nccl.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if not dist.is_initialized():
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=WHILE_ONE_VALIDATES)
    return dist.get_rank(), dist.get_world_size()


def average_over_processes(values: Sequence[Tensor]) -> None:
    """Every tensor becomes its mean over the processes; in one buffer, as each may lie in memory in its own way."""
    together = torch.cat([value.reshape(-1) for value in values])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    for value, mean in zip(values, together.split([value.numel() for value in values]), strict=True):
        value.copy_(mean.view(value.shape))


def prepare(config: MetaConfig) -> Trainer:
    """Read the people and the base, embed the photos, check that all of it fits, and build the trainer."""
    process_of_run(config.device)
    model = load(config.base, device=config.device)
    name = model.card.get("recogniser", "embedded")
    recogniser = recognise.load(name, device=config.device)
    if config.learn_start and model.start is not None and model.start.embedding_dim != recogniser.dim:
        raise ConfigError(f"base: the start of {config.base} reads embeddings of {model.start.embedding_dim} numbers, "
                          f"its recogniser '{name}' gives {recogniser.dim}")
    parts = split(load_crops(*config.data, layout=config.layout), config.split)
    for part in (config.part, config.validate_part):
        if part not in parts:
            raise DataError(f"{config.split}: no person of these folders is marked '{part}'")
    cache = config.cache_dir or config.output_dir / "cache"
    photos = pack(parts[config.part], config.pack_size or model.size, cache, workers=2)
    if photos.size != model.size:
        raise ConfigError(f"pack_size: the base restores {model.size} px, not {photos.size}")
    able = tasks.measurable(parts[config.validate_part], config.shots[1], model.size, [config.seed],
                            config.validate_queries)
    watched = [tasks.load_task(able, person, config.shots[1], model.size, config.seed, config.validate_queries,
                               aligned=True)  # as `load_crops` says that all photos of a training are
               for person in list(able)[:config.validate_people]]
    data = Data(photos, embed_all(recogniser, photos, config.inner.bf16, cache), watched)
    in_losses = recognise.load(config.loss_recogniser, device=config.device) if config.loss_recogniser else recogniser
    scorer = recognise.load(config.scorer, device=config.device) if config.scorer else recogniser
    trainer = Trainer(config, data, model, recogniser, in_losses, scorer)
    if not watched:
        raise DataError(f"validation: no person marked {config.validate_part} has {config.shots[1]} photos to learn "
                        f"from and two more of {model.size} native px; lower shots or add photos")
    return trainer


def meta_train(config: MetaConfig, resume: bool = True) -> Path:
    """Run the outer loop, resuming `output_dir/last.pt` if there is one; returns the path of the averaged model."""
    if config.threads:
        torch.set_num_threads(config.threads)
    console = Console(quiet=process_of_run(config.device)[0] > 0)
    trainer = prepare(config)
    if is_one_of(trainer.scorer, [trainer.recogniser, trainer.in_losses]):
        console.print(f"validation is judged by '{trainer.scorer.name}', which is in the losses, too: its figures "
                      "flatter; let scorer name another one to choose the best model by")
    path = run_or_go_on(trainer, console, resume)
    console.print(f"done: {path}; best.safetensors, contact sheets and log.jsonl beside it")
    return path
