"""The bank: one entry for each domain that was met, with what was learned there. A value; nothing here learns.

A domain is known by its mean encoding. A window of n frames lies about `sqrt(V (1/n + 1/N))` from the mean of the N
frames of its own domain, V being what is left of unit length: distances are compared with that.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.delta import Delta
from edge_adapt.errors import ConfigError

Array = NDArray[Any]

SOURCE = "source"
"""Name of the first entry: the domain that the model was exported on. It stays."""
MEMORY = 1024
"""Frames that a mean encoding averages over."""
KNOWN = 64
"""Frames from which it is known what is usual."""
RARE = 0.5
"""An entry that was not used for this share of all frames since may be given up before two others are merged."""
LEAST = 0.02
"""Variance of a domain, all of whose frames look the same."""

NO_SCORES: Array = np.zeros(0)


@dataclass(frozen=True)
class Usual:
    """How strange the frames of a domain usually are to the source model: every domain has its own measure."""

    mean: float = 0.0
    variance: float = 1.0
    frames: int = 0

    def after(self, scores: Array) -> Usual:
        """With the scores [n] of more of its frames."""
        if not len(scores):
            return self
        frames = min(self.frames + len(scores), MEMORY)
        share = len(scores) / frames
        mean = self.mean + share * (float(scores.mean()) - self.mean)
        variance = float(np.square(scores - mean).mean())
        if self.frames:
            variance = self.variance + share * (variance - self.variance)
        return Usual(mean, variance, frames)

    def above(self, scores: Array) -> Array:
        """[n], how many standard deviations scores are above the mean; zeros before it is known."""
        if self.frames < KNOWN:
            return np.zeros(len(scores))
        made: Array = (scores - self.mean) / np.sqrt(max(self.variance, 1e-12))
        return made


@dataclass(frozen=True)
class Entry:
    """A domain, and what was learned there."""

    name: str
    mean: Array
    """[width], mean of the domain's encodings with source weights, each of unit length."""
    frames: float
    """Frames that `mean` counts as, at most `MEMORY`."""
    state: Any
    """The host's, as of the last window that was surely of this domain."""
    visits: int = 1
    used: int = 0
    """Frame of the stream at which it answered last."""
    usual: Usual = field(default_factory=Usual)

    @property
    def variance(self) -> float:
        """What one frame's encoding differs from the mean, squared length."""
        return max(1 - float(self.mean @ self.mean), LEAST)

    def distance(self, window: Array) -> float:
        """Squared distance of a window's mean [n, width] in units of its expectation: about 1 for its own domain."""
        apart = window.mean(axis=0) - self.mean
        return float(apart @ apart) / (self.variance * (1 / len(window) + 1 / self.frames))

    def met(self, window: Array, state: Any, now: int, scores: Array = NO_SCORES) -> Entry:
        """After a window [n, width] that was surely of this domain, and the scores [n] of its frames."""
        frames = min(self.frames + len(window), MEMORY)
        mean = self.mean + len(window) / frames * (window.mean(axis=0) - self.mean)
        usual = self.usual.after(scores)
        return replace(self, mean=mean.astype(np.float32), frames=frames, state=state, used=now, usual=usual)


