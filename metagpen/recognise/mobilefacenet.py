"""MobileFaceNet (Chen et al. 2018, "MobileFaceNets: efficient CNNs for accurate real-time face verification").

Parameter names are those of the usual PyTorch checkpoints (conv1, dw_conv1, blocks.N.conv.M, conv2, linear7,
linear1); widths, depth and input size are read off the tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm, and PReLU unless `linear`."""

    def __init__(self, weight: torch.Size, stride: int = 1, padding: int = 0, groups: int = 1,
                 linear: bool = False) -> None:
        super().__init__()
        outputs, inputs, *kernel = weight
        self.conv = nn.Conv2d(inputs * groups, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.prelu = nn.Identity() if linear else nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Expand, depthwise, project; the input is added where the shapes agree."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.connect = stride == 1 and inputs == outputs
        self.stride = stride
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.PReLU(width),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.connect else self.conv(x)


class MobileFaceNet(nn.Module):
    """[B, 3, H, W] -> [B, dim], built with the shapes of a state dict and filled from it."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        shape = {name: tensor.shape for name, tensor in state.items()}
        count = len({name.split(".")[1] for name in shape if name.startswith("blocks.")})
        stem, top = shape["conv1.conv.weight"], shape["linear7.conv.weight"]
        self.conv1 = ConvBlock(stem, stride=2, padding=1)
        self.dw_conv1 = ConvBlock(shape["dw_conv1.conv.weight"], padding=1, groups=stem[0])
        self.blocks = nn.Sequential()
        for index in range(count):
            width, inputs = shape[f"blocks.{index}.conv.0.weight"][:2]
            outputs = shape[f"blocks.{index}.conv.6.weight"][0]
            # The plan has stride 2 in its first block and wherever it expands by 4.
            self.blocks.append(Bottleneck(inputs, width, outputs, 2 if index == 0 or width == 4 * inputs else 1))
        self.conv2 = ConvBlock(shape["conv2.conv.weight"])
        self.linear7 = ConvBlock(top, groups=top[0], linear=True)
        self.linear1 = ConvBlock(shape["linear1.conv.weight"], linear=True)
        self.load_state_dict(state)
        self.dim = len(state["linear1.conv.weight"])
        self.size = (16 * top[2], 16 * top[3])  # four halvings before the global depthwise convolution

    def forward(self, x: Tensor) -> Tensor:
        return self.perceive(x)[1]

    def features(self, x: Tensor) -> list[Tensor]:
        """The last map at each resolution, shallow to deep."""
        return self.perceive(x)[0]

    def perceive(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """`features` and the output from one pass."""
        x = self.dw_conv1(self.conv1(x))
        maps = []
        for block in self.blocks:
            if block.stride == 2:
                maps.append(x)
            x = block(x)
        maps.append(x)
        return maps, self.linear1(self.linear7(self.conv2(x))).flatten(1)
