"""Routing accuracy and AUROC on numbers that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.routing import auroc, routed


def test_auroc_counts_pairs_and_halves_of_ties():
    usual, strange = np.array([0.0, 1, 2, 2]), np.array([2.0, 3, -1])
    expected = np.mean([(s > u) + 0.5 * (s == u) for s in strange for u in usual])
    assert auroc(usual, strange) == pytest.approx(expected)


def test_windows_go_to_the_nearest_centroid_of_first_halves():
    near = np.tile([[0.0, 0.0]], (8, 1))
    far = np.tile([[1.0, 0.0]], (8, 1))
    far[4:6] = 0  # its first window of two looks like the other domain
    made = routed({"near": near, "far": far}, 2)
    assert made["windows"] == 4 and made["accuracy"] == 0.75
    assert made["by_domain"] == {"near": 1.0, "far": 0.5}
    assert made["confused"] == [{"true": "far", "taken_for": "near", "windows": 1}]
