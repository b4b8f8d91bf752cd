"""Drift detectors: against river where it is installed, and what must hold of any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_adapt.errors import ConfigError, DataError
from edge_adapt.monitor.drift import Adwin, PageHinkley, Sums, Window

STEP_AT = 1000


def drifts(detector: Adwin | PageHinkley, values) -> list[int]:
    """Places at which the detector told a drift."""
    state, found = detector.init(), []
    for place, value in enumerate(values):
        state = detector.after(state, float(value))
        if state.drifted:
            found.append(place)
    return found


def step(size: float, seed: int = 0, noise: float = 0.1, length: int = 2 * STEP_AT) -> np.ndarray:
    """Noise about 0.5, and about another value from the middle on."""
    values = np.random.default_rng(seed).normal(0.5, noise, length)
    values[STEP_AT:] += size
    return values


STREAMS = {
    "step up": step(0.3),
    "step down": step(-0.3, 1),
    "small step": step(0.08, 2),
    "slope": np.random.default_rng(3).normal(0.5, 0.1, 3000) + np.linspace(0, 0.6, 3000),
    "coins": np.random.default_rng(4).random(3000) < np.repeat([0.2, 0.6, 0.3], 1000),
    "stationary": step(0.0, 5),
}


@pytest.mark.parametrize("name", STREAMS)
def test_page_hinkley_tells_what_river_tells(name):
    river = pytest.importorskip("river.drift", reason="the oracle, river, is not installed")
    oracle = river.PageHinkley(min_instances=30, delta=0.005, threshold=5.0, alpha=0.9999)
    expected = []
    for place, value in enumerate(STREAMS[name]):
        oracle.update(float(value))
        if oracle.drift_detected:
            expected.append(place)
    assert drifts(PageHinkley(threshold=5.0), STREAMS[name]) == expected


@pytest.mark.parametrize("name", STREAMS)
def test_adwin_tells_nearly_what_river_tells(name):
    """River looks at fewer cuts, and empties its window at a drift."""
    river = pytest.importorskip("river.drift", reason="the oracle, river, is not installed")
    oracle, ours = river.ADWIN(), Adwin()
    state, expected, found = ours.init(), [], []
    for place, value in enumerate(STREAMS[name]):
        oracle.update(float(value))
        state = ours.after(state, float(value))
        expected += [place] if oracle.drift_detected else []
        found += [place] if state.drifted else []
    assert bool(found) == bool(expected)
    if expected:
        assert abs(found[0] - expected[0]) <= 2 * ours.clock
    assert state.mean == pytest.approx(oracle.estimation, abs=0.06)


@pytest.mark.parametrize("detector", [Adwin(), PageHinkley(threshold=5.0)], ids=["adwin", "page_hinkley"])
def test_stationary_noise_gives_few_false_alarms(detector):
    alarms = sum(len(drifts(detector, step(0.0, seed))) for seed in range(8))
    assert alarms <= 1  # in 16,000 numbers


@pytest.mark.parametrize("detector", [Adwin(), PageHinkley(threshold=5.0)], ids=["adwin", "page_hinkley"])
@pytest.mark.parametrize("size", [0.3, -0.3])
def test_a_step_of_three_deviations_is_seen_soon(detector, size):
    for seed in range(3):
        found = drifts(detector, step(size, seed))
        assert found
        assert STEP_AT <= found[0] <= STEP_AT + 96


def test_adwin_forgets_what_came_before_the_step():
    state, detector = Adwin().init(), Adwin()
    for value in step(0.3, 0, noise=0.05):
        state = detector.after(state, value)
    assert state.mean == pytest.approx(0.8, abs=0.02)
    assert state.width <= STEP_AT + detector.clock


def test_the_window_is_bounded():
    detector = Adwin(longest=1000)
    state = detector.init()
    for value in np.random.default_rng(0).normal(0.5, 0.1, 5000):
        state = detector.after(state, value)
        assert state.width <= 1000
        assert len(state.sizes) <= detector.buckets * 10
    assert state.seen == 5000


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=100))
def test_buckets_sum_up_what_came(values):
    detector = Adwin(clock=1000)
    state = detector.init()
    for value in values:
        state = detector.after(state, value)
    assert state.width == len(values)
    assert state.mean == pytest.approx(np.mean(values), abs=1e-8)
    spread = state.spreads.sum() + state.sizes @ np.square(state.means - state.mean)
    assert spread == pytest.approx(np.square(np.array(values) - np.mean(values)).sum(), rel=1e-6, abs=1e-6)
    assert (np.diff(state.sizes) <= 0).all()


@pytest.mark.parametrize("detector", [Adwin(clock=1), PageHinkley(threshold=5.0)], ids=["adwin", "page_hinkley"])
def test_a_state_is_a_value(detector):
    """A state that was gone on from may be gone on from again, with the same outcome."""
    state = detector.init()
    for value in step(0.3, 0)[:1040]:
        kept, state = state, detector.after(state, value)
        if isinstance(kept, Window):
            before = kept.means.copy()
            detector.after(kept, 1e3)
            assert (kept.means == before).all()
        else:
            assert detector.after(kept, value) == state


def test_page_hinkley_starts_anew_after_a_drift():
    state, detector = Sums(), PageHinkley(threshold=5.0)
    for value in step(0.3)[: drifts(detector, step(0.3))[0] + 1]:
        state = detector.after(state, value)
    assert state == Sums(drifted=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("detector", [Adwin(), PageHinkley()], ids=["adwin", "page_hinkley"])
def test_what_is_no_number_is_refused(detector, value):
    with pytest.raises(DataError):
        detector.after(detector.init(), value)


@pytest.mark.parametrize(
    "made", [lambda: Adwin(delta=0), lambda: Adwin(clock=0), lambda: Adwin(longest=10), lambda: PageHinkley(keeps=0)]
)
def test_settings_that_make_no_sense_are_refused(made):
    with pytest.raises(ConfigError):
        made()
