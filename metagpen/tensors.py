"""Tensors on disk: reading without executing anything, and writing so that a crash leaves either the old file or the
new one, never half of it."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from .atomic import whole_file
from .errors import CheckpointError


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file at `path`: written under a temporary name beside it, then renamed; folders are made.

    Its permissions are those of any new file (safetensors itself would write one that only its owner can read).
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(pack_tensors(tensors, metadata or {}))
    return Path(path)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file. Raises CheckpointError, and OSError for one that may not be read."""
    open(path, "rb").close()  # which says why, where safetensors says that there is no such file
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except Exception as error:  # safetensors raises its own, undocumented error types
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


@contextmanager
def packaged(name: str, instead: str = "") -> Iterator[Path]:
    """A file of the package's weights, as a path. Raises CheckpointError where the installation lacks it, and says what
    could be done instead."""
    file = files("metagpen") / "weights" / name
    if not file.is_file():
        raise CheckpointError(f"this installation has no {name}; install metagpen from its package{instead}")
    with as_file(file) as path:
        yield path


def unpickled_tensors(path: str | Path, wrappers: Sequence[str]) -> dict[str, Tensor]:
    """The state dict in a torch file, plain or under one of `wrappers`, the first that is there; nothing is executed.

    Raises CheckpointError for a damaged file, or one that holds more than tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise CheckpointError(f"{path}: damaged, or not a PyTorch checkpoint") from error
        raise CheckpointError(f"{path}: holds Python objects beside tensors and is not opened, because they could run "
                              "code; save its state dict alone") from error
    except Exception as error:  # the unpickler stumbles over foreign bytes in many ways: KeyError, EOFError, ...
        raise CheckpointError(f"{path}: damaged, or not a PyTorch checkpoint ({type(error).__name__})") from error
    while isinstance(state, dict) and (inner := [key for key in wrappers if isinstance(state.get(key), dict)]):
        state = state[inner[0]]
    if (not isinstance(state, dict) or not state
            or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())):
        raise CheckpointError(f"{path}: holds no state dict (names and tensors), plain or under {', '.join(wrappers)}; "
                              "save one with torch.save(network.state_dict(), path)")
    return state


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values: the same for the same tensors on any device."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


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
