"""Writing tensors to disk so that a crash leaves either the old file or the new one, never half of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load, save, save_file
from torch import Tensor


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file at `path`: written under a temporary name beside it, then renamed; folders are made.

    Its permissions are those of any new file (safetensors itself writes files that only their owner can read).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        whole = {name: value.contiguous() for name, value in tensors.items()}
        save_file(whole, temporary, metadata=dict(metadata or {}))
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def pack_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of the file that `write_tensors` would write."""
    return save({name: value.contiguous() for name, value in tensors.items()}, metadata=dict(metadata))


def unpack_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of the content of a safetensors file; its errors are of undocumented types."""
    tensors = load(data)
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__", {})
