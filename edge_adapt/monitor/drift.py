"""Detectors of drift in a stream of numbers, such as a score or the distance of a tap: a state is a value.

ADWIN: Bifet & Gavalda, "Learning from Time-Changing Data with Adaptive Windowing", SDM 2007. It keeps a window as long
as no two parts of it differ in their means. Page-Hinkley: Page, "Continuous Inspection Schemes", Biometrika 1954. It
sums how far the numbers are from their mean so far.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.errors import ConfigError, DataError

Array = NDArray[Any]


@dataclass(frozen=True)
class Window:
    """ADWIN's: numbers in buckets whose sizes are powers of two, the oldest first."""

    sizes: Array
    """[buckets] integers, falling."""
    means: Array
    spreads: Array
    """[buckets], sums of squared distances from `means`."""
    seen: int = 0
    """Numbers since the start."""
    drifted: bool = False
    """True if the last number brought a drift to light; the window then holds what came after it."""

    @property
    def width(self) -> int:
        """Numbers in the window."""
        return int(self.sizes.sum())

    @property
    def mean(self) -> float | None:
        """None of an empty window."""
        return float(self.sizes @ self.means / self.width) if len(self.sizes) else None


@dataclass(frozen=True, kw_only=True)
class Adwin:
    """Detects a change of the mean, up or down, at any speed; needs no threshold in the units of the numbers."""

    delta: float = 0.002
    """Chance of a false alarm at a cut that is looked at, about: the bound is loose."""
    clock: int = 32
    """Cuts are looked at each time so many numbers came."""
    buckets: int = 5
    """Of each size, at most."""
    shortest: int = 5
    """Numbers on each side of a cut, at least."""
    grace: int = 10
    """Numbers before the first look."""
    longest: int = 65_536
    """Numbers in the window, at most, and so is the memory."""

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise ConfigError(f"delta is {self.delta}, expected between 0 and 1", remedy="0.002 is usual")
        for name in ("clock", "buckets", "shortest"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more", remedy="use the default")
        if self.longest < 4 * self.shortest:
            raise ConfigError(
                f"longest is {self.longest}, expected {4 * self.shortest} or more", remedy="use the default"
            )

    def init(self) -> Window:
        """An empty window."""
        return Window(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))

    def after(self, window: Window, value: float) -> Window:
        """With one more number. Raises: DataError if it is not finite."""
        value = _finite(value)
        window = replace(
            window,
            sizes=np.append(window.sizes, 1),
            means=np.append(window.means, value),
            spreads=np.append(window.spreads, 0.0),
            seen=window.seen + 1,
            drifted=False,
        )
        window = self._merged(window)
        while window.width > self.longest:
            window = _without_oldest(window)
        if window.seen % self.clock or window.width <= self.grace:
            return window
        while self._differs(window):
            window = replace(_without_oldest(window), drifted=True)
        return window

    def _merged(self, window: Window) -> Window:
        """The two oldest buckets of a size become one of twice the size, where there are too many."""
        sizes, means, spreads = window.sizes, window.means, window.spreads
        size = 1
        while True:
            places = np.flatnonzero(sizes == size)
            if len(places) <= self.buckets:
                return replace(window, sizes=sizes, means=means, spreads=spreads)
            first, second = places[:2]
            means, spreads, sizes = means.copy(), spreads.copy(), sizes.copy()
            spreads[first] += spreads[second] + size / 2 * (means[first] - means[second]) ** 2
            means[first] = (means[first] + means[second]) / 2
            sizes[first] = size = 2 * size
            sizes, means, spreads = (np.delete(part, second) for part in (sizes, means, spreads))

    def _differs(self, window: Window) -> bool:
        """True if the means on both sides of some cut differ by more than chance explains."""
        width, mean = window.width, window.mean
        if mean is None or len(window.sizes) < 2:
            return False
        variance = float(window.spreads.sum() + window.sizes @ np.square(window.means - mean)) / width
        old, total = np.cumsum(window.sizes)[:-1], np.cumsum(window.sizes * window.means)[:-1]
        new = width - old
        fit = (old >= self.shortest) & (new >= self.shortest)
        if not fit.any():
            return False
        old, new, total = old[fit], new[fit], total[fit]
        gap = np.abs(total / old - (width * mean - total) / new)
        # Theorem 3.1 with the variance of the whole window; the sides count as a little shorter than they are.
        share = 1 / (old - self.shortest + 1) + 1 / (new - self.shortest + 1)
        confidence = log(2 * log(width) / self.delta)
        return bool((gap > np.sqrt(2 * share * variance * confidence) + 2 / 3 * share * confidence).any())


@dataclass(frozen=True)
class Sums:
    """Page-Hinkley's: how far the numbers went up and down since the start, or since the last drift."""

    count: int = 0
    mean: float = 0.0
    rise: float = 0.0
    fall: float = 0.0
    lowest: float = inf
    highest: float = -inf
    drifted: bool = False
    """True if the last number brought a drift to light; everything else then starts anew."""


@dataclass(frozen=True, kw_only=True)
class PageHinkley:
    """Detects a lasting change of the mean by some amount; a few additions for each number."""

    tolerance: float = 0.005
    """A change by so much is none, in the units of the numbers."""
    threshold: float = 50.0
    """Sum of changes at which there is a drift: a step by d is seen after about threshold / (d - tolerance) numbers."""
    keeps: float = 0.9999
    """Share of the sums that stays at each number."""
    grace: int = 30
    """Numbers before the first drift."""

    def __post_init__(self) -> None:
        if not 0 < self.keeps <= 1:
            raise ConfigError(f"keeps is {self.keeps}, expected above 0 and up to 1", remedy="0.9999 is usual")
        if not (isfinite(self.threshold) and self.threshold > 0):
            raise ConfigError(f"threshold is {self.threshold}, expected above 0", remedy="take some steps' sizes")

    def init(self) -> Sums:
        """Before the first number."""
        return Sums()

    def after(self, sums: Sums, value: float) -> Sums:
        """With one more number. Raises: DataError if it is not finite."""
        count = sums.count + 1
        mean = sums.mean + (_finite(value) - sums.mean) / count
        rise = self.keeps * sums.rise + value - mean - self.tolerance
        fall = self.keeps * sums.fall + value - mean + self.tolerance
        lowest, highest = min(sums.lowest, rise), max(sums.highest, fall)
        if count >= self.grace and max(rise - lowest, highest - fall) > self.threshold:
            return Sums(drifted=True)
        return Sums(count, mean, rise, fall, lowest, highest)


def _without_oldest(window: Window) -> Window:
    return replace(window, sizes=window.sizes[1:], means=window.means[1:], spreads=window.spreads[1:])


def _finite(value: float) -> float:
    if not isfinite(value):
        raise DataError(f"{value} is no number to detect a drift in", remedy="leave such frames out")
    return value
