"""Mixed domains and classes in runs: what source tells of the frames near its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_adapt.guards.near import ENOUGH, LEAST, MIXED, NEAR, OFTEN, Near

CHANNELS, CLASSES, FRAMES = 40, 10, 32
VARIANCE = np.full(CHANNELS, 0.25)
FAR = np.full(FRAMES, 2 * NEAR)
CLOSE = np.full(FRAMES, 0.5 * NEAR)
MIXTURE = np.where(np.arange(FRAMES) % 4, 0.5, 2.0) * NEAR
"""Three frames in four are near."""
ALL = np.arange(FRAMES) % CLASSES
ONE = np.zeros(FRAMES, int)


def sharp(classes):
    return 8.0 * np.eye(CLASSES, dtype=np.float32)[classes]


def taps(width, frames=FRAMES):
    """Of frames that differ `width` times as much as those of source."""
    return np.random.default_rng(0).normal(1.0, width * np.sqrt(VARIANCE), (frames, CHANNELS))


def after(values):
    return Near.none(CLASSES).after(values, VARIANCE)


def compared(ours, plain, distance=MIXTURE, width=1.5):
    return after(taps(width)).compared(sharp(ours), sharp(plain), distance)


def test_frames_that_differ_much_from_one_another_are_of_mixed_domains():
    assert after(taps(1.1 * np.sqrt(MIXED))).mixed
    assert not after(taps(1.0)).mixed
    assert not after(taps(3.0, LEAST)).mixed  # one difference too few


def test_a_change_from_one_domain_to_another_is_no_mixture():
    moved = taps(0.8)
    moved[FRAMES // 2 :] += 3.0
    assert moved.var(axis=0).mean() > MIXED * VARIANCE.mean()
    assert not after(moved).mixed


def test_differences_are_those_of_all_frames_at_once_and_what_is_not_finite_is_left_out():
    values = taps(2.0)
    broken = np.full((1, CHANNELS), np.nan)
    parts = after(values[:17]).after(broken, VARIANCE).after(values[17:], VARIANCE)
    assert parts.frames == FRAMES - 1
    assert parts.apart == pytest.approx((np.square(np.diff(values, axis=0)) / VARIANCE).mean(axis=1).sum() / 2)


def test_few_classes_to_source_and_many_to_the_ports_are_of_few():
    assert compared(ALL, ONE).of_few(still=False)


@pytest.mark.parametrize(
    ("ours", "plain"), [(ALL, ALL), (ONE, ONE), (ONE, ALL)], ids=["both many", "both one", "ports fewer"]
)
def test_what_ports_do_not_make_broader_is_not(ours, plain):
    assert not compared(ours, plain).of_few(still=False)


def test_frames_far_from_source_are_no_evidence():
    assert not compared(ALL, ONE, FAR).of_few(still=False)
    few = np.where(np.arange(FRAMES) < ENOUGH - 1, CLOSE, FAR)
    assert not compared(ALL, ONE, few).of_few(still=False)


def test_one_domain_is_no_mixture_unless_it_was_found_so_before():
    for one in (compared(ALL, ONE, CLOSE), compared(ALL, ONE, width=0.8)):  # all are near, or all are alike
        assert not one.of_few(still=False) and one.of_few(still=True)


def test_answers_that_are_not_finite_are_left_out():
    ours = sharp(ALL)
    ours[0] = np.inf
    near = after(taps(1.5)).compared(ours, sharp(ONE), CLOSE)
    assert near.near == FRAMES - 1 and np.isfinite(near.ours).all()


def test_evidence_counts_half_in_the_next_verdict_while_it_stands_and_else_not_at_all():
    near = compared(ALL, ONE)
    still, over = near.begun_anew(still=True), near.begun_anew(still=False)
    assert still.near == near.near / 2 and np.allclose(still.plain, near.plain / 2) and over.near == 0
    assert still.frames == over.frames == 0
    assert (still.verdicts, over.verdicts) == (1, 2)


def test_source_is_asked_in_mixed_domains_and_more_and_more_seldom_where_that_finds_nothing():
    near, asked = after(taps(1.5)), []
    for verdict in range(1, 20):
        assert near.verdicts == verdict
        if near.asks:
            asked.append(verdict)
        near = replace(near, apart=1.5 * LEAST, frames=LEAST).begun_anew(still=False)
        assert near.known
    assert asked == [*range(1, OFTEN + 1), 8, 16]
    assert not after(taps(0.8)).asks
