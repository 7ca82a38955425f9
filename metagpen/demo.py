"""The demo: learn a person from a few photos, restore others of the same person, and show before and after.

Albums are described in `metagpen.album`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor

from . import degrade, evaluate, load, recognise
from .adaptation import adapt
from .album import read_album
from .atomic import whole_file, write_text
from .devices import pick_device
from .errors import DataError
from .evaluate.report import contact_sheet, table
from .evaluate.tasks import load_crop
from .faces import to_pil
from .identities import Photo
from .model import MetaGPEN
from .person import Person

METHODS = ("degraded", "generic", "personal")
METRICS = ("identity", "psnr", "ssim")
DRAWS = 4  # degradations of each held-out photo that are measured; the first one is shown

Figures = dict[str, dict[str, float]]  # method -> metric -> mean over held-out photos and draws


@dataclass(frozen=True)
class PersonResult:
    """One person of the album: how many photos served what, the figures, the seconds of adapting, the sheet."""

    name: str
    support: int
    held_out: int
    seconds: float
    figures: Figures
    sheet: Path


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo measured and wrote. `report` (Markdown) and `data` (JSON) hold the same figures."""

    album: str
    people: list[PersonResult]
    mean: Figures
    report: Path
    data: Path


def run_demo(
    album: str | Path = "own",
    output_dir: str | Path = "demo_out",
    steps: int = 32,
    shots: int = 5,
    seed: int = 0,
    degradation: str = "heavy",
    device: str = "auto",
    progress: Callable[[str], None] = lambda message: None,
) -> DemoResult:
    """Adapt to `shots` photos of each person, restore the others, write pictures and figures to `output_dir`.

    album: "own", "lisa", or a folder. steps: gradient steps of adapting (0: the identity-conditioned start alone).
    seed: chooses the photos, the degradations and the draws of adapting. device: auto, cpu, cuda, ...; where to
    learn and restore (damage is drawn and figures are taken on the CPU, the same on every machine). progress: called
    with a line of text at each stage. Raises DataError when the album is missing or has a person with fewer than two
    photos, and for a device that is not there.
    """
    if shots < 1:
        raise DataError(f"shots must be at least 1, not {shots}: without a photo there is no person to learn")
    people = read_album(album)
    model = load(device=pick_device(device))
    recogniser = recognise.load("embedded")
    worsen = degrade.by_name(degradation)
    output = Path(output_dir)
    if Path(album).is_dir() and Path(album).resolve() in (output.resolve(), *output.resolve().parents):
        raise DataError(f"{output}: lies in the album, whose photos it could take the place of; choose another output "
                        "folder")
    output.mkdir(parents=True, exist_ok=True)
    results = []
    for name, photos in people.items():
        generator = torch.Generator().manual_seed(seed)
        support, held_out = split_photos(photos, shots, generator)
        progress(f"{name}: adapting to {len(support)} photos, {steps} steps")
        crops, _ = load_crops(support, model.size)
        began = time.perf_counter()
        person = adapt(model, list(crops), steps=steps, seed=seed)
        seconds = time.perf_counter() - began
        progress(f"{name}: restoring {len(held_out)} photos that adapting never saw ({seconds:.1f} s)")
        images, landmarks = restorations(person, model, held_out, worsen, generator)
        figures = {method: measure(images[method], images["truth"], landmarks, recogniser) for method in METHODS}
        sheet = output / f"{name}.jpg"
        with whole_file(sheet) as temporary:
            before_after(images).save(temporary, "JPEG", quality=92)
        results.append(PersonResult(name, len(support), len(held_out), seconds, figures, sheet))
    result = DemoResult(
        str(album),
        results,
        mean_figures([p.figures for p in results]),
        output / "report.md",
        output / "figures.json",
    )
    write_text(result.report, markdown(result, steps, seed, degradation))
    write_text(result.data, json.dumps(as_json(result, steps, seed, degradation), indent=1) + "\n")
    return result


