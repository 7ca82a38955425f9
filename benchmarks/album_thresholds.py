"""What the thresholds of the album check are worth: strangers, sharpness, pose, copies, covered and cut-off faces.

People whom no training saw: the val people of celeba_wild_256 (photos of years, lights and poses) and london_512 (two
photos each in one studio; lisa seven). Photos come from `$METAGPEN_SHARED`, or the folder `shared` beside this
repository. Faces are recognised by the embedded recogniser, as `metagpen album` does it. Minutes on one core.

    python benchmarks/album_thresholds.py    # writes benchmarks/results/album_thresholds.json, tables in docs/album.md
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import measure
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from metagpen import degrade, recognise
from metagpen.check import limits, measures
from metagpen.check.agree import cosine_to_others, groups, is_divided, most_typical
from metagpen.errors import PhotoError
from metagpen.evaluate import report
from metagpen.evaluate.report import table
from metagpen.evaluate.tasks import generator_of, load_crop
from metagpen.faces import crop_face, detect_many, to_pil, to_tensor
from metagpen.identities import People, Photo
from metagpen.person import mean_identity

RESULTS = measure.RESULTS / "album_thresholds.json"
PAGE = measure.ROOT / "docs" / "album.md"
OTHERS = (1, 2, 3, 4, 5, 7)  # photos in the mean that a face is compared with
DRAWS = 20  # of a photo and its others, per person
SIDES = (96, 64, 48, 32, 16, 10)
YAWS = (0, 15, 30, 45, 90)
ALBUMS = ((5, 0), (8, 0), (14, 0), (3, 3), (5, 5), (7, 7), (5, 1), (6, 2), (9, 5))  # photos of one, of another person
PER_PERSON = 2  # photos of each val person that are covered and cut
COVERS = {"mouth": (0.60, 0.95, 0.2, 0.8), "eyes": (0.40, 0.54, 0.2, 0.8), "one side": (0.3, 0.95, 0.15, 0.5)}
CUTS = (0.2, 0.25, 0.3, 0.35)
OUTSIDE = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)


@dataclass
class Faces:
    """Photos of a set: whose they are [N], crops [N, 3, 128, 128], landmarks [N, 5, 2], embeddings [N, D]."""

    owner: np.ndarray
    photos: list[Photo]
    crops: Tensor
    landmarks: Tensor
    embeddings: Tensor

    @property
    def people(self) -> list[np.ndarray]:
        """The indices of each person's photos."""
        return [np.flatnonzero(self.owner == name) for name in np.unique(self.owner)]


@torch.no_grad()
def load_faces(people: People, recogniser: recognise.Recogniser) -> Faces:
    photos = [photo for own in people.values() for photo in own]
    owner = np.array([name for name, own in people.items() for _ in own])
    crops, landmarks = map(torch.stack, zip(*(load_crop(photo, measures.VIEW) for photo in photos)))
    found = torch.cat([recogniser.embed(*part) for part in zip(crops.split(32), landmarks.split(32))])
    return Faces(owner, photos, crops, landmarks, found)


def quantiles(values: np.ndarray | list[float]) -> dict[str, float]:
    shares = (0, 0.01, 0.05, 0.5, 0.95, 0.99, 1)
    return {f"{share:g}": float(np.quantile(np.asarray(values), share)) for share in shares}


def identity(faces: Faces) -> Iterator[dict]:
    """Cosines of a face to the mean of its person's others, and of strangers to that mean."""
    random = np.random.default_rng(0)
    for count in OTHERS:
        own, strangers = [], []
        for mine in faces.people:
            for _ in range(DRAWS if len(mine) > count else 0):
                one, *others = random.choice(mine, count + 1, replace=False)
                mean = mean_identity(faces.embeddings[others])
                own.append(float(faces.embeddings[one] @ mean))
                strangers.append((faces.embeddings[faces.owner != faces.owner[one]] @ mean).numpy())
        if own:
            mine, theirs = np.array(own), np.concatenate(strangers)
            yield {"others": count, "draws": len(mine), "own": quantiles(mine), "strangers": quantiles(theirs),
                   "at": {str(t): {"own_below": float((mine < t).mean()),
                                   "strangers_above": float((theirs >= t).mean())}
                          for t in (0.2, limits.STRANGER, 0.3, limits.DOUBTFUL, 0.4)}}


