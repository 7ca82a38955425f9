"""Networks of the Open Model Zoo, read from OpenVINO's IR (an XML graph and a file of constants) into torch.

Only the operations that convolutional recognisers use are known; anything else is named in the error.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError

DTYPES = {"f32": np.float32, "f16": np.float16}
SIMPLE = {"Add": torch.add, "Multiply": torch.mul, "Sigmoid": torch.sigmoid, "ReLU": F.relu}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


class Node:
    """One layer of the graph: its operation and attributes, what feeds it, and its value if that is constant."""

    def __init__(self, layer: ElementTree.Element) -> None:
        data, port = layer.find("data"), layer.find("output/port")
        self.id, self.name, self.kind = layer.get("id"), layer.get("name"), layer.get("type")
        self.attributes = {} if data is None else dict(data.attrib)
        self.shape = () if port is None else tuple(int(dim.text) for dim in port.iter("dim"))
        self.inputs: list[Node] = []
        self.readers = 0
        self.value: Tensor | None = None


def read_graph(path: Path) -> list[Node]:
    """The nodes, each after everything that feeds it."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise CheckpointError(f"{path}: not readable as XML ({error}); expected an OpenVINO IR") from error
    if root.tag != "net" or root.find("layers") is None or root.find("edges") is None:
        raise CheckpointError(f"{path}: this XML is not an OpenVINO IR (no <net> with <layers> and <edges>)")
    nodes = {layer.get("id"): Node(layer) for layer in root.find("layers")}
    for edge in sorted(root.find("edges"), key=lambda edge: int(edge.get("to-port"))):
        try:
            source, reader = nodes[edge.get("from-layer")], nodes[edge.get("to-layer")]
        except KeyError as error:
            raise CheckpointError(f"{path}: an edge touches the layer {error}, which is not there") from error
        reader.inputs.append(source)
        source.readers += 1
    return in_order(list(nodes.values()), path)


def in_order(nodes: list[Node], path: Path) -> list[Node]:
    done: dict[str, Node] = {}
    while len(done) < len(nodes):
        ready = [node for node in nodes if node.id not in done and all(source.id in done for source in node.inputs)]
        if not ready:
            raise CheckpointError(f"{path}: the graph has a cycle")
        done.update((node.id, node) for node in ready)
    return list(done.values())


def read_constants(nodes: list[Node], path: Path) -> None:
    """Give constants their values, float32; a `Convert` (f16 -> f32) of a constant counts as that constant."""
    binary = path.with_suffix(".bin")
    if not binary.is_file():
        raise CheckpointError(f"{binary}: the constants of {path.name} are missing; put both in one folder")
    blob = binary.read_bytes()
    for node in nodes:
        if node.kind == "Convert":
            node.value = node.inputs[0].value
        if node.kind != "Const":
            continue
        kind = node.attributes["element_type"]
        start, size = int(node.attributes["offset"]), int(node.attributes["size"])
        if kind not in DTYPES:
            raise CheckpointError(f"{path}: constant {node.name} has type {kind}, not f16 or f32")
        if start + size > len(blob):
            raise CheckpointError(f"{binary}: cut short ({len(blob)} bytes, {node.name} ends at {start + size}); "
                                  "download it again")
        values = np.frombuffer(blob[start:start + size], DTYPES[kind]).astype(np.float32)
        node.value = torch.from_numpy(values).reshape(numbers(node.attributes["shape"]))


