"""A scenario: the same frames once by day and once by night, and a dusk in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.scenarios import Scenario, Shift
from edge_adapt.errors import DataError
from edge_adapt.streams.data import Dataset

LIGHT = {"day": (1.0, 1.0), "dusk": (1.0, 0.25), "night": (0.25, 0.25)}
"""At the beginning and at the end of each, as a share of what the images have."""


def day_and_night(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """Day, dusk and night, each over all frames in an order drawn for it; of the seed and the data alone.

    Raises: DataError if the data hold no 8-bit images.
    """
    if data.images is None or data.images.dtype != np.uint8:
        raise DataError(f"{data.name} holds no 8-bit images", remedy="give images, not ready-made shifts")
    for number, name in enumerate(LIGHT):
        order = np.random.default_rng([seed, number]).permutation(len(data.images))
        begins, ends = LIGHT[name]
        light = np.linspace(begins, ends, len(order)).reshape(-1, *(1,) * (data.images.ndim - 1))
        images = (data.images[order] * light).astype(np.uint8)
        yield Shift(name, images, None if data.labels is None else data.labels[order])


DAY_AND_NIGHT = Scenario("day_and_night", "frames by day, at dusk and by night", day_and_night)
