"""FOA: prompts for a frozen transformer, found without gradients, and features shifted back to where source had them.

Niu et al., "Test-Time Model Adaptation with Only Forward Passes", ICML 2024. `foa_shift` is the shift alone: one
pass, any network with a linear head. `foa` tries prompts on every batch, 28 passes, and answers with the best: its
answer depends on the step. Candidates of CMA-ES are judged by entropy and by how far the class token's moments behind
the norms are from source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.delta import PROMPTS as PROMPTS_TENSOR
from edge_adapt.delta import Delta
from edge_adapt.errors import ConfigError
from edge_adapt.methods import cma
from edge_adapt.methods.cma import CmaState
from edge_adapt.methods.label_mix import LabelMix, noticed, runs
from edge_adapt.methods.protocol import (
    CHANGE,
    FEATURES,
    HEAD,
    LOGITS,
    PROMPTS,
    TAPS,
    Answered,
    Context,
    Method,
    Observation,
    Step,
    configured,
)
from edge_adapt.methods.source import Source
from edge_adapt.methods.wrapper import Wrapped, Wrapper
from edge_adapt.probabilities import entropy, softmax

Array = NDArray[Any]

PATCH = 16
"""Side of a patch in the paper, from which the first prompts get their size."""
REFERENCE_BATCH = 64
"""Batch size that the weight of the moments is for."""


@dataclass(frozen=True, kw_only=True)
class ShiftConfig:
    """`strength` and `momentum` as published; the count is ours, for few frames at a time."""

    strength: float = 1.0
    momentum: float = 0.1
    """Reference mode: weight of the newest batch in the mean of the features."""
    memory: int = 256
    """Device: frames that this mean goes over."""
    source_count: float = 64.0
    """Device: how many frames the source counts as."""

    def __post_init__(self) -> None:
        if self.memory < 1 or self.source_count < 0:
            raise ConfigError(
                f"memory is {self.memory} and source_count {self.source_count}, expected 1 or more and 0 or more",
                remedy="use the defaults",
            )
        if not 0 < self.momentum <= 1:
            raise ConfigError(f"momentum is {self.momentum}, outside (0, 1]", remedy="use 0.1")


@dataclass(frozen=True)
class History:
    """Where the features of the target have been."""

    mean: Array
    """[D]."""
    count: int = 0
    """Frames in it, at most `memory`; 0 before the first."""
    labels: LabelMix | None = None
    """Which were answered; None where features are compared with those of all source, as published."""


class Shift:
    """z' = z + strength (mean of source - mean of the target so far), and its effect on the logits.

    On the device, where labels come in runs, a burst of one class would be shifted to look like all of them: there the
    mean of source is that of the classes that were answered.
    """

    def __init__(self, bundle: Bundle, config: ShiftConfig, *, published: bool) -> None:
        """Raises: ConfigError if the bundle does not know the features of its source."""
        self.config, self.published = config, published
        self.source_mean = calibrated(bundle, "features.mean").astype(np.float64)
        means = None if published else bundle.source.get("class.mean")
        self.class_means = None if means is None else means.astype(np.float64)
        self.rows = bundle.source["head.weight"].astype(np.float64)

    def start(self) -> History:
        classes = len(self.rows)
        return History(self.source_mean, labels=None if self.class_means is None else LabelMix.unseen(classes))

    def after(self, history: History, features: Array, logits: Array | None = None) -> History:
        """With N more frames [N, D], and what they were answered without the shift, [N, K].

        Published: an average of batches, which begins at the first one's mean.
        """
        mean, frames = features.mean(axis=0, dtype=np.float64), len(features)
        count = min(history.count + frames, self.config.memory)
        rate = self.config.momentum if self.published else frames / count
        rate = min(1.0, rate) if history.count else 1.0
        labels = history.labels
        if labels is not None and logits is not None and np.isfinite(logits).all():
            labels = noticed(labels, softmax(logits), self.config.memory)
        return History(history.mean + rate * (mean - history.mean), count, labels)

    def expected(self, history: History) -> Array:
        """[D], the mean of source's features: of all, or as far as labels come in runs, of those that were answered."""
        if self.class_means is None or history.labels is None or not history.labels.frames:
            return self.source_mean
        answered = history.labels.share @ self.class_means
        made: Array = self.source_mean + runs(history.labels) * (answered - self.source_mean)
        return made

    def offset(self, history: History) -> Array:
        """[K], what the shift adds to every frame's logits, for the head is linear; 0 before the first frame."""
        trust = 1.0 if self.published else history.count / (history.count + self.config.source_count)
        made: Array = self.rows @ (trust * self.config.strength * (self.expected(history) - history.mean))
        return made


