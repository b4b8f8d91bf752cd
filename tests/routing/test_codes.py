"""Packed signs against plain sums of signs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_adapt.errors import DataError
from edge_adapt.routing import codes


@given(width=st.integers(1, 70), seed=st.integers(0, 99))
def test_similarity_is_the_mean_product_of_signs(width, seed):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(5, width)), rng.normal(size=(3, width))
    expected = np.where(first > 0, 1, -1) @ np.where(second > 0, 1, -1).T / width
    assert codes.similarity(codes.packed(first), codes.packed(second), width) == pytest.approx(expected, abs=1e-6)


def test_the_table_counts_like_numpy():
    every = np.arange(256, dtype=np.uint8)
    expected = [bin(value).count("1") for value in range(256)]
    assert codes.ones(every).tolist() == expected
    assert codes._ONES.tolist() == expected


def test_many_codes_are_compared_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    first, second = (codes.packed(rng.normal(size=(count, 64))) for count in (9, 4))
    whole = codes.similarity(first, second, 64)
    monkeypatch.setattr(codes, "_AT_ONCE", 1)
    assert np.array_equal(codes.similarity(first, second, 64), whole)


def test_codes_of_another_width_are_refused():
    with pytest.raises(DataError, match="64 signs take 8"):
        codes.similarity(np.zeros((1, 8), np.uint8), np.zeros((1, 4), np.uint8), 64)
