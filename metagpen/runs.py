"""What every training run shares: going on where it stopped, its files and log, its average, what is shown of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import Tensor

from . import devices
from .atomic import whole_file
from .errors import CheckpointError, ConfigError, DataError, MetagpenError
from .identities import PackedPhotos
from .model import MetaGPEN
from .recognise import Recogniser
from .tensors import write_tensors

TAKE_ANOTHER = "take another output_dir, or the configuration that the run began with"
DIVERGED = ("the training has diverged. What was saved before stays; begin another run, from it where that can be "
            "done, at lower rates")


class Resumable(Protocol):
    """A trainer that saves all it needs to go on."""

    step: int

    def run(self, console: Console) -> Path: ...
    def save(self) -> None: ...
    def resume(self) -> bool: ...


def run_or_go_on(trainer: Resumable, console: Console, resume: bool = True) -> Path:
    """Run a trainer from where it was, or from the beginning; an interruption saves before it passes on."""
    if resume and trainer.resume():
        console.print(f"resumed at step {trainer.step}")
    try:
        return trainer.run(console)
    except KeyboardInterrupt:
        trainer.save()
        console.print(f"interrupted at step {trainer.step}; run the same command to go on from there")
        raise


# -- the state ------------------------------------------------------------------------------------------------


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def save_average(average: MetaGPEN, path: Path) -> None:
    """The averaged model, before the state is written: ConfigError, and neither is written, once it has diverged."""
    try:
        average.save(path)
    except CheckpointError:  # whose advice is for those who save a model themselves
        raise ConfigError(f"{path}: not written, its numbers are not finite in half precision: {DIVERGED}") from None


def go_on_from(path: Path, device: torch.device, take_up: Callable[[dict[str, Any]], None],
               cure: str = "delete it to begin again") -> bool:
    """Hands what `write_state` wrote, if it is there, to `take_up`: whether it was. Raises CheckpointError, with the
    cure, for a file that is damaged or holds something else; what `take_up` refuses in words of its own stays so."""
    if not path.exists():
        return False
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler stumbles over foreign bytes in many ways
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}); {cure}") from error
    try:
        take_up(state)
    except MetagpenError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a state of this training ({error}); {cure}") from error
    return True


def same_photos(path: Path, state: Mapping[str, Any], photos: PackedPhotos) -> None:
    """Raises CheckpointError when a run that began on other photos would go on: its draws name photos by number."""
    if state.get("photos", photos.digest) != photos.digest:
        raise CheckpointError(f"{path}: the run began on other photos than those now in data; bring them back, or "
                              "take another output_dir")


def must_be_finite(norm: Tensor | float, trainer: Resumable) -> None:
    """Raises ConfigError before numbers that are not finite reach the files."""
    if not math.isfinite(norm):
        raise ConfigError(f"step {trainer.step}: a loss or gradient is not finite: {DIVERGED}")


# -- what is shown --------------------------------------------------------------------------------------------


@contextmanager
def progress_bar(task: str, total: int, done: int, console: Console,
                 hidden: bool = False) -> Iterator[Callable[[int, str], None]]:
    """A bar over the steps of a run; called with how many are done and what to say beside it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())
    with Progress(*columns, console=console, disable=hidden) as progress:
        bar = progress.add_task(task, total=total, completed=done)
        yield lambda completed, description: progress.update(bar, completed=completed, description=description)


def tensorboard(folder: Path, begin: int, wanted: bool = True) -> AbstractContextManager[Any | None]:
    """A SummaryWriter to enter, which forgets what lies after step `begin`; None where it is not wanted, or TensorBoard
    is not installed."""
    try:
        if wanted:
            from torch.utils.tensorboard import SummaryWriter

            return SummaryWriter(str(folder), purge_step=begin + 1)  # the first that goes
    except ImportError:
        pass
    return nullcontext()


@contextmanager
def log_of_step(log: TextIO, record: dict[str, Any], trainer: Resumable) -> Iterator[None]:
    """Writes the record of the step that is taken inside, also when watching afterwards is interrupted."""
    try:
        yield
    finally:
        if trainer.step > record["step"]:
            log.write(json.dumps(record) + "\n")
            log.flush()


# -- tensors --------------------------------------------------------------------------------------------------


def ema_with_warmup(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """Moving average whose horizon grows with the run, so that it forgets the random beginning quickly."""
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + int(count)) / (10 + int(count))))
    return update


def resize(images: Tensor, size: int) -> Tensor:
    """Antialiased reduction to size x size; the images themselves when they have it."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def embed_all(recogniser: Recogniser, photos: PackedPhotos, bf16: bool, cache_dir: Path, batch: int = 64) -> Tensor:
    """Embeddings [N, D] of all packed photos, by the recogniser where it lies; kept in a file named after the photos,
    the recogniser and the precision."""
    device = next((value.device for value in recogniser.parameters()), torch.device("cpu"))
    bf16 = bf16 and devices.has_bf16(device)
    digest = hashlib.sha256(f"{photos.digest}{bf16}{recogniser.digest}{recogniser.spec}".encode())
    file = cache_dir / f"embeddings_{digest.hexdigest()[:20]}.safetensors"
    if file.exists():
        try:
            return load_file(file)["embeddings"]
        except Exception as error:  # safetensors raises its own type and several builtin ones
            raise DataError(f"the embeddings in '{file}' cannot be read ({error}); delete the file") from error
    parts = []
    with torch.no_grad(), devices.bf16_autocast(device, bf16):
        for index in torch.arange(len(photos)).split(batch):
            crops, landmarks = photos.batch(index).to(device), photos.landmarks[index].to(device)
            parts.append(recogniser.embed(crops, landmarks).float().cpu())
    embeddings = torch.cat(parts)
    write_tensors(file, {"embeddings": embeddings})
    return embeddings
