"""The inner loop: from a few photos of a person to that person's parameters. One loop, batched over people."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .. import degrade, recognise
from ..config import Config, Seed
from ..devices import bf16_autocast, synchronise, undisturbed
from ..errors import ConfigError, MetagpenError, PhotoError
from ..faces import FFHQ_LANDMARKS, LEFT_RIGHT, single_face, to_tensor
from ..faces.photo import PhotoSource, crop_of, photo_list
from ..gpen.discriminator import Discriminator
from ..losses import RecogniserLoss, chroma_l1, gradient_l1, l1
from ..losses.fused import check_compiles, fused
from ..memory import free_memory
from ..model import MetaGPEN
from ..person import AdapterSpec, Parameters, Person, mean_identity, new_parameters, personal_forward
from ..person.rule import by_kind
from ..recognise.align import View
from ..schedule import warmup_cosine
from . import adversarial
from .optimise import Optimiser, new_optimiser
from .recorded import RecordedSteps

OnError = Callable[[str, Exception], None]
STEPS_WORTH_A_PROCESS = 4  # fewer are damaged sooner than another process begins
Support = tuple[Tensor, Tensor, Tensor | View]
"""Truth and degraded [P·B, 3, S, S], and their landmarks [P·B, 5, 2] or where the recogniser looks in them."""


DECIDED_BY_RULE = {"optimiser", "lr_latent", "lr_tail", "lr_decoder", "warmup", "eta_min", "tail_blocks", "tail_rank",
                   "latent_rank", "decoder_rank"}
"""Settings in whose place a model's rule stands."""


class AdaptConfig(Config):
    """How a person is learned. Rates are per kind of tensor; the defaults were checked on four training people only.

    `degradation`: parts of the mixture that fresh degradations are drawn from, as in `degrade.by_name("mixed", ...)`.
    """

    steps: int = Field(32, ge=0)
    batch_size: int = Field(4, gt=0, description="degraded photos per person and step")
    optimiser: str = Field("adam", pattern="^(adam|sgd)$")
    lr_latent: float = Field(1e-2, ge=0)
    lr_tail: float = Field(1e-3, ge=0)
    lr_decoder: float = Field(5e-3, ge=0)
    warmup: int = Field(4, ge=0)
    eta_min: float = Field(0.05, ge=0, le=1, description="last rate as a fraction of the first")
    l1: float = Field(2.0, ge=0)
    gradient: float = Field(0.0, ge=0)
    chroma: float = Field(1.0, ge=0)
    perceptual: float = Field(0.5, ge=0)
    identity: float = Field(0.6, ge=0)
    latent_norm: float = Field(1e-3, ge=0)
    flip: bool = True
    degradation: dict[str, Any] = {"heavy": {"face_px": [8, 32], "weight": 0.7}, "gfpgan": 0.15, "bsrgan": 0.15}
    tail_blocks: int = Field(2, ge=0)
    tail_rank: int = Field(8, ge=0)
    latent_rank: int = Field(0, ge=0)
    decoder_rank: int = Field(16, ge=0, description="shared filters that each decoder layer's difference is made of")
    gated_decoder: bool = Field(False, description="whether the gate decides about the decoder's mixtures, too; "
                                                   "without it they count fully, on photos that show who it is as well")
    start: bool = True
    rule: bool = Field(True, description="follow the model's rule, if it has one, in place of the "
                                         "optimiser, rates, spec and initial values given here")
    seed: Seed = 0
    bf16: bool = Field(True, description="autocast to bfloat16 where the processor has it")
    cuda_graphs: bool | None = Field(None, description="on a GPU, record a step and play it again; default: wherever "
                                                       "that can be done")
    compile: bool = Field(False, description="on a CPU, fuse a step's passes over maps with torch.compile, in batches "
                                             "of full size: a C++ compiler's work of a minute or two, once")
    people_per_batch: int = Field(0, ge=0, description="how many learn at a time; 0: as memory allows, at most 8 on a "
                                                       "CPU and 64 on a GPU")
    adversarial_steps: int = Field(0, ge=0, description="stage 2: steps with the critic's last layers released")
    adversarial: float = Field(0.02, ge=0)
    lr_critic: float = Field(1e-3, ge=0)

    def check_rule(self, model: MetaGPEN) -> None:
        """Raises ConfigError for settings that were given although the model's rule decides them."""
        idle = sorted(DECIDED_BY_RULE & self.model_fields_set)
        if self.rule and model.rule is not None and idle:
            raise ConfigError(f"{', '.join(idle)}: of no effect, because the model's rule decides it; give "
                              "rule=False (-s rule=false) beside it, or leave it out")

    @property
    def spec(self) -> AdapterSpec:
        return AdapterSpec(self.tail_blocks, self.tail_rank, self.latent_rank, decoder_rank=self.decoder_rank,
                           gated_decoder=self.gated_decoder)

    def for_model(self, model: MetaGPEN) -> AdaptConfig:
        """With what the model's rule, if it is to be followed, says in the place of what stands here."""
        if not (self.rule and model.rule is not None):
            return self.model_copy(update={"rule": False})
        said = {**model.rule.spec.to_dict(), "optimiser": model.rule.config.optimiser}
        return self.model_copy(update={name: value for name, value in said.items() if name in DECIDED_BY_RULE})


