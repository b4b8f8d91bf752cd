"""Scenarios of time: long streams, a sensor that sticks, and recordings that are played as they were met."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks import scenarios
from benchmarks.scenarios.time import LONGEST, REPEATS, SHORTEST, STICKS
from edge_adapt.errors import DataError
from edge_adapt.streams.data import Dataset

FRAMES = 50


@pytest.fixture(scope="module")
def ready() -> Dataset:
    """Two ready-made shifts whose frames say their own number, plus 100 for the second one."""
    images = np.arange(FRAMES, dtype=np.uint16)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint16)
    return Dataset("made", None, np.arange(FRAMES) % 5, {"dusk": images, "rain": images + np.uint16(100)})


@pytest.fixture(scope="module")
def recording() -> Dataset:
    """A recording with two interruptions."""
    images = np.arange(FRAMES, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    return Dataset("drive", images, None, ordered=True, gaps=(10, 30))


def said(shift) -> list[int]:
    return shift.images[:].reshape(len(shift.images), -1)[:, 0].tolist()


def test_long_is_continual_twenty_times_over_without_copies(ready):
    plain = list(scenarios.get("continual").play(ready, 5, 0))
    shifts = list(scenarios.get("long").play(ready, 5, 0))
    assert REPEATS == 20
    assert [shift.name for shift in shifts] == [shift.name for shift in plain] * REPEATS
    assert all(shift.images is plain[number % 2].images for number, shift in enumerate(shifts))


def test_a_stuck_sensor_repeats_frames_that_are_not_scored_and_loses_none(ready):
    for shift, plain in zip(
        scenarios.get("sensor_freeze").play(ready, 5, 0), scenarios.get("continual").play(ready, 5, 0), strict=True
    ):
        assert shift.name == plain.name
        assert np.array_equal(shift.images[:][shift.counts], plain.images)
        assert np.array_equal(shift.labels[shift.counts], plain.labels)
        assert (shift.labels[~shift.counts] == -1).all()
        seen = np.array(said(shift))
        assert (seen[1:][~shift.counts[1:]] == seen[:-1][~shift.counts[1:]]).all()  # each repeats the one before it
        stuck = np.unique(seen[~shift.counts], return_counts=True)[1]
        assert len(stuck) == STICKS
        assert (stuck >= SHORTEST).all() and (stuck <= LONGEST).all()


def test_the_sensor_sticks_elsewhere_with_another_seed_and_in_another_shift(ready):
    first, second = scenarios.get("sensor_freeze").play(ready, 5, 0)
    other, _ = scenarios.get("sensor_freeze").play(ready, 5, 1)
    assert len(first.images) != len(second.images) or (first.counts != second.counts).any()
    assert len(first.images) != len(other.images) or (first.counts != other.counts).any()


def test_real_goes_in_order_and_begins_a_shift_behind_each_gap(recording):
    shifts = list(scenarios.get("real").play(recording, 5, 0))
    assert [shift.name for shift in shifts] == ["drive 1", "drive 2", "drive 3"]
    assert [said(shift) for shift in shifts] == [[*range(10)], [*range(10, 30)], [*range(30, 50)]]
    [whole] = scenarios.get("real").play(dataclasses.replace(recording, gaps=()), 5, 0)
    assert whole.name == "drive"
    assert said(whole) == [*range(FRAMES)]


def test_a_part_of_a_recording_keeps_its_order_and_its_gaps(recording):
    assert recording[:30].gaps == (10,)
    assert recording[5:31].gaps == (5, 25)
    assert recording[::4].gaps == (3, 8)
    assert [said(shift)[0] for shift in scenarios.get("real").play(recording[::4], 5, 0)] == [0, 12, 32]
    drawn = recording[np.array([3, 1, 2])]
    assert not drawn.ordered and not recording[::-1].ordered


def test_real_refuses_what_has_no_order_in_time(ready):
    with pytest.raises(DataError, match="no order in time") as caught:
        list(scenarios.get("real").play(ready, 5, 0))
    assert "--scenario natural" in caught.value.remedy
    parts = list(scenarios.get("real").play(dataclasses.replace(ready, ordered=True), 5, 0))
    assert [shift.name for shift in parts] == ["dusk", "rain"]