def album_sizes(faces: Faces, held: int = 6) -> dict:
    """Mean cosine of held-out photos to the mean of 1 to 15 others; and to 3, 5, 8 chosen by chance or by us."""
    random = np.random.default_rng(0)
    counts, chosen = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15), (3, 5, 8)
    by_count: dict[int, list[float]] = {count: [] for count in counts}
    by_choice: dict[str, list[float]] = {f"{how} {n}": [] for n in chosen for how in ("random", "best", "all for")}
    for mine in faces.people:
        for _ in range(DRAWS if len(mine) >= max(counts) + held else 0):
            order = random.permutation(mine)
            away, rest = faces.embeddings[order[:held]], faces.embeddings[order[held:]]
            for count in counts:
                by_count[count].append(float((away @ mean_identity(rest[:count])).mean()))
            for n in chosen:
                best = rest[most_typical(rest, n)]
                for how, used in (("random", rest[:n]), ("best", best), ("all for", rest)):
                    by_choice[f"{how} {n}"].append(float((away @ mean_identity(used)).mean()))
    return {"photos": {str(count): float(np.mean(found)) for count, found in by_count.items()},
            "choice": {name: float(np.mean(found)) for name, found in by_choice.items()},
            "albums": len(by_count[1])}


def albums(faces: Faces) -> dict[str, dict]:
    """How albums of one and of two people are judged, by the rules of `check_album` with one face on each photo."""
    found = {}
    for many, few in ALBUMS:
        random = np.random.default_rng([many, few])
        judged = [judge(faces.embeddings[chosen], many) for chosen in drawn(faces, many, few, random)]
        shares = np.mean(judged, axis=0)
        found[f"{many} + {few}" if few else str(many)] = {"albums": len(judged)} | dict(
            zip(("divided", "strangers_out", "own_out"), map(float, shares)))
    return found


