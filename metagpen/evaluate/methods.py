"""The methods of the shots curve: ours, the rivals, the controls. Each is one function from a lesson to a learner.

A learner says where a method begins, what it minimises, how far each step goes and how it restores; one loop,
`trajectory`, walks all of them over the same fresh degradations of the same photos. A model is never changed: a
method's weights are tensors of its own, put in the model's place by `torch.func.functional_call`.

Schedules. A point at n steps means one of four things, and every row says which:

    constant   one run, rates constant after the warm-up; n is a stop on the way
    per-run    a run of its own for every n, rates falling by a cosine that ends at n
    tutorial   one run under a cosine over `Rivals.iterations`; n is a stop on the way, early ones are unfinished
    learned    a run for every stop, with the rates that the model's rule has for its length
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from metagpen.adaptation.config import AdaptConfig
from metagpen.adaptation.draws import Album, helpers, supports
from metagpen.adaptation.loop import default_recogniser, mean_identities, start_guess
from metagpen.adaptation.objective import Objective
from metagpen.adaptation.steps import begin, step_rates, steps_from
from metagpen.config import Config
from metagpen.devices import synchronise
from metagpen.errors import ConfigError
from metagpen.evaluate import names
from metagpen.gpen import GPEN
from metagpen.gpen.layers import ModulatedConv2d
from metagpen.model import MetaGPEN
from metagpen.person import DecoderBases, Parameters, Person
from metagpen.recognise import Recogniser
from metagpen.recognise.align import View
from metagpen.restore.null_space import null_space
from metagpen.schedule import warmup_cosine

ELSEWHERE = "elsewhere"  # learned, or not, by another program: see metagpen.evaluate.elsewhere
CONSTANT, PER_RUN, TUTORIAL, LEARNED = "constant", "per-run", "tutorial", "learned"
SCHEDULES = (CONSTANT, PER_RUN)  # those that can be asked for; the others belong to a method
Rates = Mapping[str, Tensor | float]


class Rivals(Config):
    """Settings of the methods that are not ours; what they share with ours (photos, losses, batch) is `AdaptConfig`.

    Rates are for Adam and weights of equalised learning rate, which are of order 1.
    """

    iterations: int = Field(2000, gt=0, description="length of the tutorial's fine-tune")
    release: float = Field(0.5, ge=0, le=1, description="share of a fine-tune after which everything is released")
    lr_encoder: float = Field(2e-3, gt=0, description="fine-tune: encoder and final linear layer")
    lr_decoder: float = Field(2e-4, gt=0, description="fine-tune: the prior, once released; a tenth, as GPEN's paper")
    lr_lora: float = Field(1e-3, gt=0)
    lr_latent: float = Field(1e-2, gt=0, description="W+ offset of latent-only and pivotal")
    lr_full: float = Field(3e-4, gt=0, description="every weight, of full and pivotal; PTI's rate")
    blend: float = Field(0.25, ge=0, le=1, description="reference-average: share of the mean face")


@dataclass(frozen=True)
class Lesson:
    """What every method is given: the shared model, one person's photos and the settings.

    config: what is minimised, batch, seed; `steps` is the length of the schedule, `eta_min` = 1 a constant one.
    recogniser: of the start and the losses, None if nothing asks. rate: on all of a method's rates. sharing: how many
    processes like this one have the same cores.
    """

    model: MetaGPEN
    album: Album
    config: AdaptConfig
    rivals: Rivals
    recogniser: Recogniser | None = None
    rate: float = 1.0
    sharing: int = 1

    def factor(self, step: int) -> float:
        """What every rate of `rivals` is multiplied with at a step."""
        return self.rate * warmup_cosine(step, self.config.steps, self.config.warmup, self.config.eta_min)


@dataclass(frozen=True)
class Learner:
    """begin: what moves, by name. restore: (parameters, images [B, 3, S, S]) -> restored, same shape.

    loss: (parameters, truth, poor, landmarks) -> [1], None for a method without steps. rates: step -> rate by name;
    a tensor without one rests.
    """

    begin: Parameters
    restore: Callable[[Parameters, Tensor], Tensor]
    loss: Callable[..., Tensor] | None = None
    rates: Callable[[int], Rates] | None = None
    optimiser: str = "adam"


@dataclass(frozen=True)
class CurveMethod:
    """A method by name. photos: "none", "own", "wrong" (somebody else's) or "elsewhere". steps: whether it takes any.

    schedule: the one it insists on, None to follow the configuration. rate: on its rates, of `Rivals` or ours; None for
    a method whose rates are what they are.
    """

    name: str
    build: Callable[[Lesson], Learner] | None  # None: made elsewhere
    photos: str = "own"
    steps: bool = True
    schedule: str | None = None
    follows_rule: bool = False
    rate: float | None = None

    def schedule_of(self, model: MetaGPEN, configured: str) -> str:
        """The schedule that this method's points on this model are measured under."""
        return LEARNED if self.follows_rule and model.rule is not None else self.schedule or configured


@dataclass(frozen=True)
class Checkpoint:
    """A method after so many steps and seconds; `restore` holds until the next checkpoint is asked for."""

    steps: int
    seconds: float
    restore: Callable[[Tensor], Tensor]


METHODS: dict[str, CurveMethod] = {}


def method(
    name: str,
    photos: str = "own",
    steps: bool = True,
    schedule: str | None = None,
    follows_rule: bool = False,
    rate: float | None = None,
    **arguments: Any,
) -> Callable:
    """Registers a builder of learners under a name; `arguments` go to the builder."""

    def register(build: Callable[..., Learner]) -> Callable[..., Learner]:
        METHODS[name] = CurveMethod(name, partial(build, **arguments), photos, steps, schedule, follows_rule, rate)
        return build

    return register


def by_name(name: str) -> CurveMethod:
    """The method of this name; `meta-KEY` is `adapt` on another model, `NAME-x4` one at four times its rates,
    `folder-NAME` what another program restored.

    Raises ConfigError for an unknown one.
    """
    if name.startswith(names.FOLDER):
        return CurveMethod(name, None, ELSEWHERE, steps=False)
    if name in METHODS or name.startswith("meta-"):
        return METHODS["adapt" if name.startswith("meta-") else name]
    base, times = names.rate_of(name)
    if times == 1 or base not in METHODS:
        raise ConfigError(f"unknown method '{name}'; choose from {', '.join(METHODS)}, meta-NAME, folder-NAME, NAME-x4")
    if METHODS[base].rate is None:
        raise ConfigError(f"method '{name}': {base} is not measured at other rates")
    return replace(METHODS[base], name=name, rate=times)


# --- the walk ------------------------------------------------------------------------------------


def checkpoints(chosen: CurveMethod, lesson: Lesson, stops: Sequence[int], schedule: str) -> Iterator[Checkpoint]:
    """The method after each of `stops` steps, in ascending order, from one run or, "per-run", a run for each.

    `lesson.config.steps` and `eta_min` are set here as the schedule wants them. Seconds are those of learning alone:
    the recogniser's look at the photos, the steps; not what is done with a checkpoint. Raises ConfigError for stops
    beyond the tutorial's length.
    """
    stops = sorted(set(stops))
    if schedule == TUTORIAL and stops[-1] > lesson.rivals.iterations:
        raise ConfigError(
            f"{chosen.name}: {stops[-1]} steps lie beyond the tutorial's {lesson.rivals.iterations}; "
            "raise rivals.iterations"
        )
    if schedule in (PER_RUN, LEARNED):  # a rule has rates for the length of the run
        for stop in stops:
            yield from trajectory(chosen.build, with_schedule(lesson, steps=stop), [stop])
    elif schedule == TUTORIAL:
        yield from trajectory(chosen.build, with_schedule(lesson, steps=lesson.rivals.iterations), stops)
    else:
        constant = {"eta_min": 1.0} if schedule == CONSTANT else {}
        yield from trajectory(chosen.build, with_schedule(lesson, steps=stops[-1], **constant), stops)


def with_schedule(lesson: Lesson, **changes: Any) -> Lesson:
    config = lesson.config.model_copy(update=changes)
    return replace(lesson, config=config)


def trajectory(build: Callable[[Lesson], Learner], lesson: Lesson, stops: Sequence[int]) -> Iterator[Checkpoint]:
    """One run: the learner's steps, with a checkpoint at each of the ascending `stops`.

    Photos and degradations come from `config.seed` as in `metagpen.adapt`, so all methods see the same ones.
    """
    began = time.perf_counter()
    learner, device, recogniser = build(lesson), lesson.model.device, lesson.recogniser
    config = lesson.config.model_copy(update={"steps": stops[-1], "optimiser": learner.optimiser})
    drawn = supports([lesson.album], config, device, recogniser, helpers(device, lesson.sharing))
    take = steps_from(learner.loss, learner.begin, config, device, recogniser)
    for step in range(stops[-1] + 1):
        if step in stops:
            synchronise(device)
            seconds = time.perf_counter() - began
            learned = {name: value.detach() for name, value in take.parameters.items()}
            yield Checkpoint(step, seconds, partial(learner.restore, learned))
            began = time.perf_counter() - seconds
        if step < stops[-1]:
            with torch.enable_grad():
                take(next(drawn), learner.rates(step))


# --- without learning ----------------------------------------------------------------------------


@method("input", photos="none", steps=False)
def unrestored(lesson: Lesson) -> Learner:
    """The degraded photo itself."""
    return Learner({}, lambda parameters, images: images)


@method("generic", photos="none", steps=False)
def generic(lesson: Lesson) -> Learner:
    """The shared model, which knows nobody (GPEN: Yang et al. 2021)."""
    return Learner({}, lambda parameters, images: lesson.model.restore(images))


@method(names.CEILING, photos="none", steps=False)
def another_true_photo(lesson: Lesson) -> Learner:
    """Another true photo of the person in the restoration's place: what identity can reach at most, in kind.

    It restores nothing: the runner scores true photos against each other (`engine.Scorer.ceiling`).
    """
    return Learner({}, lambda parameters, images: images)


@method("reference-average", steps=False)
def reference_average(lesson: Lesson) -> Learner:
    """The generic restoration blended with the mean of the person's aligned photos: the cheap trick to be beaten."""
    mean, share = lesson.album.crops.mean(dim=0), lesson.rivals.blend
    return Learner({}, lambda parameters, images: torch.lerp(lesson.model.restore(images), mean, share))


# --- ours ----------------------------------------------------------------------------------------


@method("start", steps=False)
@method("adapt", follows_rule=True, rate=1.0)
@method("no-rule", rate=1.0, rule=False)
@method("adapt-gated", follows_rule=True, gated_decoder=True)
@method("random-filters", follows_rule=True, learned_filters=False)
@method("no-start", rate=1.0, rule=False, start=False)
@method("wrong-person", photos="wrong", follows_rule=True, rate=1.0)
@method("adapt-float32", follows_rule=True, bf16=False)
@method("strength-25", follows_rule=True, strength=0.25)
@method("strength-50", follows_rule=True, strength=0.5)
@method("strength-75", follows_rule=True, strength=0.75)
def adapted(lesson: Lesson, rule: bool = True, strength: float = 1.0, bf16: bool = True, start: bool = True,
            gated_decoder: bool | None = None, learned_filters: bool = True) -> Learner:
    """`metagpen.adapt`: the identity-conditioned start, then steps on the adapter; restored at a strength.

    At `lesson.rate` times the rates. rule: whether the model's rule is followed, if it has one, or the configured ones.
    bf16: False for steps in float32 throughout. start: False to begin at nobody. gated_decoder: in place of the
    configured. learned_filters: False for random filters in place of the model's. With the defaults, at n steps of the
    schedule "per-run", or "learned", this is what `adapt(..., steps=n)` returns, on a CPU bit for bit.
    """
    model = lesson.model if learned_filters else with_random_filters(lesson.model)
    wanted = {"rule": rule and model.rule is not None, "bf16": bf16 and lesson.config.bf16,
              "start": start and lesson.config.start}
    if gated_decoder is not None:
        wanted["gated_decoder"] = gated_decoder
    config = lesson.config.model_copy(update=wanted).for_model(model)
    guess = started(lesson) if config.start else None
    parameters = begin(model, config, 1, torch.Generator().manual_seed(config.seed), guess)
    objective = Objective(model, config, lesson.recogniser, parameters["latent.offset"])

    def restore(parameters: Parameters, images: Tensor) -> Tensor:
        mine = {name: value.half().float() for name, value in parameters.items()}  # as a Person's file holds it
        return Person(model, config.spec, mine).restore_batch(images, strength)

    def rates(step: int) -> Rates:
        return {name: lesson.rate * rate for name, rate in step_rates(model, config, step, parameters).items()}

    return Learner(parameters, restore, objective, rates, config.optimiser)


def with_random_filters(model: MetaGPEN) -> MetaGPEN:
    """The model, its decoder differences made of random filters, as a file would hold them."""
    if model.bases is None:
        return model
    bases = DecoderBases.random(model.gpen, model.bases.rank)
    for own in bases.filters:
        own.data = own.data.half().float()
    return MetaGPEN(model.gpen, model.start, model.card, model.rule, bases)


def started(lesson: Lesson) -> Parameters | None:
    """What the model's start guesses from the photos; None where it has none."""
    if lesson.model.start is None:
        return None
    return start_guess(lesson.model, [lesson.album], mean_identities([lesson.album], lesson.recogniser))


@method("null-space", follows_rule=True)
def adapted_in_null_space(lesson: Lesson) -> Learner:
    """`adapt`, restored with the person confined to what the photo leaves open (see `metagpen.restore.null_space`)."""
    learner = adapted(lesson)

    def restore(parameters: Parameters, images: Tensor) -> Tensor:
        generic = lesson.model.restore(images)
        return null_space(generic, learner.restore(parameters, images)).clamp(-1, 1)

    return replace(learner, restore=restore)


# --- rivals --------------------------------------------------------------------------------------


@method("latent-only", rate=1.0)
def latent_only(lesson: Lesson) -> Learner:
    """The W+ offset alone, from zero (Abdal et al. 2019, Image2StyleGAN)."""
    offset, rate = zero_offset(lesson.model.gpen), lesson.rivals.lr_latent
    return in_place_of_weights(lesson, offset, lambda step: {OFFSET: lesson.factor(step) * rate})


@method("full", rate=1.0)
@method("start-full", rate=1.0, start=True)
def full(lesson: Lesson, start: bool = False) -> Learner:
    """Every weight of encoder and decoder at one rate: plain fine-tuning; from our start, if it is given that."""
    weights, rate = weights_of(lesson.model.gpen), lesson.rivals.lr_full
    return in_place_of_weights(lesson, weights, lambda step: dict.fromkeys(weights, lesson.factor(step) * rate),
                               start=start)


@method("finetune", schedule=TUTORIAL, rate=1.0)
@method("finetune@n", schedule=PER_RUN, rate=1.0)
def finetune(lesson: Lesson) -> Learner:
    """The usual few-shot tutorial: thousands of iterations under a cosine, first frozen, then released.

    First the encoder's last two blocks and the linear layer that makes the latent code; after the share `release` of
    the schedule every weight, the decoder at a tenth of the encoder's rate (the ratio of Yang et al. 2021). `finetune`
    has the schedule of the full length, `finetune@n` the same cut to the n steps that it is measured at.
    """
    gpen, rivals = lesson.model.gpen, lesson.rivals
    weights = weights_of(gpen)
    tail = tuple(f"ecd{k}." for k in range(len(gpen.encoder) - 2, len(gpen.encoder))) + ("final_linear.",)
    first = [name for name in weights if name.startswith(tail)]

    def rates(step: int) -> Rates:
        moving = weights if step >= rivals.release * lesson.config.steps else first
        return {
            name: lesson.factor(step) * (rivals.lr_decoder if name.startswith("generator.") else rivals.lr_encoder)
            for name in moving
        }

    return in_place_of_weights(lesson, weights, rates)


@method("pivotal", schedule=PER_RUN, rate=1.0)
def pivotal(lesson: Lesson) -> Learner:
    """Pivotal tuning (Roich et al. 2022, PTI): first the latent alone, then the weights around it, half the steps each.

    The turning point depends on the number of steps, so every number has a run of its own; either half has the schedule
    of a run of its length.
    """
    weights, rivals, turn = weights_of(lesson.model.gpen), lesson.rivals, math.ceil(lesson.config.steps / 2)
    first, second = (with_schedule(lesson, steps=steps) for steps in (turn, lesson.config.steps - turn))

    def rates(step: int) -> Rates:
        if step < turn:
            return {OFFSET: first.factor(step) * rivals.lr_latent}
        return dict.fromkeys(weights, second.factor(step - turn) * rivals.lr_full)

    return in_place_of_weights(lesson, {**zero_offset(lesson.model.gpen), **weights}, rates)


@method("lora-4", rate=1.0, rank=4)
@method("lora-16", rate=1.0, rank=16)
@method("start-lora-16", rate=1.0, rank=16, start=True)
def lora(lesson: Lesson, rank: int, start: bool = False) -> Learner:
    """Low-rank differences of the decoder's modulated convolutions, W + up down (Hu et al. 2022, LoRA).

    A weight [1, out, in, k, k] is the matrix [out, in·k·k]; `down` begins random, `up` at zero, so step 0 is generic,
    or our start's, if it is given that.
    """
    shared = weights_of(lesson.model.gpen)
    generator = torch.Generator().manual_seed(lesson.config.seed)
    factors: Parameters = {}
    for name in modulated(lesson.model.gpen):
        _, out, *rest = shared[name].shape
        down = torch.randn(rank, math.prod(rest), generator=generator) / math.sqrt(rank)
        factors |= {f"{name}.up": shared[name].new_zeros(out, rank), f"{name}.down": down.to(shared[name])}

    def replaced(parameters: Parameters) -> Parameters:
        return {
            name: shared[name] + (parameters[f"{name}.up"] @ parameters[f"{name}.down"]).reshape(shared[name].shape)
            for name in modulated(lesson.model.gpen)
        }

    def rates(step: int) -> Rates:
        return dict.fromkeys(factors, lesson.factor(step) * lesson.rivals.lr_lora)

    return in_place_of_weights(lesson, factors, rates, replaced, start)


OFFSET = "latent.offset"


def zero_offset(gpen: GPEN) -> Parameters:
    """A W+ offset of nobody, [1, n_latent, style_dim]."""
    return {OFFSET: torch.zeros(1, gpen.config.n_latent, gpen.config.style_dim, device=gpen.ecd0[0][0].weight.device)}


def weights_of(gpen: GPEN) -> Parameters:
    """All weights by name, detached; no step writes into them."""
    return {name: value.detach() for name, value in gpen.named_parameters()}


def modulated(gpen: GPEN) -> list[str]:
    """Names of the weights of the decoder's modulated convolutions."""
    return [f"{name}.weight" for name, module in gpen.named_modules() if isinstance(module, ModulatedConv2d)]


def in_place_of_weights(
    lesson: Lesson,
    parameters: Parameters,
    rates: Callable[[int], Rates],
    replaced: Callable[[Parameters], Parameters] = lambda parameters: parameters,
    start: bool = False,
) -> Learner:
    """A learner of weights: `replaced(parameters)` stand in for the model's of the same names, a W+ offset is added.

    start: what our start guesses from the photos is added too, through the gate, and rests. The objective is ours,
    without what is about adapters: no gate, and the latent norm holds the offset near zero.
    """
    gpen, shared = lesson.model.gpen, weights_of(lesson.model.gpen)
    guess = started(lesson) if start else None
    objective = Objective(lesson.model, lesson.config, lesson.recogniser, None)
    nowhere = torch.zeros(1, 1, 1, device=lesson.model.device)

    def forward(parameters: Parameters, images: Tensor) -> Tensor:
        own = {name: value for name, value in replaced(parameters).items() if name in shared}
        images = images.to(lesson.model.device).contiguous(memory_format=torch.channels_last)
        share, filling = lesson.model.look(images)
        begun = None if guess is None else guess[OFFSET] if share is None else share[..., None] * guess[OFFSET]
        added = [part for part in (filling, parameters.get(OFFSET), begun) if part is not None]  # [B, L, D]
        return functional_call(gpen, {**shared, **own}, (images, sum(added) if added else None))

    def loss(parameters: Parameters, truth: Tensor, poor: Tensor, landmarks: Tensor | View) -> Tensor:
        with objective.autocast():
            restored = forward(parameters, poor).float()
        return objective.terms({OFFSET: parameters.get(OFFSET, nowhere)}, restored, truth, poor, landmarks)

    return Learner(parameters, lambda parameters, images: forward(parameters, images).clamp(-1, 1), loss, rates)


def recogniser_of(model: MetaGPEN, config: AdaptConfig) -> Recogniser | None:
    """The recogniser of start and losses: the one that the model's start understands."""
    return default_recogniser(model, config.model_copy(update={"steps": 1}))
