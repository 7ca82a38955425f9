"""CelebA and CelebA-HQ as their users have them: numbered photos, and lists that say who is on them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import DataError
from .listing import existing_folder, find_list, first_folder, numbered_photos, text_rows
from .people import People, Photo, register_layout

IDENTITIES = "identity_CelebA.txt"
HQ_MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"
LANDMARKS = {False: "list_landmarks_celeba.txt", True: "list_landmarks_align_celeba.txt"}
FOLDERS = {False: ("img_celeba", "Img/img_celeba"), True: ("img_align_celeba", "Img/img_align_celeba")}
HQ_FOLDERS = ("CelebA-HQ-img", "CelebAMask-HQ/CelebA-HQ-img")
LAST_PHOTO = {"train": 162_770, "val": 182_637, "test": 202_599}
"""Number of the last photo of each part of CelebA's official partition (list_eval_partition.txt)."""


@register_layout("celeba_hq")
def celeba_hq(root: str | os.PathLike, lists: str | os.PathLike | None = None, *, strict: bool = True) -> People:
    """CelebA-HQ: aligned crops named by their number 0 ... 29999, people named by CelebA's identity numbers.

    root: a folder with `0.jpg`, `00000.png` or `imgHQ00000.png` ... at any depth (train and val sub-folders, say),
    or CelebAMask-HQ with its CelebA-HQ-img. lists: the folder of `CelebA-HQ-to-CelebA-mapping.txt` and
    `identity_CelebA.txt`, with or without header; default: root, the folder above it, or an Anno folder of either.
    Photos know their source_side when CelebA's `list_landmarks_celeba.txt` lies there too. strict: all of the
    mapping's photos must be there.

    Raises DataError for a missing or damaged list, a photo that no list knows, and missing photos.
    """
    root = existing_folder(root)
    files = numbered_photos(first_folder(root, HQ_FOLDERS))
    originals = read_hq_mapping(find_list(HQ_MAPPING, root, lists))
    if unknown := files.keys() - originals.keys():
        raise DataError(f"'{files[min(unknown)]}' is not in {HQ_MAPPING} (numbers 0 to {max(originals)}); photos under "
                        "CelebA's own numbers are read by celeba()")
    _check_complete(originals.keys() - files.keys(), root, strict)
    sides = _known_sides(root, lists)
    photos = {originals[n]: Photo(path, None, sides.get(originals[n])) for n, path in files.items()}
    return _grouped(photos, read_identities(find_list(IDENTITIES, root, lists)), "celeba_hq")


@register_layout("celeba")
def celeba(root: str | os.PathLike, lists: str | os.PathLike | None = None, *, aligned: bool = False,
           strict: bool = True) -> People:
    """CelebA in the wild: whole photos with landmarks; cut them with `write_shards(..., crop=cut_by_landmarks)`.

    root: a folder with `img_celeba/000001.jpg` ... (or Img/img_celeba, or the photos themselves).
    lists: the folder of `identity_CelebA.txt` and `list_landmarks_celeba.txt`; default: as for `celeba_hq`.
    aligned: the 178 x 218 pixel version instead (`img_align_celeba`, `list_landmarks_align_celeba.txt`).
    strict: all photos of the identity list must be there. The source_side of a photo is that of the FFHQ-style crop
    through its landmarks, in its own pixels.

    Raises DataError for a missing or damaged list, a photo that no list knows, and missing photos.
    """
    root = existing_folder(root)
    files = numbered_photos(first_folder(root, FOLDERS[aligned]))
    identities = read_identities(find_list(IDENTITIES, root, lists))
    _check_complete(identities.keys() - files.keys(), root, strict)
    landmarks = read_landmarks(find_list(LANDMARKS[aligned], root, lists))
    if unmarked := files.keys() - landmarks.keys():
        raise DataError(f"{LANDMARKS[aligned]} has no landmarks for '{files[min(unmarked)]}'; complete the list")
    sides = crop_sides(landmarks)
    return _grouped({n: Photo(path, landmarks[n], sides[n]) for n, path in files.items()}, identities,
                    "celeba_aligned" if aligned else "celeba")


def celeba_split(people: People, identities: str | os.PathLike) -> dict[str, People]:
    """CelebA's official split, which shares nobody, of a collection read by `celeba` or `celeba_hq`.

    identities: the file identity_CelebA.txt. Returns the parts "train", "val" and "test" (those that are not empty).
    Raises DataError for people whom the list does not know or puts into two parts.
    """
    part_of: dict[str, str] = {}
    for number, person in read_identities(identities).items():
        part = next(part for part, last in LAST_PHOTO.items() if number <= last)
        if part_of.setdefault(person, part) != part:
            raise DataError(f"{identities}: person {person} has photos in {part_of[person]} and in {part}; no official "
                            "list has that, copy the file again")
    if strange := [name for name in people if name not in part_of]:
        raise DataError(f"{identities} does not know '{strange[0]}' of {people} ({len(strange)} people in all); split "
                        "before merging, and give the list the people were read with")
    parts = {part: [name for name in people if part_of[name] == part] for part in LAST_PHOTO}
    return {part: people.select(names) for part, names in parts.items() if names}


