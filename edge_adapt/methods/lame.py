"""LAME: correct the answers of a batch, not the network: similar features shall have similar answers.

Boudiaf et al., "Parameter-free Online Test-time Adaptation", CVPR 2022. It helps where neighbours in time are of one
class and destroys where they are not, so a gate lets it act on correlated streams alone; as published there is none.
On the device a frame that is the one before is left out: a stuck sensor is no correlated stream.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from edge_adapt.errors import ConfigError
from edge_adapt.methods.protocol import FEATURES, HEAD, LOGITS, Answered, Context, Method, Step, configured
from edge_adapt.methods.source import Source
from edge_adapt.methods.wrapper import Wrapped, Wrapper

Array = NDArray[Any]
Affinity = Literal["knn", "rbf", "linear"]

ITERATIONS, TOLERANCE = 100, 1e-8
LEAST_PROBABILITY = 1e-10
WINDOW = 32
"""Frames refined together on the device, where few arrive at once."""
ENOUGH = 64
"""Answers before the gate may open."""
SAME = 1e-5
"""Features are those of the same frame if they differ by less than this share of the largest."""


@dataclass(frozen=True, kw_only=True)
class LameConfig:
    """The paper's affinities; the gate is ours."""

    affinity: Affinity = "knn"
    neighbours: int = 5
    """Of `knn`: how many; of `rbf`: up to which one, itself counted, the distance sets the width."""
    window: int | None = None
    """Fewer frames than this are refined with those before them. None: 0 in reference mode, 32 on the device."""
    gate: bool | None = None
    """Act on correlated streams alone. None: not in reference mode, as published, but on the device."""
    correlated: float = 0.25
    """Gate: from this kappa on, of each predicted class with the one before it, the stream counts as correlated."""
    horizon: int = 256
    """Gate: frames that the kappa is taken over."""

    def __post_init__(self) -> None:
        if self.affinity not in get_args(Affinity):
            raise ConfigError(
                f"lame.affinity is {self.affinity!r}", remedy=f"known: {', '.join(get_args(Affinity))}"
            )
        for name, least in (("neighbours", 1), ("window", 0), ("horizon", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"lame.{name} is {value}, expected {least} or more", remedy="use the default")


@dataclass(frozen=True)
class Persistence:
    """How often a predicted class is that of the frame before; sums over a sliding horizon."""

    classes: Array
    """[K], how often each was predicted."""
    agreed: float = 0.0
    pairs: float = 0.0
    last: int | None = None
    seen: int = 0

    def after(self, predicted: Array, horizon: int) -> Persistence:
        """With N more predictions, integers in the order of their frames."""
        before = predicted[:1] if self.last is None else [self.last]
        weights = (1 - 1 / horizon) ** np.arange(len(predicted) - 1, -1, -1)
        paired = weights if self.last is not None else np.concatenate([[0.0], weights[1:]])
        kept = (1 - 1 / horizon) ** len(predicted)
        agrees = predicted == np.concatenate([before, predicted[:-1]])
        return Persistence(
            kept * self.classes + np.bincount(predicted, weights, len(self.classes)),
            kept * self.agreed + float(paired @ agrees),
            kept * self.pairs + float(paired.sum()),
            int(predicted[-1]),
            min(self.seen + len(predicted), horizon),
        )

    @property
    def kappa(self) -> float:
        """Cohen's kappa of neighbours: 0 for independent frames, however unequal the classes; 1 if all are alike.

        A stream of nothing but one class is 0: it may as well be a network that has collapsed.
        """
        if not self.pairs:
            return 0.0
        chance = float(np.square(self.classes / self.classes.sum()).sum())
        return (self.agreed / self.pairs - chance) / (1 - chance) if chance < 1 - 1e-9 else 0.0


@dataclass(frozen=True)
class LameState:
    """The last few frames, and what the gate goes by."""

    logits: Array
    """[at most window, K]."""
    features: Array
    """[at most window, D]."""
    persistence: Persistence
    acts: bool


class Lame(Wrapper[LameState]):
    """Around a method: its answers, refined."""

    name: ClassVar[str] = "lame"
    adds: ClassVar[frozenset[str]] = frozenset({LOGITS, FEATURES})
    demands: ClassVar[frozenset[str]] = frozenset({HEAD})

    def __init__(self, context: Context, host: Method[Any], config: LameConfig | None = None) -> None:
        super().__init__(context, host)
        self.config: LameConfig = configured(config or LameConfig(), context.settings)
        published = context.reference
        self.gated = not published if self.config.gate is None else self.config.gate
        self.window = (0 if published else WINDOW) if self.config.window is None else self.config.window
        self.takes_repeated = published
        manifest = context.bundle.manifest
        assert manifest.head is not None
        self.classes, self.width = manifest.outputs, manifest.head.width

    def start(self) -> LameState:
        return LameState(
            np.zeros((0, self.classes), np.float32),
            np.zeros((0, self.width), np.float32),
            Persistence(np.zeros(self.classes)),
            acts=not self.gated,
        )

    def watch(self, state: Wrapped[LameState], answered: Answered) -> Step[Wrapped[LameState]]:
        state, answered, events = self.watched_by_host(state, answered)
        features = self.features_of(answered)
        if not (np.isfinite(answered.logits).all() and np.isfinite(features).all()):
            return Step(state, answered.logits, (*events, "refused: answers are not finite"))
        fresh = self._fresh(state.own, features)
        if not fresh.any():
            return Step(state, answered.logits, events)
        newest = answered.logits[fresh]
        logits = np.concatenate([state.own.logits, newest])[-max(self.window, len(newest)) :]
        features = np.concatenate([state.own.features, features[fresh]])[-len(logits) :]
        own = self._seen(state.own, newest, logits, features)
        if own.acts != state.own.acts:
            events = (*events, "lame: on, the stream is correlated" if own.acts else "lame: off")
        state = Wrapped(state.host, own)
        if not own.acts:
            return Step(state, answered.logits, events)
        refined = refine(log_softmax(logits.astype(np.float64), axis=1), self.affinity(features))
        answers = answered.logits.astype(np.float32)
        answers[fresh] = np.log(np.maximum(refined[-len(newest) :], LEAST_PROBABILITY))
        return Step(state, answers, events)

    def _fresh(self, own: LameState, features: Array) -> Array:
        """[N] bool, False for a frame that is the one before: what a stuck sensor shows says nothing of its stream."""
        if self.takes_repeated:
            return np.ones(len(features), bool)
        before = np.concatenate([own.features[-1:] if len(own.features) else features[:1] + 1.0, features[:-1]])
        made: Array = np.abs(features - before).max(axis=1) > SAME * np.abs(features).max(axis=1)
        return made

    def _seen(self, own: LameState, answers: Array, logits: Array, features: Array) -> LameState:
        """Remember the last frames, and decide whether to act."""
        persistence, acts = own.persistence, own.acts
        if self.gated:
            persistence = persistence.after(answers.argmax(axis=1), self.config.horizon)
            enough = persistence.seen >= min(ENOUGH, self.config.horizon)
            acts = enough and persistence.kappa >= self.config.correlated
        keep = len(logits) - self.window if len(logits) > self.window else 0
        return replace(own, logits=logits[keep:], features=features[keep:], persistence=persistence, acts=acts)

    def affinity(self, features: Array) -> Array:
        """[N, N] for features [N, D]."""
        return {"knn": nearest, "rbf": gaussian, "linear": linear}[self.config.affinity](
            features, self.config.neighbours
        )


class LameAlone(Lame):
    """Around the frozen model: LAME as published."""

    requires: frozenset[str] = Lame.demands

    def __init__(self, context: Context) -> None:
        super().__init__(context, Source(replace(context, settings={})))


def refine(log_p: Array, affinity: Array) -> Array:
    """Probabilities Y [N, K] that stay near p and agree with their neighbours: Y = softmax(log p + W Y), repeated.

    Args:
        log_p: [N, K], log-probabilities of the network.
        affinity: W [N, N]; where it is not symmetric the iteration need not converge, and ends after 100 rounds.
    """
    p = np.exp(log_p)
    if len(p) < 2:
        return p
    fidelity = np.log(p + LEAST_PROBABILITY)
    y, energy = p, np.nan
    for _ in range(ITERATIONS):
        y = softmax(fidelity + affinity @ y, axis=1)
        before = energy
        energy = float((y * (np.log(np.maximum(y, 1e-20)) - fidelity - affinity @ y)).sum())
        if abs(energy - before) <= TOLERANCE * abs(before):
            break
    return y


def nearest(features: Array, neighbours: int) -> Array:
    """1 for the nearest few of each row, not counting itself; fewer where there are fewer."""
    apart = _distances(features)
    np.fill_diagonal(apart, np.inf)
    count = min(neighbours, len(features) - 1)
    made = np.zeros_like(apart)
    np.put_along_axis(made, np.argsort(apart, axis=1, kind="stable")[:, :count], 1.0, axis=1)
    return made


def gaussian(features: Array, neighbours: int) -> Array:
    """exp(-d^2 / 2 s^2), s the mean distance to the k-th nearest, itself counted; 1 throughout if all are alike."""
    apart = _distances(features)
    place = min(neighbours, len(features)) - 1
    width = max(float(np.sort(apart, axis=1)[:, place].mean()), 1e-6)
    made: Array = np.exp(-np.square(apart) / (2 * width**2))
    return made


def linear(features: Array, neighbours: int) -> Array:
    """Cosine similarity; `neighbours` is not used."""
    unit = _unit(features)
    made: Array = unit @ unit.T
    return made


def _distances(features: Array) -> Array:
    unit = _unit(features)
    made: Array = np.sqrt(np.maximum(2 - 2 * unit @ unit.T, 0))
    np.fill_diagonal(made, 0.0)  # rounding leaves up to 1e-8 under the root
    return made


def _unit(features: Array) -> Array:
    wide = features.astype(np.float64)
    made: Array = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return made