class FoaShift(Wrapper[History]):
    """Around a method: its answers, moved by what the frames before them say. Forgets when the host sees a change."""

    name: ClassVar[str] = "foa_shift"
    adds: ClassVar[frozenset[str]] = frozenset({LOGITS, FEATURES})
    demands: ClassVar[frozenset[str]] = frozenset({HEAD})

    def __init__(self, context: Context, host: Method[Any], config: ShiftConfig | None = None) -> None:
        super().__init__(context, host)
        self.config: ShiftConfig = configured(config or ShiftConfig(), context.settings)
        self.shift = Shift(context.bundle, self.config, published=context.reference)

    def start(self) -> History:
        return self.shift.start()

    def step(self, state: Wrapped[History], seen: Observation) -> Step[Wrapped[History]]:
        step = super().step(state, seen)
        if CHANGE in step.events:
            return replace(step, state=Wrapped(step.state.host, self.start()))
        return step

    def watch(self, state: Wrapped[History], answered: Answered) -> Step[Wrapped[History]]:
        state, answered, events = self.watched_by_host(state, answered)
        features = self.features_of(answered)
        logits = answered.logits + self.shift.offset(state.own).astype(np.float32)
        if not np.isfinite(features).all():
            return Step(state, logits, (*events, "refused: features are not finite"))
        return Step(Wrapped(state.host, self.shift.after(state.own, features, answered.logits)), logits, events)


class FoaShiftAlone(FoaShift):
    """Around the frozen model."""

    requires: frozenset[str] = FoaShift.demands

    def __init__(self, context: Context) -> None:
        super().__init__(context, Source(replace(context, settings={})))


@dataclass(frozen=True, kw_only=True)
class FoaConfig(ShiftConfig):
    """Defaults as published for ImageNet-C, except that the covariance is diagonal."""

    prompts: int = 3
    population: int = 27
    """Candidates asked of CMA-ES for each batch; the best of the last batch is one more."""
    sigma: float = 1.0
    discrepancy: float = 0.4
    """Weight of the moments against the entropy."""
    covariance: str = "diagonal"
    """Or `full`: 42 MB twice, and seconds a batch, for 2304 numbers."""
    interval: int = 16
    """A generation ends after so many frames; batches that are smaller are gathered (the paper's interval variant)."""

    def __post_init__(self) -> None:
        ShiftConfig.__post_init__(self)
        for name, least in (("prompts", 1), ("population", 4), ("interval", 2)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"foa.{name} is {getattr(self, name)}, expected {least} or more", remedy="use the default"
                )
        if self.covariance not in ("diagonal", "full"):
            raise ConfigError(f"foa.covariance is {self.covariance!r}", remedy="known: diagonal, full")


@dataclass(frozen=True)
class Trial:
    """What the candidates of this generation cost so far: sums over its frames."""

    candidates: Array
    """[population + 1, prompts x width]; the last is the best of the generation before."""
    entropies: Array
    """[population + 1] in nats."""
    cls: Array
    """[population + 1, channels]: sum of the class token behind the norms, as far from source."""
    squares: Array
    """Likewise, of squares."""
    features: Array
    """[D], sum over frames of the mean over candidates."""
    frames: int = 0


@dataclass(frozen=True)
class FoaState:
    """Everything between two batches."""

    search: CmaState
    trial: Trial
    history: History
    delta: Delta
    """The best prompts of the last generation; source before the first."""


