"""T3A: classify by prototypes, which the most certain answers of the stream make from the rows of the head.

Iwasawa & Matsuo, "Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization", NeurIPS 2021. An
answer depends on the frames that it is given with. Its logits are no measure of certainty: keep them out of gates.

Prototypes of length 1 forget how long the rows of the head are, and few supports of a corrupted class are poor ones:
on ResNet-8 the answers of a stream get 16 points worse. So on the device a gate lets prototypes speak only where the
head is unsure, and only while they say what the head says of the frames that it is sure of.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from edge_adapt.errors import ConfigError
from edge_adapt.methods.protocol import (
    CHANGE,
    FEATURES,
    HEAD,
    LOGITS,
    Answered,
    Context,
    Method,
    Observation,
    Step,
    configured,
)
from edge_adapt.methods.source import Source
from edge_adapt.methods.wrapper import Wrapped, Wrapper

Array = NDArray[Any]

LARGEST = 1e18
"""Squares of larger features are infinite."""
SURE = 0.9
"""Probability from which on the head counts as sure of a frame."""
ENOUGH = 64
"""Frames that the head is sure of, before the gate may open."""


@dataclass(frozen=True, kw_only=True)
class T3AConfig:
    """Default of the FOA paper's comparison; T3A's own choice is made by validation."""

    supports: int = 20
    """M, features kept of each class: those with the lowest entropy."""
    gate: bool | None = None
    """Keep out of what the head knows better. None: not in reference mode, as published, but on the device."""
    unsure: float = 0.5
    """Gate: prototypes answer where the head's largest probability is below this."""
    agree: float = 0.97
    """Gate: of the frames that the head is sure of, the share on which prototypes must agree with it."""
    horizon: int = 256
    """Gate: frames that the share is taken over."""

    def __post_init__(self) -> None:
        for name, least in (("supports", 1), ("horizon", ENOUGH)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"t3a.{name} is {getattr(self, name)}, expected {least} or more", remedy="use the default"
                )
        for name in ("unsure", "agree"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"t3a.{name} is {getattr(self, name)}, expected 0 to 1", remedy="use the default")


@dataclass(frozen=True)
class Supports:
    """Of constant size, whatever the length of the stream."""

    features: Array
    """[K, M, D], of length 1; 0 where there is none."""
    entropies: Array
    """[K, M] in nats, ascending; infinite where there is none."""
    agreed: float = 0.0
    """Of the last frames that the head was sure of, on how many prototypes agreed with it."""
    sure: float = 0.0
    """How many these were; older ones count less."""

    def with_(self, features: Array, logits: Array) -> Supports:
        """The most certain of these and N more: features [N, D], and logits [N, K] that say class and certainty."""
        log_p = log_softmax(logits.astype(np.float64), axis=1)
        entropies = -(np.exp(log_p) * log_p).sum(axis=1)
        predicted = logits.argmax(axis=1)
        kept, scores = self.features.copy(), self.entropies.copy()
        most = scores.shape[1]
        for label in np.unique(predicted):
            of_class = predicted == label
            ranked = np.concatenate([scores[label], entropies[of_class]])
            order = np.argsort(ranked, kind="stable")[:most]
            kept[label] = np.concatenate([kept[label], unit(features[of_class])])[order]
            scores[label] = ranked[order]
        return replace(self, features=kept, entropies=scores)

    def compared(self, certainty: Array, agrees: Array, horizon: int) -> Supports:
        """After N more answers of head and prototypes: certainty [N] of the head, and where the two agree [N]."""
        agrees = agrees[certainty >= SURE]
        kept = (1 - 1 / horizon) ** len(agrees)
        return replace(self, agreed=kept * self.agreed + float(agrees.sum()), sure=kept * self.sure + len(agrees))

    @property
    def prototypes(self) -> Array:
        """[K, D], the normalised sum of each class's supports; 0 for a class without any."""
        return unit(self.features.sum(axis=1))


class T3A(Wrapper[Supports]):
    """Around a method: its features, classified by prototypes. Emptied when the host sees a change of domain."""

    name: ClassVar[str] = "t3a"
    adds: ClassVar[frozenset[str]] = frozenset({LOGITS, FEATURES})
    demands: ClassVar[frozenset[str]] = frozenset({HEAD})

    def __init__(self, context: Context, host: Method[Any], config: T3AConfig | None = None) -> None:
        super().__init__(context, host)
        self.config: T3AConfig = configured(config or T3AConfig(), context.settings)
        self.gated = not context.reference if self.config.gate is None else self.config.gate
        source = context.bundle.source
        self.rows, self.bias = source["head.weight"], source["head.bias"]

    def start(self) -> Supports:
        """The rows of the head, each where the head itself would put it."""
        classes, width = self.rows.shape
        shape = classes, self.config.supports
        empty = Supports(np.zeros((*shape, width), np.float32), np.full(shape, np.inf))
        return empty.with_(self.rows, self.rows @ self.rows.T + self.bias)

    def step(self, state: Wrapped[Supports], seen: Observation) -> Step[Wrapped[Supports]]:
        step = super().step(state, seen)
        if CHANGE in step.events:
            return replace(step, state=Wrapped(step.state.host, self.start()))
        return step

    def watch(self, state: Wrapped[Supports], answered: Answered) -> Step[Wrapped[Supports]]:
        state, answered, events = self.watched_by_host(state, answered)
        features = self.features_of(answered)
        if not (np.isfinite(answered.logits).all() and np.abs(features).max(initial=0) < LARGEST):
            return Step(state, answered.logits, (*events, "refused: answers are not finite"))
        own = state.own.with_(features, answered.logits)
        logits = features @ own.prototypes.T
        if self.gated:
            own, logits = self._gate(own, answered.logits, logits)
        return Step(Wrapped(state.host, own), logits, events)

    def _gate(self, own: Supports, head: Array, prototypes: Array) -> tuple[Supports, Array]:
        """Whose logits stand, frame by frame; [N, K] each."""
        certainty = np.exp(log_softmax(head.astype(np.float64), axis=1).max(axis=1))
        own = own.compared(certainty, head.argmax(axis=1) == prototypes.argmax(axis=1), self.config.horizon)
        if own.sure < ENOUGH or own.agreed < self.config.agree * own.sure:
            return own, head
        return own, np.where((certainty < self.config.unsure)[:, None], prototypes, head)


class T3AAlone(T3A):
    """Around the frozen model: T3A as published."""

    requires: frozenset[str] = T3A.demands

    def __init__(self, context: Context) -> None:
        super().__init__(context, Source(replace(context, settings={})))


def unit(features: Array) -> Array:
    """Rows [N, D] of length 1; a row of zeros stays."""
    made: Array = features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    return made
