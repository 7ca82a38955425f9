"""Reading checkpoints: ours (safetensors with a card) and every published GPEN layout."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..devices import pick_device
from ..errors import CheckpointError
from ..gpen import GPEN
from ..model import FAMILY, MetaGPEN
from ..tensors import differences, packaged, read_tensors, shapes, some, unpickled_tensors
from .catalogue import CATALOGUE, fetch, unknown_name

EMBEDDED = "embedded_128.safetensors"
WRAPPERS = ("g_ema", "params_ema", "params", "g", "state_dict")  # what training scripts wrap a generator in; in order


@torch.inference_mode(False)  # a model that was loaded there can learn people elsewhere
def load(source: str | Path = "embedded", device: str | torch.device = "cpu") -> MetaGPEN:
    """A restorer, frozen and ready to adapt.

    source: "embedded" (in the package, no download), a catalogue name such as "gpen-bfr-512" (downloaded once), or a
    file: a metagpen model, or a GPEN generator as .pth or .safetensors, plain or wrapped as g_ema / g; its size,
    channel multiplier and narrow are read off the tensors. Raises CheckpointError when it is none of these, saying
    which keys are missing or unexpected. device: auto, cpu, cuda, ...; DataError for one that is not there.
    """
    device = pick_device(str(device))
    if str(source) == "embedded":
        with packaged(EMBEDDED, ", or name a model file") as path:
            return MetaGPEN.from_file(path).frozen().to(device)
    if str(source) in CATALOGUE:
        source = fetch(str(source))
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(f"'{source}' is neither a file nor a known model; {unknown_name(str(source))}")
    if is_metagpen(path):
        return MetaGPEN.from_file(path).frozen().to(device)
    return MetaGPEN(gpen_from_state(read_state(path), path), card={"source": path.name}).frozen().to(device)


def is_metagpen(path: Path) -> bool:
    """Whether a file is what `MetaGPEN.save` of some version writes."""
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format", "").startswith(FAMILY)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The generator's tensors in a .pth or .safetensors file, unwrapped; nothing in it is executed.

    Raises CheckpointError for a damaged file, or one that holds more than tensors.
    """
    path = Path(path)
    state = read_tensors(path)[0] if path.suffix == ".safetensors" else unpickled_tensors(path, WRAPPERS)
    if "latent.offset" in state:
        raise CheckpointError(f"{path}: a Person file, what one person adds to a model; restore with --person, or "
                              "Person.load(file, model)")
    return {key.removeprefix("module."): value for key, value in state.items()}


@torch.random.fork_rng(devices=[])  # what the state fills, the caller's dice need not
def gpen_from_state(state: dict[str, Tensor], path: str | Path = "checkpoint") -> GPEN:
    """A GPEN whose shape is read off its tensors. Raises CheckpointError naming missing and unexpected keys."""
    try:
        arguments = infer_arguments(state, path)
    except (IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: not a GPEN generator: tensors of its names, but not of its shapes") from error
    try:
        with torch.device("meta"):
            gpen = GPEN(**arguments)
    except (ValueError, ZeroDivisionError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: no GPEN can have {arguments}, which its tensors say") from error
    if problems := differences(state, shapes(gpen.state_dict())):
        raise CheckpointError(f"{path}: looks like a GPEN with {arguments}, but has {problems}")
    gpen = GPEN(**arguments)
    gpen.load_state_dict({key: value.float() for key, value in state.items()})
    return gpen


def infer_arguments(state: dict[str, Tensor], path: str | Path) -> dict:
    """size, channel_multiplier, narrow, style_dim, n_mlp and concat of a generator's state dict."""
    needed = ("generator.input.input", "generator.conv1.activate.bias", "ecd0.0.0.weight", "generator.style.1.weight")
    absent = [key for key in needed if key not in state]
    if absent:
        raise CheckpointError(f"{path}: not a GPEN generator: missing keys: {some(absent)}; it has "
                              f"{some(sorted(state))}")
    size = 4 << sum(key.startswith("generator.to_rgbs.") and key.endswith(".bias") and "modulation" not in key
                    for key in state)
    width = state["generator.input.input"].shape[1]
    narrow = width / 512
    top = state["ecd0.0.0.weight"].shape[0]
    multiplier = top * size / (16384 * narrow) if size > 32 else 2
    return {"size": size, "channel_multiplier": int(multiplier) if multiplier == int(multiplier) else multiplier,
            "narrow": narrow, "style_dim": state["generator.style.1.weight"].shape[0],
            "n_mlp": sum(key.startswith("generator.style.") and key.endswith(".weight") for key in state),
            "concat": state["generator.conv1.activate.bias"].shape[0] == 2 * width}


