"""A network of a few hundred weights with every kind of batch-norm site, its frames and bundles: always alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_adapt.bundle import Bundle, InputSpec
from edge_adapt.preprocess import Preprocess
from edge_adapt.streams.data import Dataset
from exporters.export import export, from_module

Array = NDArray[Any]

TINY_INPUT = InputSpec(shape=(3, 16, 16), scale=255.0, mean=(0.5, 0.4, 0.6), std=(0.25, 0.2, 0.3))
CLASSES = 5
FRAMES = 128


class Residual(nn.Module):
    """conv-BN-ReLU, added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.bn(self.conv(x)))


class TinyNet(nn.Module):
    """Every kind of batch-norm site in a few hundred weights; [N, 3, 16, 16] -> [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = Residual()
        self.alone = nn.BatchNorm2d(8)  # behind an addition: no layer to fold it into
        self.depthwise, self.depthwise_bn = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.point, self.point_bn = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.alone(self.block(self.stem(x))))
        x = torch.relu(self.depthwise_bn(self.depthwise(x)))
        x = torch.relu(self.point_bn(self.point(x)))
        made: Tensor = self.head(x.mean(dim=(2, 3)))
        return made


def made_tiny_net() -> TinyNet:
    """In eval mode, with statistics and affines that are not the identity; the same network each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = TinyNet().eval()
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.data.uniform_(0.7, 1.3)
                part.bias.data.normal_(0, 0.2)
        net.train()
        with torch.no_grad():  # statistics of real activations, as training would leave them
            frames = torch.from_numpy(tiny_images(64)).permute(0, 3, 1, 2) / 255
            mean, std = (torch.tensor(value)[:, None, None] for value in (TINY_INPUT.mean, TINY_INPUT.std))
            for _ in range(30):
                net((frames - mean) / std)
            net.eval()
            net.head.weight.mul_(4)
            net.head.bias.sub_(net((frames - mean) / std).mean(dim=0))  # no class rules alone
        return net


def tiny_images(count: int) -> Array:
    """Smooth coloured patterns, uint8 [N, 16, 16, 3]."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (count, 4, 4, 3))
    fine = coarse.repeat(4, axis=1).repeat(4, axis=2) + rng.normal(0, 12, (count, 16, 16, 3))
    return np.clip(fine, 0, 255).astype(np.uint8)


def made_tiny_data(net: nn.Module) -> Dataset:
    """128 images, labelled by the network itself, every fifth one wrongly."""
    images = tiny_images(FRAMES)
    with torch.no_grad():
        labels = net(torch.from_numpy(Preprocess(TINY_INPUT)(images))).argmax(1).numpy()
    labels[::5] = (labels[::5] + 1) % CLASSES
    return Dataset("tiny", images, labels)


def tiny_bundle(net: nn.Module, images: Array, folder: Path, cut: str) -> Bundle:
    """Exported and loaded. cut: `block`, or `input` for reference mode."""
    model = from_module(net, "tiny", TINY_INPUT, classes=[f"class-{index}" for index in range(CLASSES)])
    return Bundle.load(export(model, folder, calibration=images, cut=cut))
