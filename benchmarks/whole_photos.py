"""What is lost between a face that lies where the restorer expects it and one that has to be found in a photo.

The evidence is measured on crops that were aligned before they were damaged. Here the same damaged crops of the same
people are laid into photos four times as wide (their rim is the crop's edge, drawn out), those are saved at 0.5 to 2.5
times their size, and the face is aligned by what is seen of it: *plain*, by the detector as it looks at photos to learn
from; *found*, as it looks at photos to restore, blurred too; *refined*, with the landmarks corrected, which is what
`metagpen restore` does; *box*, from a box around the face as a hand would draw it (each side off by up to a tenth),
corrected. Each crop is restored, laid back into the aligned crop and scored there, as the evidence does; beside them
the crop as it was damaged, where it truly lies (*exact*), and the same resampled once (*aligned*). Everybody learned
from five photos by `metagpen.adapt`.

    python benchmarks/whole_photos.py                  # benchmarks/results/whole_photos.json, tables in docs/restore.md
    python benchmarks/whole_photos.py --before FILE    # beside a model before, to which the second table compares
    python benchmarks/whole_photos.py --tables         # only the tables, of what was measured
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from statistics import mean, median

import calibrate_judge
import measure
import numpy as np
import torch
from finding import error, in_a_photo, nearest, rim_of
from PIL import Image
from rich.progress import track
from torch import Tensor

import metagpen
from metagpen import faces, recognise
from metagpen.errors import PhotoError
from metagpen.evaluate import metrics, report
from metagpen.evaluate.engine import named_degradations
from metagpen.evaluate.statistics import paired_gain
from metagpen.evaluate.tasks import Task, damage, draws_of, generator_of, load_task
from metagpen.faces.align import paste_back, transform
from metagpen.faces.detect import detect_many, usable_face
from metagpen.faces.landmarks import BOX, landmarks_in, refine
from metagpen.lpips_files import load_lpips
from metagpen.workers import spread

RESULTS = measure.RESULTS / "whole_photos.json"
PAGE = measure.ROOT / "docs" / "restore.md"
LEVELS = ("moderate", "hard", "extreme")
SHOTS, MAX_QUERIES = 5, 4
SAVED = math.log(0.5), math.log(2.5)  # times as large
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
UNSURE = 0.1  # of the box: how far off a hand draws its sides
WAYS = {"exact": "the crop as it was damaged", "aligned": "where it truly lies",
        "plain": "found as in photos to learn from", "found": "found, blurred too",
        "refined": "found, corrected: `metagpen restore`", "box": "a box by hand, corrected"}
FIDELITY = {"identity": 3, "psnr": 2, "lpips": 3, "sharpness": 2}  # decimals

Rows = list[report.Row]


def saved(photo: Image.Image, name: str) -> tuple[Image.Image, float]:
    """The photo at another size, and how many times as large."""
    generator = generator_of("saved", name)
    low, high = SAVED
    side = round(photo.width * math.exp(low + (high - low) * float(torch.rand(1, generator=generator))))
    with_filter = FILTERS[int(torch.randint(len(FILTERS), (1,), generator=generator))]
    return photo.resize((side, side), with_filter), side / photo.width


def landmarks_by(photo: Image.Image, truth: np.ndarray, name: str, first: list[faces.Face],
                 last: list[faces.Face]) -> dict[str, np.ndarray]:
    """The face's landmarks by every way that finds it, by the detector's first looks and by all."""
    by = {"aligned": truth}
    for way, seen in (("plain", first), ("found", last)):
        if (landmarks := nearest(seen, truth)) is not None:
            by[way] = landmarks
    if "found" in by:
        by["refined"] = refine(photo, by["found"])
    by["box"] = refine(photo, landmarks_in(by_hand(truth, name)))
    return by


def by_hand(truth: np.ndarray, name: str) -> np.ndarray:
    """A box x0, y0, x1, y1 around the face with these landmarks, its sides a little off."""
    corners = transform(np.array(BOX).reshape(2, 2), faces.invert(faces.crop_matrix(truth, 1)))
    off = torch.rand(2, 2, generator=generator_of("by hand", name)).numpy() * 2 - 1
    return (corners + UNSURE * off * (corners[1] - corners[0])).ravel()


class Judges:
    """The recogniser that no loss saw, and LPIPS where it is present."""

    def __init__(self) -> None:
        self.recogniser, self.lpips = recognise.load(str(measure.SCORING)), load_lpips()

    def __call__(self, image: Tensor, truth: Tensor, landmarks: Tensor) -> report.Row:
        """Of [3, S, S] each, with the truth's landmarks [5, 2]."""
        image, truth = image[None], truth[None]
        embedded = [metrics.embeddings(self.recogniser, part, landmarks[None]) for part in (image, truth)]
        found = {"identity": metrics.cosine(*embedded), "psnr": metrics.psnr(image, truth),
                 "sharpness": metrics.sharpness(image, truth), "lpips": metrics.lpips(self.lpips, image, truth)}
        return {name: value.item() for name, value in found.items() if value is not None}


