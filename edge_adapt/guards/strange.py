"""A strange frame among others is not learned from, and the strangest are answered from source.

Where most frames are strange, it is another domain, and they are learned from.

Strange is relative: a frame's taps are compared with where the bulk of the frames of its time lies, and how far from
there they usually are. So a domain that is far from source has its own strangers, also while every third frame is one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_adapt.delta import Delta
from edge_adapt.guards.rows import step_on
from edge_adapt.methods.protocol import TAPS, Context, Method, Observation, Step, compacted
from edge_adapt.methods.wrapper import Wrapped, Wrapper

Array = NDArray[Any]

STRANGE = "guard: strange frame"

FEWEST, FIRST = 8, 32
"""Frames of a domain before any of them can be strange, and until then and so many it is judged by all of them."""
MEMORY = 64
"""Frames over which the usual is averaged."""
BULK = 0.6
"""Share of the frames that is surely of the domain: they say where it lies."""
MIDDLE, NEAR, STEP = 0.35, 0.07, 1.1
"""Quantiles of all distances that are about the median and the nearest tenth of the domain's own if three in ten frames
are foreign, and how many standard deviations of a normal distribution they are apart if none is."""
NARROW = 0.2
"""Least standard deviation of a log distance."""
ASIDE, SURE = 2.0, 8.0
"""So many standard deviations above the middle a frame is not learned from, and is told to be strange."""
LAST, SELDOM, CHANCE = 8, 0.1, 3.2
"""Frames that are another domain if more of them lie aside than by chance: so many deviations of a binomial
distribution above the usual share of frames aside, which is taken as `SELDOM` at least."""
HALF = 0.5
"""Doubt from which several frames are looked at."""


@dataclass(frozen=True)
class Usual:
    """What frames of this domain are like."""

    mean: Array
    """[channels], mean of the tap means of those that are not strange."""
    distances: Array
    """[n], log distances of the last frames, strange ones too, at most `MEMORY`."""
    first: Array
    """[n, channels], tap means of the domain's first frames, until there are `FIRST`; then empty."""
    aside: Array
    """[n] bool, which of the last frames were not learned from, at most `MEMORY`."""

    @property
    def doubt(self) -> float:
        """How many of the last frames lie aside, as a share of how many make another domain; 1 and more is one."""
        last, before = self.aside[-LAST:], self.aside[:-LAST]
        usual = max(SELDOM, float(before.mean())) if len(before) >= LAST else SELDOM
        limit = np.ceil(LAST * usual + CHANCE * np.sqrt(LAST * usual * (1 - usual)))
        return float(last.sum() / min(limit, LAST))


