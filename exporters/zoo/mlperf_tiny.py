"""Two reference models of the MLPerf Tiny benchmark: ResNet-8 for CIFAR-10 and DS-CNN for keyword spotting.

Source: Banbury et al., "MLPerf Tiny Benchmark", NeurIPS Datasets and Benchmarks 2021; the DS-CNN is that of
Zhang et al., "Hello Edge: Keyword Spotting on Microcontrollers", 2017. Both were trained in Keras: "same"
padding, a bias in every convolution, BatchNorm with eps 1e-3 and momentum 0.99 (0.01 as torch counts it).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from exporters.zoo.layers import Pair, SameConv2d, global_average, init_convs


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Stem(nn.Module):
    """Convolution 3x3, BatchNorm, ReLU: [N, 3, H, W] -> [N, D, H, W]."""

    def __init__(self, out_channels: int, in_size: Pair) -> None:
        super().__init__()
        self.conv = SameConv2d(3, out_channels, 3, in_size=in_size, bias=True)
        self.bn = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, D, H, W]."""
        return F.relu(self.bn(self.conv(x)))


class Stack(nn.Module):
    """One residual block, [N, C, H, W] -> [N, D, H/s, W/s].

    Where the stride is not 1 the shortcut is a 1x1 convolution without BatchNorm.
    """

    def __init__(self, in_channels: int, out_channels: int, in_size: Pair, stride: int) -> None:
        super().__init__()
        self.conv1 = SameConv2d(in_channels, out_channels, 3, in_size=in_size, stride=stride, bias=True)
        self.bn1 = _norm(out_channels)
        self.conv2 = SameConv2d(out_channels, out_channels, 3, in_size=self.conv1.out_size, bias=True)
        self.bn2 = _norm(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = SameConv2d(
                in_channels, out_channels, 1, in_size=in_size, stride=stride, bias=True
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, D, H/s, W/s], after the ReLU."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet8(nn.Module):
    """The image classification reference: a stem and three residual blocks of 16, 32 and 64 channels."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = Stem(16, (32, 32))
        self.stack1 = Stack(16, 16, (32, 32), stride=1)
        self.stack2 = Stack(16, 32, (32, 32), stride=2)
        self.stack3 = Stack(32, 64, (16, 16), stride=2)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """RGB [N, 3, 32, 32] as raw floats 0..255, not normalised -> logits [N, K]."""
        x = self.stack3(self.stack2(self.stack1(self.stem(x))))
        logits: Tensor = self.fc(global_average(x))
        return logits


class SeparableBlock(nn.Module):
    """Depthwise 3x3 and pointwise convolution, each with BatchNorm and ReLU: [N, C, H, W] to the same."""

    def __init__(self, channels: int, in_size: Pair) -> None:
        super().__init__()
        self.dw = SameConv2d(channels, channels, 3, in_size=in_size, groups=channels, bias=True)
        self.dw_bn = _norm(channels)
        self.pw = SameConv2d(channels, channels, 1, in_size=in_size, bias=True)
        self.pw_bn = _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        x = F.relu(self.dw_bn(self.dw(x)))
        return F.relu(self.pw_bn(self.pw(x)))


class KeywordDSCNN(nn.Module):
    """The keyword spotting reference: MFCC frames to ten words, "silence" and "unknown"."""

    def __init__(self, classes: int = 12) -> None:
        super().__init__()
        self.conv0 = SameConv2d(1, 64, (10, 4), in_size=(49, 10), stride=2, bias=True)
        self.bn0 = _norm(64)
        size = self.conv0.out_size  # 25 x 5
        self.block1 = SeparableBlock(64, size)
        self.block2 = SeparableBlock(64, size)
        self.block3 = SeparableBlock(64, size)
        self.block4 = SeparableBlock(64, size)
        self.fc = nn.Linear(64, classes)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """MFCC [N, 1, 49 frames, 10 coefficients] as floats -> logits [N, K]."""
        x = F.relu(self.bn0(self.conv0(x)))
        x = self.block4(self.block3(self.block2(self.block1(x))))
        x = F.avg_pool2d(x, (24, 5))  # of 25 rows, as in the reference: the last one is left out
        logits: Tensor = self.fc(x.flatten(1))
        return logits
