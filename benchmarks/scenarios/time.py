"""Scenarios of time: a stream that goes on for long, a sensor that sticks, and recordings as they were met."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from benchmarks.scenarios.domains import corrupted
from benchmarks.scenarios.stream import Shift, frames_of
from edge_adapt.errors import DataError
from edge_adapt.streams.data import Dataset

REPEATS = 20
"""How often the stream of `long` is played, as in Hoang et al., "Persistent Test-time Adaptation", NeurIPS 2024."""
STICKS, SHORTEST, LONGEST = 3, 32, 256
"""How often the sensor sticks in each shift of `sensor_freeze`, and for how many frames."""


def long(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """All of `continual`, `REPEATS` times, the same frames in the same order."""
    shifts = []
    for shift in corrupted(data, severity, seed, corruptions):
        shifts.append(shift)
        yield shift
    for _ in range(REPEATS - 1):
        yield from shifts


def sensor_freeze(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """Each corruption over all frames in order, as in `continual`, and now and then one frame comes again and again.

    What is before a stuck sensor is not known: repeated frames are answered and not scored. No frame is lost, so that
    what is scored is exactly what `continual` scores.
    """
    for number, shift in enumerate(corrupted(data, severity, seed, corruptions)):
        rng = np.random.default_rng([seed, number])
        count = len(shift.images)
        sticks = np.zeros(count, np.int64)
        places = np.sort(rng.permutation(count)[:STICKS])
        sticks[places] = rng.integers(SHORTEST, LONGEST + 1, len(places))
        order = np.repeat(np.arange(count), 1 + sticks)
        genuine = np.concatenate([[True], order[1:] != order[:-1]]) if count else np.ones(0, bool)
        labels = None if shift.labels is None else np.where(genuine, shift.labels[order], -1)
        yield Shift(shift.name, frames_of(shift.images).taken(order), labels, counts=genuine)


def real(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """A recording as it was met: in the order of time, never shuffled, and one shift for each stretch without a gap.

    Raises: DataError if the frames have no order in time; `natural` takes any data as stored.
    """
    if not data.ordered:
        raise DataError(
            f"{data.name} has no order in time that is known",
            remedy="give a video file, the recording of an agent or numbered frames, or use --scenario natural",
        )
    if data.images is None:
        yield from (Shift(name, images, data.labels_of(name)) for name, images in data.shifts.items())
        return
    ends = (0, *data.gaps, len(data.images))
    whole = replace(data, gaps=())
    for number, (start, end) in enumerate(pairwise(ends), start=1):
        part = whole[start:end]
        assert part.images is not None
        yield Shift(data.name if not data.gaps else f"{data.name} {number}", part.images, part.labels)
