"""Accuracy without labels: the signals against plain arithmetic, and what the interval has to do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_adapt.errors import ConfigError, DataError
from edge_adapt.monitor.accuracy import (
    COMPARED,
    ENOUGH,
    FEWEST,
    LATEST,
    MEMORY,
    PASSES,
    RATE,
    SEED,
    WEIGHTS,
    WORTH,
    Accuracy,
    Interval,
    Signals,
    bounds,
    compared,
    labelled,
    softmax,
)

K, D = 5, 16


@pytest.fixture(scope="module")
def bundle(device_bundle):
    """With weights that follow the confidence, and are worth 40 labels at most."""
    source = {name: value for name, value in device_bundle.source.items() if not name.startswith("class.")}
    source[WEIGHTS] = np.array([[1.0, -0.3, -1.0, 0.5, 0.0]] * 2, np.float32)
    source[WORTH] = np.array([[np.log(40), -3.0]] * 2, np.float32)
    return replace(device_bundle, source=source)


def answers(bundle, count: int = 256, seed: int = 0, sharp: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, K] and the features [N, D] that they come from."""
    rng = np.random.default_rng(seed)
    weight = bundle.source["head.weight"]
    features = rng.normal(0, 1, (count, D)).astype(np.float32)
    features += sharp * weight[rng.integers(0, K, count)] / np.linalg.norm(weight, axis=1).mean()
    return features @ weight.T * sharp, features


def fed(estimator: Accuracy, logits, features, source=None, step: int = 32):
    state = estimator.init()
    for first in range(0, len(logits), step):
        part = slice(first, first + step)
        state = estimator.after(state, logits[part], features[part], None if source is None else source[part])
    return state


def test_signals_are_plain_arithmetic(bundle):
    logits, features = answers(bundle, 96)
    source = np.roll(logits, 1, axis=0)
    kept = np.random.default_rng(SEED).random((PASSES, D)) >= RATE
    weight = bundle.source["head.weight"]
    changed = np.mean(
        [(logits + (features * mask / (1 - RATE) - features) @ weight.T).argmax(1) != logits.argmax(1) for mask in kept]
    )
    shares = softmax(logits)
    mean = shares.mean(axis=0)
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    expected = [
        logit(shares.max(axis=1).mean()),
        logit(changed),
        1 + (mean * np.log(mean)).sum() / np.log(K),
        logit((source.argmax(1) == logits.argmax(1)).mean()),
    ]
    estimator = Accuracy(bundle)
    found = estimator.signals.of(fed(estimator, logits, features, source).whole)
    assert found == pytest.approx(expected, rel=1e-4)


def test_distance_is_in_deviations_from_the_class_that_was_answered(bundle):
    centres = np.random.default_rng(1).normal(0, 1, (K, D)).astype(np.float32)
    stored = bundle.source | {"class.mean": centres, "class.std": np.full(D, 2.0, np.float32)}
    signals = Signals(replace(bundle, source=stored))
    logits = np.eye(K)[[0, 3]] * 9
    state = signals.after(signals.init(), logits, centres[[0, 3]] + 4)
    assert signals.count == 6
    assert state.whole.sums[2] / 2 == pytest.approx(4.0)


@pytest.mark.parametrize("step", [1, 16, 96])
def test_strangers_are_left_out_of_every_signal(bundle, step):
    """Three in ten lie five times as far as the others, and change every signal if they are not left out."""
    centres = np.random.default_rng(1).normal(0, 1, (K, D)).astype(np.float32)
    stored = bundle.source | {"class.mean": centres, "class.std": np.ones(D, np.float32)}
    signals = Signals(replace(bundle, source=stored))
    rng = np.random.default_rng(2)
    classes, foreign = rng.integers(0, K, 192), np.arange(192) % 10 >= 7
    foreign[:FEWEST] = False
    logits = (np.eye(K)[classes] * np.where(foreign, 1, 9)[:, None]).astype(np.float32)
    away = np.where(foreign, 5.0, rng.uniform(0.8, 1.2, 192))
    features = (centres[classes] + np.sqrt(away)[:, None]).astype(np.float32)
    source = np.roll(logits, 1, axis=0)

    def told(chosen):
        state = signals.init()
        for start in range(0, 192, step):
            part = np.flatnonzero(chosen[start : start + step]) + start
            state = signals.after(state, logits[part], features[part], source[part])
        return state

    all_of_them, genuine = told(np.ones(192, bool)), told(~foreign)
    assert all_of_them.whole.count == all_of_them.whole.compared == genuine.whole.count == (~foreign).sum()
    np.testing.assert_allclose(signals.of(all_of_them.whole), signals.of(genuine.whole), rtol=1e-6)
    assert len(all_of_them.distances) == LATEST


