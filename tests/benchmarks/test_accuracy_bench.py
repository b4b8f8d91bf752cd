"""`edge-adapt bench accuracy` on the tiny network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.accuracy import COLLAPSES, accuracy, collapsed, print_accuracy
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.monitor.accuracy import MEMORY, WEIGHTS, WORTH
from edge_adapt.streams.data import Dataset


@pytest.fixture(scope="module")
def bundle(device_bundle):
    signals = 6 if "class.mean" in device_bundle.source else 4
    entries = {WEIGHTS: np.zeros((2, signals + 1), np.float32), WORTH: np.array([[3.0, 0.0]] * 2, np.float32)}
    return replace(device_bundle, source=device_bundle.source | entries)


@pytest.fixture(scope="module")
def data(tiny_data) -> Dataset:
    images = np.concatenate([tiny_data.images, tiny_data.images[:, ::-1], tiny_data.images[:40, :, ::-1]])
    return Dataset("tiny", images, np.arange(len(images)) % 5)


def test_every_shift_and_method_has_its_windows(bundle, data):
    shifts = {"a": data.images, "b": data.images[:, ::-1].copy()}
    results = accuracy(bundle, Dataset("two", None, data.labels, shifts))
    assert [(row["method"], row["shift"]) for row in results["rows"]] == [
        ("source", "a"),
        ("source", "b"),
        ("moments", "a"),
        ("moments", "b"),
    ]
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in results["rows"])
    whole = results["summary"][-1]
    errors = [abs(row["value"] - row["truth"]) for row in results["rows"]]
    assert whole["windows"] == 4
    assert whole["error"] == pytest.approx(np.mean(errors))
    lines: list[str] = []
    print_accuracy(results, lines.append)
    assert any("one class" in line for line in lines)


def test_shifts_that_are_too_short_are_refused(bundle, data):
    with pytest.raises(DataError, match=str(MEMORY)):
        accuracy(bundle, data[:100], scenario="natural", methods=("source",))


def test_a_bundle_without_entries_is_refused(device_bundle, data):
    with pytest.raises(ConfigError, match="--calibration"):
        accuracy(device_bundle, data)


@pytest.mark.parametrize("kind", COLLAPSES)
def test_a_collapse_leaves_one_class(kind):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (200, 5)) + 6 * np.eye(5)[rng.integers(0, 5, 200)]
    assert np.bincount(collapsed(logits, kind).argmax(axis=1), minlength=5)[0] > 180
