"""Tails of every kind of layer: convolutions, a linear head, matrix products of a transformer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_adapt.bundle import Bundle, InputSpec
from edge_adapt.tail import Tail
from exporters.export import export, from_module
from exporters.zoo.vit import VisionTransformer


@pytest.fixture(scope="session")
def token_bundle(tmp_path_factory) -> Bundle:
    """A transformer of two blocks, cut between them. Do not modify its files."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = VisionTransformer(image=16, patch=4, dim=16, depth=2, heads=2, classes=5).eval()
    model = from_module(net, "tokens", InputSpec(shape=(3, 16, 16)), cut="blocks.0", prompt_width=16)
    frames = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3)).astype(np.uint8)
    return Bundle.load(export(model, tmp_path_factory.mktemp("tokens") / "b", calibration=frames, cut="blocks.0"))


@pytest.fixture(scope="module", params=["device_bundle", "reference_bundle", "token_bundle"])
def bundle(request) -> Bundle:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def tail(bundle) -> Tail:
    return Tail(bundle)


@pytest.fixture
def h(bundle) -> torch.Tensor:
    """Eight tensors at the cut."""
    shape = bundle.manifest.cut.shape
    tokens = (17,) if bundle.manifest.prompts else ()
    return torch.randn(8, *tokens, *shape, generator=torch.Generator().manual_seed(1))
