"""The error of a replay as the device itself would estimate it: what is told where nobody labelled the frames."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.protocol import Engine
from edge_adapt.errors import ConfigError
from edge_adapt.guards.default import taught_too
from edge_adapt.methods.protocol import FEATURES, LOGITS, Answered, Context, Method, Step
from edge_adapt.methods.wrapper import Wrapped, Wrapper
from edge_adapt.monitor.accuracy import ENOUGH, Accuracy
from edge_adapt.monitor.accuracy import labelled as with_labels
from edge_adapt.preprocess import Preprocess
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail

Array = NDArray[Any]

REHEARSED = 4
"""One frame in so many is given to the source weights too, aside from what is measured."""


class Overheard(Wrapper[None]):
    """Keeps what was answered since somebody last asked, and what the head was given for it."""

    name: ClassVar[str] = "overheard"
    adds: ClassVar[frozenset[str]] = frozenset({LOGITS, FEATURES})

    def __init__(self, context: Context, host: Method[Any]) -> None:
        super().__init__(context, host)
        self._answered: list[Answered] = []

    def start(self) -> None:
        return None

    def watch(self, state: Wrapped[None], answered: Answered) -> Step[Wrapped[None]]:
        state, answered, events = self.watched_by_host(state, answered)
        self._answered.append(answered)
        return Step(state, answered.logits, events)

    def taken(self) -> tuple[Array, Array] | None:
        """Logits [N, K] and features [N, D], and forget them; None from a host that does not give features."""
        answered, self._answered = self._answered, []
        features = [part.features for part in answered if part.features is not None]
        if len(features) < len(answered) or not answered:
            return None
        return np.concatenate([part.logits for part in answered]), np.concatenate(features)


class Estimated:
    """The estimate for one method over a stream: `add` after each of its batches, `row` at the end.

    `method` and `preprocess` stand for those that were given; without an estimate `row` says why.
    """

    def __init__(self, bundle: Bundle, engine: Engine, method: Method[Any], preprocess: Preprocess) -> None:
        self.method, self._preprocess = method, preprocess
        self._why: str | None = None
        self._frames = np.zeros(0)
        self._sums, self._weight = np.zeros(3), 0
        try:
            self._accuracy = Accuracy(bundle)
        except ConfigError as error:
            self._why = f"{error.what}; {error.remedy}"
            return
        self._state = self._accuracy.init()
        self._aside = Predictor(bundle, engine)  # counts its own passes
        self._heard = cast("Overheard", taught_too(Overheard, method)(Context(bundle, lambda: Tail(bundle)), method))
        self.method = self._heard

    def preprocess(self, images: Array) -> Array:
        """The frames that are answered next."""
        self._frames = self._preprocess(images)
        return self._frames

    def add(self, right: int = 0, labelled: int = 0) -> None:
        """Take note of the answers to the frames that were preprocessed last, and of late labels that came."""
        if self._why is not None:
            return
        heard = self._heard.taken()
        if heard is None:
            self._why = f"{self._heard.host.name} answers by itself and does not say what it gave the head"
            return
        logits, features = heard
        some = slice(0, len(logits), REHEARSED)
        source = np.full_like(logits, np.nan)
        source[some] = self._aside.rehearse(self._frames[some], Delta.source(), frozenset()).logits
        fine = np.isfinite(logits).all(axis=1) & np.isfinite(features).all(axis=1)
        asked = fine & np.isfinite(source).all(axis=1)
        self._state = self._accuracy.after(self._state, logits[fine & ~asked], features[fine & ~asked])
        self._state = self._accuracy.after(self._state, logits[asked], features[asked], source[asked])
        self._state = with_labels(self._state, right, labelled)
        found = self._accuracy.estimate(self._state)
        if found is not None:
            self._sums += np.array([found.value, found.low, found.high]) * len(logits)
            self._weight += len(logits)

    def row(self) -> dict[str, Any]:
        """`error_estimate` in per cent, the mean over the stream, or None and `error_estimate_why`."""
        if self._why is None and not self._weight:
            self._why = f"an estimate takes {ENOUGH} frames or more"
        if self._why is not None:
            return {"error_estimate": None, "error_estimate_why": self._why}
        value, low, high = (round(100 * (1 - share), 2) for share in self._sums / self._weight)
        return {"error_estimate": {"value": value, "low": high, "high": low}}


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """What to tell a person about rows without labels, one line each; the same reason once."""
    told: list[str] = []
    for row in rows:
        estimate = row.get("error_estimate")
        if estimate is not None:
            span = f"{estimate['low']:.1f} to {estimate['high']:.1f}"
            told.append(f"{row['method']}: error about {estimate['value']:.1f} % ({span}), estimated without labels")
        elif "error_estimate_why" in row:
            told.append(f"no labels, and no estimate of the error: {row['error_estimate_why']}")
    return list(dict.fromkeys(told))
