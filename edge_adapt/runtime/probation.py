"""Probation: an adapter from outside answers, and is compared with the model as exported until it is trusted.

The evidence is that of the watchdog's trials (`guards/trial.py`): no label, a few frames of each look run twice more.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.guards.trial import AGREE, EACH, Trial
from edge_adapt.methods.protocol import Observation


class Verdict(Enum):
    """What came of it so far."""

    OPEN = "open"
    PASSED = "passed"
    FAILED = "failed"


@dataclass(frozen=True)
class Probation:
    """An adapter on trial. A value, like everything that is learned."""

    bundle: Bundle
    looks: int
    """Looks after which it is trusted, if nothing spoke against it; but never before one trial is complete."""
    fallback: str
    """Slot that answers when it fails."""
    trial: Trial = field(default_factory=Trial.empty)
    seen: int = 0
    judged: int = 0
    """Trials that spoke for it."""
    verdict: Verdict = Verdict.OPEN
    reason: str = ""

    def after(self, seen: Observation, given: Delta, source: Delta) -> Probation:
        """With the evidence of one more look. Each complete trial is judged; one that fails ends it."""
        assert seen.rehearse is not None
        frames = seen.frames[:EACH]
        ours, plain = (seen.rehearse(frames, delta) for delta in (given, source))
        assert ours.logits is not None
        assert plain.logits is not None
        if not np.isfinite(ours.logits).all():
            return replace(self, verdict=Verdict.FAILED, reason="its answers are not finite")
        trial = self.trial.with_answers(ours.logits, plain.logits).with_taps(ours.taps, plain.taps)
        trial = trial.with_certainty(ours.logits, plain.logits)
        made = replace(self, trial=trial, seen=self.seen + 1)
        if trial.is_complete:
            made = made._judged()
        if made.verdict is Verdict.OPEN and made.judged and made.seen >= self.looks:
            return replace(made, verdict=Verdict.PASSED)
        return made

    def _judged(self) -> Probation:
        trial, bundle = self.trial, self.bundle
        if trial.collapsed(bundle.manifest.outputs):
            return replace(self, verdict=Verdict.FAILED, reason="it answers one class where source answers many")
        if trial.agreement < AGREE:
            share = f"{trial.agreement:.0%} of the frames that source is surest of, {AGREE:.0%} are asked"
            return replace(self, verdict=Verdict.FAILED, reason=f"it agrees on {share}")
        if trial.unsure:
            return replace(self, verdict=Verdict.FAILED, reason="it leaves little of the certainty of source's answers")
        if self._is_strange(trial):
            return replace(self, verdict=Verdict.FAILED, reason="it makes activations stranger than source does")
        return replace(self, trial=Trial.empty(), judged=self.judged + 1)

    def _is_strange(self, trial: Trial) -> bool:
        if not trial.tapped or "taps.mean" not in self.bundle.source:
            return False
        starts = np.array([place.start for place in self.bundle.slices.values()])
        source = self.bundle.source
        return trial.strange_taps(source["taps.mean"], source["taps.second"], starts)

