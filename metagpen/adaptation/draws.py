"""What a step sees: a person's aligned photos, which of them are drawn, and what is done to them."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .. import degrade, recognise
from ..errors import PhotoError
from ..faces import FFHQ_LANDMARKS, single_face, to_tensor
from ..faces.align import mirror
from ..faces.photo import PhotoSource, crop_of, photo_list
from ..recognise.align import View
from .config import AdaptConfig

STEPS_WORTH_A_PROCESS = 4  # fewer are damaged sooner than another process begins
Support = tuple[Tensor, Tensor, Tensor | View]
"""Truth and degraded [P·B, 3, S, S], and their landmarks [P·B, 5, 2] or where the recogniser looks in them."""


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