def test_where_all_frames_lie_far_none_is_a_stranger(bundle):
    """Another domain, or a collapse: the median moves with it."""
    centres = np.zeros((K, D), np.float32)
    stored = bundle.source | {"class.mean": centres, "class.std": np.ones(D, np.float32)}
    signals = Signals(replace(bundle, source=stored))
    logits = np.tile(np.eye(K, dtype=np.float32)[:1], (MEMORY, 1))
    near = signals.after(signals.init(), logits, np.ones((MEMORY, D), np.float32))
    far = near
    for _ in range(8):
        far = signals.after(far, logits[:16], 2 * np.ones((16, D), np.float32))
    assert near.whole.count == MEMORY
    assert far.whole.count == MEMORY + 7 * 16  # the first look is not yet known to be of many


def test_nothing_is_told_before_there_are_frames_enough(bundle):
    estimator = Accuracy(bundle)
    logits, features = answers(bundle, ENOUGH)
    assert estimator.estimate(estimator.init()) is None
    assert estimator.estimate(fed(estimator, logits[:-1], features[:-1])) is None
    assert isinstance(estimator.estimate(fed(estimator, logits, features)), Interval)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), sharp=st.floats(0, 8), right=st.integers(0, 50), wrong=st.integers(0, 50))
def test_the_value_lies_within_the_interval(bundle, seed, sharp, right, wrong):
    estimator = Accuracy(bundle)
    state = labelled(fed(estimator, *answers(bundle, 128, seed, sharp)), right, right + wrong)
    found = estimator.estimate(state)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


def test_late_labels_that_agree_tighten_the_interval(bundle):
    estimator = Accuracy(bundle)
    state = fed(estimator, *answers(bundle, sharp=0.5))
    found = [estimator.estimate(state)]
    assert 0.3 < found[0].value < 0.9
    for count in (20, 100, 500):
        found.append(estimator.estimate(labelled(state, round(found[0].value * count), count)))
    widths = [interval.high - interval.low for interval in found]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.4 * widths[0]


def test_late_labels_that_contradict_win_in_the_end(bundle):
    estimator = Accuracy(bundle)
    state = fed(estimator, *answers(bundle))
    assert estimator.estimate(state).value > 0.9
    found = estimator.estimate(labelled(state, 150, 500))
    assert found.value == pytest.approx(0.3, abs=0.06)


def test_labels_alone_are_an_interval_too(bundle):
    estimator = Accuracy(bundle)
    found = estimator.estimate(labelled(estimator.init(), 8, 10))
    assert found.value == pytest.approx(0.8)
    assert found.low < 0.7
    assert found.high > 0.9


def test_labels_fade(bundle):
    estimator = Accuracy(bundle)
    logits, features = answers(bundle)
    state = labelled(fed(estimator, logits, features), 0, 500)
    for _ in range(40):
        state = estimator.after(state, logits, features)
    assert state.labelled < 1
    assert estimator.estimate(state).value == pytest.approx(
        estimator.estimate(fed(estimator, logits, features)).value, abs=0.03
    )


def test_bounds_hold_a_share_nine_times_of_ten():
    rng = np.random.default_rng(0)
    for truth in (0.1, 0.5, 0.9, 0.99):
        right = rng.binomial(50, truth, 2000)
        low, high = bounds(right, 50 - right)
        assert ((low <= truth) & (truth <= high)).mean() >= 0.85


