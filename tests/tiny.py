"""A small native recogniser for tests, importable by other processes too, and a full disk."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from metagpen.recognise import InputSpec, Recogniser


class Net(nn.Module):
    """Looks at 16 px, returns 8 numbers; a class of a module, so that it can be sent to another process."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.project = nn.Linear(6 * 64, 8)

    def perceive(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        maps = torch.tanh(self.conv(x))
        return [maps], self.project(maps.flatten(1))

    def features(self, x: Tensor) -> list[Tensor]:
        return self.perceive(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.perceive(x)[1]


def recogniser(name: str = "tests", seed: int = 1) -> Recogniser:
    """Random, with 8-dimensional embeddings."""
    torch.manual_seed(seed)
    template = tuple((16 * x, 16 * y) for x, y in ((0.35, 0.45), (0.65, 0.45), (0.5, 0.6), (0.4, 0.75), (0.6, 0.75)))
    return Recogniser(name, Net(), InputSpec((16, 16), template), dim=8)


def fill_the_disk(monkeypatch):
    """From here on no picture becomes a whole file."""
    plain = Image.Image.save

    def cut_short(image, file, *args, **options):
        if isinstance(file, io.BytesIO):  # as degradations compress
            return plain(image, file, *args, **options)
        file.write_bytes(b"the beginning alone")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", cut_short)


def older_sheet_is_left(sheet, show, monkeypatch):
    """Shows twice, the second time on a full disk."""
    show()
    before = sheet.read_bytes()
    fill_the_disk(monkeypatch)
    with pytest.raises(OSError) as caught:
        show()
    assert caught.value.filename == str(sheet) and sheet.read_bytes() == before
