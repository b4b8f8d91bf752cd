"""A strange single frame is not learned from; strange frames one after the other are another domain, and are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_adapt.guards.rows import step_on
from edge_adapt.methods.protocol import TAPS, Context, Method, Observation, Step
from edge_adapt.methods.wrapper import Wrapped, Wrapper

Array = NDArray[Any]

STRANGE = "guard: strange frame"

WARM = 16
"""Frames of a domain before any of them can be strange."""
MEMORY = 64
"""Frames over which the usual is averaged."""
FACTOR, DEVIATIONS = 10.0, 6.0
"""Strange is a distance both so many times the usual, and so many mean deviations of its logarithm above it."""


@dataclass(frozen=True)
class Usual:
    """What frames of this domain are like."""

    mean: Array
    """[channels], mean of the frames' tap means."""
    level: float = 0.0
    """Mean log distance of a frame from it."""
    deviation: float = 0.5
    """Mean absolute deviation of that."""
    count: int = 0
    """Frames in these averages, at most `MEMORY`."""
    run: int = 0
    """Strange frames in a row, up to now."""


class Strange(Wrapper[Usual]):
    """Out of distribution is a frame whose taps lie far from those of the frames before it: no sum over their length
    tells more than that, and it costs nothing. It asks for the next frame at once, to know what it was."""

    name: ClassVar[str] = "strange"

    def __init__(self, context: Context, host: Method[Any]) -> None:
        super().__init__(context, host)
        channels = context.bundle.channels
        spread = context.bundle.source.get("taps.frame_std", np.full(channels, 0.5))
        self.variance = np.square(spread.astype(np.float64)) + 1e-6

    def start(self) -> Usual:
        return Usual(np.zeros_like(self.variance))

    def look(self, state: Wrapped[Usual], frames: int, passed: int) -> int:
        wanted = super().look(state, frames, passed)
        return max(1, wanted) if state.own.run and self.host.needs else wanted

    def step(self, state: Wrapped[Usual], seen: Observation) -> Step[Wrapped[Usual]]:
        if TAPS not in self.needs or seen.taps is None:
            return super().step(state, seen)
        means = seen.taps[0]
        odd = self._odd(state.own, means)
        strange, events = int(odd.sum()), ()  # type: tuple[int, tuple[str, ...]]
        usual = state.own
        if strange and strange * 2 >= len(odd) and strange + usual.run >= 2:
            odd, usual = np.zeros_like(odd), self.start()  # another domain
        elif strange:
            usual, events = replace(usual, run=usual.run + strange), (STRANGE,) * strange
        else:
            usual = replace(usual, run=0)
        fallback = np.zeros((len(odd), 0)) if seen.logits is None else seen.logits
        step = step_on(self.host, state.host, seen, ~odd, fallback)
        usual = self._seen(usual, means[~odd])
        return replace(step, state=Wrapped(step.state, usual), events=(*events, *step.events))

    def distance(self, usual: Usual, means: Array) -> Array:
        """[N], log of the mean squared distance of each frame's tap means from the usual; larger is stranger."""
        made: Array = np.log((np.square(means - usual.mean) / self.variance).mean(axis=1) + 1e-9)
        return made

    def _odd(self, usual: Usual, means: Array) -> Array:
        if usual.count < WARM:
            return np.zeros(len(means), bool)
        above = self.distance(usual, means) - usual.level
        odd: Array = above > max(np.log(FACTOR), DEVIATIONS * usual.deviation)
        return odd

    def _seen(self, usual: Usual, means: Array) -> Usual:
        """Take frames into the averages, exactly while there are few."""
        if not len(means):
            return usual
        count = min(usual.count + len(means), MEMORY)
        share = min(1.0, len(means) / count)
        mean = usual.mean + share * (means.mean(axis=0) - usual.mean)
        if not usual.count:
            return replace(usual, mean=mean, count=count)
        distances = self.distance(usual, means)
        level = usual.level if usual.level else float(distances.mean())
        return replace(
            usual,
            mean=mean,
            level=level + share * float(distances.mean() - level),
            deviation=usual.deviation + share * (float(np.abs(distances - level).mean()) - usual.deviation),
            count=count,
        )
