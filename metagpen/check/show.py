"""A report for people: a table for the terminal, and a contact sheet."""

from __future__ import annotations

from PIL import Image
from rich.table import Table
from rich.text import Text

from ..evaluate.report import contact_sheet
from .album import AlbumReport, PhotoReport, tails
from .measures import VIEW

COLOURS = {"keep": "green", "warn": "dark_orange", "leave out": "red"}
FRAMES = {"keep": (40, 150, 60), "warn": (230, 140, 0), "leave out": (200, 30, 30)}
PER_LINE = 5
WORD = len("unreadable")  # the longest kind of limit
FRAME = 5  # pixels on a view of VIEW


def album_table(report: AlbumReport) -> Table:
    """A line per photo; a star marks the best ones where there are more than serve."""
    best = {id(photo) for photo in report.best()}
    starred = len(best) < len(report.usable) and not report.divided
    table = Table(title=title(report))
    table.add_column("photo", overflow="fold")
    table.add_column("verdict", overflow="fold")
    for name in ("cosine", "px", "sharp", "yaw", "roll", "faces"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("short of", overflow="fold", min_width=WORD)
    for photo, name in zip(report.photos, tails([photo.name for photo in report.photos])):
        star = " *" if starred and id(photo) in best else ""
        numbers = (number(photo.cosine, 2), number(photo.side, 0), number(photo.sharpness, 2), number(photo.yaw, 0),
                   number(photo.roll, 0))
        table.add_row(Text(name + star), Text(photo.verdict, COLOURS[photo.verdict]), *numbers,
                      str(photo.found), ", ".join(limit.kind for limit in photo.limits))
    if starred:
        table.caption = "* the best: without a warning, and together closest to all"
    return table


def title(report: AlbumReport) -> str:
    """Of a divided album nothing serves before it is known whose it is."""
    if report.divided:
        return f"{len(report.photos)} photo(s) of {len(report.people)} different people"
    return f"{len(report.usable)} of {len(report.photos)} photo(s) serve"


def reason_lines(report: AlbumReport) -> list[str]:
    """What each photo falls short of, in words, then the advice for the whole album."""
    return [*photo_lines(report), *report.advice]


def photo_lines(report: AlbumReport) -> list[str]:
    """What each photo falls short of, in words."""
    verbs = {"leave out": "left out", "warn": "warning"}
    return [f"{verbs[photo.verdict]}: {photo.name}: {'; '.join(photo.reasons)}" for photo in report.photos
            if photo.limits]


def album_sheet(report: AlbumReport) -> Image.Image:
    """The aligned faces, framed in green (keep), orange (warn) and red (leave out), with the kinds of their limits."""
    names = tails([photo.name for photo in report.photos])
    tiles = [(label(photo, name), framed(photo)) for photo, name in zip(report.photos, names)]
    return contact_sheet([tiles[i:i + PER_LINE] for i in range(0, len(tiles), PER_LINE)])


def label(photo: PhotoReport, name: str) -> str:
    kinds = ", ".join(limit.kind for limit in photo.limits) or number(photo.cosine, 2)
    text = f"{name}: {kinds}"
    return text if len(text) <= 31 else f"{text[:30]}~"  # as many letters as fit over a tile


def framed(photo: PhotoReport) -> Image.Image:
    tile = Image.new("RGB", (VIEW, VIEW), FRAMES[photo.verdict])
    inner = VIEW - 2 * FRAME
    view = photo.view.resize((inner, inner), Image.Resampling.LANCZOS) if photo.view else Image.new(
        "RGB", (inner, inner), (220, 220, 220))
    tile.paste(view, (FRAME, FRAME))
    return tile


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
