"""One bit for each number: exact bits, exact levels, exact sizes."""

from __future__ import annotations

import numpy as np
import pytest

from edge_adapt.adapters.one_bit import pack, size_bytes, unpack


@pytest.mark.parametrize("shape", [(3, 5), (64, 64, 3, 3), (1, 1), (7,)])
def test_signs_and_levels_come_back_bit_for_bit(shape):
    """Conformance 15: levels mean -+ 0.6745 sigma, the signs as they were."""
    values = np.random.default_rng(0).normal(0.3, 0.02, shape).astype(np.float32)
    packed = pack(values)
    found = unpack(packed)
    assert found.dtype == np.float32
    assert found.shape == shape
    mean, sigma = np.float32(values.mean(dtype=np.float64)), np.float32(values.std(dtype=np.float64))
    step = np.float32(sigma * np.float32(0.6745))
    expected = np.where(values >= mean, mean + step, mean - step)
    assert np.array_equal(found, expected)
    assert np.array_equal(np.unpackbits(packed.signs, count=values.size), (values >= mean).ravel())
    assert np.array_equal(unpack(pack(values)), found)


def test_a_constant_comes_back_exactly():
    values = np.full((4, 4), 0.1, np.float32)
    assert np.array_equal(unpack(pack(values)), values)


def test_a_normal_matrix_keeps_its_direction():
    """Of a normal matrix, signs keep sqrt(2 / pi) = 0.798 as cosine."""
    values = np.random.default_rng(1).normal(size=(200, 100)).astype(np.float32)
    found = unpack(pack(values))
    cosine = (values * found).sum() / np.linalg.norm(values) / np.linalg.norm(found)
    assert cosine == pytest.approx(0.798, abs=0.01)


def test_sizes():
    tensors = {"matrix": np.zeros((10, 10), np.float32), "vector": np.zeros(10, np.float32)}
    assert size_bytes(tensors, bits=32) == 440
    assert size_bytes(tensors, bits=1) == 13 + 8 + 40
    assert pack(tensors["matrix"]).nbytes == 21
