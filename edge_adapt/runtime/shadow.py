"""What would have been answered, while only source may answer: how often it differs, and how sure it would be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.delta import Delta
from edge_adapt.methods.protocol import Observation

Array = NDArray[Any]
EVERY = 8
"""One look in so many is run a second time."""
MEMORY = 32
"""Comparisons that the averages go over."""


@dataclass(frozen=True)
class Shadow:
    """Running averages over the latest comparisons. No label, so no accuracy."""

    looks: int = 0
    compared: int = 0
    agreement: float = 1.0
    """Share of frames that would have been answered with the same class."""
    gain: float = 0.0
    """Difference of mean confidence, learned less source."""

    def after(self, seen: Observation, own: Delta) -> Shadow:
        """With one more look, answered from source."""
        made = replace(self, looks=self.looks + 1)
        if self.looks % EVERY or seen.rehearse is None or seen.logits is None:
            return made
        ours = seen.rehearse(seen.frames, own).logits
        assert ours is not None
        count = min(self.compared + 1, MEMORY)
        same = float((ours.argmax(axis=1) == seen.logits.argmax(axis=1)).mean())
        gain = float((_confidence(ours) - _confidence(seen.logits)).mean())
        return replace(
            made,
            compared=self.compared + 1,
            agreement=self.agreement + (same - self.agreement) / count,
            gain=self.gain + (gain - self.gain) / count,
        )


def _confidence(logits: Array) -> Array:
    """Largest probability of each row."""
    made: Array = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    return made
