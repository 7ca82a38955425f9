"""InsightFace's "iresnet" backbones of ArcFace (Deng et al. 2019): residual blocks that begin with batch norm.

Parameter names are those of InsightFace's PyTorch checkpoints; depth and widths are read off the tensors.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

# Blocks in each of the four stages.
DEPTHS = {"iresnet18": (2, 2, 2, 2), "iresnet34": (3, 4, 6, 3), "iresnet50": (3, 4, 14, 3),
          "iresnet100": (3, 13, 30, 3), "iresnet200": (6, 26, 60, 6)}


class Block(nn.Module):
    """Batch norm, 3x3, batch norm, PReLU, 3x3 with the stride, batch norm; plus the input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.bn1(x))
        out = self.bn3(self.conv2(self.prelu(self.bn2(out))))
        return out + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """[B, 3, 112, 112] -> [B, dim]."""

    def __init__(self, depths: tuple[int, ...] = (2, 2, 2, 2), widths: tuple[int, ...] = (64, 128, 256, 512),
                 dim: int = 512, last: int = 7) -> None:
        super().__init__()
        self.dim, self.size = dim, (16 * last, 16 * last)
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.prelu = nn.PReLU(widths[0])
        inputs = widths[0]
        for index, (depth, width) in enumerate(zip(depths, widths), start=1):
            blocks = [Block(inputs, width, 2), *(Block(width, width, 1) for _ in range(depth - 1))]
            setattr(self, f"layer{index}", nn.Sequential(*blocks))
            inputs = width
        self.bn2 = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs * last * last, dim)
        self.features_norm = nn.BatchNorm1d(dim)

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> IResNet:
        """The network that a checkpoint describes, filled with it."""
        depths = [len({name.split(".")[1] for name in state if name.startswith(f"layer{index}.")})
                  for index in range(1, 5)]
        widths = [len(state[f"layer{index}.0.conv1.weight"]) for index in range(1, 5)]
        dim, flat = state["fc.weight"].shape
        net = cls(tuple(depths), tuple(widths), dim, last=math.isqrt(flat // widths[-1]))
        # `features` is the name of the last batch norm in the checkpoints; here it is a method.
        net.load_state_dict({name.replace("features.", "features_norm.", 1) if name.startswith("features.") else name:
                             tensor for name, tensor in state.items()})
        return net

    @property
    def plan(self) -> str:
        """Its name by the number of blocks, such as "iresnet50"."""
        depths = tuple(len(getattr(self, f"layer{index}")) for index in range(1, 5))
        return next((name for name, known in DEPTHS.items() if known == depths), "iresnet" + "-".join(map(str, depths)))

    def forward(self, x: Tensor) -> Tensor:
        return self.perceive(x)[1]

    def features(self, x: Tensor) -> list[Tensor]:
        """The map after each stage, shallow to deep."""
        return self.perceive(x)[0]

    def perceive(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """`features` and the output from one pass."""
        x = self.prelu(self.bn1(self.conv1(x)))
        maps = []
        for index in range(1, 5):
            x = getattr(self, f"layer{index}")(x)
            maps.append(x)
        return maps, self.features_norm(self.fc(self.bn2(x).flatten(1)))