@dataclass(eq=False)  # tensors have no single answer to ==
class Album:
    """One person's aligned photos: crops [K, 3, S, S] in [-1, 1] and landmarks [K, 5, 2] in their pixels."""

    crops: Tensor
    landmarks: Tensor

    def __len__(self) -> int:
        return len(self.crops)

    def cpu(self) -> Album:
        """The album where photos are damaged."""
        return Album(self.crops.cpu(), self.landmarks.cpu())


def album(photos: Iterable[PhotoSource] | Tensor, size: int, device: str | torch.device = "cpu") -> Album:
    """Align a person's photos. Tensors [3, size, size] (or one [K, 3, size, size]) count as aligned already.

    Only the crops are kept, so hundreds of large photos fit. Raises PhotoError without a photo, for a single one in
    place of several, or naming a bad one.
    """
    photos = photo_list(photos)
    if not photos:
        raise PhotoError("no photo given: at least one photo of the person is needed")
    crops, landmarks = [], []
    for photo in photos:
        if isinstance(photo, Tensor) and tuple(photo.shape) == (3, size, size):
            crops.append(crop_of(photo))
            landmarks.append(torch.from_numpy(FFHQ_LANDMARKS * size).float())
        else:
            face = single_face(photo, size, device=device)
            crops.append(to_tensor(face.image))
            landmarks.append(torch.from_numpy(face.landmarks).float())
    return Album(torch.stack(crops).to(device), torch.stack(landmarks).to(device))


def adapt(model: MetaGPEN, photos: Iterable[PhotoSource] | Tensor, steps: int | None = None, *,
          start: bool | None = None, seed: int | None = None, config: AdaptConfig | None = None,
          recogniser: recognise.Recogniser | None = None, critic: Discriminator | None = None,
          progress: bool = False) -> Person:
    """Learn one person from 1 or more photos; `model` is not changed.

    photos: paths, PIL images, arrays, or tensors; tensors [3, S, S] in [-1, 1] count as aligned crops. steps: gradient
    steps after the identity-conditioned start (0: the start alone; models without one begin at zero). start: use it.
    config: everything else; `steps`, `start` and `seed` given here win over it (default 32, True, 0). Where the model
    has a rule (the embedded one has, calibrated) that decides rates, optimiser and the adapter's shape, unless
    `config.rule` is False. recogniser: for start and losses; default the one that the model's start was trained with,
    which alone it understands: one of another width is a ConfigError, one of another name is warned of. critic: the
    discriminator of stage 2, never changed.

    Deterministic for a seed on one machine's CPU, on a GPU up to the order of its sums. Raises PhotoError for no photo,
    or for one that shows no usable face.
    """
    config = settled("adapt", model, config, recogniser, steps=steps, start=start, seed=seed, people_per_batch=1)
    one = {"": photos}
    return next(iter(adapt_stream(model, one.items(), config, recogniser, critic, progress)))[1]