def drawn(faces: Faces, many: int, few: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Albums: so many photos of each person who has them, then so few of another person; DRAWS for each person."""
    for i, mine in enumerate(faces.people):
        others = [other for j, other in enumerate(faces.people) if j != i and len(other) >= few]
        for _ in range(DRAWS if len(mine) >= many else 0):
            other = others[random.integers(len(others))]
            yield np.concatenate([random.choice(mine, many, replace=False), random.choice(other, few, replace=False)])


def judge(embeddings: Tensor, many: int) -> tuple[bool, bool, bool]:
    """Of an album [N, D]: is it divided; if not, are all photos but the first `many` left out, and any of those."""
    photos = [own[None] for own in embeddings]
    people = groups(photos)
    if is_divided(people, len(photos)):
        return True, False, False
    out = {i for i in range(len(photos)) if i not in people[0].faces
           or cosine_to_others(photos, people[0], i, 0) < limits.STRANGER}
    return False, set(range(many, len(photos))) <= out, min(out, default=many) < many


def sharpness(faces: Faces, size: int = measures.VIEW, most: int = 600) -> dict:
    """Of photos at least as large as `size`, as they are and reduced to fewer pixels (of 128) and enlarged again."""
    found: dict[str, list[float]] = {str(side): [] for side in (measures.VIEW, *SIDES)}
    for photo in [photo for photo in faces.photos if photo.source_side >= size][:most]:
        crop = load_crop(photo, size)[0]
        found[str(measures.VIEW)].append(measures.sharpness(to_tensor(to_pil(crop))))
        for side in SIDES:
            fewer = side * size // measures.VIEW
            small = F.interpolate(crop[None], (fewer, fewer), mode="bicubic", antialias=True)
            enlarged = to_pil(F.interpolate(small, (size, size), mode="bicubic")[0])
            found[str(side)].append(measures.sharpness(to_tensor(enlarged)))
    return {side: quantiles(values) | {"soft": float((np.array(values) < limits.SOFT).mean()),
                                       "blurred": float((np.array(values) < limits.BLURRED).mean())}
            for side, values in found.items()}


def pose(faces: Faces) -> dict:
    """Yaw, and the cosine to the mean of all one's other photos by yaw."""
    yaws = np.array([abs(measures.yaw(points)) for points in faces.landmarks.numpy()])
    cosines = np.zeros(len(yaws))
    for mine in faces.people:
        for i in mine:
            cosines[i] = float(faces.embeddings[i] @ mean_identity(faces.embeddings[mine[mine != i]]))
    bins = {f"{low}-{high}": cosines[(yaws >= low) & (yaws < high + (high == 90))] for low, high in zip(YAWS, YAWS[1:])}
    return {"yaw": quantiles(yaws), "turned": float((yaws > limits.TURNED).mean()),
            "cosine": {name: {"photos": len(part), "mean": float(part.mean()),
                              "5_percent": float(np.quantile(part, 0.05))}
                       for name, part in bins.items() if len(part)}}


def likeness(faces: Faces) -> dict:
    """Of copies to their originals, and of different photos of one person (the first eight), whole and face alone."""
    whole = [measures.picture_print(photo.load()) for photo in faces.photos]
    face = [measures.face_print(to_pil(crop)) for crop in faces.crops]
    pairs = [(i, j) for mine in faces.people for i in mine[:8] for j in mine[:8] if i < j]
    copied: dict[str, list[float]] = {"whole": [], "face": []}
    for mine in faces.people:
        first = mine[0]
        for copy, landmarks in copies(faces.photos[first]):
            copied["whole"].append(measures.likeness(whole[first], measures.picture_print(copy)))
            crop = crop_face(copy, landmarks, measures.VIEW).image
            copied["face"].append(measures.likeness(face[first], measures.face_print(crop)))
    return {"pairs": len(pairs), "copies": len(copied["whole"]),
            "whole": {"different": quantiles([measures.likeness(whole[i], whole[j]) for i, j in pairs]),
                      "copies": quantiles(copied["whole"]),
                      "found": float((np.array(copied["whole"]) >= limits.COPY).mean())},
            "face": {"different": quantiles([measures.likeness(face[i], face[j]) for i, j in pairs]),
                     "copies": quantiles(copied["face"]),
                     "found": float((np.array(copied["face"]) >= limits.ALIKE).mean())}}


def copies(photo: Photo) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """Compressed and reduced copies, with landmarks that are off by about 1 % of the distance of the eyes."""
    random, original = np.random.default_rng(0), photo.load()
    for quality, scale in ((50, 1.0), (75, 0.5), (30, 1.0), (90, 0.7), (60, 0.3)):
        side = int(original.width * scale)
        copy = jpeg(original.resize((side, side), Image.Resampling.LANCZOS), quality)
        points = np.asarray(photo.landmarks) * (side / original.width)
        yield copy, points + random.normal(0, 0.0025 * side, (5, 2))


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    packed = io.BytesIO()
    picture.save(packed, "JPEG", quality=quality)
    return Image.open(packed).convert("RGB")


def coverage(faces: Faces, recogniser: recognise.Recogniser) -> dict:
    """Whole, covered and cut-off faces as detector, flat share and recogniser see them."""
    random = np.random.default_rng(0)
    chosen = [i for mine in faces.people for i in mine[:PER_PERSON]]
    photos = [faces.photos[i].load() for i in chosen]
    pasted = photos[7:] + photos[:7]  # somebody else's picture, in the place of hands, cups and microphones
    whole = seen(photos, recogniser)
    found = {"whole": summary(whole, whole)}
    for name, box in COVERS.items():
        painted = [cover(photo, box, tuple(random.integers(0, 255, 3).tolist())) for photo in photos]
        found[f"{name} painted over"] = summary(seen(painted, recogniser), whole)
        hidden = [cover(photo, box, other) for photo, other in zip(photos, pasted)]
        found[f"{name} behind a picture"] = summary(seen(hidden, recogniser), whole)
    outside, cosines = [], []
    for cut in CUTS:
        for shorten in (from_below, from_the_left):
            for one, first in zip(seen([shorten(photo, cut) for photo in photos], recogniser), whole):
                if one and first:
                    outside.append(one["outside"])
                    cosines.append(float(one["embedding"] @ first["embedding"]))
    outside, cosines = np.array(outside), np.array(cosines)
    parts = {f"{low:g}-{high:g}": cosines[(outside >= low) & (outside <= high if high == 1 else outside < high)]
             for low, high in zip(OUTSIDE, OUTSIDE[1:])}
    return {"photos": len(photos), "covered": found,
            "cut_off": {name: {"faces": len(part), "cosine": float(part.mean())}
                        for name, part in parts.items() if len(part)}}


def from_below(photo: Image.Image, share: float) -> Image.Image:
    return photo.crop((0, 0, photo.width, round(photo.height * (1 - share))))


def from_the_left(photo: Image.Image, share: float) -> Image.Image:
    return photo.crop((round(photo.width * share), 0, photo.width, photo.height))


def cover(photo: Image.Image, box: tuple[float, ...], what: tuple[int, ...] | Image.Image) -> Image.Image:
    top, bottom, left, right = (round(share * photo.width) for share in box)
    covered = photo.copy()
    patch = what.resize((right - left, bottom - top)) if isinstance(what, Image.Image) else what
    covered.paste(patch, (left, top, right, bottom))
    return jpeg(covered, 85)


@torch.no_grad()
def seen(photos: list[Image.Image], recogniser: recognise.Recogniser) -> list[dict | None]:
    """The largest face of each photo, or None where none is found."""
    found: list[dict | None] = []
    for photo, faces in zip(photos, detect_many(photos)):
        try:
            crop = crop_face(photo, faces[0].landmarks, measures.VIEW)
        except (IndexError, PhotoError):
            found.append(None)
            continue
        points = torch.from_numpy(crop.landmarks).float()[None]
        found.append({"score": faces[0].score, "flat": measures.flat_share(crop.image),
                      "outside": measures.face_outside(photo.size, faces[0].landmarks),
                      "embedding": recogniser.embed(to_tensor(crop.image)[None], points)[0],
                      "limits": {limit.kind for limit in limits.face_limits(photo, faces[0])}})
    return found


def summary(faces: list[dict | None], whole: list[dict | None]) -> dict:
    pairs = [(one, first) for one, first in zip(faces, whole) if one and first]
    return {"found": len([one for one in faces if one]), "of": len(faces),
            "score": quantiles([one["score"] for one, _ in pairs]),
            "flat": quantiles([one["flat"] for one, _ in pairs]),
            "cosine": quantiles([float(one["embedding"] @ first["embedding"]) for one, first in pairs]),
            "unsure": float(np.mean([one["score"] < limits.UNSURE for one, _ in pairs])),
            "flat_found": float(np.mean([one["flat"] > limits.COVERED for one, _ in pairs])),
            "any_limit": float(np.mean([bool(one["limits"]) for one, _ in pairs]))}


def flat_shares(faces: Faces) -> dict[str, dict]:
    """False alarms on whole faces, sharp and degraded."""
    crops = {"sharp": faces.crops}
    for name in ("heavy", "gfpgan", "bsrgan"):
        worsen = degrade.by_name(name)
        crops[name] = torch.cat([worsen(crop[None], generator_of("flat", name, i))
                                 for i, crop in enumerate(faces.crops[:100])])
    return {name: quantiles(shares := [measures.flat_share(to_pil(crop)) for crop in part]) |
            {"found": float((np.array(shares) > limits.COVERED).mean())} for name, part in crops.items()}


def tables(found: dict) -> dict[str, str]:
    """Marker -> table of the page."""
    val, london = found["celeba_wild_256, val"], found["london_512"]

    def share(value: float) -> str:
        return f"{value:.1%}"

    who = [["celeba_wild_256" if rows is val else "london_512", str(row["others"]), f"{row['own']['0.5']:.2f}",
            f"{row['own']['0.05']:.2f}", f"{row['strangers']['0.99']:.2f}",
            *(share(row["at"][str(t)][key]) for t in (limits.STRANGER, limits.DOUBTFUL)
              for key in ("own_below", "strangers_above"))]
           for rows in (val, london) for row in rows["identity"] if rows is val or row["others"] == 1]
    heads = ["set", "other photos", "own, median", "own, 5 % below", "strangers, 1 % above",
             *(f"{what} {limit}" for limit in (limits.STRANGER, limits.DOUBTFUL)
               for what in ("own below", "strangers from"))]
    count = [[n, f"{cosine:.3f}"] for n, cosine in val["album_sizes"]["photos"].items()]
    choice = val["album_sizes"]["choice"]
    picked = [[n, *(f"{choice[f'{how} {n}']:.3f}" for how in ("random", "best", "all for"))] for n in ("3", "5", "8")]
    sharp = [[side, f"{row['0.05']:.2f}", f"{row['0.5']:.2f}", f"{row['0.95']:.2f}", share(row["soft"]),
              share(row["blurred"])] for side, row in val["sharpness"].items()]
    turned = [[name, str(row["photos"]), f"{row['mean']:.2f}", f"{row['5_percent']:.2f}"]
              for name, row in val["pose"]["cosine"].items()]
    alike = [[name, what, f"{rows['likeness'][what]['different']['0.99']:.3f}",
              f"{rows['likeness'][what]['different']['1']:.3f}", f"{rows['likeness'][what]['copies']['0.05']:.3f}",
              share(rows["likeness"][what]["found"])]
             for name, rows in (("celeba_wild_256", val), ("london_512", london)) for what in ("whole", "face")]
    hidden = [[name, f"{row['found']} of {row['of']}", share(row["flat_found"]), share(row["unsure"]),
               f"{row['cosine']['0.5']:.2f}"] for name, row in val["coverage"]["covered"].items()]
    cut = [[name, str(row["faces"]), f"{row['cosine']:.2f}"] for name, row in val["coverage"]["cut_off"].items()]
    return {"identity": table(heads, who), "divided": divided_table(val["divided"]),
            "count": table(["photos", "cosine of held-out photos"], count),
            "choice": table(["photos", "by chance", "the best", "all there are"], picked),
            "sharpness": table(["pixels left of 128", "5 %", "median", "95 %", "soft", "blurred"], sharp),
            "pose": table(["yaw, degrees", "photos", "mean cosine to the others", "5 % below"], turned),
            "likeness": table(["set", "compared", "different photos, 99 %", "different, most", "copies, 5 %",
                               "copies found"], alike),
            "covered": table(["face", "found", "flat", "unsure", "cosine to the whole face"], hidden),
            "cut": table(["share of the face outside", "faces", "cosine to the whole face"], cut)}


def divided_table(found: dict[str, dict]) -> str:
    """Strangers are counted where one of two people is on more photos, else nobody knows who they are."""
    rows = []
    for (many, few), row in zip(ALBUMS, found.values()):
        shares = (row["divided"], row["strangers_out"] if many > few > 0 else None, row["own_out"])
        name = f"{many} + {few}" if few else str(many)
        rows.append([name, str(row["albums"]), *("" if value is None else f"{value:.1%}" for value in shares)])
    return table(["photos", "albums", "divided", "every stranger left out", "the person's own left out"], rows)


def measured(work: Callable[[], dict], name: str) -> dict:
    began = time.process_time()
    result = work()
    print(f"{name}: {time.process_time() - began:.0f} s")
    return result


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    studio = measure.SHARED / "photos" / "london_512"
    measure.need(studio)
    recogniser = recognise.load()
    val = load_faces(measure.wild_people(), recogniser)
    london = load_faces(People.from_folder(studio), recogniser)
    found = {}
    for name, faces in (("celeba_wild_256, val", val), ("london_512", london)):
        found[name] = {"people": len(faces.people), "photos": len(faces.photos), "identity": list(identity(faces)),
                       "sharpness": measured(lambda faces=faces: sharpness(faces), "sharpness"), "pose": pose(faces),
                       "likeness": measured(lambda faces=faces: likeness(faces), "likeness"),
                       "flat": measured(lambda faces=faces: flat_shares(faces), "flat")}
    found["celeba_wild_256, val"]["divided"] = measured(lambda: albums(val), "albums of two people")
    found["celeba_wild_256, val"]["album_sizes"] = measured(lambda: album_sizes(val), "album sizes")
    found["celeba_wild_256, val"]["coverage"] = measured(lambda: coverage(val, recogniser), "coverage")
    found["london_512"]["sharpness at 512"] = measured(lambda: sharpness(london, 512, 60), "sharpness at 512")
    thresholds = {name: getattr(limits, name) for name in (
        "FEWEST", "MOST", "STRANGER", "DOUBTFUL", "TWO_PEOPLE", "COPY", "ALIKE", "SMALL", "SOFT", "BLURRED",
        "TURNED", "UNSURE", "COVERED", "CUT_OFF")}
    facts = {"thresholds": thresholds, "recogniser": recogniser.name, "commit": report.commit(),
             "machine": report.machine(), "cpu_seconds": round(time.process_time())}
    report.write_text(RESULTS, json.dumps({**measure.rounded(found), **facts}, indent=1) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    for name, text in tables(found).items():
        page = report.replace_between(page, *measure.markers(name), text)
    report.write_text(PAGE, page)


if __name__ == "__main__":
    measure.run(main)
