"""Pairs of sharp and degraded photos on disk, for trainers that read folders: GT/001.png beside LR/001.png."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ..atomic import whole_file
from ..errors import ConfigError, DataError, PhotoError
from ..workers import spread
from .base import Degradation
from .names import by_name


@dataclass(frozen=True)
class PairsSummary:
    """What `write_pairs` did: how many pairs it wrote and where, and the photos it could not read, with the reason."""

    written: int
    failed: tuple[tuple[Path, str], ...]
    gt_dir: Path
    lr_dir: Path
    seconds: float

    def __str__(self) -> str:
        lines = [f"{self.written} pairs in {self.gt_dir} and {self.lr_dir} ({self.seconds:.1f} s)"]
        if self.failed:
            lines.append(f"{len(self.failed)} left out:")
            lines += [f"  {reason}" for _, reason in self.failed]
        return "\n".join(lines)


def write_pairs(
    input_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    degradation: str | Degradation = "bsrgan",
    scale: int = 1,
    size: int | None = None,
    num_workers: int = 4,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> PairsSummary:
    """Writes ``output_dir/GT/001.png …`` (sharp) and ``output_dir/LR/001.png …`` (degraded), one pair per photo.

    The photos directly in `input_dir` are numbered in the order of their file names, with at least three digits. A
    photo that cannot be read keeps its number, is named in the summary, and does not stop the others.

    degradation: a name for `by_name`, or a `Degradation`.
    scale: LR is this many times smaller per side (BSRGAN only); GT is cropped to a multiple of it.
    size: crop each photo to its middle square and resize that to size x size first; None keeps photos as they are.
    num_workers: processes; 0 or 1 works in this one. The pictures do not depend on it: photo number i is degraded
        with a seed made of `seed` and i. Scripts that use more than one need ``if __name__ == "__main__":``.
    overwrite: replace pairs that exist. Other files in GT and LR are left alone either way.
    progress: draw a progress bar on stderr.

    Raises `DataError` if there are no photos, none can be read, or a file is in the way and `overwrite` is off
    (nothing is written then); `ConfigError` for impossible settings. Files appear under their name only when complete.
    """
    degrade = _degradation(degradation, scale)
    if size is not None and size < degrade.scale:
        raise ConfigError(f"size must be at least {degrade.scale} pixels, not {size}")
    if num_workers < 0:
        raise ConfigError(f"num_workers must be 0 or more, not {num_workers}")
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, not {seed}")
    jobs = _jobs_of(Path(input_dir), Path(output_dir), size, seed, overwrite)

    start = time.perf_counter()
    reasons = _run(jobs, degrade, num_workers, _bar if progress else _no_bar)
    failed = tuple((job.photo, reasons[job.index]) for job in jobs if reasons[job.index] is not None)
    if len(failed) == len(jobs):
        raise DataError(f"none of the {len(jobs)} photos in {input_dir} makes a pair; the first: {failed[0][1]}")
    for job in jobs:
        if reasons[job.index] is not None:  # nor shall an older one stand for it
            job.gt.unlink(missing_ok=True)
            job.lr.unlink(missing_ok=True)
    return PairsSummary(len(jobs) - len(failed), failed, jobs[0].gt.parent, jobs[0].lr.parent,
                        time.perf_counter() - start)


def _degradation(degradation: str | Degradation, scale: int) -> Degradation:
    if isinstance(degradation, str):
        built = by_name(degradation, scale=scale) if degradation.lower() == "bsrgan" else by_name(degradation)
    else:
        built = degradation
        scale = built.scale if scale == 1 else scale
    if built.scale != scale:
        raise ConfigError(f"this degradation has scale {built.scale}, not {scale}; only bsrgan can be given a scale")
    return built


def _photos_in(folder: Path) -> list[Path]:
    from ..faces.photo import PHOTO_SUFFIXES, photos_in

    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the folder that holds the photos")
    photos = photos_in(folder)
    if not photos:
        known = " ".join(sorted(PHOTO_SUFFIXES))
        raise DataError(f"{folder} holds no photos (subfolders are not searched); known: {known}")
    return photos


# One photo


@dataclass(frozen=True)
class _Job:
    index: int
    photo: Path
    gt: Path
    lr: Path
    size: int | None
    seed: int


def _jobs_of(photos_dir: Path, output_dir: Path, size: int | None, seed: int, overwrite: bool) -> list[_Job]:
    """A job per photo, the folders of its pair made. Raises DataError where there is no photo, or a file in the way."""
    photos = _photos_in(photos_dir)
    gt_dir, lr_dir = output_dir / "GT", output_dir / "LR"
    if photos_dir.resolve() in (gt_dir.resolve(), lr_dir.resolve()):
        raise DataError(f"{output_dir}: its pairs would be written over the photos of {photos_dir}; choose another "
                        "output folder")
    digits = max(3, len(str(len(photos))))
    jobs = [
        _Job(index, photo, gt_dir / f"{index:0{digits}}.png", lr_dir / f"{index:0{digits}}.png", size, seed)
        for index, photo in enumerate(photos, start=1)
    ]
    if not overwrite:
        for path in (path for job in jobs for path in (job.gt, job.lr)):
            if path.exists():
                raise DataError(f"{path} exists already; choose another output folder or ask to overwrite")
    for folder in (gt_dir, lr_dir):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder} cannot be created ({error.strerror}); choose another output folder") from None
    return jobs


def _write_pair(job: _Job, degrade: Degradation) -> str | None:
    """Writes one pair; the reason if the photo is no good."""
    from ..faces.photo import load_photo, to_pil, to_tensor

    try:
        photo = load_photo(job.photo)
        if min(photo.size) < degrade.scale:
            raise PhotoError(f"photo '{job.photo}' is too small ({photo.width}x{photo.height}) for scale "
                             f"{degrade.scale}")
    except PhotoError as error:
        return str(error)
    if job.size is not None:
        photo = ImageOps.fit(photo, (job.size, job.size), Image.Resampling.LANCZOS)
    photo = photo.crop((0, 0, photo.width - photo.width % degrade.scale, photo.height - photo.height % degrade.scale))
    state = int(np.random.SeedSequence([job.seed, job.index]).generate_state(1, np.uint64)[0] >> 1)
    poor = degrade(to_tensor(photo)[None], torch.Generator().manual_seed(state))
    try:
        with whole_file(job.gt) as gt, whole_file(job.lr) as lr:  # both are renamed at the end, so that none is alone
            for picture, file in ((photo, gt), (to_pil(poor[0]), lr)):
                picture.save(file, "PNG", compress_level=2)  # 6 takes five times as long and saves a sixth
    except OSError as error:
        raise DataError(f"{job.gt} or its partner cannot be written ({error.strerror or error})") from None
    return None


# All photos


def _run(jobs: list[_Job], degrade: Degradation, num_workers: int, bar: Callable) -> dict[int, str | None]:
    """Job index to the reason it failed, or None."""
    if num_workers <= 1 or len(jobs) == 1:
        with bar(iter(jobs), len(jobs)) as todo:
            return {job.index: _write_pair(job, degrade) for job in todo}
    done = spread(partial(_write_pair, degrade=degrade), jobs, min(num_workers, len(jobs)), torch.set_num_threads, 1)
    with closing(done), bar(done, len(jobs)) as ready:
        return {job.index: reason for job, reason in ready}


@contextmanager
def _bar(items: Iterator, total: int) -> Iterator[Iterator]:
    """The items, a bar beside them that ends with the block, and after an error leaves the stage to its message.

    (`rich.progress.track` alone lives on with the traceback.)
    """
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        with closing(progress.track(items, description="Writing pairs", total=total)) as tracked:
            try:
                yield tracked
            except BaseException:
                progress.live.transient = True
                progress.console.quiet = not progress.console.is_terminal  # where it would end with an empty line
                raise


@contextmanager
def _no_bar(items: Iterator, total: int) -> Iterator[Iterator]:
    yield items
