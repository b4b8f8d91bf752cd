"""A method that does as it is told, and looks to give it: for tests of what stands around methods."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.methods.protocol import CUT, LOGITS, TAPS, Answered, Labelled, Observation, Step

CLASSES = 5


@dataclass(frozen=True)
class Count:
    """What the host was shown: frames, and answers."""

    frames: int = 0
    answers: int = 0
    delta: Delta = field(default_factory=Delta.source)


class Host:
    """Counts; its delta is what `deltas` says for the number of frames seen."""

    name = "host"
    requires: frozenset[str] = frozenset()
    needs = frozenset({TAPS, CUT})
    watches = frozenset({LOGITS})
    answers = False

    def __init__(self, deltas=lambda frames: None, correct=lambda logits: None) -> None:
        self.deltas, self.correct = deltas, correct

    def init(self) -> Count:
        return Count()

    def look(self, state: Count, frames: int, passed: int) -> int:
        return min(8, frames)

    def step(self, state: Count, seen: Observation) -> Step[Count]:
        assert np.isfinite(seen.frames).all()
        state = replace(state, frames=state.frames + len(seen.frames))
        delta = self.deltas(state.frames)
        return Step(state if delta is None else replace(state, delta=delta))

    def watch(self, state: Count, answered: Answered) -> Step[Count]:
        assert np.isfinite(answered.logits).all()
        return Step(replace(state, answers=state.answers + len(answered.logits)), self.correct(answered.logits))

    def delta(self, state: Count) -> Delta:
        return state.delta


class Taught(Host):
    """Learns from labels, too."""

    def learn_from(self, state: Count, labelled: Labelled) -> Step[Count]:
        return Step(replace(state, frames=-1))

    def predict(self, state: Count, cut: Any) -> Any:
        return np.zeros((len(cut), CLASSES))


def sharp(classes, height: float = 8.0) -> np.ndarray:
    return (np.eye(CLASSES)[np.asarray(classes)] * height).astype(np.float32)


def observed(bundle: Bundle, frames: int, seed: int = 0, *, shift: float = 0.0, classes=None, rehearse=None):
    """A look at frames of the source domain, or of one that is `shift` frame deviations away."""
    rng = np.random.default_rng(seed)
    spread = bundle.source["taps.frame_std"].astype(np.float64) + 1e-3
    mean = bundle.source["taps.mean"] + (rng.normal(size=(frames, bundle.channels)) + shift) * spread
    second = np.square(mean) + bundle.source["taps.second"] - np.square(bundle.source["taps.mean"])
    classes = rng.integers(0, CLASSES, frames) if classes is None else classes
    return Observation(
        rng.normal(size=(frames, 3, 16, 16)).astype(np.float32),
        sharp(classes),
        np.zeros((frames, 8, 16, 16), np.float32),
        (mean, second),
        rehearse=rehearse,
    )
