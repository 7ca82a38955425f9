"""The inner loop: from a few photos of a person to that person's parameters. One loop, batched over people."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from .. import recognise
from ..devices import synchronise, undisturbed
from ..errors import ConfigError, MetagpenError
from ..faces.photo import PhotoSource
from ..gpen.discriminator import Discriminator
from ..losses.fused import check_compiles, fused
from ..memory import free_memory
from ..model import MetaGPEN
from ..person import Parameters, Person, mean_identity, personal_forward
from ..recognise.recogniser import must_be_recogniser
from . import adversarial
from .config import AdaptConfig
from .draws import Album, album, draw, supports
from .objective import Objective
from .steps import begin, step_rates, steps_from

OnError = Callable[[str, Exception], None]


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
    must_be_recogniser(recogniser)
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
    model.bases_of(config.decoder_rank)  # raises where they are too few, before somebody is learned without a step
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
        cure = ("with a lower lr_scale" if config.lr_scale > 1 else "with rule=False and lower lr_latent and lr_tail"
                if config.rule else "with lower lr_latent and lr_tail")
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
