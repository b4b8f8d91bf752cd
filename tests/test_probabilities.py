"""Softmax and entropy against scipy, and where logarithms and powers end."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats

from edge_adapt.probabilities import entropy, perplexity, softmax


def test_softmax_is_scipys_in_double_precision_for_any_shape():
    logits = np.random.default_rng(0).normal(0, 30, (3, 4, 5)).astype(np.float32)
    made = softmax(logits)
    assert made.dtype == np.float64
    np.testing.assert_allclose(made, special.softmax(logits.astype(np.float64), axis=-1), rtol=1e-12)


def test_large_logits_do_not_overflow():
    made = softmax(np.array([[1000.0, 1000.0], [0.0, np.log(3)]], np.float32))
    np.testing.assert_allclose(made, [[0.5, 0.5], [0.25, 0.75]], rtol=1e-6)


def test_entropy_is_scipys_in_nats_and_none_where_one_class_has_all():
    shares = np.random.default_rng(1).dirichlet(np.ones(6), 7)
    np.testing.assert_allclose(entropy(shares), stats.entropy(shares, axis=1), rtol=1e-12)
    assert entropy(np.array([0.0, 1.0, 0.0])) == 0
    assert entropy(np.full(10, 0.1)) == pytest.approx(np.log(10))


def test_perplexity_is_the_number_of_classes_that_are_alike():
    assert perplexity(np.array([0.25, 0.25, 0.0, 0.25, 0.25])) == pytest.approx(4)
    assert perplexity(np.array([0.0, 1.0, 0.0])) == pytest.approx(1)