def settled(caller: str, model: MetaGPEN, config: AdaptConfig | None, recogniser: recognise.Recogniser | None = None,
            **given: Any) -> AdaptConfig:
    """The configuration with what was given (not None) apart from it. Raises ConfigError for impossible or idle
    settings, for what is no configuration or no recogniser, and for a model that is not in float32."""
    if isinstance(recogniser, (str, Path)):
        raise ConfigError("recogniser: a Recogniser is needed, not its name; say "
                          f"metagpen.recognise.load({str(recogniser)!r})")
    if config is not None and not isinstance(config, AdaptConfig):
        raise ConfigError(f"config: an AdaptConfig is needed, not {type(config).__name__}; say "
                          "metagpen.AdaptConfig(steps=8)")
    if model.dtype != torch.float32:
        raise ConfigError(f"people are learned in float32, and this model is in {str(model.dtype).split('.')[1]}; load "
                          "it anew, and change its precision afterwards")
    given = {key: value for key, value in given.items() if value is not None}
    found = AdaptConfig.from_dict({**(config or AdaptConfig()).model_dump(exclude_unset=True), **given}, source=caller)
    found.check_rule(model)
    return found


def adapt_stream(model: MetaGPEN, people: Iterable[tuple[str, Iterable[PhotoSource] | Tensor]], config: AdaptConfig,
                 recogniser: recognise.Recogniser | None = None, critic: Discriminator | None = None,
                 progress: bool = False, on_error: OnError | None = None) -> Iterator[tuple[str, Person]]:
    """People as they come, `config.people_per_batch` at a time, so that any number of them fits in memory.

    on_error: called with (name, error) for everybody who cannot be learned, and who is then left out; None: the error
    is raised.
    """
    if config.adversarial_steps and critic is None:
        raise ConfigError("adversarial_steps needs a critic: adapt(..., critic=Discriminator.from_state_dict(...))")
    config = config.for_model(model)
    if config.compile:
        if model.device.type != "cpu":
            raise ConfigError(f"compile: for steps on a CPU, and the model is on {model.device}; leave it out")
        check_compiles()
    if recogniser and config.start and model.start is not None:
        check_start_reads(model, recogniser)
    recogniser = recogniser.to(model.device) if recogniser else default_recogniser(model, config)
    size = config.people_per_batch or people_that_fit(model, config, recogniser)
    usable = albums(model, people, on_error)
    plain = config.model_copy(update={"compile": False})
    while group := list(islice(usable, size)):
        own = config if len(group) == size else plain  # a last, smaller batch would be compiled for itself alone
        yield from learn_group(model, group, own, recogniser, critic, progress, on_error)


def albums(model: MetaGPEN, people: Iterable[tuple[str, Iterable[PhotoSource] | Tensor]],
           on_error: OnError | None) -> Iterator[tuple[str, Album]]:
    """The aligned photos of each person, without those people whose photos cannot be used."""
    for name, photos in people:
        try:
            own = album(photos, model.size, model.device)
        except (MetagpenError, OSError) as error:
            if on_error is None:
                raise
            on_error(name, error)
        else:
            yield name, own


