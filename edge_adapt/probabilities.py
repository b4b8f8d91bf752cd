"""Softmax and entropy of plain arrays, in double precision; learners have their own, in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LEAST = 1e-30
"""A probability below this counts as this, in logarithms."""


def softmax(logits: Array) -> Array:
    """[..., K] -> the same, float64; the last axis sums to 1."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    made: Array = powers / powers.sum(axis=-1, keepdims=True)
    return made


def entropy(shares: Array) -> Array:
    """[..., K] -> [...], in nats."""
    made: Array = -(shares * np.log(np.maximum(shares, LEAST))).sum(axis=-1)
    return made


def perplexity(shares: Array) -> float:
    """[K] -> how many classes as frequent as one another would be as uncertain, 1 to K."""
    return float(np.exp(entropy(shares)))
