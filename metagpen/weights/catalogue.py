"""Models that can be downloaded by name: the weights that GPEN's authors published."""

from __future__ import annotations

import difflib
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ..errors import CheckpointError

ADDRESS = "https://public-vigen-video.oss-cn-shanghai.aliyuncs.com/robin/models/"


@dataclass(frozen=True)
class Published:
    """A published generator. `megabytes` as measured on the original file; the file is checked against its first
    download, since its authors publish no checksum."""

    name: str
    file: str
    what: str
    megabytes: float


CATALOGUE = {entry.name: entry for entry in (
    Published("gpen-bfr-512", "GPEN-BFR-512.pth", "GPEN blind face restoration, 512 px, 71 M parameters", 284),
    Published("gpen-bfr-256", "GPEN-BFR-256.pth", "GPEN blind face restoration, 256 px, 19 M parameters", 75.5),
)}


def available() -> list[tuple[str, str, str, str]]:
    """(name, what, size, where) of the embedded model and of every entry that can be downloaded."""
    rows = [("embedded", "meta-GPEN, 128 px, with identity-conditioned start", "20 MB", "in the package")]
    for entry in CATALOGUE.values():
        path = cache_folder() / entry.file
        where = str(path) if path.is_file() else "downloaded when first used"
        rows.append((entry.name, entry.what, f"{entry.megabytes:g} MB", where))
    return rows


def cache_folder() -> Path:
    """$METAGPEN_CACHE, or metagpen/ under the user's cache folder."""
    root = os.environ.get("METAGPEN_CACHE")
    if root:
        return Path(root).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "metagpen"
    except RuntimeError:
        raise CheckpointError("there is no home folder to keep downloads in; set METAGPEN_CACHE to a folder") from None


def unknown_name(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), CATALOGUE, 1, 0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known models: embedded, {', '.join(CATALOGUE)}"


def fetch(name: str, timeout: float = 30.0) -> Path:
    """The cached file of a catalogue entry, downloaded if it is not there yet.

    The SHA-256 of the first download is kept beside it and checked ever after. Raises CheckpointError offline, for an
    interrupted download (nothing half-written stays), or when the cached file has changed.
    """
    entry = CATALOGUE[name]
    path = cache_folder() / entry.file
    recorded = path.with_name(path.name + ".sha256")
    if path.is_file():
        if recorded.is_file() and sha256(path) != recorded.read_text().strip():
            raise CheckpointError(f"{path}: has changed since it was downloaded; delete it to download it again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        download(ADDRESS + entry.file, temporary, timeout)
        if abs(temporary.stat().st_size / 1e6 - entry.megabytes) > 0.05 * entry.megabytes:
            raise CheckpointError(f"{name}: the download has {temporary.stat().st_size / 1e6:.1f} MB instead of "
                                  f"{entry.megabytes:g} MB; try again later, or fetch {entry.file} by hand")
        recorded.write_text(sha256(temporary) + "\n")  # first: a file that is there is always checked
        temporary.replace(path)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise CheckpointError(f"{name} could not be downloaded ({getattr(error, 'reason', error)}); without a network, "
                              f"put {entry.file} into {path.parent} or give its path") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def download(address: str, path: Path, timeout: float) -> None:
    columns = (TextColumn("downloading {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
               TimeRemainingColumn())
    with urllib.request.urlopen(address, timeout=timeout) as response, Progress(*columns) as progress:
        expected = int(response.headers.get("Content-Length", 0))
        task = progress.add_task(Path(address).name, total=expected or None)
        with open(path, "wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                progress.update(task, advance=len(chunk))
            if expected and file.tell() != expected:  # a connection that closes early is no error to urllib
                raise ConnectionError(f"it ended after {file.tell()} of {expected} bytes")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