def read_identities(file: str | os.PathLike) -> dict[int, str]:
    """{photo number: person} of identity_CelebA.txt (rows `000001.jpg 2880`, a header or not).

    Raises DataError, naming file and line.
    """
    people: dict[int, str] = {}
    for line, (image, person) in text_rows(file, columns=2):
        number = _image_number(image, file, line)
        if number in people:
            raise DataError(f"{file}, line {line}: '{image}' is listed twice; repair the line or copy the file again")
        if not 1 <= number <= LAST_PHOTO["test"]:
            raise DataError(f"{file}, line {line}: CelebA has no photo '{image}'; copy the file again")
        people[number] = person
    return _not_empty(people, file)


def read_hq_mapping(file: str | os.PathLike) -> dict[int, int]:
    """{CelebA-HQ number: CelebA photo number} of the mapping (rows `0 119613 119614.jpg`, a header or not).

    Raises DataError, naming file and line; also when the last two values of a row contradict each other.
    """
    originals: dict[int, int] = {}
    for line, (index, position, image) in text_rows(file, columns=3):
        number = _image_number(image, file, line)
        if not (index.isdigit() and position == str(number - 1)) or int(index) in originals:
            raise DataError(f"{file}, line {line}: '{index} {position} {image}' contradicts itself (the second value "
                            "is one less than the third) or an earlier line; copy the file again")
        originals[int(index)] = number
    return _not_empty(originals, file)


def read_landmarks(file: str | os.PathLike) -> dict[int, np.ndarray]:
    """{photo number: landmarks [5, 2] in pixels} of a landmark list of CelebA (count and header line, or neither).

    The list names pixels; the library's coordinates put a pixel's centre at its number + 0.5.
    Raises DataError, naming file and line.
    """
    numbers, values = [], []
    for line, row in text_rows(file, columns=11, heads=2):
        numbers.append(_image_number(row[0], file, line))
        try:
            values.append([int(value) for value in row[1:]])
        except ValueError:
            raise DataError(f"{file}, line {line}: a landmark of '{row[0]}' is not a whole number") from None
    points = np.array(values, dtype=np.float64).reshape(-1, 5, 2) + 0.5
    return _not_empty(dict(zip(numbers, points)), file)


def crop_sides(landmarks: dict[int, np.ndarray]) -> dict[int, float]:
    """{number: side in pixels of the FFHQ-style crop through landmarks [5, 2]} (see `metagpen.faces.ffhq_quad`)."""
    points = np.stack(list(landmarks.values()))
    eyes = points[:, 1] - points[:, 0]
    mouths = points[:, 3:].mean(1) - points[:, :2].mean(1)
    sides = np.maximum(4.0 * np.hypot(*eyes.T), 3.6 * np.hypot(*mouths.T))
    return dict(zip(landmarks, sides.tolist()))


def _known_sides(root: Path, lists: str | os.PathLike | None) -> dict[int, float]:
    """Native crop sides by CelebA number; empty without the optional list of landmarks in the wild."""
    try:
        file = find_list(LANDMARKS[False], root, lists)
    except DataError:
        return {}
    return crop_sides(read_landmarks(file))


def _grouped(photos: dict[int, Photo], identities: dict[int, str], set_name: str) -> People:
    """Photos by CelebA number -> People."""
    people: dict[str, list[Photo]] = {}
    for number, photo in photos.items():
        if number not in identities:
            raise DataError(f"{IDENTITIES} does not say who is on '{photo.path}' (CelebA's photo {number:06}.jpg); "
                            "copy the list again")
        people.setdefault(identities[number], []).append(photo)
    return People({name: sorted(of, key=lambda photo: photo.path) for name, of in people.items()}, set_name)


def _check_complete(missing: Iterable[int], root: Path, strict: bool) -> None:
    missing = sorted(missing)
    if strict and missing:
        raise DataError(f"{len(missing)} listed photos are not below '{root}', number {missing[0]} to begin with; copy "
                        "them, or pass strict=False to go without")


def _image_number(image: str, file: str | os.PathLike, line: int) -> int:
    stem = image.removesuffix(".jpg")
    if not stem.isdigit():
        raise DataError(f"{file}, line {line}: '{image}' is not the name of a CelebA photo such as 000001.jpg")
    return int(stem)


def _not_empty(rows: dict, file: str | os.PathLike) -> dict:
    if not rows:
        raise DataError(f"'{file}' lists nothing; copy the file again")
    return rows
