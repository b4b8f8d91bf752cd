"""What `label_shift` promises on real images: it helps hosts where classes come unevenly, and costs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.replay import Replay, replay
from edge_adapt.adapters.label_shift import save
from edge_adapt.bundle import Bundle
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.preprocess import Preprocess
from edge_adapt.streams.data import Dataset, load_data
from exporters.export import export, from_spec
from exporters.label_shift import train_label_shift

pytestmark = pytest.mark.slow

SOME = ("glass_blur", "frost", "brightness")
UNEVEN = ("long_tailed_100_forward", "long_tailed_100_backward", "bursts")


@pytest.fixture(scope="module")
def train(shared_data: Path) -> Dataset:
    return load_data(shared_data / "cifar10_train_10k.npz")


@pytest.fixture(scope="module")
def bundle(shared_data: Path, train: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """ResNet-20 cut before its last stage, calibrated on training images; without a hypernetwork."""
    folder = tmp_path_factory.mktemp("bundles") / "resnet20"
    weights = shared_data / "models" / "cifar10_resnet20.safetensors"
    return Bundle.load(export(from_spec("zoo:cifar-resnet20", weights=weights), folder, calibration=train.images))


@pytest.fixture(scope="module")
def corrupted(shared_data: Path) -> Dataset:
    return load_data(shared_data / "cifar10_c_sev5.npz")


def gain(bundle: Bundle, data: Dataset, host: str, scenario: str, **plan: Any) -> float:
    """Points of error that the adapter takes off its host; below 0 where it adds some."""
    plan = {"batch_size": 50, "corruptions": SOME, **plan}
    rows = replay(bundle, data, Replay(scenario=scenario, methods=(host, f"{host}+label_shift"), **plan))["rows"]
    return float(rows[0]["error_mean"] - rows[1]["error_mean"])


@pytest.mark.parametrize("host", ["moments", "tent"])
def test_uneven_classes_are_corrected_and_even_ones_left_alone(bundle: Bundle, corrupted: Dataset, host: str) -> None:
    assert np.mean([gain(bundle, corrupted, host, scenario) for scenario in UNEVEN]) >= 2
    assert gain(bundle, corrupted, host, "continual") >= -0.2


def test_the_frozen_model_gains_too(bundle: Bundle, corrupted: Dataset) -> None:
    assert gain(bundle, corrupted, "source", "bursts") >= 2
    assert gain(bundle, corrupted, "source", "continual") >= -0.2


def test_frames_one_by_one(bundle: Bundle, corrupted: Dataset) -> None:
    plan = {"batch_size": 1, "corruptions": ("glass_blur", "brightness"), "limit": 400}
    assert gain(bundle, corrupted, "moments", "bursts", **plan) >= 2
    assert gain(bundle, corrupted, "moments", "continual", **plan) >= -0.2


def test_clean_images_are_left_alone(bundle: Bundle, shared_data: Path) -> None:
    data = load_data(shared_data / "cifar10_test.npz")
    assert gain(bundle, data, "moments", "natural", limit=2000) >= -0.2


def test_a_hypernetwork_from_clean_images_is_strong(bundle: Bundle, train: Dataset, corrupted: Dataset) -> None:
    engine, preprocess = OnnxRuntimeEngine(bundle), Preprocess(bundle.manifest.input)
    assert train.images is not None
    assert train.labels is not None
    parts = [preprocess(train.images[start : start + 50]) for start in range(0, 3000, 50)]
    features = np.concatenate([engine.observe(part, features=True).features for part in parts])
    head = (bundle.source["head.weight"], bundle.source["head.bias"])
    file = save(bundle.path, train_label_shift(features, train.labels[:3000], head))
    try:
        assert np.mean([gain(bundle, corrupted, "moments", scenario) for scenario in UNEVEN]) >= 2
        assert gain(bundle, corrupted, "moments", "continual") >= -0.2
    finally:
        file.unlink()
