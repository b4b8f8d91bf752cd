"""Scenarios of label shift: which frames come, how often, in which order, and that nothing but the seed decides it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks import scenarios
from benchmarks.scenarios import Shift
from benchmarks.scenarios.labels import RUN
from edge_adapt.errors import DataError
from edge_adapt.streams.data import Dataset

TWO = ("dusk", "rain")
EACH = 100
"""Frames of each class."""
LABEL_SHIFT = sorted(name for name in scenarios.SCENARIOS if name.startswith("long_tailed_") or name == "bursts")


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Frames that say their own number and shift, so that each can be told from all others."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), EACH))
    images = np.zeros((len(labels), 2, 2, 3), np.uint16)
    images[..., 0] = np.arange(len(labels))[:, None, None]
    return Dataset("made", None, labels, {name: images + np.uint16(1000 * place) for place, name in enumerate(TWO)})


def played(data: Dataset, name: str, seed: int = 0) -> list[Shift]:
    return list(scenarios.get(name).shifts(data, 5, seed, TWO))


def test_the_ids_are_for_ever():
    orders = ("backward", "forward", "uniform")
    expected = {"bursts", *(f"long_tailed_{ratio}_{order}" for ratio in (10, 100) for order in orders)}
    assert set(LABEL_SHIFT) == expected


@pytest.mark.parametrize("name", LABEL_SHIFT)
def test_frames_keep_their_labels_and_come_once(data, name):
    shifts = played(data, name)
    assert [shift.name for shift in shifts] == list(TWO)
    for place, shift in enumerate(shifts):
        numbers = shift.images[:][:, 0, 0, 0] - 1000 * place
        assert len(set(numbers)) == len(numbers)
        assert np.array_equal(data.labels[numbers], shift.labels)


@pytest.mark.parametrize("name", LABEL_SHIFT)
def test_the_seed_alone_decides(data, name):
    first, again, other = played(data, name), played(data, name), played(data, name, seed=1)
    for one, two in zip(first, again, strict=True):
        assert np.array_equal(one.images[:], two.images[:])
    assert not np.array_equal(first[0].images[:], other[0].images[:])
    assert not np.array_equal(first[0].images[:], first[1].images[:] - 1000)  # another draw for each shift


@pytest.mark.parametrize("ratio", [10, 100])
def test_a_long_tail_has_the_profile_of_its_name(data, ratio):
    expected = np.round(EACH * ratio ** (-np.arange(10) / 9))
    for order, counts in (("forward", expected), ("backward", expected[::-1])):
        for shift in played(data, f"long_tailed_{ratio}_{order}"):
            assert np.bincount(shift.labels, minlength=10).tolist() == counts.tolist()
    even = np.bincount(played(data, f"long_tailed_{ratio}_uniform")[0].labels, minlength=10)
    assert set(even) == {round(EACH * (ratio ** (-np.arange(10) / 9)).mean())}


def test_a_long_tail_comes_in_random_order(data):
    labels = played(data, "long_tailed_100_forward")[0].labels
    head = labels == 0
    assert abs(head[: len(head) // 2].mean() - head.mean()) < 0.15


def test_bursts_hold_all_frames_in_runs_of_one_class(data):
    for shift in played(data, "bursts"):
        assert np.bincount(shift.labels).tolist() == [EACH] * 10
        ends = np.flatnonzero(np.diff(shift.labels)) + 1
        lengths = np.diff([0, *ends, len(shift.labels)])
        assert {length % RUN for length in lengths} <= {0, EACH % RUN}
        assert len(lengths) >= 15


def test_without_labels_they_are_refused(data):
    with pytest.raises(DataError, match="has no labels"):
        played(dataclasses.replace(data, labels=None), "bursts")
