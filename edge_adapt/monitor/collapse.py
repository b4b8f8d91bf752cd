"""How many classes a model still answers: near none of them left is what a collapse looks like, and a burst too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.probabilities import entropy

Array = NDArray[Any]

CONSTANT = 0.2
"""Class entropy, as a share of ln K, below which answers are near-constant (AETTA's limit).
Of ten classes that is one with 0.83 to 0.92 of the answers or more, as the rest is one other class or all others."""


def class_entropy(shares: Array) -> float:
    """Entropy of class frequencies [K] as a share of ln K: 0 for one class alone, 1 for all alike."""
    total = float(shares.sum())
    if total <= 0 or len(shares) < 2:
        return 1.0
    return float(entropy(shares / total) / np.log(len(shares)))


@dataclass(frozen=True)
class Recent:
    """Class frequencies of the last answers, about `memory` of them."""

    shares: Array
    """[K], sums to 1 once anything was answered."""
    count: int = 0
    """Answers in it, at most `memory`."""
    memory: int = 128

    @classmethod
    def of(cls, classes: int, memory: int = 128) -> Recent:
        """Nothing answered yet."""
        return cls(np.zeros(classes), 0, memory)

    def after(self, answers: Array) -> Recent:
        """With some more answers [N], as class indices."""
        counts = np.bincount(answers, minlength=len(self.shares))
        count = min(self.count + len(answers), self.memory)
        share = min(1.0, len(answers) / count) if count else 0.0
        shares = self.shares + share * (counts / max(1, len(answers)) - self.shares)
        return Recent(shares, count, self.memory)

    @property
    def is_constant(self) -> bool:
        """True if there are enough answers to tell, and nearly all are of one class."""
        # Entropy is never below -log of the largest share, which most streams need no more than.
        if self.count < self.memory or -np.log(self.shares.max()) >= CONSTANT * np.log(len(self.shares)):
            return False
        return class_entropy(self.shares) < CONSTANT