def learn_group(model: MetaGPEN, group: Sequence[tuple[str, Album]], config: AdaptConfig,
                recogniser: recognise.Recogniser | None, critic: Discriminator | None, progress: bool,
                on_error: OnError | None) -> Iterator[tuple[str, Person]]:
    """The people of one batch."""
    own = [photos for _, photos in group]
    began = time.perf_counter()
    identities = mean_identities(own, recogniser) if recogniser else None
    parameters = learn(model, own, config, recogniser, identities, progress)
    if config.adversarial_steps:
        parameters = adversarial.refine(model, own, parameters, config, recogniser, critic)
    synchronise(model.device)
    seconds = (time.perf_counter() - began) / len(group)
    for i, (name, photos) in enumerate(group):
        with torch.inference_mode(False):  # or nobody could learn from there
            mine = {key: value[i:i + 1].half().float() for key, value in parameters.items()}  # as its file will hold it
            template = None if identities is None else identities[i].half().float().cpu()
        if all(bool(value.isfinite().all()) for value in mine.values()):
            yield name, Person(model, config.spec, mine, describe(model, config, recogniser, len(photos), seconds),
                               template)
            continue
        cure = "with rule=False and lower lr_latent and lr_tail" if config.rule else "with lower lr_latent and lr_tail"
        whom = f"learning '{name}'" if name else "learning"
        error = ConfigError(f"{whom} diverged (numbers that are not finite); try again {cure}")
        if on_error is None:
            raise error
        on_error(name, error)


