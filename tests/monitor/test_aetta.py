"""AETTA against numbers worked out by hand, and its hazard."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edge_adapt.monitor.aetta import Estimate, after, disagreement, diversity, estimated_error


def hot(classes, width: int = 10, height: float = 30.0) -> np.ndarray:
    """Logits that are certain of these classes."""
    return np.eye(width)[np.asarray(classes)] * height


def test_disagreement_counts_frames_and_passes():
    logits = hot([0, 1, 2, 3])
    dropped = np.stack([hot([0, 1, 2, 3]), hot([0, 1, 2, 4]), hot([5, 5, 2, 3])])
    assert disagreement(logits, dropped) == pytest.approx(3 / 12)


def test_diversity_is_one_for_all_classes_and_zero_for_one():
    assert diversity(hot(range(10))[None]) == pytest.approx(1, abs=1e-9)
    assert diversity(hot([3] * 10)[None]) == pytest.approx(0, abs=1e-9)
    assert diversity(hot([0, 1] * 5)[None]) == pytest.approx(math.log(2) / math.log(10), abs=1e-9)


def test_the_estimate_is_the_formula_of_the_paper():
    assert estimated_error(0.1, 0.8, 10) == pytest.approx(0.1 / 0.8**3)
    assert estimated_error(0.0, 0.9, 10) == 0
    assert estimated_error(0.9, 0.5, 10) == pytest.approx(0.9)


def test_nearly_one_class_and_some_disagreement_is_chance():
    """Conformance 16, first half: the estimate is 100 / K."""
    answers = [0] * 60 + [1] * 4
    dropped = np.stack([hot([0] * 56 + [1] * 8) for _ in range(10)])
    estimate = Estimate(error=0.9)
    for _ in range(20):
        estimate = after(estimate, hot(answers), dropped)
    assert disagreement(hot(answers), dropped) > 0
    assert estimate.accuracy == pytest.approx(1 / 10)


def test_exactly_one_class_without_disagreement_is_chance_too():
    """Conformance 16, second half: PDD / e^3 would be an error of zero."""
    constant = hot([0] * 64)
    dropped = np.stack([constant] * 10)
    assert disagreement(constant, dropped) == 0
    assert estimated_error(0.0, diversity(dropped), 10) == pytest.approx(0.9)
    assert after(Estimate(0.9), constant, dropped).error == pytest.approx(0.9)


def test_the_average_starts_at_the_disagreement_and_takes_two_fifths_of_the_new():
    logits = hot(range(10))
    dropped = np.stack([hot([1, 1, *range(2, 10)])])
    e = diversity(dropped)
    first = after(Estimate(), logits, dropped)
    assert first.error == pytest.approx(0.6 * 0.1 + 0.4 * 0.1 / e**3)
    second = after(first, logits, dropped)
    assert second.error == pytest.approx(0.6 * first.error + 0.4 * 0.1 / e**3)


@pytest.mark.parametrize(
    ("history", "reset"),
    [
        ((), False),
        ((0.19,), True),
        ((0.21,), False),
        ((0.8,) * 5 + (0.77,) * 5, True),
        ((0.8,) * 5 + (0.79,) * 5, False),
        ((0.8,) * 5 + (0.5,) * 4, False),
    ],
)
def test_when_to_reset(history, reset):
    assert Estimate(0.5, history).asks_for_reset is reset


def test_the_history_does_not_grow():
    estimate = Estimate()
    for _ in range(40):
        estimate = after(estimate, hot(range(10)), hot(range(10))[None])
    assert len(estimate.history) == 10
