"""ResNet-20, -32, -44 and -56 for 32 x 32 images.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 (CIFAR-10, shortcut
option A). Parameter names follow akamaster/pytorch_resnet_cifar10, whose weights load as they are.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from edge_adapt.errors import ConfigError
from exporters.zoo.layers import global_average


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a parameter-free shortcut, [N, C, H, W] -> [N, D, H/s, W/s]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: every `stride`-th pixel, and the new channels are zeros, half of them on either side."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, D, H/s, W/s], after the ReLU."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A CIFAR ResNet of 6n + 2 layers: stages of 16, 32 and 64 channels at 32, 16 and 8 pixels.

    Args:
        depth: number of weighted layers, 6n + 2 (20, 32, 44, 56, ...).
        classes: number of classes K.
    """

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ConfigError(f"depth is {depth}, not 6n + 2", remedy="20, 32, 44 or 56, as in the paper")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 32, 32] -> logits [N, K]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(global_average(x))
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` basic blocks; the first one changes the channels and the resolution."""
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))