def people_that_fit(model: MetaGPEN, config: AdaptConfig, recogniser: recognise.Recogniser | None) -> int:
    """How many people to learn at a time: half of the free memory over what one person takes, at most 8 on a CPU
    (results would come later) and 64 elsewhere."""
    most = 8 if model.device.type == "cpu" else 64
    if not config.steps:
        return most  # the start alone keeps nothing for gradients
    return max(1, min(most, free_memory(model.device) // 2 // bytes_per_person(model, config, recogniser)))


@undisturbed
def bytes_per_person(model: MetaGPEN, config: AdaptConfig, recogniser: recognise.Recogniser | None) -> int:
    """Memory of a gradient step per person: twice what the loss of one grey photo keeps for its gradients, the other
    half being for what is computed on the way."""
    grey = [album(torch.zeros(1, 3, model.size, model.size), model.size, model.device)]
    identities = mean_identities(grey, recogniser) if recogniser else None
    guess = start_guess(model, grey, identities) if config.start else None
    begun = begin(model, config, 1, torch.Generator().manual_seed(0), guess)
    objective = Objective(model, config, recogniser, begun["latent.offset"].clone())
    parameters = {name: value.requires_grad_() for name, value in begun.items()}
    support = draw(grey, objective.degradation, config, [torch.Generator().manual_seed(0)])
    shared = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in shared:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        objective(parameters, *support)
    return 2 * sum(kept.values()) + sum(value.nbytes for value in parameters.values())


def default_recogniser(model: MetaGPEN, config: AdaptConfig) -> recognise.Recogniser | None:
    """The recogniser that the model's start understands; "embedded" for models without one; None if nothing asks."""
    uses_start = config.start and model.start is not None
    learns = config.steps or config.adversarial_steps
    if not (uses_start or (learns and (config.identity or config.perceptual))):
        return None
    return recognise.load(model.card.get("recogniser", "embedded"), device=str(model.device))


def check_start_reads(model: MetaGPEN, recogniser: recognise.Recogniser) -> None:
    """Raises ConfigError where the model's start cannot read this recogniser's embeddings; warns where it was trained
    with another's, which mean nothing to it."""
    wanted, cure = model.start.embedding_dim, "leave the recogniser out, or add start=False"
    if recogniser.dim != wanted:
        raise ConfigError(f"recogniser: the model's start reads embeddings of {wanted} numbers, '{recogniser.name}' "
                          f"gives {recogniser.dim}; {cure}")
    name = Path(model.card.get("recogniser", "embedded"))
    names_itself = name.suffix == ".safetensors"  # inside, where the file's name does not show it
    if not names_itself and recogniser.name not in (str(name), name.stem, name.name.split(".")[0]):
        warnings.warn(f"the model's start was trained with the recogniser '{name}'; embeddings of '{recogniser.name}' "
                      f"say nothing to it; {cure}", stacklevel=2)


def describe(model: MetaGPEN, config: AdaptConfig, recogniser: recognise.Recogniser | None, shots: int,
             seconds: float) -> dict[str, Any]:
    from .. import __version__

    stage_2 = {"adversarial_steps": config.adversarial_steps} if config.adversarial_steps else {}
    return {"shots": shots, "steps": config.steps, **stage_2, "seed": config.seed, "seconds": round(seconds, 2),
            "start": bool(config.start and model.start is not None),
            "recogniser": recogniser.name if recogniser else None, "metagpen": __version__}


@torch.no_grad()
def start_guess(model: MetaGPEN, albums: Sequence[Album], identities: Tensor | None) -> Parameters | None:
    """The identity-conditioned start: the guess from the albums and their `mean_identities`; None where the model has
    no start."""
    return None if model.start is None else model.guess(identities, mean_appearances(model, albums))


@undisturbed
@torch.no_grad()
def mean_identities(albums: Sequence[Album], recogniser: recognise.Recogniser) -> Tensor:
    """Each album's unit mean embedding [P, E]: what the start sees, and a Person's template."""
    return torch.stack([mean_identity(torch.cat([recogniser.embed(crops, marks) for crops, marks in zip(
        a.crops.split(32), a.landmarks.split(32), strict=True)])) for a in albums])


@torch.no_grad()
def mean_appearances(model: MetaGPEN, albums: Sequence[Album]) -> Tensor | None:
    """Each album's mean w [P, D]; None where the model's start does not look at it."""
    if model.start.appearance is None:
        return None
    return torch.stack([torch.cat([model.appearance(crops) for crops in own.crops.split(32)]).mean(dim=0)
                        for own in albums])


@undisturbed
def learn(model: MetaGPEN, albums: Sequence[Album], config: AdaptConfig, recogniser: recognise.Recogniser | None,
          identities: Tensor | None, progress: bool = False) -> Parameters:
    """The inner loop for P people at once; parameters with leading dimension P, detached.

    identities: `mean_identities` of the albums, which the start needs.
    """
    guess = start_guess(model, albums, identities) if config.start else None
    generator = torch.Generator().manual_seed(config.seed)
    parameters = begin(model, config, len(albums), generator, guess)
    objective = Objective(model, config, recogniser, parameters["latent.offset"])
    objective.forward = fused(personal_forward, config.compile)
    steps = steps_from(objective, parameters, config, model.device, recogniser)
    columns = (TextColumn("adapting"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
               TimeRemainingColumn())
    with Progress(*columns, disable=not (progress and config.steps)) as bar:
        task = bar.add_task("", total=config.steps, loss=float("nan"))
        for step, support in enumerate(supports(albums, config, model.device, recogniser)):
            loss = steps(support, step_rates(model, config, step, parameters))
            if progress:  # which waits for the device
                bar.update(task, advance=1, loss=float(loss.mean()))
    return {name: value.detach() for name, value in steps.parameters.items()}


def steps_from(objective: Callable[..., Tensor], parameters: Parameters, config: AdaptConfig, device: torch.device,
               recogniser: recognise.Recogniser | None) -> PlainSteps | RecordedSteps:
    """Steps from `parameters`: called with a support and rates, each leads on, and says the loss [P] before it."""
    if config.steps and records_steps(config, device, recogniser):
        return RecordedSteps(objective, parameters)
    return PlainSteps(objective, parameters, config.optimiser)


def records_steps(config: AdaptConfig, device: torch.device, recogniser: recognise.Recogniser | None) -> bool:
    """Whether steps are recorded as a CUDA graph. Raises ConfigError where that is asked for and cannot be."""
    possible = config.optimiser == "adam" and recogniser is not None
    if config.cuda_graphs and device.type == "cuda" and not possible:
        raise ConfigError("cuda_graphs: steps are recorded with Adam and a recogniser in the losses only; take it out")
    return device.type == "cuda" and possible and config.cuda_graphs is not False


class PlainSteps:
    """Steps from `parameters` [P, ...], each into new tensors; `recorded.RecordedSteps` is its twin for a GPU."""

    def __init__(self, objective: Callable[..., Tensor], parameters: Parameters, optimiser: str):
        self.objective, self.parameters, self.optimiser = objective, parameters, new_optimiser(optimiser)

    def __call__(self, support: Support, rates: Mapping[str, Tensor | float]) -> Tensor:
        """The loss [P] before the step."""
        parameters = {name: value.detach().requires_grad_(name in rates) for name, value in self.parameters.items()}
        self.parameters, loss = inner_step(self.objective, parameters, support, rates, self.optimiser)
        return loss.detach()


class Drawn(IterableDataset):
    """What `draw` gives these people (on the CPU) step by step, everybody for themselves: who else is there changes
    nothing. With a stride, of every so many steps only one; of the others the dice are thrown."""

    def __init__(self, albums: Sequence[Album], config: AdaptConfig, first: int = 0, stride: int = 1):
        self.albums = [own.cpu() for own in albums]
        self.config, self.first, self.stride = config, first, stride

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        degradation = degrade.full_size(self.config.degradation)
        generators = [torch.Generator().manual_seed(self.config.seed + 1) for _ in self.albums]
        for step in range(self.config.steps):
            thrown = [throw(own, degradation, self.config, generator)
                      for own, generator in zip(self.albums, generators, strict=True)]
            if step % self.stride == self.first:
                yield carry_out(self.albums, thrown, degradation)


def supports(albums: Sequence[Album], config: AdaptConfig, device: torch.device,
             recogniser: recognise.Recogniser | None, workers: int | None = None) -> Iterator[Support]:
    """(truth, degraded, where the recogniser looks) of every step, on the device.

    Photos are damaged on the CPU: one after the other, in operations too small for a GPU. Beside a GPU, processes do it
    ahead, each for some of the people, or, where there are fewer people than processes, for one of them and some of the
    steps. workers: how many; default: `helpers`.
    """
    if not config.steps:
        return
    if workers is None:
        workers = helpers(device)
    parts = max(1, min(len(albums), workers))
    bounds = [len(albums) * k // parts for k in range(parts + 1)]
    most = max(1, config.steps // STEPS_WORTH_A_PROCESS)
    strides = [max(1, min(workers // parts + (k < workers % parts), most)) for k in range(parts)]
    some: list[list[Iterable[tuple[Tensor, Tensor, Tensor]]]] = [
        [Drawn(albums[bounds[k]:bounds[k + 1]], config, first, stride) for first in range(stride)]
        for k, stride in enumerate(strides)]
    if workers:
        some = [[DataLoader(one, batch_size=None, num_workers=1, multiprocessing_context="fork",
                            generator=torch.Generator()) for one in own] for own in some]  # the caller's stays as it is
    running = [[iter(one) for one in own] for own in some]
    for step in range(config.steps):
        drawn = [next(own[step % len(own)]) for own in running]
        yield placed([joined(values, device) for values in zip(*drawn, strict=True)], device, recogniser)


def joined(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Along the first dimension; photos on the device, where it takes no thread from the processes that damage more."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.to(device) for part in parts] if parts[0].ndim == 4 else list(parts))


def placed(drawn: Sequence[Tensor], device: torch.device, recogniser: recognise.Recogniser | None) -> Support:
    """What `draw` gave, on the device; where the recogniser looks is found before, so that nothing waits for it."""
    truth, poor = (photos.to(device, non_blocking=True) for photos in drawn[:2])
    return truth, poor, drawn[2] if recogniser is None else recogniser.view(drawn[2], truth)


def helpers(device: torch.device, sharing: int = 1) -> int:
    """How many processes damage photos beside a device: this process' cores but one, at most 32. None beside a CPU,
    none but on Linux, where a process begins without running the caller's script again, and none where it may have no
    children. sharing: how many processes like this one have the same cores."""
    if device.type == "cpu" or sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 0
    return min(32, max(1, (len(os.sched_getaffinity(0)) - 1) // sharing))


def begin(model: MetaGPEN, config: AdaptConfig, people: int, generator: torch.Generator,
          guess: Parameters | None) -> Parameters:
    """Where `people` people begin, detached: at the start's guess, and what the rule adds to it."""
    if config.rule:
        begun = model.rule.begin(people, guess)
    else:
        begun = new_parameters(model.gpen, config.spec, people, generator, guess)
    return {name: value.detach().clone() for name, value in begun.items()}


def step_rates(model: MetaGPEN, config: AdaptConfig, step: int, names: Iterable[str]) -> dict[str, Tensor | float]:
    """Rates of an inner step: the rule's, or those of the configuration with warm-up and cosine."""
    if config.rule:
        return {name: value.detach() for name, value in model.rule.rates(step, config.steps).items()}
    factor = warmup_cosine(step, config.steps, config.warmup, config.eta_min)
    return {name: factor * rate(name, config) for name in names}


def last_rates(model: MetaGPEN, config: AdaptConfig, names: Iterable[str]) -> dict[str, Tensor | float]:
    """Rates of stage 2: those at which the steps before it end."""
    if config.rule:
        steps = max(config.steps, model.rule.config.steps)  # without a step, or with few, as after the rule's own
        return step_rates(model, config.model_copy(update={"steps": steps}), steps - 1, names)
    return {name: config.eta_min * rate(name, config) for name in names}


def inner_step(objective: Callable[..., Tensor], parameters: Parameters, support: Any,
               rates: Mapping[str, Tensor | float], optimiser: Optimiser,
               create_graph: bool = False) -> tuple[Parameters, Tensor]:
    """One step of every person at once: (parameters after it, loss before it [P]).

    Only tensors that have a rate move. The result stays connected to parameters and rates; `create_graph` also
    connects the gradients, for second derivatives.
    """
    found, loss = inner_gradient(objective, parameters, support, rates, create_graph)
    return moved(parameters, found, rates, optimiser), loss


def inner_gradient(objective: Callable[..., Tensor], parameters: Parameters, support: Any, names: Iterable[str],
                   create_graph: bool = False) -> tuple[Parameters, Tensor]:
    """(gradients of the named parameters, loss [P]): everybody's own, because nobody's loss depends on another's."""
    names = list(names)
    loss = objective(parameters, *support)
    found = torch.autograd.grad(loss.sum(), [parameters[name] for name in names], create_graph=create_graph)
    return dict(zip(names, found, strict=True)), loss


def moved(parameters: Parameters, gradients: Parameters, rates: Mapping[str, Tensor | float],
          optimiser: Optimiser) -> Parameters:
    """The parameters after a step on those that have a rate."""
    return {**parameters, **optimiser({name: parameters[name] for name in rates}, gradients, rates)}


def rate(name: str, config: AdaptConfig) -> float:
    return by_kind(name, config.lr_latent, config.lr_tail, config.lr_decoder)


class Thrown(NamedTuple):
    """All that is random in one person's step: which photos, which of them are mirrored, what happens to each."""

    chosen: Tensor
    flipped: Tensor
    recipes: list[Any]


def throw(own: Album, degradation: degrade.Degradation, config: AdaptConfig, generator: torch.Generator) -> Thrown:
    chosen = torch.randint(len(own), (config.batch_size,), generator=generator)
    flipped = torch.rand(len(chosen), generator=generator) < 0.5 if config.flip else torch.zeros(len(chosen)).bool()
    return Thrown(chosen, flipped, degradation.recipes(len(chosen), *own.crops.shape[-2:], generator))


def carry_out(albums: Sequence[Album], thrown: Sequence[Thrown],
              degradation: degrade.Degradation) -> tuple[Tensor, Tensor, Tensor]:
    """See `draw`."""
    parts = []
    for own, dice in zip(albums, thrown, strict=True):
        chosen, flip = dice.chosen.to(own.crops.device), dice.flipped.to(own.crops.device)
        truth, landmarks = own.crops[chosen], own.landmarks[chosen]
        truth = torch.where(flip[:, None, None, None], truth.flip(-1), truth)
        landmarks = torch.where(flip[:, None, None], mirror(landmarks, truth.shape[-1]), landmarks)
        parts.append((truth, degradation.carry_out(truth, dice.recipes), landmarks))
    truth, poor, landmarks = (torch.cat(part) for part in zip(*parts, strict=True))
    return truth, poor, landmarks


def draw(albums: Sequence[Album], degradation: degrade.Degradation, config: AdaptConfig,
         generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh (truth, degraded, landmarks) of every person: [P·B, 3, S, S] twice and [P·B, 5, 2], person-major."""
    thrown = [throw(own, degradation, config, generator) for own, generator in zip(albums, generators, strict=True)]
    return carry_out(albums, thrown, degradation)


def mirror(landmarks: Tensor, size: int) -> Tensor:
    """Landmarks [B, 5, 2] of horizontally flipped images: x mirrored (continuous pixels), left and right exchanged."""
    flipped = landmarks[:, LEFT_RIGHT].clone()
    flipped[..., 0] = size - flipped[..., 0]
    return flipped


class Objective:
    """What a step minimises: reconstruction, perceptual and identity terms of the support, and staying near the start.

    The latent norm is measured from `origin`, where the person started (in stage 2, where stage 1 ended), so that it
    never pulls a face back to nobody.
    """

    def __init__(self, model: MetaGPEN, config: AdaptConfig, recogniser: recognise.Recogniser | None,
                 origin: Tensor | None):
        self.model, self.config, self.origin = model, config, origin
        self.degradation = degrade.full_size(config.degradation)
        self.recogniser_loss = RecogniserLoss(recogniser) if recogniser else None
        self.autocast = partial(bf16_autocast, model.device, config.bf16)
        self.forward = personal_forward

    def restore(self, parameters: Parameters, poor: Tensor) -> Tensor:
        with self.autocast():
            share, filling = self.model.look(poor)
            return self.forward(self.model.gpen, poor.contiguous(memory_format=torch.channels_last), parameters,
                                self.config.spec, frozen=True, share=share, filling=filling,
                                bases=self.model.bases_of(self.config.spec.decoder_rank)).float()

    def terms(self, parameters: Parameters, restored: Tensor, truth: Tensor, poor: Tensor,
              landmarks: Tensor | View) -> Tensor:
        """The loss of each person [P]."""
        config = self.config
        loss = config.l1 * l1(restored, truth)
        if config.gradient:
            loss = loss + config.gradient * gradient_l1(restored, truth)
        if config.chroma:
            loss = loss + config.chroma * chroma_l1(restored, truth)
        if config.perceptual or config.identity:
            with self.autocast():
                seen = self.recogniser_loss(restored, truth, landmarks, poor)
            loss = loss + config.perceptual * seen.perceptual + config.identity * seen.identity
        moved = parameters["latent.offset"] - (0 if self.origin is None else self.origin)
        people = moved.shape[0]
        return loss.unflatten(0, (people, -1)).mean(dim=1) + config.latent_norm * moved.square().mean(dim=(1, 2))

    def __call__(self, parameters: Parameters, truth: Tensor, poor: Tensor, landmarks: Tensor | View) -> Tensor:
        return self.terms(parameters, self.restore(parameters, poor), truth, poor, landmarks)
