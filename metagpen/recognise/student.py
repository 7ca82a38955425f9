"""The embedded recogniser: a small network of inverted bottlenecks with a global depthwise head.

The blocks are those of MobileFaceNet (Chen et al. 2018): expand, depthwise, project, linear where the width
narrows; and a global depthwise convolution in place of average pooling, so that every place of the face has
weights of its own. The plan is ours and made for CPUs, where moving large maps costs more than arithmetic:
4 x 4 pixels become 48 channels before the first convolution, and leaky ReLU replaces PReLU, whose backward
pass costs as much as all convolutions together. Its maps have the sizes of its teacher's at 1/4, 1/8 and 1/16,
so that each stage can learn from the teacher's map there.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from .recogniser import InputSpec, Recogniser

ARCHITECTURE = "metagpen-mobileface-3"
SIZE = 128  # input side in pixels
DIM = 256
PATCH = 4  # pixels that become channels, along one side
# The student's template: fractions of its input (eyes, nose, mouth corners), a tight view of the face.
TEMPLATE = ((0.316, 0.462), (0.683, 0.462), (0.5, 0.640), (0.350, 0.825), (0.654, 0.825))


class DepthwiseConv(nn.Conv2d):
    """3 x 3 depthwise convolution. A stride is taken by leaving pixels out, which is the same and, backward on
    CPU, ten times faster than the strided kernel."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.step = stride

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x[:, :, ::self.step, ::self.step] if self.step > 1 else x


class Bottleneck(nn.Module):
    """Expand to twice the output, depthwise, project; the input is added where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        width = 2 * outputs
        self.residual = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.1),
            DepthwiseConv(width, stride), nn.BatchNorm2d(width), nn.LeakyReLU(0.1),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def stage(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    """One halving of the resolution, then `depth` residual bottlenecks."""
    return nn.Sequential(Bottleneck(inputs, outputs, stride=2), *(Bottleneck(outputs, outputs) for _ in range(depth)))


class StudentNet(nn.Module):
    """[B, 3, size, size] in [-1, 1] -> [B, dim] (not normalised).

    widths: channels at 1/4, 1/8, 1/16 of the input. depths: residual bottlenecks there. top: channels of the
    last map.
    """

    def __init__(self, size: int = SIZE, dim: int = DIM, widths: tuple[int, ...] = (64, 128, 128),
                 depths: tuple[int, ...] = (2, 4, 4), top: int = 512) -> None:
        super().__init__()
        self.size, self.widths = size, widths
        self.stem = nn.Sequential(nn.PixelUnshuffle(PATCH),
                                  nn.Conv2d(3 * PATCH ** 2, widths[0], 3, padding=1, bias=False),
                                  nn.BatchNorm2d(widths[0]), nn.LeakyReLU(0.1))
        first = nn.Sequential(*(Bottleneck(widths[0], widths[0]) for _ in range(depths[0])))
        self.stages = nn.ModuleList([first, *(stage(a, b, n) for a, b, n in zip(widths, widths[1:], depths[1:]))])
        last = size // PATCH // 2 ** (len(widths) - 1)
        self.top = nn.Sequential(nn.Conv2d(widths[-1], top, 1, bias=False), nn.BatchNorm2d(top), nn.LeakyReLU(0.1))
        self.place = nn.Parameter(torch.randn(top, last, last) / last)  # global depthwise convolution
        self.place_norm = nn.BatchNorm1d(top)
        self.project = nn.Linear(top, dim, bias=False)
        self.project_norm = nn.BatchNorm1d(dim)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The map after each stage, shallow to deep."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        maps = []
        for block in self.stages:
            x = block(x)
            maps.append(x)
        return maps

    def head(self, last: Tensor) -> Tensor:
        """The embedding from the last stage's map."""
        pooled = (self.top(last) * self.place).sum((2, 3))
        return self.project_norm(self.project(self.place_norm(pooled)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.maps(x)[-1])

    def apart(self, x: Tensor, wanted: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """`perceive` with every stage, and the head, fed with the map `wanted` at its entrance."""
        entrances = [self.stem(x.contiguous(memory_format=torch.channels_last)), *wanted[:-1]]
        return [stage(entrance) for stage, entrance in zip(self.stages, entrances)], self.head(wanted[-1])

    def features(self, x: Tensor) -> list[Tensor]:
        """Same as `maps`."""
        return self.maps(x)

    def perceive(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """`features` and the output from one pass."""
        maps = self.maps(x)
        return maps, self.head(maps[-1])


def fuse(module: nn.Module) -> nn.Module:
    """Folds every batch norm that follows a convolution into it (eval mode only); returns the module."""
    for child in module.modules():
        if isinstance(child, nn.Sequential):
            for index in range(len(child) - 1):
                if isinstance(child[index], nn.Conv2d) and isinstance(child[index + 1], nn.BatchNorm2d):
                    child[index] = fuse_conv_bn_eval(child[index], child[index + 1])
                    child[index + 1] = nn.Identity()
    return module


def recogniser(state: dict[str, Tensor], metadata: dict[str, str]) -> Recogniser:
    """The recogniser that a file of this architecture holds; sizes are read off the tensors."""
    stages = len({name.split(".")[1] for name in state if name.startswith("stages.")})
    blocks = [len({name.split(".")[2] for name in state if name.startswith(f"stages.{i}.")}) for i in range(stages)]
    widths = tuple(len(state[f"stages.{i}.0.body.6.weight"]) for i in range(stages))
    depths = (blocks[0], *(count - 1 for count in blocks[1:]))
    top, last, _ = state["place"].shape
    size, dim = last * PATCH * 2 ** (stages - 1), len(state["project.weight"])
    net = StudentNet(size, dim, widths, depths, top)
    counters = {name: value for name, value in net.state_dict().items() if not value.is_floating_point()}
    net.load_state_dict(counters | state)
    template = tuple((x * size, y * size) for x, y in json.loads(metadata["template"]))
    return Recogniser(metadata["name"], fuse(net.eval()), InputSpec((size, size), template), dim)
