"""Label mix, and moments under labels that come in runs."""

from __future__ import annotations

import numpy as np
import pytest

from edge_adapt.methods.label_mix import LabelMix, breadth, noticed, runs
from edge_adapt.methods.moments import Moments
from edge_adapt.methods.protocol import Context, Observation

UNIFORM = np.full(5, 0.2)


def after(labels: np.ndarray, memory: int = 256, group: int = 8) -> LabelMix:
    mix = LabelMix.unseen(5)
    for start in range(0, len(labels), group):
        mix = noticed(mix, np.eye(5)[labels[start : start + group]], memory)
    return mix


def test_a_shuffled_stream_has_no_runs_and_a_sorted_one_has():
    labels = np.random.default_rng(0).integers(0, 5, 256)
    assert runs(after(labels)) < 0.2
    assert runs(after(np.sort(labels))) > 0.9


def test_a_class_that_swallows_the_others_is_no_run():
    """80 % of one class, in random order: many neighbours agree, and no more than by chance."""
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(1024) < 0.8, 3, rng.integers(0, 5, 1024))
    assert runs(after(labels, memory=1024)) < 0.25


def test_one_class_alone_is_taken_for_a_run():
    assert runs(LabelMix.unseen(5)) == 1.0
    assert runs(after(np.full(40, 2))) == pytest.approx(1.0)


def test_it_does_not_matter_how_many_come_together():
    labels = np.random.default_rng(1).integers(0, 5, 64)
    one, many = after(labels, group=1), after(labels, group=16)
    np.testing.assert_allclose(one.share, many.share)
    assert one.agreement == pytest.approx(many.agreement, abs=0.05)


def test_breadth_counts_classes_against_the_prior():
    assert breadth(after(np.arange(100) % 5), UNIFORM) == pytest.approx(1)
    assert breadth(after(np.arange(100) % 2), UNIFORM) == pytest.approx(2 / 5)
    skewed = np.array([0.96, 0.01, 0.01, 0.01, 0.01])
    assert breadth(after(np.zeros(100, int)), skewed) > 0.7


def play(bundle, labels, *, aware: bool, shift: float = 0.0) -> Moments:
    """Frames that are just what source gives for their class, plus one and the same shift of every channel."""
    method = Moments(Context(bundle, lambda: None, 0, {"labels": aware, "dead_zone": 0.0}))
    by_class = bundle.source["taps.by_class"].astype(np.float64)
    state = method.init()
    noise = np.random.default_rng(0).normal(0, 1e-3, (len(labels), bundle.channels))
    events = []
    for start in range(0, len(labels), 8):
        rows = labels[start : start + 8]
        mean, second = by_class[rows].transpose(1, 0, 2)
        mean, second = mean + noise[start : start + 8] + shift, second + 2 * shift * mean + shift**2
        seen = Observation(np.zeros((len(rows), 1)), 20 * np.eye(5)[rows], taps=(mean, second))
        step = method.step(state, seen)
        state, events = step.state, [*events, *step.events]
    return method, state, events


def moved(state, bundle) -> float:
    from edge_adapt.delta import PORT_SCALE, PORT_SHIFT

    if PORT_SCALE not in state.delta:
        return 0.0
    return float(np.abs(state.delta[PORT_SCALE] - 1).mean() + np.abs(state.delta[PORT_SHIFT]).mean())


def test_runs_of_source_labels_move_no_port(device_bundle):
    labels = np.repeat([0, 3], 120)
    _, state, events = play(device_bundle, labels, aware=True)
    _, plain, _ = play(device_bundle, labels, aware=False)
    assert moved(state, device_bundle) < 0.1 * moved(plain, device_bundle)
    assert events == []


def test_a_real_shift_still_shows_through_runs(device_bundle):
    labels = np.repeat([0, 3, 1, 2, 4], 48)
    _, state, _ = play(device_bundle, labels, aware=True, shift=0.5)
    residual = state.mean - state.expected[0]
    assert float(np.mean(residual)) == pytest.approx(0.5, abs=0.05)
    assert moved(state, device_bundle) > 0.2


def test_without_class_statistics_nothing_is_other_than_before(device_bundle):
    labels = np.repeat([0, 3], 40)
    method, state, _ = play(device_bundle, labels, aware=False)
    assert np.array_equal(state.expected, method.source)
    assert state.mix.frames == 0
