"""What a running device can tell about itself without labels: how strange its frames are, how often it is right.

It reads the looks that learning takes anyway. Where there are none, because nothing is learned, one frame in `EVERY` is
looked at for it alone. Source weights are asked about one frame in `COMPARED`. All of this is on the learning thread,
and on its budget; no answer is touched.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.methods.protocol import FEATURES, Observation
from edge_adapt.monitor.accuracy import Accuracy, Seen, labelled, offered
from edge_adapt.monitor.late import accuracy_interval
from edge_adapt.routing import scores

Array = NDArray[Any]

EVERY = 16
"""Frames answered unseen after which one is looked at."""
COMPARED = 4
"""One frame looked at in so many is given to the source weights too."""
RECENT, ENOUGH = 256, 32
"""Frames that the share of strange ones is over, and the fewest it is told from."""


class Gauge:
    """Thread-safe: the learning thread shows it looks, others bring labels and read."""

    def __init__(self, bundle: Bundle) -> None:
        """A bundle without thresholds, or without what an estimate needs, is gauged by what it has."""
        self._lock = threading.Lock()
        self._source = Delta.source()
        self._judge = scores.best(bundle)
        self._accuracy = Accuracy(bundle) if offered(bundle) else None
        self._seen: Seen | None = self._accuracy.init() if self._accuracy else None
        self._strange: deque[bool] = deque(maxlen=RECENT)
        self._frames = 0
        self._right = self._labelled = 0

    @property
    def needs(self) -> frozenset[str]:
        """What a look has to bring beside answers."""
        by_features = self._judge is not None and self._judge.score.name == scores.DEFAULT
        return frozenset({FEATURES}) if by_features or self._accuracy else frozenset()

    @property
    def reads(self) -> bool:
        """False if the bundle holds nothing to read a look by."""
        return self._judge is not None or self._accuracy is not None

    def after(self, looked: Observation, answers: Array) -> None:
        """Read one more look.

        Args:
            looked: with logits and what `needs` says, and `rehearse` if it was not given with source weights.
            answers: [N, K], logits as they leave the loop.
        """
        fine = _finite(answers, looked.features)
        asked, source = self._with_source(looked, fine)
        with self._lock:
            self._note(answers, looked.features, fine & ~asked, None)
            if source is not None:
                self._note(answers, looked.features, asked, source.logits)
                self._judged(source)

    def labelled(self, right: int, count: int) -> None:
        """Labels came for `count` frames that were answered, and so many answers were right."""
        with self._lock:
            self._right += right
            self._labelled += count
            if self._seen is not None:
                self._seen = labelled(self._seen, right, count)

    @property
    def strange(self) -> float | None:
        """Share of the latest frames that are stranger to the source model than its threshold; None: too few."""
        with self._lock:
            return float(np.mean(self._strange)) if len(self._strange) >= ENOUGH else None

    @property
    def estimate(self) -> dict[str, float] | None:
        """Accuracy in per cent: `value`, `low` and `high`, which hold the truth nine times of ten; None: not known.

        From a bundle that was exported without an estimate, from late labels alone.
        """
        with self._lock:
            found = self._accuracy.estimate(self._seen) if self._accuracy and self._seen else None
            if found is not None:
                return found.per_cent()
            return accuracy_interval(self._right, self._labelled) if self._labelled else None

    def _with_source(self, looked: Observation, fine: Array) -> tuple[Array, Observation | None]:
        """Which frames [N] were given to the source weights, and what these say; None if it was none of them."""
        if looked.is_of(self._source):
            return fine, _of(looked, fine)
        numbers = self._frames + np.arange(len(fine))
        self._frames += len(fine)
        asked: Array = fine & (numbers % COMPARED == 0)
        if asked.any() and looked.rehearse is not None:
            told = looked.rehearse(looked.frames[asked], self._source)
            if told.logits is not None and _finite(told.logits, told.features).all():
                return asked, told
        return np.zeros_like(fine), None

    def _note(self, answers: Array, features: Array | None, chosen: Array, source: Array | None) -> None:
        if self._accuracy is not None and self._seen is not None and features is not None and chosen.any():
            self._seen = self._accuracy.after(self._seen, answers[chosen], features[chosen], source)

    def _judged(self, source: Observation) -> None:
        if self._judge is not None and source.logits is not None:
            self._strange.extend(self._judge.strange(source.logits, source.features).tolist())


def _finite(logits: Array, features: Array | None) -> Array:
    """[N] bool."""
    fine = np.asarray(np.isfinite(logits).all(axis=1))
    return fine if features is None else np.logical_and(fine, np.isfinite(features).all(axis=1))


def _of(looked: Observation, chosen: Array) -> Observation:
    """Logits and features of some of its frames."""
    assert looked.logits is not None
    features = None if looked.features is None else looked.features[chosen]
    return Observation(looked.frames[chosen], looked.logits[chosen], features=features)