class Strange(Wrapper[Usual]):
    """Out of distribution is a frame whose taps lie far from those of the frames before it: no sum over their length
    tells more than that, and it costs nothing. It asks for the next frame at once, to know what it was."""

    name: ClassVar[str] = "strange"

    def __init__(self, context: Context, host: Method[Any]) -> None:
        super().__init__(context, host)
        channels = context.bundle.channels
        spread = context.bundle.source.get("taps.frame_std", np.full(channels, 0.5))
        self.variance = np.square(spread.astype(np.float64)) + 1e-6
        self.source = Delta.source()

    def start(self) -> Usual:
        channels = len(self.variance)
        return Usual(np.zeros(channels), np.zeros(0), np.zeros((0, channels), np.float32), np.zeros(0, bool))

    def compact(self, state: Wrapped[Usual]) -> Wrapped[Usual]:
        """Without the domain's first frames: what they said of it is known, if there were enough."""
        usual = state.own
        if 0 < len(usual.first) < FEWEST:
            usual = self.start()
        usual = replace(usual, mean=usual.mean.astype(np.float32), first=usual.first[:0])
        return Wrapped(compacted(self.host, state.host), usual)

    def look(self, state: Wrapped[Usual], frames: int, passed: int) -> int:
        wanted = super().look(state, frames, passed)
        if not self.host.needs or not state.own.aside[-1:].any():
            return wanted
        return max(wanted, min(LAST if state.own.doubt >= HALF else 1, frames))

    def step(self, state: Wrapped[Usual], seen: Observation) -> Step[Wrapped[Usual]]:
        if TAPS not in self.needs or seen.taps is None:
            return super().step(state, seen)
        usual, above = self._judged(state.own, seen.taps[0])
        if usual.doubt >= 1:
            usual, above = self._judged(self.start(), seen.taps[0])  # another domain
        rows = above <= ASIDE
        fallback = np.zeros((len(rows), 0)) if seen.logits is None else seen.logits
        step = step_on(self.host, state.host, seen, rows, fallback)
        sure = above > SURE
        events = (STRANGE,) * int(sure.sum())
        step = self._from_source(step, seen, sure) if events else step
        aside = None if rows.all() else ~rows
        return replace(step, state=Wrapped(step.state, usual), events=(*events, *step.events), aside=aside)

    def _from_source(self, step: Step[Any], seen: Observation, rows: Array) -> Step[Any]:
        """With source's answers to some frames, where the engine answered with something else: they stand."""
        if self.answers or seen.rehearse is None or seen.logits is None or seen.is_of(self.source):
            return step
        given = seen.rehearse(seen.frames[rows], self.source)
        assert given.logits is not None
        logits = seen.logits.copy()
        logits[rows] = given.logits
        features = None if seen.features is None else seen.features.copy()
        if features is not None and given.features is not None:
            features[rows] = given.features
        return replace(step, logits=logits, features=features, stands=rows)

    def _judged(self, usual: Usual, means: Array) -> tuple[Usual, Array]:
        """With more frames [n, channels], and how far above the usual each is, in standard deviations."""
        settled = len(usual.distances) and not len(usual.first)
        if settled:
            distances = log_distances(means, usual.mean, self.variance)
            known = np.concatenate([usual.distances, distances])[-MEMORY:]
            above = strangeness(distances, known)
            kept = means[above <= ASIDE]
            mean = usual.mean
            if len(kept):
                mean = mean + min(1.0, len(kept) / MEMORY) * (kept.mean(axis=0) - mean)
            usual = replace(usual, mean=mean, distances=known)
        else:
            block = np.concatenate([usual.first, means.astype(np.float32)])
            known, mean = among_themselves(block, self.variance)
            above = strangeness(known, known)[-len(means) :]
            if len(block) < FEWEST:
                above = np.zeros_like(above)
            enough = len(block) >= FIRST
            usual = Usual(mean, known[-MEMORY:], block[:0] if enough else block, usual.aside)
        return replace(usual, aside=np.concatenate([usual.aside, above > ASIDE])[-MEMORY:]), above


def log_distances(means: Array, centre: Array, variance: Array) -> Array:
    """[N], log of the mean squared distance of tap means [N, channels] from a centre, in units of `variance`."""
    made: Array = np.log((np.square(means - centre) / variance).mean(axis=1) + 1e-9)
    return made


def among_themselves(means: Array, variance: Array, rounds: int = 4) -> tuple[Array, Array]:
    """Log distances [N] of frames from where the bulk of them lies, and that place [channels].

    A frame that says itself where the place is lies nearer to it than a new one would: that is put right.
    """
    centre = np.median(means, axis=0).astype(np.float64)
    bulk = np.ones(len(means), bool)
    for _ in range(rounds):
        distances = log_distances(means, centre, variance)
        bulk = distances <= np.quantile(distances, BULK)
        centre = means[bulk].mean(axis=0, dtype=np.float64)
    count = max(2, int(bulk.sum()))
    distances = log_distances(means, centre, variance)
    return distances + np.where(bulk, -2 * np.log(1 - 1 / count), -np.log(1 + 1 / count)), centre


def strangeness(distances: Array, known: Array) -> Array:
    """How many standard deviations log distances [N] are above the middle of the domain's own among `known` [M]."""
    middle, near = np.quantile(known, [MIDDLE, NEAR])
    made: Array = (distances - middle) / max((middle - near) / STEP, NARROW)
    return made
