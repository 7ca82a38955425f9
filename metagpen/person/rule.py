"""The inner rule: what is known for everybody about learning one person, learned by an outer loop or calibrated.

Where a person's parameters begin (added to what the identity-conditioned start sets) and how far each step goes, per
tensor, per tensor and step (LSLR, Antoniou et al. 2019), or per number (Meta-SGD, Li et al. 2017). It ships inside the
model's file, and `adapt` follows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..gpen import GPEN
from ..schedule import warmup_cosine
from .adapter import AdapterSpec, Parameters, guessed, new_parameters

KINDS = ("latent.", "tail.", "linear.", "decoder.")


@dataclass(frozen=True)
class RuleConfig:
    """What shapes a rule. `optimiser`: "sgd" or "adam". `steps`: inner steps that its rates are kept for. `per_step`:
    rates for each of them; `elementwise`: a rate for every number. `moving`: kinds of parameters that inner steps
    change, of latent., tail., linear., decoder.; the others stay where they begin. `schedule`: "flat", or "cosine",
    where every rate is also multiplied with a warm-up over the run's first eighth and a cosine down to a twentieth."""

    optimiser: str = "sgd"
    steps: int = 8
    per_step: bool = False
    elementwise: bool = False
    moving: tuple[str, ...] = KINDS
    schedule: str = "flat"

    def __post_init__(self) -> None:
        object.__setattr__(self, "moving", tuple(self.moving))
        unknown = set(self.moving) - set(KINDS)
        if unknown or not self.moving:
            raise ConfigError(f"moving = {list(self.moving)}: some of {', '.join(KINDS)} must move")
        if self.schedule not in ("flat", "cosine"):
            raise ConfigError(f"schedule = {self.schedule}: flat or cosine")

    def to_dict(self) -> dict:
        return asdict(self)


class InnerRule(nn.Module):
    """Initial values and inner rates, shared by all people; everything it returns carries gradients to them.

    Rates are kept as logarithms, so they stay positive and move by factors. A run of n steps, not the T that the table
    is for, walks through the same table at its own pace, every rate times (T/n)^shrink: more steps, smaller ones, with
    an exponent that is learned too.
    """

    def __init__(self, gpen: GPEN, spec: AdapterSpec, config: RuleConfig, lr_latent: float = 1e-2,
                 lr_tail: float = 1e-3, lr_decoder: float = 5e-3, seed: int = 0):
        super().__init__()
        self.spec, self.config = spec, config
        begin = new_parameters(gpen, spec, 1, torch.Generator().manual_seed(seed))
        self.names = list(begin)
        self.initial = nn.ParameterDict({key(name): nn.Parameter(value[0]) for name, value in begin.items()})
        table = config.steps if config.per_step else 1
        self.log_rates = nn.ParameterDict()
        for name in self.moving:
            shape = begin[name].shape[1:] if config.elementwise else [1] * (begin[name].ndim - 1)
            first = torch.tensor(by_kind(name, lr_latent, lr_tail, lr_decoder)).log()
            self.log_rates[key(name)] = nn.Parameter(first.repeat(table, *shape))
        self.shrink = nn.Parameter(torch.tensor(0.5))

    @property
    def moving(self) -> list[str]:
        """Names of the tensors that inner steps change."""
        return [name for name in self.names if name.startswith(self.config.moving)]

    def begin(self, people: int, guess: Parameters | None = None) -> Parameters:
        """Where `people` people begin: [people, ...] each, on top of what the start guesses (`MetaGPEN.guess`)."""
        return guessed({name: self.initial[key(name)].expand(people, *self.initial[key(name)].shape)
                        for name in self.names}, guess)

    def rates(self, step: int, steps: int) -> dict[str, Tensor]:
        """Rates of step 0 <= `step` < `steps`, by name, of shapes that broadcast against the parameters'
        [people, ...]."""
        longer = self.shrink * math.log(self.config.steps / steps)
        factor = warmup_cosine(step, steps, steps // 8, 0.05) if self.config.schedule == "cosine" else 1.0
        return {name: factor * (at(self.log_rates[key(name)], step / max(1, steps - 1)) + longer).exp()
                for name in self.moving}

    @torch.no_grad()
    def take(self, other: InnerRule) -> None:
        """What another rule learned: initial values of the same name and shape, and rates of the same name.

        Rates only mean the same under the same optimiser and schedule: under others, one's own stay. Those kept for
        another number of steps become what they say for a run of this one's, in a table of this one's shape.
        """
        for name, value in self.initial.items():
            if name in other.initial and other.initial[name].shape == value.shape:
                value.copy_(other.initial[name])
        if (self.config.optimiser, self.config.schedule) != (other.config.optimiser, other.config.schedule):
            return
        longer = other.shrink * math.log(other.config.steps / self.config.steps)
        for name, value in self.log_rates.items():
            if name in other.log_rates:
                value.copy_(reshaped(other.log_rates[name], value.shape, self.config.per_step) + longer)
        self.shrink.copy_(other.shrink)

    def to_dict(self) -> dict:
        """What rebuilds it, beside its tensors."""
        return {"spec": self.spec.to_dict(), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, gpen: GPEN, values: dict) -> InnerRule:
        return cls(gpen, AdapterSpec(**values["spec"]), RuleConfig(**values["config"]))


def by_kind(name: str, latent: float, tail: float, decoder: float) -> float:
    """What a parameter of this name gets of the three: the encoder's final layer counts as its tail."""
    return latent if name.startswith("latent.") else decoder if name.startswith("decoder.") else tail


def at(table: Tensor, progress: float) -> Tensor:
    """Row of a table [T, ...] at progress 0 (the first) to 1 (the last), linear between rows."""
    place = progress * (len(table) - 1)
    row = min(int(place), len(table) - 2) if len(table) > 1 else 0
    return table[row] if len(table) == 1 else torch.lerp(table[row], table[row + 1], place - row)


def reshaped(table: Tensor, shape: Sequence[int], per_step: bool) -> Tensor:
    """A table of logarithms [T, ...] as another rule of this shape would hold it: steps between those that it has, and
    the mean where that rule has one number for many."""
    rows = shape[0]
    table = torch.stack([at(table, k / max(1, rows - 1)) for k in range(rows)]) if per_step else table.mean(0, True)
    if any(own not in (1, wanted) for own, wanted in zip(table.shape[1:], shape[1:], strict=True)):
        table = table.mean(dim=tuple(range(1, table.ndim)), keepdim=True)
    return table.expand(*shape)


def key(name: str) -> str:
    """A tensor's name as a module can hold it: no dots."""
    return name.replace(".", "-")