class Foa:
    """Prompts by CMA-ES, and the shift. Cost: population + 1 passes for every batch, no gradients."""

    name: ClassVar[str] = "foa"
    requires: frozenset[str] = frozenset({PROMPTS, HEAD})
    needs: frozenset[str] = frozenset({TAPS, FEATURES})
    watches: frozenset[str] = frozenset()
    answers = True

    def __init__(self, context: Context, config: FoaConfig | None = None) -> None:
        self.config: FoaConfig = configured(config or FoaConfig(), context.settings)
        bundle = context.bundle
        assert bundle.manifest.prompts is not None
        self.seed, self.width = context.seed, bundle.manifest.prompts
        self.shift = Shift(bundle, self.config, published=True)
        self.places = block_ends(bundle)
        self.source_mean = calibrated(bundle, "cls.mean")[self.places].astype(np.float64)
        self.source_std = calibrated(bundle, "cls.std")[self.places].astype(np.float64)

    def init(self) -> FoaState:
        size = self.config.prompts * self.width
        search = cma.start(np.zeros(size), self.config.sigma, diagonal=self.config.covariance == "diagonal")
        limit = math.sqrt(6 / (3 * PATCH**2 + self.width))
        first = np.random.default_rng(self.seed).uniform(-limit, limit, size)
        return FoaState(search, self._trial(search, first), self.shift.start(), Delta.source())

    def look(self, state: FoaState, frames: int, passed: int) -> int:
        return frames

    def watch(self, state: FoaState, answered: Answered) -> Step[FoaState]:
        return Step(state)

    def delta(self, state: FoaState) -> Delta:
        return state.delta

    def step(self, state: FoaState, seen: Observation) -> Step[FoaState]:
        assert seen.rehearse is not None
        assert seen.logits is not None
        if not np.isfinite(seen.frames).all():
            return Step(state, seen.logits, ("refused: frames are not finite",), seen.features)
        tried = [self._tried(state, seen, place) for place in range(self.config.population + 1)]
        trial = self._added(state.trial, tried)
        ends = trial.frames >= self.config.interval
        costs = self._costs(trial)
        if not (np.isfinite(costs).any() and np.isfinite(trial.features).all()):
            return Step(state, tried[-1].logits, ("refused: no candidate is finite",), tried[-1].features)
        best = int(np.where(np.isfinite(costs), costs, np.inf).argmin()) if ends else len(costs) - 1
        answer = tried[best]
        assert answer.logits is not None
        logits = answer.logits + self.shift.offset(state.history).astype(np.float32)
        state = self._next(state, trial, costs, best) if ends else replace(state, trial=trial)
        return Step(state, logits, features=answer.features)

    def _tried(self, state: FoaState, seen: Observation, place: int) -> Observation:
        """One candidate on these frames; the best so far was tried already, if the look was made with it."""
        if place == self.config.population and state.delta and seen.is_of(state.delta):
            return seen
        assert seen.rehearse is not None
        return seen.rehearse(seen.frames, self._delta(state.trial.candidates[place]))

    def _added(self, trial: Trial, tried: list[Observation]) -> Trial:
        cls = np.stack([one.cls for one in tried if one.cls is not None]).astype(np.float64)
        apart = cls[:, :, self.places] - self.source_mean
        logits = np.stack([one.logits for one in tried if one.logits is not None]).astype(np.float64)
        features = np.stack([one.features for one in tried if one.features is not None]).astype(np.float64)
        return replace(
            trial,
            entropies=trial.entropies + entropy(softmax(logits)).sum(axis=1),
            cls=trial.cls + apart.sum(axis=1),
            squares=trial.squares + np.square(apart).sum(axis=1),
            features=trial.features + features.mean(axis=0).sum(axis=0),
            frames=trial.frames + logits.shape[1],
        )

    def _costs(self, trial: Trial) -> Array:
        """Sum of entropies + discrepancy (sum of squares of what mean and std differ by) frames / 64."""
        frames = trial.frames
        mean = trial.cls / frames
        variance = np.maximum(trial.squares / frames - np.square(mean), 0) * frames / max(frames - 1, 1)
        apart = np.square(mean).sum(axis=1) + np.square(np.sqrt(variance) - self.source_std).sum(axis=1)
        made: Array = trial.entropies + self.config.discrepancy * apart * frames / REFERENCE_BATCH
        return made

    def _next(self, state: FoaState, trial: Trial, costs: Array, best: int) -> FoaState:
        """Another generation, with the best of this one in force."""
        search = cma.tell(state.search, trial.candidates, costs)
        winner = trial.candidates[best]
        history = self.shift.after(state.history, trial.features[None] / trial.frames)
        same = best == self.config.population and state.delta
        delta = state.delta if same else self._delta(winner)
        return FoaState(search, self._trial(search, winner), history, delta)

    def _trial(self, search: CmaState, incumbent: Array) -> Trial:
        rng = np.random.default_rng([self.seed % 2**63, search.generation])
        candidates = np.concatenate([cma.ask(search, self.config.population, rng), incumbent[None]])
        sums = np.zeros((len(candidates), len(self.places)))
        return Trial(candidates, np.zeros(len(candidates)), sums, sums, np.zeros_like(self.shift.source_mean))

    def _delta(self, candidate: Array) -> Delta:
        return Delta({PROMPTS_TENSOR: candidate.reshape(self.config.prompts, self.width)})


def calibrated(bundle: Bundle, name: str) -> Array:
    """What calibration measured. Raises: ConfigError if the bundle was exported without it."""
    if name not in bundle.source:
        raise ConfigError(
            f"bundle {bundle.manifest.name!r} holds no {name}: how its source looks was not measured",
            remedy="export it again with --calibration and this version of edge-adapt",
        )
    return bundle.source[name]


def block_ends(bundle: Bundle) -> Array:
    """Where in `cls` stand the norms that each block's output meets: the next block's first, and the last of all.

    A block has two norms, in the order of the network; the first block's first sees no image yet. Integers [channels].
    """
    places, start, parts = [site for site in bundle.manifest.sites if site.kind == "layer_norm"], 0, []
    for number, site in enumerate(places):
        if number and number % 2 == 0:
            parts.append(np.arange(start, start + site.channels))
        start += site.channels
    if not parts:
        raise ConfigError(
            f"bundle {bundle.manifest.name!r} has {len(places)} layer norms, expected two a block and one at the end",
            remedy="use foa_shift",
        )
    return np.concatenate(parts)
