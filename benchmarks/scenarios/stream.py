"""What a scenario is made of: shifts, and frames that stay where they are until they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.errors import ConfigError, DataError
from edge_adapt.streams.corruptions import CORRUPTIONS
from edge_adapt.streams.data import Dataset

Array = NDArray[Any]


@dataclass(frozen=True)
class Frames:
    """Frames of some arrays in an order of their own. A slice copies its frames, nothing else is copied."""

    arrays: tuple[Array, ...]
    """Each [M, ...]; the shape of a frame and the type are those of the first."""
    which: Array
    """[N], of which array each frame is."""
    place: Array
    """[N], where it is in that array."""

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, part: slice) -> Array:
        which, place = self.which[part], self.place[part]
        made = np.empty((len(place), *self.arrays[0].shape[1:]), self.arrays[0].dtype)
        for number in np.unique(which):
            made[which == number] = self.arrays[number][place[which == number]]
        return made

    def taken(self, frames: Array) -> Frames:
        """Some of them, by their indices."""
        return Frames(self.arrays, self.which[frames], self.place[frames])


def frames_of(images: Array | Frames) -> Frames:
    """All frames of an array, in order."""
    if isinstance(images, Frames):
        return images
    return Frames((images,), np.zeros(len(images), np.int64), np.arange(len(images)))


@dataclass(frozen=True)
class Shift:
    """A stretch of the stream, of one domain unless `domains` says otherwise."""

    name: str
    images: Array | Frames
    """[N, H, W, C], raw; slices of it are arrays."""
    labels: Array | None
    """[N]."""
    domains: Array | None = None
    """[N] names: the true domain of each frame. None: all are of the domain `name`."""
    counts: Array | None = None
    """[N] bool: which frames are genuine, and scored. None: all."""

    @property
    def domain_names(self) -> list[str]:
        """Its domains, in the field's order."""
        if self.domains is None:
            return [self.name]
        order = {name: place for place, name in enumerate(CORRUPTIONS)}
        return sorted(np.unique(self.domains).tolist(), key=lambda name: order.get(name, len(order)))

    def taken(self, frames: Array) -> Shift:
        """Some of its frames, by their indices, in that order; none is copied."""
        return Shift(
            self.name,
            frames_of(self.images).taken(frames),
            None if self.labels is None else self.labels[frames],
            None if self.domains is None else self.domains[frames],
            None if self.counts is None else self.counts[frames],
        )


def joined(name: str, shifts: Sequence[Shift]) -> Shift:
    """One shift of the frames of several, each frame with its domain.

    Raises: DataError if frames differ in shape.
    """
    pools = [frames_of(shift.images) for shift in shifts]
    shapes = {array.shape[1:] for pool in pools for array in pool.arrays}
    if len(shapes) > 1:
        raise DataError(
            f"{name}: frames have shapes {' and '.join(map(str, sorted(shapes)))}, expected one to mix them",
            remedy="use data whose shifts have frames of the same size",
        )
    starts = np.cumsum([0, *(len(pool.arrays) for pool in pools)])
    labels = [shift.labels for shift in shifts if shift.labels is not None]
    domains = [np.full(len(shift.images), shift.name) if shift.domains is None else shift.domains for shift in shifts]
    return Shift(
        name,
        Frames(
            tuple(array for pool in pools for array in pool.arrays),
            np.concatenate([pool.which + start for pool, start in zip(pools, starts, strict=False)]),
            np.concatenate([pool.place for pool in pools]),
        ),
        np.concatenate(labels) if len(labels) == len(shifts) else None,
        np.concatenate(domains),
    )


@dataclass(frozen=True)
class Scenario:
    """How shifts follow each other."""

    name: str
    summary: str
    shifts: Callable[..., Iterator[Shift]]
    """(data, severity, seed, corruptions) -> the shifts, in order, made when asked for."""
    reset: bool = False
    """True: the method starts anew at each shift, as some papers report."""
    corruptions: tuple[str, ...] = CORRUPTIONS
    """Those that are played when none are named."""
    contaminated: bool = False
    """True: `shifts` takes `foreign` besides, images [M, ...] to mix in; None: generated noise."""

    def play(
        self,
        data: Dataset,
        severity: int,
        seed: int,
        corruptions: Sequence[str] | None = None,
        foreign: Array | None = None,
    ) -> Iterator[Shift]:
        """The shifts, in order, made when asked for.

        Raises: ConfigError for foreign frames where none are mixed in; DataError if the data cannot serve.
        """
        names = self.corruptions if corruptions is None else corruptions
        if self.contaminated:
            return self.shifts(data, severity, seed, names, foreign=foreign)
        if foreign is not None:
            raise ConfigError(f"scenario {self.name} mixes no foreign frames in", remedy="use contaminated")
        return self.shifts(data, severity, seed, names)


def labels_of(data: Dataset, shift: Shift) -> Array:
    """Labels of a shift where they say what comes when. Raises: DataError if there are none."""
    if shift.labels is None:
        raise DataError(f"{data.name} has no labels, which say what comes when here", remedy="use --scenario natural")
    return shift.labels