def test_a_collapse_to_one_class_is_told_where_source_says_something_else(bundle):
    """Without any doubt in the answers, and within 512 frames of a sound stream."""
    estimator = Accuracy(bundle)
    logits, features = answers(bundle, 1024)
    state = fed(estimator, logits, features, logits)
    before = estimator.estimate(state)
    constant = np.tile(30 * np.eye(K)[2], (32, 1))
    for first in range(0, 512, 32):
        state = estimator.after(state, constant, features[:32], logits[first : first + 32])
    found = estimator.estimate(state)
    assert found.value == pytest.approx(1 / K)
    assert found.high < before.low


def test_a_burst_of_one_class_is_no_collapse(bundle):
    """Source says the same: the estimate stays, and the interval grows."""
    estimator = Accuracy(bundle)
    _, features = answers(bundle)
    constant = np.tile(6 * np.eye(K)[2], (256, 1))
    found = estimator.estimate(fed(estimator, constant, features, constant))
    usual = estimator.estimate(fed(estimator, *answers(bundle)))
    assert found.value > 0.5
    assert found.high - found.low > 3 * (usual.high - usual.low)


def test_one_class_alone_is_hardly_told_where_nobody_asked_source(bundle):
    estimator = Accuracy(bundle)
    _, features = answers(bundle)
    found = estimator.estimate(fed(estimator, np.tile(30 * np.eye(K)[2], (256, 1)), features))
    assert found.value == pytest.approx(1 / K)
    assert found.high - found.low > 0.8


def test_answers_of_source_may_come_for_some_frames_only(bundle):
    estimator = Accuracy(bundle)
    logits, features = answers(bundle)
    other = np.roll(logits, 1, axis=1)
    some = slice(0, COMPARED)
    state = compared(fed(estimator, logits, features), logits[some].argmax(1), other[some].argmax(1))
    assert state.whole.same == 0
    assert estimator.estimate(state).value < estimator.estimate(fed(estimator, logits, features)).value


def test_old_frames_are_forgotten_and_the_state_does_not_grow(bundle):
    estimator = Accuracy(bundle)
    bad, good = answers(bundle, 4 * MEMORY, 1, sharp=0.1), answers(bundle, MEMORY, 2)
    state = fed(estimator, *bad)
    for first in range(0, len(good[0]), 32):
        state = estimator.after(state, good[0][first : first + 32], good[1][first : first + 32])
    assert state.whole.count == MEMORY
    assert state.whole.mean.shape == (K,)
    alone = fed(estimator, *good)
    assert estimator.estimate(state).value == pytest.approx(estimator.estimate(alone).value, abs=1e-6)


def test_a_state_is_a_value(bundle):
    estimator = Accuracy(bundle)
    logits, features = answers(bundle)
    state = fed(estimator, logits, features)
    before = estimator.estimate(state)
    estimator.after(state, np.zeros_like(logits), features)
    labelled(state, 0, 100)
    assert estimator.estimate(state) == before


def test_what_is_not_finite_is_refused(bundle):
    estimator = Accuracy(bundle)
    logits, features = answers(bundle, 4)
    logits[1, 1] = np.nan
    with pytest.raises(DataError, match="not finite"):
        estimator.after(estimator.init(), logits, features)


def test_more_right_than_labels_is_refused(bundle):
    with pytest.raises(DataError, match="3 of 2"):
        labelled(Accuracy(bundle).init(), 3, 2)


def test_a_bundle_without_the_entries_says_how_to_get_them(device_bundle):
    with pytest.raises(ConfigError, match="export it again with --estimate"):
        Accuracy(device_bundle)


def test_entries_of_another_shape_are_refused(bundle):
    with pytest.raises(ConfigError, match="shape"):
        Accuracy(replace(bundle, source=bundle.source | {WEIGHTS: np.zeros((2, 9), np.float32)}))
