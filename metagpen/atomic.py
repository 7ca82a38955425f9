"""Files that appear whole or not at all: whatever fails while one is written, what was there before stays."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from uuid import uuid4

from safetensors import SafetensorError

from .errors import DataError


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; what lies there at the end takes the place of `path`.

    Folders are made. Raises OSError naming `path` when it cannot be written, also where a writer has words of its own
    for that: torch and safetensors report a full disk as other errors, and PIL without the file's name. Raises
    DataError where the name of some file, which is no text, would have to be written as text.
    """
    path = Path(path)
    _no_device(path)
    temporary = path.with_name(f"{path.name[:40]}.{uuid4().hex[:12]}.part")  # not longer than names may be
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except (RuntimeError, SafetensorError) as error:
        raise OSError(errno.EIO, f"cannot be written ({str(error).splitlines()[0]})", str(path)) from error
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: cannot be written: {error.object[:200]!r} holds a name that is no text; rename that "
                        "file or folder") from None
    except OSError as error:
        at = str(path.parent) if error.filename == str(path.parent) else str(path)
        raise OSError(error.errno, error.strerror or str(error), at) from error
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:  # a folder that is none, or may not be entered: nothing was written there
            pass


def check_writable(path: str | Path, read: Iterable[str | Path | None] = ()) -> None:
    """Before any work: raises OSError, naming what is in the way, where `whole_file` could not put a file, DataError
    where it would take the place of one that is read. What is no file among `read`, such as the name of a model, is
    passed over. Leaves nothing behind."""
    path = Path(path)
    _no_device(path)
    if path.is_file():
        for other in read:
            if other is not None and Path(other).is_file() and path.samefile(other):
                raise DataError(f"{path}: the output would replace {other}, which is read; give another name")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def _no_device(path: Path) -> None:
    if path.exists() and not path.is_file() and not path.is_dir():  # renaming would do away with /dev/null
        raise OSError(errno.EINVAL, "a device or a pipe; give the name of a file", str(path))


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all: to a temporary neighbour, then rename."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def forget_later_steps(path: Path, step: int) -> None:
    """Leaves out what a log of JSON Lines says from `step` on: a killed run was further than what it saved."""
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] < step:
                kept.append(line.decode("utf-8"))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number}: damaged ({error}); delete the line") from None
    write_text(path, "".join(kept))
