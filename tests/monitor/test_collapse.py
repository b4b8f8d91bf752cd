"""Class entropy, and when answers are near-constant."""

from __future__ import annotations

import numpy as np
import pytest

from edge_adapt.monitor.collapse import Recent, class_entropy


def test_entropy_is_a_share_of_that_of_all_classes():
    assert class_entropy(np.ones(10)) == pytest.approx(1)
    assert class_entropy(np.eye(10)[3] * 7) == 0
    assert class_entropy(np.array([1, 1, 0, 0])) == pytest.approx(0.5)
    assert class_entropy(np.zeros(4)) == 1


def test_shares_are_exact_while_there_are_few():
    recent = Recent.of(3, memory=8).after(np.array([0, 0, 1])).after(np.array([2]))
    assert recent.shares == pytest.approx([0.5, 0.25, 0.25])
    assert recent.count == 4


@pytest.mark.parametrize(
    ("classes", "answers", "constant"),
    [
        (10, [4] * 128, True),
        (10, [4] * 127, False),
        (10, [4] * 96 + [5] * 32, False),
        (10, ([4] * 15 + [5]) * 8, True),
        (2, ([0] * 9 + [1]) * 13, False),
        (1000, list(range(1000)), False),
    ],
)
def test_near_constant(classes, answers, constant):
    assert Recent.of(classes).after(np.array(answers)).is_constant is constant


def test_one_by_one_is_close_to_all_at_once():
    answers = np.random.default_rng(0).integers(0, 4, 400)
    one = Recent.of(4)
    for answer in answers:
        one = one.after(np.array([answer]))
    assert one.shares == pytest.approx(np.full(4, 0.25), abs=0.12)
    assert one.shares.sum() == pytest.approx(1)
