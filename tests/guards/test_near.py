"""Mixed domains and classes in runs: what source tells of the frames near its own."""

from __future__ import annotations

import numpy as np
import pytest

from edge_adapt.guards.near import ENOUGH, LEAST, MIXED, NEAR, Near

CHANNELS, CLASSES, FRAMES = 6, 10, 32
VARIANCE = np.full(CHANNELS, 0.25)
FAR = np.full(FRAMES, 2 * NEAR)
CLOSE = np.full(FRAMES, 0.5 * NEAR)
MIXTURE = np.where(np.arange(FRAMES) % 4, 0.5, 2.0) * NEAR
"""Three frames in four are near."""
ALL = np.arange(FRAMES) % CLASSES
ONE = np.zeros(FRAMES, int)


def sharp(classes):
    return 8.0 * np.eye(CLASSES, dtype=np.float32)[classes]


def compared(ours, plain, distance=MIXTURE):
    return mixed(1.5).compared(sharp(ours), sharp(plain), distance)


def mixed(width, frames=FRAMES):
    """After frames whose tap means differ `width` times as much as those of source."""
    taps = np.random.default_rng(0).normal(1.0, width * np.sqrt(VARIANCE), (frames, CHANNELS))
    return Near.none(CHANNELS, CLASSES).after(taps)


def test_spread_is_that_of_all_frames_at_once_in_units_of_source():
    taps = np.random.default_rng(1).normal(3.0, 1.0, (40, CHANNELS))
    parts = Near.none(CHANNELS, CLASSES).after(taps[:17]).after(taps[17:])
    assert parts.spread(VARIANCE) == pytest.approx((taps.var(axis=0, ddof=1) / VARIANCE).mean(), rel=1e-9)


def test_few_frames_have_no_spread_and_those_not_finite_do_not_count():
    near = mixed(3.0, LEAST - 1)
    assert near.spread(VARIANCE) == 0.0
    assert near.after(np.full((1, CHANNELS), np.nan)).frames == LEAST - 1


def test_few_classes_to_source_and_many_to_the_ports_are_of_few():
    assert compared(ALL, ONE).of_few(VARIANCE, still=False)


@pytest.mark.parametrize(
    ("ours", "plain"), [(ALL, ALL), (ONE, ONE), (ONE, ALL)], ids=["both many", "both one", "ports fewer"]
)
def test_what_ports_do_not_make_broader_is_not(ours, plain):
    assert not compared(ours, plain).of_few(VARIANCE, still=False)


def test_frames_far_from_source_are_no_evidence():
    assert not compared(ALL, ONE, FAR).of_few(VARIANCE, still=False)
    barely = np.where(np.arange(FRAMES) < ENOUGH, CLOSE, FAR)  # enough of them, but most lie far
    assert not compared(ALL, ONE, barely).of_few(VARIANCE, still=False)
    assert compared(ALL, ONE, barely).of_few(VARIANCE, still=True)  # once it is so, less is enough to stay with it


def test_where_frames_are_alike_no_domains_are_mixed():
    evidence = (sharp(ALL), sharp(ONE), MIXTURE)
    assert not mixed(0.8).compared(*evidence).of_few(VARIANCE, still=False)
    assert mixed(0.8).compared(*evidence).of_few(VARIANCE, still=True)


def test_where_all_frames_are_near_it_is_one_mild_domain():
    assert not compared(ALL, ONE, CLOSE).of_few(VARIANCE, still=False)
    assert compared(ALL, ONE, CLOSE).of_few(VARIANCE, still=True)


def test_answers_that_are_not_finite_are_left_out():
    ours = sharp(ALL)
    ours[0] = np.inf
    near = Near.none(CHANNELS, CLASSES).compared(ours, sharp(ONE), CLOSE)
    assert near.near == FRAMES - 1 and np.isfinite(near.ours).all()


def test_evidence_counts_half_in_the_next_verdict_while_it_stands_and_else_not_at_all():
    near = compared(ALL, ONE)
    still, over = near.begun_anew(VARIANCE, still=True), near.begun_anew(VARIANCE, still=False)
    assert still.near == near.near / 2 and np.allclose(still.plain, near.plain / 2) and over.near == 0
    assert still.frames == over.frames == 0


def test_mixed_domains_are_remembered():
    once = mixed(1.5 * np.sqrt(MIXED)).begun_anew(VARIANCE, still=False)
    assert once.mixed and once.begun_anew(VARIANCE, still=False).mixed
    assert not mixed(0.8).begun_anew(VARIANCE, still=False).mixed
