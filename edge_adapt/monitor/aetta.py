"""AETTA: the accuracy of an adapting model, estimated from answers alone.

Lee, Chottananurak, Gong & Lee, "AETTA: Label-Free Accuracy Estimation for Test-Time Adaptation", CVPR 2024. Answers
that change under dropout are uncertain; answers that are all of one class are worth less than they seem.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

EXPONENT = 3
COLLAPSED = 0.2
"""Class entropy, as a share of ln K, below which the error is taken to be that of chance: a model that answers one
class with or without dropout disagrees with itself nowhere, and the formula would call it perfect."""
NEW = 0.4
"""Weight of the newest error in the average."""
LOW, DROP, HALF = 0.2, 0.02, 5
"""Reset at an accuracy below this, or where the mean of so many estimates fell by this from that of as many before."""


@dataclass(frozen=True)
class Estimate:
    """What is remembered from window to window."""

    error: float | None = None
    """Average of the errors so far, 0 to 1; None before the first window."""
    history: tuple[float, ...] = ()
    """Accuracies after the last windows, at most twice `HALF`."""

    @property
    def accuracy(self) -> float | None:
        """0 to 1."""
        return None if self.error is None else 1 - self.error

    @property
    def asks_for_reset(self) -> bool:
        """True if the accuracy is very low, or fell. Whoever resets starts a new estimate."""
        if not self.history:
            return False
        if self.history[-1] < LOW:
            return True
        if len(self.history) < 2 * HALF:
            return False
        before, now = np.mean(self.history[:HALF]), np.mean(self.history[HALF:])
        return bool(now + DROP < before)


def disagreement(logits: Array, dropped: Array) -> float:
    """PDD: share of (frame, pass) whose class is not that of the answer.

    Args:
        logits: [N, K], the answers.
        dropped: [passes, N, K], the same frames with dropout; 10 passes in the paper.
    """
    return float((dropped.argmax(axis=2) != logits.argmax(axis=1)).mean())


def diversity(dropped: Array) -> float:
    """e: entropy of the mean softmax over passes and frames, as a share of ln K."""
    weights = np.exp(dropped - dropped.max(axis=2, keepdims=True))
    mean = (weights / weights.sum(axis=2, keepdims=True)).mean(axis=(0, 1))
    return float(-(mean * np.log(np.maximum(mean, 1e-30))).sum() / np.log(len(mean)))


def estimated_error(pdd: float, e: float, classes: int) -> float:
    """err = PDD / e^3, at most that of chance, and that of chance if hardly any class is left."""
    chance = 1 - 1 / classes
    if e < COLLAPSED:
        return chance
    return min(pdd / e**EXPONENT, chance)


def after(estimate: Estimate, logits: Array, dropped: Array) -> Estimate:
    """With one more window of frames, 64 or more; arguments as in `disagreement`."""
    pdd = disagreement(logits, dropped)
    error = estimated_error(pdd, diversity(dropped), logits.shape[1])
    old = pdd if estimate.error is None else estimate.error
    mixed = (1 - NEW) * old + NEW * error
    return Estimate(mixed, (*estimate.history, 1 - mixed)[-2 * HALF :])