class Convolution(nn.Module):
    """Convolution, grouped or not; `bias` is set by the sum that follows it, if any."""

    def __init__(self, node: Node, path: Path) -> None:
        super().__init__()
        weight, self.groups = node.inputs[1].value, 1
        if weight is None:
            raise CheckpointError(f"{path}: the weights of convolution {node.name} are not constant")
        if node.kind == "GroupConvolution":  # IR keeps [groups, out, in, k, k]
            self.groups, weight = len(weight), weight.flatten(0, 1)
        begin, end = numbers(node.attributes["pads_begin"]), numbers(node.attributes["pads_end"])
        if begin != end or node.attributes.get("auto_pad", "explicit") != "explicit":
            raise CheckpointError(f"{path}: convolution {node.name} pads unevenly, which is not supported")
        self.padding = begin
        self.stride = numbers(node.attributes["strides"])
        self.dilation = numbers(node.attributes["dilations"])
        self.weight = nn.Parameter(weight)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (2, 2) and self.groups == len(self.weight) and x.requires_grad:
            # The backward pass of a strided depthwise convolution is ten times slower on CPU than this detour.
            full = F.conv2d(x, self.weight, self.bias, 1, self.padding, self.dilation, self.groups)
            return full[:, :, ::2, ::2]
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class IRNetwork(nn.Module):
    """A feed-forward IR graph as a torch module.

    input_shape: [1, C, H, W] of the graph; dim: channels of its output. taps: names of the last map at each
    resolution, expanded and activated; trunk: of the last sum of residual blocks at each resolution.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        path = Path(path)
        nodes = read_graph(path)
        read_constants(nodes, path)
        self.layers = nn.ModuleDict()
        self.values = nn.ParameterDict()  # constants of element-wise operations
        self.steps: list[tuple[str, Callable, list[str]]] = []  # (output, operation, inputs)
        self.taps: list[str] = []
        sums: dict[int, str] = {}
        alias: dict[str, str] = {}  # a sum that became a bias stands for its convolution
        for node in nodes:
            inputs = [alias.get(source.id, source.id) for source in node.inputs]
            if node.value is not None:
                continue
            if node.kind == "Parameter":
                self.input, self.input_shape = node.id, node.shape
            elif node.kind == "Result":
                self.output, self.dim = inputs[0], node.inputs[0].shape[1]
            elif self._is_bias(node):
                self.layers[inputs[0]].bias = nn.Parameter(node.inputs[1].value.flatten())
                alias[node.id] = inputs[0]
            else:
                if self._shrinks(node):
                    self.taps.append(inputs[0])
                if node.kind == "Add" and all(source.value is None for source in node.inputs):
                    sums[node.shape[-1]] = node.id
                operation, count = self._operation(node, path)
                self.steps.append((node.id, operation, inputs[:count]))
        self.trunk = list(sums.values())

    def _is_bias(self, node: Node) -> bool:
        """Whether a node adds a constant to a convolution that nothing else reads."""
        return (node.kind == "Add" and node.inputs[1].value is not None and node.inputs[0].id in self.layers
                and node.inputs[0].readers == 1)

    def _shrinks(self, node: Node) -> bool:
        """Whether a node is a convolution, other than the first, that lowers the resolution."""
        return (node.kind in ("Convolution", "GroupConvolution") and len(self.layers) > 0
                and node.shape[-1] < node.inputs[0].shape[-1])

    def _operation(self, node: Node, path: Path) -> tuple[Callable, int]:
        """What a node does, and how many of its inputs that takes; constants are kept where needed."""
        if node.kind in ("Convolution", "GroupConvolution"):
            self.layers[node.id] = Convolution(node, path)
            return self.layers[node.id], 1
        if node.kind in SIMPLE:
            for source in node.inputs:
                if source.value is not None:
                    self.values[source.id] = nn.Parameter(source.value)
            return SIMPLE[node.kind], len(node.inputs)
        if node.kind == "PReLU" and node.inputs[1].value.numel() == 1:  # one slope for all channels
            return partial(F.leaky_relu, negative_slope=float(node.inputs[1].value)), 1
        if node.kind == "PReLU":
            self.values[node.inputs[1].id] = nn.Parameter(node.inputs[1].value.flatten())
            return F.prelu, 2
        if node.kind == "AvgPool" and node.shape[2:] == (1, 1):
            return partial(torch.mean, dim=(2, 3), keepdim=True), 1
        raise CheckpointError(f"{path}: layer {node.name} has the operation {node.kind}, which this reader does not "
                              "know; use an ONNX file with onnxruntime instead")

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W] -> [B, dim, 1, 1]."""
        return self.run(x, [self.output])[0]

    def features(self, x: Tensor) -> list[Tensor]:
        """The last map at each resolution, shallow to deep."""
        return self.run(x, self.taps)

    def perceive(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """`features` and the output from one pass."""
        *maps, output = self.run(x, [*self.taps, self.output])
        return maps, output

    def run(self, x: Tensor, wanted: list[str]) -> list[Tensor]:
        """The values named in `wanted`, computing no more than they need."""
        known = dict(self.values.items())
        known[self.input] = x.contiguous(memory_format=torch.channels_last)
        missing = set(wanted)
        for output, operation, inputs in self.steps:
            known[output] = operation(*(known[name] for name in inputs))
            missing.discard(output)
            if not missing:
                break
        return [known[name] for name in wanted]
