"""Accuracy from labels that came late: a share of few frames, and so an interval."""

from __future__ import annotations

from math import sqrt

Z = 1.6449
"""Quantile of the normal distribution for a two-sided interval of 90 %."""


def accuracy_interval(right: int, labelled: int, z: float = Z) -> dict[str, float]:
    """`value`, `low` and `high` in per cent: the score interval of Wilson, Probable Inference, JASA 1927.

    Args:
        right, labelled: counts; labelled above 0.
    """
    share = right / labelled
    spread = z * z / labelled
    middle = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / labelled + spread / (4 * labelled)) / (1 + spread)
    return {
        "value": round(100 * share, 2),
        "low": round(100 * max(0.0, middle - half), 2),
        "high": round(100 * min(1.0, middle + half), 2),
    }
