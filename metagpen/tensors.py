"""Writing tensors to disk so that a crash leaves either the old file or the new one, never half of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from .atomic import whole_file


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file at `path`: written under a temporary name beside it, then renamed; folders are made.

    Its permissions are those of any new file (safetensors itself would write one that only its owner can read).
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(pack_tensors(tensors, metadata or {}))
    return Path(path)


def differences(found: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]) -> str:
    """What keeps tensors from being the wanted ones, given by their shapes: names and shapes; "" if nothing does."""
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    wrong = [f"{key} {tuple(found[key].shape)} instead of {tuple(shape)}"
             for key, shape in wanted.items() if key in found and tuple(found[key].shape) != tuple(shape)]
    kinds = (("missing keys", missing), ("unexpected keys", unexpected), ("other shapes", wrong))
    return "; ".join(f"{name}: {some(keys)}" for name, keys in kinds if keys)


def some(keys: Sequence[str], most: int = 6) -> str:
    """The first of them, and how many more there are."""
    rest = len(keys) - most
    return ", ".join(keys[:most]) + (f" and {rest} more" if rest > 0 else "")


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def pack_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of the file that `write_tensors` would write."""
    return save({name: value.contiguous() for name, value in tensors.items()}, metadata=dict(metadata))


def unpack_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of the content of a safetensors file; its errors are of undocumented types."""
    tensors = load(data)
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__", {})