@dataclass(frozen=True)
class Bank:
    """Entries, the first of which is source."""

    entries: tuple[Entry, ...]
    made: int = 0
    """Domains that were ever met, source not counted: names are never given twice."""

    @classmethod
    def of(cls, mean: Array, frames: float, state: Any) -> Bank:
        """With source alone."""
        return cls((Entry(SOURCE, mean.astype(np.float32), frames, state),))

    def nearest(self, window: Array) -> tuple[int, float]:
        """Place of the entry nearest to the window's mean [n, width], and its distance in units of what is expected."""
        apart = self.apart(window.mean(axis=0, keepdims=True))[0]
        variance = np.maximum(1 - self._lengths, LEAST)
        frames = np.array([entry.frames for entry in self.entries])
        place = int(np.argmin(apart / (variance * (1 / len(window) + 1 / frames))))
        return place, self.entries[place].distance(window)

    def apart(self, encodings: Array) -> Array:
        """[n, entries], squared distances of encodings [n, width] from the entries' means."""
        squares = np.square(encodings).sum(axis=1)[:, None] + self._lengths
        apart: Array = np.maximum(squares - 2 * encodings @ self._means.T, 0)
        return apart

    @cached_property
    def _means(self) -> Array:
        """[entries, width]."""
        return np.stack([entry.mean for entry in self.entries])

    @cached_property
    def _lengths(self) -> Array:
        """[entries], squared."""
        made: Array = np.square(self._means).sum(axis=1)
        return made

    def with_entry(self, place: int, entry: Entry) -> Bank:
        entries = list(self.entries)
        entries[place] = entry
        return replace(self, entries=tuple(entries))

    def grown(self, window: Array, state: Any, now: int, scores: Array = NO_SCORES) -> Bank:
        """With one more entry at the end, for the domain of this window [n, width] with these scores [n]."""
        mean = window.mean(axis=0).astype(np.float32)
        entry = Entry(f"domain-{self.made + 1}", mean, float(len(window)), state, used=now, usual=Usual().after(scores))
        return replace(self, entries=(*self.entries, entry), made=self.made + 1)

    def shrunk(self, keep: int, now: int) -> tuple[Bank, str]:
        """With one entry less, and what was done: the least useful one given up, or the two closest merged.

        Args:
            keep: place of an entry that is left alone, as source is: the newest, whose few frames would be lost in
                another's, so that its next window founds it again.
            now: frames of the stream so far.
        """
        spare = [place for place in range(1, len(self.entries)) if place != keep]
        oldest = min(spare, key=lambda place: (self.entries[place].visits, self.entries[place].used))
        unused = now - self.entries[oldest].used
        if len(spare) < 2 or (self.entries[oldest].visits == 1 and unused > RARE * now):
            return self._without(oldest), f"retired: {self.entries[oldest].name}"
        apart = self.apart(self._means[spare])[:, spare]
        apart[np.tril_indices(len(spare))] = np.inf
        first, second = np.unravel_index(apart.argmin(), apart.shape)
        return self._merged(spare[first], spare[second])

    def place(self, name: str) -> int | None:
        """Of the entry of that name."""
        return next((place for place, entry in enumerate(self.entries) if entry.name == name), None)

    def _merged(self, first: int, second: int) -> tuple[Bank, str]:
        """The entry with more frames takes the other one in; states are of many kinds, and the better founded stays."""
        pair = self.entries[first], self.entries[second]
        better, other = pair if pair[0].frames >= pair[1].frames else pair[::-1]
        total = better.frames + other.frames
        made = replace(
            better,
            mean=((better.frames * better.mean + other.frames * other.mean) / total).astype(np.float32),
            frames=min(total, MEMORY),
            visits=better.visits + other.visits,
            used=max(better.used, other.used),
        )
        lower, higher = min(first, second), max(first, second)
        return self.with_entry(lower, made)._without(higher), f"merged: {other.name} into {better.name}"

    def _without(self, place: int) -> Bank:
        return replace(self, entries=(*self.entries[:place], *self.entries[place + 1 :]))


@dataclass(frozen=True)
class Cap:
    """What a bank may grow to, source not counted."""

    entries: int = 8
    bytes: int = 64_000_000

    def check(self, entry: Any) -> None:
        """Raises: ConfigError if not even one entry of that host state fits."""
        need = size(entry)
        if self.entries < 1 or need > self.bytes:
            raise ConfigError(
                f"the bank may hold {self.entries} entries and {self.bytes} bytes; one entry takes {need} bytes",
                remedy=f"set router.entries to 1 or more and router.bytes to {need} or more, or router to none",
            )

    def exceeded(self, bank: Bank) -> bool:
        grown = bank.entries[1:]
        return len(grown) > self.entries or sum(size(entry) for entry in grown) > self.bytes


def size(value: Any) -> int:
    """Bytes of all arrays and tensors in a value, each counted once."""
    seen: dict[int, int] = {}
    _walk(value, seen)
    return sum(seen.values())


def _walk(value: Any, seen: dict[int, int]) -> None:
    if hasattr(value, "nbytes"):
        seen[id(value)] = int(value.nbytes)
    elif isinstance(value, Delta):
        for item in value.values():
            _walk(item, seen)
    elif is_dataclass(value):
        for part in fields(value):
            _walk(getattr(value, part.name), seen)
    elif isinstance(value, dict):
        for item in value.values():
            _walk(item, seen)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _walk(item, seen)
