"""What several zoo families share: TensorFlow's "same" padding as constants, and a weight initialisation."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]


def same_padding(size: int, kernel: int, stride: int) -> Pair:
    """Rows (or columns) of zeros before and after, as TensorFlow's `padding="same"` chooses them.

    The output has ceil(size / stride) rows; an odd row of padding goes after.
    """
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding for ONE input size, [N, C, H, W] to [N, D, H/s, W/s].

    The padding is computed here, once, from `in_size`, so an exported graph holds constants and no shape
    arithmetic. Symmetric padding goes into the convolution itself; only the lopsided kind needs its own pad.
    Parameters are called as in `nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | Pair,
        *,
        in_size: Pair,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        top, bottom = same_padding(in_size[0], height, stride)
        left, right = same_padding(in_size[1], width, stride)
        symmetric = top == bottom and left == right
        super().__init__(
            in_channels,
            out_channels,
            (height, width),
            stride,
            padding=(top, left) if symmetric else 0,
            groups=groups,
            bias=bias,
        )
        self.lopsided = None if symmetric else (left, right, top, bottom)
        self.out_size = (math.ceil(in_size[0] / stride), math.ceil(in_size[1] / stride))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, D, ceil(H / stride), ceil(W / stride)], with H, W = `in_size`."""
        if self.lopsided is not None:
            x = F.pad(x, self.lopsided)
        return super().forward(x)


def global_average(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C], the mean over the positions."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def init_convs(model: nn.Module) -> None:
    """Draw all convolution weights from He's normal distribution, which keeps the variance through a ReLU.

    For networks that are mostly plain chains: with torch's default their random logits fade into the bias. In
    the ResNets here, where every block adds to the sum, it is the default that stays bounded.
    Source: He et al., "Delving Deep into Rectifiers", ICCV 2015.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
