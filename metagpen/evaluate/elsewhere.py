"""Restorers that are no method of ours: the curve's tasks as pictures for any other program, and what it made of them.

    DIR/tasks.json                                          what was exported, and what its pictures are known by
    DIR/seed_0/PERSON/photos/00.png ...                     photos to learn from; k shots are the first k
    DIR/seed_0/PERSON/hard/00.png ...                       damaged queries, and so on for every degradation
    DIR/restored/NAME/5_photos/seed_0/PERSON/hard/00.png    what NAME, having seen 5 photos (0: none), made of them

No truth is exported. All pictures are aligned crops of the model's size, eight bits per channel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from metagpen import faces
from metagpen.atomic import write_text
from metagpen.errors import DataError
from metagpen.evaluate.names import FOLDER
from metagpen.evaluate.tasks import Degrade, Task, damage, load_photos
from metagpen.faces.photo import is_photo
from metagpen.identities import Photo

TASKS, PHOTOS, RESTORED = "tasks.json", "photos", "restored"


def export(folder: Path, tasks: Iterator[tuple[int, Task]], degradations: Mapping[str, Degrade],
           facts: Mapping[str, Any]) -> int:
    """Writes the photos and damaged queries of (seed, task) pairs; the number of damaged pictures.

    facts: what else tasks.json says. It is written last, so a folder that has it is whole.
    """
    known, pictures = {}, 0
    for seed, task in tasks:
        own = place(folder, seed, task.person)
        save_all(task.support, own / PHOTOS)
        known[key_of(seed, task.person, PHOTOS)] = pixels_digest(task.support)
        for name, degrade in degradations.items():
            poor = damage(task, name, degrade, seed)
            save_all(poor, own / name)
            known[key_of(seed, task.person, name)] = pixels_digest(poor)
            pictures += len(poor)
    write_text(folder / TASKS, json.dumps({**facts, "inputs": known}, indent=1) + "\n")
    return pictures


@dataclass(frozen=True)
class Elsewhere:
    """An exported folder with what others restored in it. Raises DataError for a folder that is none."""

    folder: Path
    inputs: Mapping[str, str]

    @classmethod
    def open(cls, folder: str | Path) -> Elsewhere:
        path = Path(folder) / TASKS
        try:
            return cls(Path(folder), dict(json.loads(path.read_text(encoding="utf-8"))["inputs"]))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: not a folder of exported tasks ({error}); metagpen curve --export makes one"
                            ) from None

    def pictures(self, name: str) -> list[Path]:
        """All that a restorer made, in a fixed order; DataError when there is nothing."""
        of = self.folder / RESTORED / name.removeprefix(FOLDER)
        found = sorted(filter(is_photo, of.rglob("*")))
        if not found:
            raise DataError(f"method {name}: no pictures in {of}; put what it restored there, each under the path of "
                            f"its damaged picture below N_photos, e.g. {of / '0_photos'}/seed_0/…")
        return found

    def digest(self, name: str) -> str:
        """Twelve hex digits of the SHA-256 over a restorer's pictures: what it is known by."""
        digest = hashlib.sha256()
        for path in self.pictures(name):
            digest.update(str(path.relative_to(self.folder)).encode() + path.read_bytes())
        return digest.hexdigest()[:12]

    def must_be(self, seed: int, person: str, what: str, images: Tensor) -> None:
        """Raises DataError where other photos to learn from, or damaged faces, were exported than are measured now."""
        if self.inputs.get(key_of(seed, person, what)) != pixels_digest(images):
            raise DataError(f"{self.folder}: its pictures of {person}, '{what}', seed {seed}, are not those that are "
                            "measured now (other settings, photos or code); export and restore again")

    def restored(self, name: str, shots: int, seed: int, person: str, degradation: str, poor: Tensor) -> Tensor:
        """What a restorer made of the damaged queries `poor` [Q, 3, S, S]: the same shape.

        Square pictures of another size are resized (antialiased bicubic). Raises DataError for one that is missing, and
        where what was exported is no longer what is measured.
        """
        self.must_be(seed, person, degradation, poor)
        of = self.place(name, shots, seed, person) / degradation
        files = [self.file(of, number) for number in range(len(poor))]
        return load_photos([Photo(file) for file in files], poor.shape[-1], aligned=True)

    def check(self, name: str, shots: int, seed: int, person: str, degradations: Iterable[str]) -> None:
        """Raises DataError where something of what was exported was not restored."""
        for degradation in degradations:
            for damaged in (place(self.folder, seed, person) / degradation).glob("*.png"):
                self.file(self.place(name, shots, seed, person) / degradation, int(damaged.stem))

    def place(self, name: str, shots: int, seed: int, person: str) -> Path:
        return place(self.folder / RESTORED / name.removeprefix(FOLDER) / f"{shots}_photos", seed, person)

    @staticmethod
    def file(folder: Path, number: int) -> Path:
        """The picture of this number, whatever its format; DataError where there is none, or two."""
        found = list(filter(is_photo, folder.glob(f"{number:02d}.*")))
        if len(found) != 1:
            what = "there in several formats" if found else "missing"
            raise DataError(f"{folder / f'{number:02d}.png'}: {what}; every damaged picture needs one that was "
                            "restored from it")
        return found[0]


def place(folder: Path, seed: int, person: str) -> Path:
    return folder / f"seed_{seed}" / person


def key_of(seed: int, person: str, degradation: str) -> str:
    return f"{seed}/{person}/{degradation}"


def save_all(images: Sequence[Tensor] | Tensor, folder: Path) -> None:
    for number, image in enumerate(images):
        faces.save_photo(faces.to_pil(image), folder / f"{number:02d}.png")


def pixels_digest(images: Tensor) -> str:
    """Twelve hex digits of the SHA-256 over images [Q, 3, S, S] as their files hold them."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(faces.to_pil(image).tobytes())
    return digest.hexdigest()[:12]
