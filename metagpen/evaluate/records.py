"""One person's result under one method, and the file that keeps such results while a run lasts."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from metagpen.atomic import write_text
from metagpen.errors import DataError


@dataclass(frozen=True)
class Record:
    """One person under one method and degradation: means over that person's queries, keyed by metric.

    Keys are those of `engine.Scorer`: `psnr`, ..., and `identity:NAME`, `person:NAME`, ... for each recogniser.
    `seconds` is the time of learning this person, None where nobody took it.
    """

    person: str
    degradation: str
    method: str
    shots: int
    steps: int
    queries: int
    seconds: float | None
    commit: str
    values: dict[str, float] = field(hash=False)

    @property
    def key(self) -> tuple:
        return self.person, self.degradation, self.method, self.shots, self.steps


class RecordFile:
    """Records as JSON Lines, appended one by one, so that an interrupted evaluation loses nothing but its last line."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.records = {record.key: record for record in self._read()}

    def _read(self) -> list[Record]:
        found = []
        for number, line in enumerate(whole_lines(self.path), start=1):
            try:
                found.append(Record(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise DataError(f"{self.path}, line {number}: damaged ({error}); delete the line, and what it held is "
                                "measured again") from None
        return found

    def append(self, record: Record) -> None:
        append_line(self.path, json.dumps(asdict(record)))
        self.records[record.key] = record


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that was appended to line by line; a last one that was cut off is removed from the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]  # bytes: a cut may have gone through a letter
    try:
        text = whole.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: damaged ({error}); move it away to measure again") from None
    if whole != data:
        write_text(path, text)
    return text.splitlines()


def append_line(path: Path, line: str) -> None:
    """Appends a line and waits until the disk has it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