def restorations(person: Person, model: MetaGPEN, photos: Sequence[Photo], worsen: degrade.Degradation,
                 generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """({each of METHODS, "truth": [N * DRAWS, 3, S, S]}, landmarks [N * DRAWS, 5, 2]) of N photos."""
    truth, landmarks = (x.repeat_interleave(DRAWS, dim=0) for x in load_crops(photos, model.size))
    degraded = worsen(truth, generator)
    generic, personal = model.restore(degraded).cpu(), person.restore_batch(degraded).cpu()
    return {"degraded": degraded, "generic": generic, "personal": personal, "truth": truth}, landmarks


@torch.no_grad()
def measure(restored: Tensor, truth: Tensor, landmarks: Tensor, recogniser: recognise.Recogniser) -> dict[str, float]:
    """Mean identity cosine, PSNR in dB and SSIM of [B, 3, H, W] against the truth, whose landmarks are [B, 5, 2]."""
    values = {
        "identity": evaluate.identity(recogniser, restored, truth, landmarks),
        "psnr": evaluate.psnr(restored, truth),
        "ssim": evaluate.ssim(restored, truth),
    }
    return {metric: float(value.mean()) for metric, value in values.items()}


def mean_figures(figures: Sequence[Figures]) -> Figures:
    """The mean over people: each person counts once, however many photos there are."""
    return {method: {metric: fmean(f[method][metric] for f in figures) for metric in METRICS} for method in METHODS}


def split_photos(photos: Sequence[Photo], shots: int, generator: torch.Generator) -> tuple[list[Photo], list[Photo]]:
    """(support, held out), drawn by the generator; at least one photo is always held out."""
    order = [photos[i] for i in torch.randperm(len(photos), generator=generator).tolist()]
    shots = min(shots, len(photos) - 1)
    return order[:shots], order[shots:]


def load_crops(photos: Sequence[Photo], size: int) -> tuple[Tensor, Tensor]:
    """Aligned faces [N, 3, size, size] in [-1, 1] and their landmarks [N, 5, 2]. Raises PhotoError."""
    crops, landmarks = zip(*(load_crop(photo, size) for photo in photos))
    return torch.stack(crops), torch.stack(landmarks)


def before_after(columns: Mapping[str, Tensor]) -> Image.Image:
    """A line per held-out photo (its first draw): degraded, generic, personal, truth."""
    count = len(next(iter(columns.values())))
    return contact_sheet(
        [[(label, to_pil(batch[i])) for label, batch in columns.items()] for i in range(0, count, DRAWS)]
    )


def lines(result: DemoResult, mean: str = "mean") -> list[list[list[str]]]:
    """What the tables print, everybody's lines together and the means last: who, photos, method, METRICS, seconds."""
    def line(who: str, photos: str, method: str, values: Mapping[str, float], seconds: str = "") -> list[str]:
        return [who, photos, method, f"{values['identity']:.3f}", f"{values['psnr']:.2f}", f"{values['ssim']:.3f}",
                seconds]

    people = [[line(person.name, f"{person.support} / {person.held_out}", method, values,
                    f"{person.seconds:.1f}" if method == "personal" else "")
               for method, values in person.figures.items()] for person in result.people]
    return [*people, [line(mean, "", method, values) for method, values in result.mean.items()]]


def markdown(result: DemoResult, steps: int, seed: int, degradation: str) -> str:
    """The report: a table with a line per person and method, then the pictures."""
    headers = ["person", "learned from / restored", "method", "identity", "PSNR dB", "SSIM", "s to adapt"]
    body = table(headers, chain(*lines(result, mean="**mean**")))
    pictures = "\n\n".join(f"![{person.name}]({person.sheet.name})" for person in result.people)
    return (
        f"# metagpen demo: album '{result.album}'\n\n"
        f"{steps} steps, degradation '{degradation}', {DRAWS} draws of each held-out photo, seed {seed}. {CAVEAT}\n\n"
        f"{body}\n\nColumns of the pictures: degraded, generic, personal, truth.\n\n{pictures}\n"
    )


CAVEAT = (
    "Identity is the cosine by the embedded recogniser, which adapting also uses in its loss; the README has "
    "figures by recognisers that no loss ever saw."
)


def as_json(result: DemoResult, steps: int, seed: int, degradation: str) -> dict:
    rows = [
        {
            "person": person.name,
            "method": method,
            "support": person.support,
            "held_out": person.held_out,
            "seconds": round(person.seconds, 2),
            **{metric: round(person.figures[method][metric], 5) for metric in METRICS},
        }
        for person in result.people
        for method in METHODS
    ]
    return {
        "album": result.album,
        "steps": steps,
        "seed": seed,
        "degradation": degradation,
        "draws": DRAWS,
        "recogniser": "embedded",
        "rows": rows,
    }
