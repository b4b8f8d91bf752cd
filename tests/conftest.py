"""Fixtures that every test may use."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.contract.tiny import (
    TINY_INPUT,
    TinyNet,
    made_tiny_data,
    made_tiny_net,
    tiny_bundle,
)
from edge_adapt.bundle import Bundle, InputSpec
from edge_adapt.streams.data import Dataset
from exporters.export import export, from_module
from exporters.zoo.vit import VisionTransformer

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two busy cores and spinning OpenMP threads make a test hundreds of times slower; one thread does not."""
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Garbage is not looked for in all that was imported and collected: it holds every thread for half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """The level of logging is what it was, although an agent may have been told to change it."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images and pretrained models, which are not part of this repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not found at ../shared/data (looked for {SHARED_DATA.name} beside the checkout)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_net() -> TinyNet:
    """In eval mode, with statistics and affines that are not the identity. Do not modify."""
    return made_tiny_net()


@pytest.fixture(scope="session")
def tiny_data(tiny_net: TinyNet) -> Dataset:
    """128 images, labelled by the network itself, every fifth one wrongly."""
    return made_tiny_data(tiny_net)


@pytest.fixture(scope="session")
def tiny_frames(tiny_data: Dataset) -> np.ndarray:
    """The images as the network is fed, [128, 3, 16, 16] float32."""
    from edge_adapt.preprocess import Preprocess

    assert tiny_data.images is not None
    return Preprocess(TINY_INPUT)(tiny_data.images)


@pytest.fixture(scope="session")
def device_bundle(tiny_net: TinyNet, tiny_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny network cut behind its residual block. Do not modify its files."""
    return tiny_bundle(tiny_net, tiny_data.images, tmp_path_factory.mktemp("bundles") / "device", "block")


@pytest.fixture(scope="session")
def reference_bundle(tiny_net: TinyNet, tiny_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny network cut at its input. Do not modify its files."""
    return tiny_bundle(tiny_net, tiny_data.images, tmp_path_factory.mktemp("bundles") / "reference", "input")


@pytest.fixture(scope="session")
def token_bundle(tmp_path_factory) -> Bundle:
    """A transformer of two blocks, cut between them. Do not modify its files."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = VisionTransformer(image=16, patch=4, dim=16, depth=2, heads=2, classes=5).eval()
    model = from_module(net, "tokens", InputSpec(shape=(3, 16, 16)), cut="blocks.0", prompt_width=16)
    frames = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3)).astype(np.uint8)
    return Bundle.load(export(model, tmp_path_factory.mktemp("tokens") / "b", calibration=frames, cut="blocks.0"))
