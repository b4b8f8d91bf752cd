"""Scenarios: which frames come when. Pure and seeded; an id never changes its meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from edge_adapt.errors import ConfigError, DataError, did_you_mean
from edge_adapt.streams.corruptions import CORRUPTIONS, corrupt
from edge_adapt.streams.data import Dataset

Array = NDArray[Any]


@dataclass(frozen=True)
class Shift:
    """A stretch of the stream with one domain."""

    name: str
    images: Array
    """[N, H, W, C], raw."""
    labels: Array | None


@dataclass(frozen=True)
class Scenario:
    """How shifts follow each other."""

    name: str
    summary: str
    shifts: Callable[[Dataset, int, int, Sequence[str]], Iterator[Shift]]
    """(data, severity, seed, corruptions) -> the shifts, in order, made when asked for."""
    reset: bool = False
    """True: the method starts anew at each shift, as some papers report."""


def corrupted(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """Each corruption over all frames, in the field's order; ready-made shifts as they are stored."""
    if data.shifts:
        for name, images in data.shifts.items():
            if name in corruptions or name not in CORRUPTIONS:
                yield Shift(name, images, data.labels)
        return
    assert data.images is not None
    if data.images.dtype.name != "uint8":
        raise DataError(
            f"{data.name} holds {data.images.dtype} frames; corruptions are defined on uint8 images",
            remedy="use --scenario natural",
        )
    images = data.images[..., None] if data.images.ndim == 3 else data.images
    for name in corruptions:
        yield Shift(name, corrupt(images, name, severity, seed=seed), data.labels)


def natural(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """The data as stored, in order, nothing added."""
    if data.images is not None:
        yield Shift(data.name, data.images, data.labels)
    for name, images in data.shifts.items():
        yield Shift(name, images, data.labels)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("continual", "one corruption after the other, never reset", corrupted),
        Scenario("reset_each_shift", "one corruption after the other, from source each time", corrupted, reset=True),
        Scenario("natural", "the data as stored, in order, nothing added", natural),
    )
}


def get(name: str) -> Scenario:
    """Raises: ConfigError with the nearest names."""
    if name not in SCENARIOS:
        raise ConfigError(f"there is no scenario {name!r}", remedy=did_you_mean(name, SCENARIOS))
    return SCENARIOS[name]