class Bench:
    """All that measuring a person takes; each worker process has its own."""

    def __init__(self, models: dict[str, str]) -> None:
        torch.set_num_threads(1)
        self.models = {name: metagpen.load(source) for name, source in models.items()}
        self.judges, self.levels, self.people = Judges(), named_degradations(LEVELS), measure.wild_people()

    def measured(self, name: str) -> Rows:
        """A row per damage, photo of the person, and way."""
        size = next(iter(self.models.values())).size
        task, rows = load_task(self.people, name, SHOTS, size, max_queries=MAX_QUERIES), []
        restorers = {}
        for label, model in self.models.items():
            person = metagpen.adapt(model, list(task.support), seed=draws_of(name, 0))
            restorers[label] = {"generic": model.restore, "personal": person.restore_batch}
        for level, degrade in self.levels.items():
            poor = damage(task, level, degrade)
            for i, way, wrong, crop, place in crops_of(task, poor, level):
                row = {"level": level, "person": name, "photo": task.names[i], "way": way, "error": wrong}
                for label, own in restorers.items():
                    row[label] = {}
                    for who, restore in own.items():
                        restored = restore(crop[None])[0]
                        if place is not None:
                            restored = laid_back(restored, poor[i], place)
                        row[label][who] = self.judges(restored, task.queries[i], task.landmarks[i])
                rows.append(measure.rounded(row))
        return rows


def crops_of(task: Task, poor: Tensor, level: str) -> Iterator[tuple[int, str, float, Tensor, np.ndarray | None]]:
    """(which photo, way, landmarks' error, crop [3, S, S], matrix from the aligned crop to it) of a person's photos."""
    size, rim = poor.shape[-1], rim_of(poor.shape[-1])
    names = [f"{level}/{task.person}/{name}" for name in task.names]
    photos, scales = zip(*(saved(in_a_photo(crop), name) for crop, name in zip(poor, names)))
    looks = zip(detect_many(list(photos)), detect_many(list(photos), degraded=True))
    for i, (photo, scale, (first, last)) in enumerate(zip(photos, scales, looks)):
        yield i, "exact", 0.0, poor[i], None
        truth = (task.landmarks[i].double().numpy() + rim) * scale
        for way, landmarks in landmarks_by(photo, truth, names[i], first, last).items():
            try:
                crop = usable_face(photo, landmarks, size, 0)
            except PhotoError:  # what is no face can be corrected to where there is no photo
                continue
            place = crop.matrix.copy()
            place[:, :2] *= scale
            place[:, 2] += place[:, :2] @ (rim, rim)
            yield i, way, error(landmarks, truth), faces.to_tensor(crop.image), place


def laid_back(restored: Tensor, poor: Tensor, place: np.ndarray) -> Tensor:
    """The aligned crop, with what was restored of another crop of its photo laid into it."""
    return faces.to_tensor(paste_back(faces.to_pil(poor), faces.to_pil(restored), place))


bench: Bench | None = None  # a worker's own


def prepare(models: dict[str, str]) -> None:
    global bench
    bench = Bench(models)


