"""Moments: re-estimate the statistics of every norm from the stream, forward only, and set them through the ports.

The source counts as some frames, so that a few target frames move little (Schneider et al., NeurIPS 2020). A dead zone
keeps everything still that has no cause to move. A change of domain shows in the taps, and starts the estimate anew.

Where labels come in runs, such as minutes of walking, the statistics of a few frames are those of their labels rather
than of the domain. The stream is then compared with what source gives for the labels that were answered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_adapt.delta import Delta
from edge_adapt.errors import ConfigError
from edge_adapt.methods.label_mix import LabelMix, breadth, noticed, runs
from edge_adapt.methods.protocol import CHANGE, SITES, TAPS, Answered, Context, Observation, Step, configured
from edge_adapt.probabilities import softmax

Array = NDArray[Any]

UNSETTLED = 10
"""While the ports still move much, deep taps move with them: only a change this many times larger is another domain."""

STALE = 1.1
"""Mean measured variance, in units of the stored one, above which the stored statistics are taken as outdated."""


@dataclass(frozen=True, kw_only=True)
class MomentsConfig:
    """Defaults from trials on CIFAR ResNets, severity 5; see the README."""

    period: int = 8
    """One frame in so many is looked at, in quiet times."""
    start: int = 256
    """After a change of domain every frame is looked at until so many were seen."""
    group: int = 8
    """At most so many frames are looked at before the ports are set again."""
    memory: int = 256
    """Frames that the estimate averages over."""
    source_count: float = 8.0
    """How many frames the source counts as."""
    dead_zone: float = 0.06
    """A site moves only as far as its channels, on average, differ from source by more than this: the root mean square
    of the shifts, in standard deviations, and of the changes of log-variance, over the square root of 2."""
    again: int = 128
    """So many frames after a change of domain are answered again with what was learned from all of their batch."""
    window: int = 8
    """Looked-at frames over which a change of domain is noticed."""
    alarm: float = 3.0
    """Mean squared distance of the window from the estimate, in units of its own noise, that is a change of domain."""
    labels: bool = True
    """Compare with source frames of the labels that were answered, as far as labels come in runs; needs a bundle with
    class statistics."""
    patience: float = 3.0
    """Where labels come in runs, frames in a window are alike and its noise is larger: the alarm rises by so many times
    itself, at most."""

    def __post_init__(self) -> None:
        for name in ("period", "start", "group", "memory", "window"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"moments.{name} is {getattr(self, name)}, expected 1 or more", remedy="use the default"
                )


@dataclass(frozen=True)
class MomentsState:
    """Everything, in a few vectors [channels], whatever the length of the stream."""

    mean: Array
    """E[x] over the frames since the last change of domain."""
    second: Array
    """E[x^2]."""
    spread: Array
    """Variance of one frame's mean about `mean`."""
    count: int
    """Frames in these averages, at most `memory`."""
    recent_mean: Array
    """The same two over the window; [1] while that is empty and the state was kept for another day."""
    recent_second: Array
    recent: int
    """Frames in the window, at most `window`."""
    seen: int
    """Frames looked at since the last change of domain."""
    delta: Delta
    expected: Array
    """[2, channels], E[x] and E[x^2] that source gives for the labels that were answered, over the same frames."""
    recent_expected: Array
    mix: LabelMix
    distance: float = 0.0
    """The window's distance from the estimate, as compared with `alarm`."""


