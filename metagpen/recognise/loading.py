"""From a name or a file to a recogniser: which network a file holds is read off its contents."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..tensors import packaged, read_tensors, unpickled_tensors
from . import align
from .recogniser import InputSpec, Recogniser

EMBEDDED = "embedded"
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".xml", ".onnx")
WRAPPERS = ("state_dict", "net_state_dict", "model_state_dict", "model", "net", "backbone")


@torch.inference_mode(False)  # one that was loaded there can be in a loss elsewhere
def load(name: str | Path = EMBEDDED, device: str | torch.device = "cpu") -> Recogniser:
    """A frozen recogniser on `device`.

    name: "embedded" (the one in the package), or a file: MobileFaceNet or InsightFace iresnet as .pth, .pt, .ckpt
    or .safetensors; an OpenVINO IR as .xml with its .bin beside it, taken to be face-reidentification-retail-0095
    or of its kind; any ArcFace network as .onnx (scoring only, needs onnxruntime).
    Raises CheckpointError for a file that is missing, damaged or of another kind.
    """
    if str(name) == EMBEDDED:
        with packaged("embedded_recogniser.safetensors", ", or name a recogniser file") as path:
            return from_file(path).to(device)
    path = Path(name)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such recogniser file; give \"{EMBEDDED}\" or a {', '.join(SUFFIXES)} file")
    return from_file(path).to(device)


@torch.random.fork_rng(devices=[])  # what the file fills, the caller's dice need not
def from_file(path: Path) -> Recogniser:
    kind = path.suffix.lower()
    if kind == ".xml":
        try:
            return openvino(path)
        except CheckpointError:
            raise
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path}: looks like an OpenVINO IR but does not hold together ({error})") from error
    if kind == ".onnx":
        return onnx(path)
    if kind == ".safetensors":
        return from_state(*read_tensors(path), path)
    if kind in SUFFIXES:
        return from_state(unpickled_tensors(path, WRAPPERS), {}, path)
    raise CheckpointError(f"{path}: cannot tell a recogniser by \"{path.suffix}\"; known are {', '.join(SUFFIXES)}")


def openvino(path: Path) -> Recogniser:
    from .openvino_ir import IRNetwork

    net = IRNetwork(path)
    height, width = net.input_shape[2:]
    template = tuple((x * width, y * height) for x, y in align.RETAIL)
    spec = InputSpec((height, width), template, pixel_scale=127.5, pixel_shift=127.5, bgr=True)
    return Recogniser(path.name.split(".")[0], net, spec, net.dim)


def onnx(path: Path) -> Recogniser:
    from .onnx import OnnxNetwork

    net = OnnxNetwork(path)
    pixels = (127.5, 127.5) if net.normalises else (1.0, 0.0)
    return Recogniser(path.stem, net, InputSpec(net.size, align.arcface(net.size), *pixels), net.dim)


def from_state(state: dict[str, Tensor], metadata: dict[str, str], path: Path) -> Recogniser:
    """The recogniser that a state dict holds. Raises CheckpointError when it is none that is known."""
    from .iresnet import IResNet
    from .mobilefacenet import MobileFaceNet
    from .student import ARCHITECTURE, recogniser

    state = {name.removeprefix("module."): value.float() if value.is_floating_point() else value
             for name, value in state.items()}
    try:
        if metadata.get("architecture") == ARCHITECTURE:
            return recogniser(state, metadata)
        if "linear7.conv.weight" in state:
            net = MobileFaceNet(state)
            pixels = 127.5 / 128  # (x - 127.5) / 128 for x in 0..255
            return Recogniser(path.stem, net, InputSpec(net.size, align.arcface(net.size), pixels), net.dim)
        if "layer1.0.conv1.weight" in state and "fc.weight" in state and "features.weight" in state:
            net = IResNet.from_state(state)
            return Recogniser(path.stem, net, InputSpec(net.size, align.arcface(net.size)), net.dim)
    except (RuntimeError, LookupError, ValueError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: looks like a known network but does not fit it: {error}") from error
    first = ", ".join(list(state)[:4])
    raise CheckpointError(f"{path}: holds none of the known recognisers (the embedded one, MobileFaceNet, "
                          f"InsightFace iresnet); its first tensors are {first}")