def measured(name: str) -> Rows:
    return bench.measured(name)


def by_person(rows: Rows, model: str, who: str, metric: str) -> dict[str, float]:
    people = dict.fromkeys(row["person"] for row in rows)
    return {person: mean(row[model][who][metric] for row in rows if row["person"] == person) for person in people}


def gain(rows: Rows, metric: str, model: str = "now") -> str:
    """Personal minus generic, paired by person, with its interval over people."""
    return told(*(by_person(rows, model, who, metric) for who in ("personal", "generic")), metric)


def told(ours: dict[str, float], theirs: dict[str, float], metric: str) -> str:
    found = paired_gain(ours, theirs)
    return report.interval_text(found.mean, found.lo, found.hi, FIDELITY[metric])


def of(rows: Rows, level: str, way: str) -> Rows:
    return [row for row in rows if (row["level"], row["way"]) == (level, way)]


def whole_photos(rows: Rows, before: bool) -> str:
    """A line per damage and way."""
    lines = []
    for level in LEVELS:
        exact = {(row["person"], row["photo"]): row for row in of(rows, level, "exact")}
        for way, title in WAYS.items():
            own = of(rows, level, way)
            if not own:
                lines.append([measure.DAMAGE[level], title, "0", *["–"] * 6])
                continue
            same = [exact[row["person"], row["photo"]] for row in own]
            generic, personal = (mean(by_person(own, "now", who, "identity").values())
                                 for who in ("generic", "personal"))
            lines.append([measure.DAMAGE[level], title, str(len(own)), f"{median(row['error'] for row in own):.2f}",
                          f"{generic:.3f} → {personal:.3f}", gain(own, "identity"), gain(same, "identity"),
                          gain(own, "identity", "before") if before else "–", gain(own, "psnr")])
    return report.table(["damage", "the face", "photos", "error", "identity", "gained", "gained by their exact crops",
                         "gained with the gate before", "PSNR gained, dB"], lines)


def judge(rows: Rows) -> str:
    """What changes from the model before on the crops as they were damaged, by damage."""
    lines, measured = [], [metric for metric in FIDELITY if metric in rows[0]["now"]["generic"]]
    for level in LEVELS:
        own = of(rows, level, "exact")
        for who in ("generic", "personal"):
            lines.append([measure.DAMAGE[level], who, *(
                told(*(by_person(own, model, who, metric) for model in ("now", "before")), metric)
                for metric in measured)])
    return report.table(["damage", "model", *measured], lines)


def measure_all(before: str | None, workers: int) -> None:
    models = {"now": "embedded"} | ({"before": before} if before else {})
    people = list(measure.wild_people())
    found = dict(track(spread(measured, people, workers, prepare, models), total=len(people), description="people"))
    report.write_text(RESULTS, json.dumps({
        "commit": report.commit(), "machine": report.machine(),
        "models": {name: metagpen.load(source).fingerprint for name, source in models.items()},
        "rows": [row for name in people for row in found[name]]}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", metavar="FILE", help="a model before")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if not arguments.tables:
        measure.need(measure.SCORING)
        measure_all(arguments.before, arguments.workers)
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows, models = found["rows"], found["models"]
    about = (f"{len({row['person'] for row in rows})} people, {SHOTS} photos; model {models['now'][:12]}, commit "
             f"{found['commit']}, {report.machine_line(found['machine'])}.")
    if "judge" in (card := metagpen.load().card):
        shares = f"{calibrate_judge.table(card['judge']['opens'])}\n\nCommit {card['judge']['commit']}."
        measure.put_on_page("judge_shares", shares, RESULTS, PAGE)
    measure.put_on_page("whole_photos", f"{whole_photos(rows, 'before' in models)}\n\n{about}", RESULTS, PAGE)
    if "before" in models:
        about = f"Against model {models['before'][:12]}. {about}"
        measure.put_on_page("judge", f"{judge(rows)}\n\n{about}", RESULTS, PAGE)


if __name__ == "__main__":
    measure.run(main)
