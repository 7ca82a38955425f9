"""ArcFace networks in ONNX files, run by onnxruntime: for scoring only, since no gradient flows through them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError


class OnnxNetwork(nn.Module):
    """[B, 3, H, W] -> [B, dim] by onnxruntime on the CPU, whole batches or, for a fixed batch of one, singly."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigError(f"{path}: ONNX files need onnxruntime: pip install onnxruntime") from error
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no base class of their own
            raise CheckpointError(f"{path}: onnxruntime cannot open it ({str(error).splitlines()[0]})") from error
        self.path = path
        entry, = self.session.get_inputs() if len(self.session.get_inputs()) == 1 else (None,)
        if entry is None or len(entry.shape) != 4 or entry.shape[1] != 3:
            shapes = [item.shape for item in self.session.get_inputs()]
            raise CheckpointError(f"{path}: expected one input [N, 3, H, W], found {shapes}")
        self.input = entry.name
        height, width = (side if isinstance(side, int) else 112 for side in entry.shape[2:])
        self.size = (height, width)
        self.single = entry.shape[0] == 1
        content = Path(path).read_bytes()
        self.digest = hashlib.sha256(content).hexdigest()
        self.normalises = {"Sub", "Mul"} <= set(first_operations(content, 8))
        try:
            self.dim = self._run(np.zeros((1, 3, height, width), np.float32)).shape[1]
        except Exception as error:
            raise CheckpointError(f"{path}: does not take float32 faces [1, 3, {height}, {width}] "
                                  f"({str(error).splitlines()[0]})") from error

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        out = self.session.run(None, {self.input: pixels})[0]
        return out.reshape(len(out), -1)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise self._only_scores()
        pixels = x.detach().float().cpu().numpy()
        parts = [self._run(part) for part in np.split(pixels, len(pixels))] if self.single else [self._run(pixels)]
        return torch.from_numpy(np.concatenate(parts)).to(x.device)

    def __deepcopy__(self, memo: dict[int, object]) -> OnnxNetwork:
        return self  # a session cannot be copied, and never changes

    def _only_scores(self) -> ConfigError:
        return ConfigError(f"{self.path}: an ONNX recogniser only scores; no gradient flows through it and it shows no "
                           "feature maps. Use a native one (\"embedded\", .pth, .ckpt, .xml) in a loss")

    def perceive(self, x: Tensor) -> NoReturn:
        raise self._only_scores()

    features = perceive


# A protocol buffer is a row of (field number, wire type) keys with their values. To see the first operations of
# a network one needs three field numbers of ONNX: ModelProto.graph = 7, GraphProto.node = 1, NodeProto.op_type = 4.
GRAPH, NODE, OP_TYPE = 7, 1, 4


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """The number at `at`, seven bits a byte, and the place after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def messages(data: memoryview, wanted: int):
    """The contents of every length-delimited field `wanted`, in order."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 2:
            length, at = varint(data, at)
            if number == wanted:
                yield data[at:at + length]
            at += length
        elif wire == 0:
            _, at = varint(data, at)
        else:
            at += {1: 8, 5: 4}[wire]


def first_operations(model: bytes, count: int) -> list[str]:
    """Names of the first `count` operations of an ONNX file.

    InsightFace's older exports begin with Sub and Mul: they bring the pixels 0..255 into range themselves.
    """
    names = []
    for graph in messages(memoryview(model), GRAPH):
        for node in messages(graph, NODE):
            names += [bytes(name).decode() for name in messages(node, OP_TYPE)]
            if len(names) >= count:
                return names
    return names
