"""Scenarios: which frames come when. Pure and seeded; an id never changes its meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_adapt.errors import ConfigError, DataError, did_you_mean
from edge_adapt.streams.corruptions import CORRUPTIONS, corrupt
from edge_adapt.streams.data import Dataset

Array = NDArray[Any]
Order = Literal["forward", "uniform", "backward"]

RUN = 40
"""Frames of one class in a row, in `bursts`."""


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
                yield Shift(name, images, data.labels_of(name))
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
        yield Shift(name, images, data.labels_of(name))


def long_tailed(
    data: Dataset, severity: int, seed: int, corruptions: Sequence[str], *, imbalance: float, order: Order
) -> Iterator[Shift]:
    """Each corruption over a part of the frames, drawn so that some classes are frequent and some are rare.

    Class k of K has a share in proportion to imbalance^(-k / (K - 1)), as in CIFAR-10-LT (Cao et al., NeurIPS 2019):
    `forward` as it is, `backward` with the classes reversed, `uniform` with as many frames, all classes alike.
    Every shift has the same profile, with other frames, in random order.
    """
    for number, shift in enumerate(corrupted(data, severity, seed, corruptions)):
        labels = _labels(data, shift)
        present, counts = np.unique(labels, return_counts=True)
        profile = imbalance ** (-np.arange(len(present)) / max(1, len(present) - 1))
        if order == "backward":
            profile = profile[::-1]
        if order == "uniform":
            profile = np.full(len(present), profile.mean())
        rng = np.random.default_rng([seed, number])
        wanted = np.maximum(1, np.round(profile * counts.min())).astype(int)
        chosen = [
            rng.permutation(np.flatnonzero(labels == label))[:frames]
            for label, frames in zip(present, wanted, strict=True)
        ]
        yield _picked(shift, rng.permutation(np.concatenate(chosen)))


def bursts(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """Each corruption over all frames, in runs of `RUN` frames of one class; the classes take turns at random."""
    for number, shift in enumerate(corrupted(data, severity, seed, corruptions)):
        labels = _labels(data, shift)
        rng = np.random.default_rng([seed, number])
        runs: list[Array] = []
        for label in np.unique(labels):
            frames = rng.permutation(np.flatnonzero(labels == label))
            runs.extend(frames[start : start + RUN] for start in range(0, len(frames), RUN))
        yield _picked(shift, np.concatenate([runs[index] for index in rng.permutation(len(runs))]))


def _labels(data: Dataset, shift: Shift) -> Array:
    if shift.labels is None:
        raise DataError(f"{data.name} has no labels, which say what comes when here", remedy="use --scenario natural")
    return shift.labels


def _picked(shift: Shift, frames: Array) -> Shift:
    return Shift(shift.name, shift.images[frames], None if shift.labels is None else shift.labels[frames])


ORDERS: dict[Order, str] = {
    "forward": "the first class is the most frequent",
    "uniform": "as many frames, all classes alike",
    "backward": "the last class is the most frequent",
}
LABEL_SHIFT = (
    *(
        Scenario(
            f"long_tailed_{imbalance}_{order}",
            f"continual, class frequencies {imbalance} to 1: {meaning}",
            partial(long_tailed, imbalance=imbalance, order=order),
        )
        for imbalance in (10, 100)
        for order, meaning in ORDERS.items()
    ),
    Scenario("bursts", f"continual, in runs of {RUN} frames of one class", bursts),
)
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("continual", "one corruption after the other, never reset", corrupted),
        Scenario("reset_each_shift", "one corruption after the other, from source each time", corrupted, reset=True),
        Scenario("natural", "the data as stored, in order, nothing added", natural),
        *LABEL_SHIFT,
    )
}


def get(name: str) -> Scenario:
    """Raises: ConfigError with the nearest names."""
    if name not in SCENARIOS:
        raise ConfigError(f"there is no scenario {name!r}", remedy=did_you_mean(name, SCENARIOS))
    return SCENARIOS[name]
