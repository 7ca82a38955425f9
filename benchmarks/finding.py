"""How small and how damaged may a face in a photo be to be found, and how well are its landmarks placed?

The crops of people whom no training saw, reduced to so many pixels and laid into a photo four times as wide (its rim
is the crop's edge, drawn out), go through the detector as `metagpen restore` uses it. A face counts as found where one
is detected whose landmarks lie within half the distance of the eyes of the true ones, in the mean; the *error*, after
they are corrected, is that mean as a share of the eyes' distance (NME), the median over those that were found. Photos
come from `$METAGPEN_SHARED`, or the folder `shared` beside this repository; a set that is not there is left out.

    python benchmarks/finding.py    # writes benchmarks/results/finding.json and the table in docs/restore.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from statistics import median

import measure
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from metagpen import faces
from metagpen.degrade import HeavyDegradation
from metagpen.evaluate import report
from metagpen.evaluate.tasks import generator_of, load_crop
from metagpen.faces.detect import detect_many
from metagpen.faces.landmarks import refine
from metagpen.identities import People, Photo

RESULTS = measure.RESULTS / "finding.json"
PAGE = measure.ROOT / "docs" / "restore.md"
SIDES = (8, 12, 16, 24, 32, 48, 64)
FROM, PHOTOS_EACH = 256, 4
BEYOND = 0.5  # of the eyes' distance: somewhere else

Damage = Callable[[Tensor, int, str], Tensor]  # crop [3, S, S], side, name -> [3, side, side]


def photos() -> Iterator[tuple[str, list[Photo]]]:
    """(set, its photos), everybody's first ones."""
    folder = measure.SHARED / "photos" / "london_512"
    if folder.is_dir():
        yield "london_512", first_of(People.from_folder(folder))
    if (measure.SHARED / "photos" / "celeba_wild_256").is_dir():
        yield "celeba_wild_256, val", first_of(measure.wild_people())


def first_of(people: People) -> list[Photo]:
    return [photo for person in people for photo in people[person][:PHOTOS_EACH]]


def reduced(crop: Tensor, side: int, name: str) -> Tensor:
    """Taken from further away."""
    return interpolate(crop[None], (side, side), mode="area")[0]


def ruined(crop: Tensor, side: int, name: str) -> Tensor:
    """The same with noise and JPEG, as the evaluation's damage has them at that size."""
    poor = HeavyDegradation(face_px=(side, side), blur_p=0.0)(crop[None], generator_of("finding", name, side))[0]
    return reduced(poor, side, name)


DAMAGE: dict[str, Damage] = {"small": reduced, "small, noise and JPEG": ruined}


def rim_of(side: int) -> int:
    """Pixels around a crop in a photo four times as wide."""
    return 3 * side // 2


def in_a_photo(face: Tensor) -> Image.Image:
    """A face [3, n, n] in the middle of a photo of 4n."""
    rim = rim_of(face.shape[-1])
    return Image.fromarray(np.pad(np.asarray(faces.to_pil(face)), ((rim, rim), (rim, rim), (0, 0)), mode="edge"))


def error(landmarks: np.ndarray, truth: np.ndarray) -> float:
    """Mean distance of five landmarks [5, 2] from the true ones, as a share of the eyes' distance."""
    eyes = np.linalg.norm(truth[0] - truth[1])
    return float(np.linalg.norm(landmarks - truth, axis=1).mean() / eyes)


def nearest(found: list[faces.Face], truth: np.ndarray) -> np.ndarray | None:
    """The landmarks [5, 2] of the face that was found where the true ones are, None where none was."""
    points = min((face.landmarks for face in found), key=lambda seen: error(seen, truth), default=None)
    return points if points is not None and error(points, truth) < BEYOND else None


def figures(name: str, faces_of: dict[Photo, tuple[Tensor, Tensor]], kind: str, side: int) -> report.Row:
    """How many of the photos' faces, each with its crop and landmarks, are found at this size, and how well."""
    small = [in_a_photo(DAMAGE[kind](crop, side, photo.path.name)) for photo, (crop, _) in faces_of.items()]
    near = []
    for (_, listed), photo, found in zip(faces_of.values(), small, detect_many(small, degraded=True), strict=True):
        truth = listed.numpy() * side / FROM + rim_of(side)
        if (landmarks := nearest(found, truth)) is not None:
            near.append(error(refine(photo, landmarks), truth))
    return {"set": name, "damage": kind, "side": side, "photos": len(small), "found": len(near) / len(small),
            "error": median(near) if near else None}


def table(rows: list[report.Row]) -> str:
    """A line per set and damage: found, and the landmarks' error, by the size of the crop."""
    lines = []
    for name, kind in dict.fromkeys((row["set"], row["damage"]) for row in rows):
        own = [row for row in rows if (row["set"], row["damage"]) == (name, kind)]
        lines.append([name, str(own[0]["photos"]), kind, *(cell(row) for row in own)])
    return report.table(["set", "photos", "face", *(f"{side} px" for side in SIDES)], lines)


def cell(row: report.Row) -> str:
    return f"{row['found']:.0%}" + ("" if row["error"] is None else f" ({row['error']:.2f})")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, chosen in photos():
        faces_of = {photo: load_crop(photo, FROM) for photo in chosen}
        rows += [figures(name, faces_of, kind, side) for kind in DAMAGE for side in SIDES]
    machine = report.machine()
    report.write_json(RESULTS, rows, commit=report.commit(), machine=machine)
    about = f"Commit {report.commit()}, {report.machine_line(machine)}."
    measure.put_on_page("finding", f"{table(rows)}\n\n{about}", RESULTS, PAGE)


if __name__ == "__main__":
    measure.run(main)