class Moments:
    """Answers with ports that lag: they are set from frames already seen."""

    name: ClassVar[str] = "moments"
    requires: frozenset[str] = frozenset({SITES})
    needs: frozenset[str] = frozenset({TAPS})
    watches: frozenset[str] = frozenset()
    answers = False

    def __init__(self, context: Context, config: MomentsConfig | None = None) -> None:
        self.config: MomentsConfig = configured(config or MomentsConfig(), context.settings)
        bundle = context.bundle
        if not bundle.manifest.sites:
            raise ConfigError(
                f"bundle {bundle.manifest.name!r} has no norm site that `moments` could set",
                remedy="export it with --calibration, which gives every convolution a port",
            )
        channels = bundle.channels
        self.sizes = np.array([site.channels for site in bundle.manifest.sites])
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        self.source_mean = _vector(bundle.source.get("taps.mean"), channels, 0.0)
        self.source_second = _vector(bundle.source.get("taps.second"), channels, 1.0)
        self.source_variance = np.maximum(self.source_second - np.square(self.source_mean), 1e-6)
        # Where a site is moved to: source as it was measured. A network whose stored statistics are much narrower than
        # its source really is (an average that lagged in training) does better with what training normalised to.
        stale = float(self.source_variance.mean()) > STALE
        self.target_mean = np.zeros(channels) if stale else self.source_mean
        self.target_variance = np.minimum(self.source_variance, 1.0) if stale else self.source_variance
        self.source = np.stack([self.source_mean, self.source_second])
        self.prior = bundle.source.get("prior", np.full(bundle.manifest.outputs, 1 / bundle.manifest.outputs))
        by_class = bundle.source.get("taps.by_class") if self.config.labels else None
        self.by_class = None if by_class is None else by_class.astype(np.float64)
        self.source_spread = np.square(_vector(bundle.source.get("taps.frame_std"), channels, 0.5)) + 1e-6

    def init(self) -> MomentsState:
        zeros = np.zeros_like(self.source_mean)
        return MomentsState(
            mean=self.source_mean,
            second=self.source_second,
            spread=self.source_spread,
            count=0,
            recent_mean=zeros,
            recent_second=zeros,
            recent=0,
            seen=0,
            delta=Delta.source(),
            expected=self.source,
            recent_expected=np.zeros_like(self.source),
            mix=LabelMix.unseen(len(self.prior)),
        )

    def look(self, state: MomentsState, frames: int, passed: int) -> int:
        if state.seen < self.config.start or self.config.period == 1:
            return min(self.config.group, frames)
        return min(self.config.group, frames, passed // (self.config.period - 1))

    def step(self, state: MomentsState, seen: Observation) -> Step[MomentsState]:
        assert seen.taps is not None
        means, seconds = seen.taps
        if not (np.isfinite(means).all() and np.isfinite(seconds).all()):
            return Step(state, events=("refused: taps are not finite",))
        if self.by_class is not None and seen.logits is not None:
            if not np.isfinite(seen.logits).all():
                return Step(state, events=("refused: logits are not finite",))
            answers = softmax(seen.logits)
            expected = np.tensordot(answers, self.by_class, 1)
            state = replace(state, mix=noticed(state.mix, answers, self.config.memory))
        else:
            expected = np.broadcast_to(self.source, (len(means), *self.source.shape))
        frames = len(means)
        mean, second = means.mean(axis=0), seconds.mean(axis=0)
        state = self._slide(state, mean, second, expected.mean(axis=0), frames)
        state = replace(state, distance=self._distance(state))
        events: tuple[str, ...] = ()
        settled = state.seen >= self.config.start / 2
        calm = 1 + self.config.patience * self._runs(state)
        if state.distance > self.config.alarm * calm * (1 if settled else UNSETTLED):
            events = (CHANGE,)
            state = self._restart(state, mean, second, expected.mean(axis=0), frames)
        else:
            state = self._pool(state, means, mean, second, expected)
        return Step(replace(state, delta=self._ports(state)), events=events, again=self.again(state))

    def again(self, state: MomentsState) -> bool:
        """True while the ports still move so much that answers are worth giving again."""
        return state.seen <= self.config.again

    def watch(self, state: MomentsState, answered: Answered) -> Step[MomentsState]:
        return Step(state)

    def delta(self, state: MomentsState) -> Delta:
        return state.delta

    def compact(self, state: MomentsState) -> MomentsState:
        """Half the bytes and no window: on return, the first window is of that day."""
        return replace(
            state,
            mean=state.mean.astype(np.float32),
            second=state.second.astype(np.float32),
            spread=state.spread.astype(np.float32),
            expected=state.expected.astype(np.float32),
            recent_mean=np.zeros(1),
            recent_second=np.zeros(1),
            recent_expected=np.zeros((2, 1)),
            recent=0,
        )

    def _runs(self, state: MomentsState) -> float:
        """How far labels come in runs, 0 to 1; 0 where it cannot be told."""
        return 0.0 if self.by_class is None else runs(state.mix)

    def _slide(self, state: MomentsState, mean: Array, second: Array, expected: Array, frames: int) -> MomentsState:
        """Take the newest frames into the window."""
        window = self.config.window
        keep = (1 - 1 / window) ** frames if state.recent else 0.0
        return replace(
            state,
            recent_mean=keep * state.recent_mean + (1 - keep) * mean,
            recent_second=keep * state.recent_second + (1 - keep) * second,
            recent_expected=keep * state.recent_expected + (1 - keep) * expected,
            recent=min(state.recent + frames, 2 * window - 1),
        )

    def _distance(self, state: MomentsState) -> float:
        """Mean squared distance of window and estimate in units of its expectation; 1 where nothing changed."""
        if state.count < self.config.window or state.recent < self.config.window:
            return 0.0
        noise = state.spread * (1 / state.recent + 1 / state.count)
        labels = self._runs(state) * (state.recent_expected[0] - state.expected[0])
        return float(np.mean(np.square(state.recent_mean - state.mean - labels) / noise))

    def _restart(self, state: MomentsState, mean: Array, second: Array, expected: Array, frames: int) -> MomentsState:
        """Forget the old domain; the window is all that is known of the new one."""
        if frames < self.config.window:
            mean, second, frames = state.recent_mean, state.recent_second, self.config.window
            expected = state.recent_expected
        return replace(state, mean=mean, second=second, expected=expected, count=frames, seen=frames, recent=0)

    def _pool(self, state: MomentsState, means: Array, mean: Array, second: Array, expected: Array) -> MomentsState:
        """Average over the last `memory` frames, exactly while there are fewer."""
        frames, memory = len(means), self.config.memory
        # While the ports move much, what was seen before they did is worth less: forget the older half.
        # Never less than two such looks: an estimate that is replaced by the newest one swings with the ports.
        memory = int(max(2 * frames, np.clip(state.seen / 2, 32, memory)))
        rate = frames / min(state.count + frames, memory)
        slow = frames / (min(state.count + frames, memory) + memory / 4)
        labels = self._runs(state) * (expected[:, 0] - state.expected[0])
        deviation = np.square(means - state.mean - labels).mean(axis=0)
        return replace(
            state,
            mean=state.mean + rate * (mean - state.mean),
            second=state.second + rate * (second - state.second),
            expected=state.expected + rate * (expected.mean(axis=0) - state.expected),
            spread=state.spread + slow * (deviation - state.spread) if state.count else state.spread,
            count=min(state.count + frames, memory),
            seen=state.seen + frames,
        )

    def _ports(self, state: MomentsState) -> Delta:
        """Mix with the source by count, leave out what lies in the dead zone, and say it as scale and shift."""
        share = state.count / (state.count + self.config.source_count)
        in_runs = self._runs(state)
        if in_runs:
            # What one class shows says little of how the domain moves the others.
            share *= 1 - in_runs * (1 - breadth(state.mix, self.prior))
        mean = share * state.mean + (1 - share) * self.source_mean
        second = share * state.second + (1 - share) * self.source_second
        variance = np.maximum(second - np.square(mean), 1e-3 * self.source_variance)
        # What source would have given: for the same labels where they come in runs, else for its own mixture.
        reference, reference_second = self.source + share * in_runs * (state.expected - self.source)
        reference_variance = np.maximum(reference_second - np.square(reference), 1e-3 * self.source_variance)
        widened = np.log(variance / reference_variance)
        unit = np.sqrt(self.source_variance * np.minimum(1.0, variance / reference_variance))
        moved = (mean - reference) / unit
        distance = np.add.reduceat(np.square(moved) + np.square(widened) / 2, self.starts) / self.sizes
        weight = np.repeat(np.maximum(0, 1 - self.config.dead_zone / np.sqrt(distance + 1e-12)), self.sizes)
        # weight 0 leaves the site alone, weight 1 gives every channel the target's mean and variance.
        target = reference + weight * (self.target_mean - self.source_mean)
        widened = weight * (widened + np.log(self.source_variance / self.target_variance))
        scale = np.exp(-widened / 2)
        shift = target - scale * (reference + weight * (mean - reference))
        return Delta.of_ports(scale, shift)


def _vector(value: Array | None, size: int, default: float) -> Array:
    return np.full(size, default) if value is None else value.astype(np.float64)
