"""One person's result under one method, and the file that keeps such results while a run lasts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from metagpen.evaluate.report import write_text


@dataclass(frozen=True)
class Record:
    """One person under one method and degradation: means over that person's queries, keyed by metric.

    Keys are `psnr`, `ssim`, `sharpness`, `lpips` and `identity:NAME`, `deg:NAME` for each recogniser. `seconds` is
    the time of `adapt` for this person.
    """

    person: str
    degradation: str
    method: str
    shots: int
    steps: int
    queries: int
    seconds: float
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
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a last line without its end was cut off when the run was killed
        if whole != text:
            write_text(self.path, whole)
        return [Record(**json.loads(line)) for line in whole.splitlines()]

    def append(self, record: Record) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        self.records[record.key] = record
