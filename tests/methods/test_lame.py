"""LAME against a plain re-statement, on batches that break affinities, and behind its gate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_adapt.bundle import Bundle
from edge_adapt.errors import ConfigError
from edge_adapt.methods.lame import Lame, LameAlone, Persistence, gaussian, linear, nearest, refine
from edge_adapt.methods.protocol import Answered, Context
from edge_adapt.methods.tent import Tent
from edge_adapt.tail import Tail

AFFINITIES = {"knn": nearest, "rbf": gaussian, "linear": linear}


def context(bundle: Bundle, **values: Any) -> Context:
    return Context(bundle, lambda: Tail(bundle), settings=values)


def published(log_p: np.ndarray, features: np.ndarray, kind: str, k: int) -> np.ndarray:
    """Section 2.12 of the specification, entry by entry."""
    count, classes = log_p.shape
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    apart = np.array([[np.linalg.norm(a - b) for b in unit] for a in unit])
    affinity = np.zeros((count, count))
    if kind == "knn":
        for i in range(count):
            others = sorted((j for j in range(count) if j != i), key=lambda j, i=i: apart[i, j])
            affinity[i, others[:k]] = 1
    elif kind == "rbf":
        width = np.mean([sorted(row)[min(k, count) - 1] for row in apart])
        affinity = np.exp(-(apart**2) / (2 * width**2))
    else:
        affinity = unit @ unit.T
    unary = -np.log(np.exp(log_p) + 1e-10)
    y, energy = np.exp(log_p), None
    for _ in range(100):
        new = np.exp(-unary + affinity @ y)
        y = new / new.sum(axis=1, keepdims=True)
        now = sum(
            unary[i, c] * y[i, c] - (affinity @ y)[i, c] * y[i, c] + y[i, c] * np.log(y[i, c])
            for i in range(count)
            for c in range(classes)
        )
        if energy is not None and abs(now - energy) <= 1e-8 * abs(energy):
            break
        energy = now
    return y


def answers(count: int, classes: int = 5, width: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, classes))
    return logits - np.log(np.exp(logits).sum(1, keepdims=True)), rng.normal(size=(count, width))


@pytest.mark.parametrize("kind", AFFINITIES)
def test_it_is_lame_as_published(kind):
    """Golden, and conformance 10: it converges, and rows sum to 1."""
    log_p, features = answers(12)
    expected = published(log_p, features, kind, 5)
    found = refine(log_p, AFFINITIES[kind](features, 5))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1)
    again = refine(log_p, AFFINITIES[kind](features, 5))
    assert np.array_equal(found, again)
    assert np.abs(found - np.exp(log_p)).max() > 0.1  # so that the comparison can fail


@pytest.mark.parametrize("kind", AFFINITIES)
def test_a_batch_of_one_is_left_alone(kind):
    """Conformance 10."""
    log_p, features = answers(1)
    np.testing.assert_allclose(refine(log_p, AFFINITIES[kind](features, 5)), np.exp(log_p))


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 9),
    kind=st.sampled_from(sorted(AFFINITIES)),
    scale=st.sampled_from([0.0, 1e-20, 1.0, 1e6]),
    alike=st.booleans(),
    sure=st.booleans(),
)
def test_answers_stay_probabilities(count, kind, scale, alike, sure):
    """Conformance 10, for frames that are all alike, features of nothing, and answers without a doubt."""
    log_p, features = answers(count)
    if sure:
        log_p = np.where(np.eye(5)[np.arange(count) % 5] > 0, 0.0, -np.inf)
    features = scale * (np.repeat(features[:1], count, axis=0) if alike else features)
    y = refine(log_p, AFFINITIES[kind](features, 5))
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y.sum(1), 1)


def play(method: Lame, logits: np.ndarray, features: np.ndarray, size: int) -> tuple[np.ndarray, list[str], Any]:
    state, made, events = method.init(), [], []
    for start in range(0, len(logits), size):
        step = method.watch(state, Answered(logits[start : start + size], features[start : start + size]))
        state = step.state
        made.append(step.logits)
        events += step.events
    return np.concatenate(made), events, state


def stream(run: int, frames: int = 1024, width: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels in runs of that length, features near a centre of each class, and a head that is right half the time."""
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.integers(0, 5, frames // run), run)
    features = np.eye(5, width)[labels] * 3 + rng.normal(size=(frames, width))
    guess = np.where(rng.random(frames) < 0.5, labels, rng.integers(0, 5, frames))
    logits = np.eye(5)[guess] + 0.1 * rng.normal(size=(frames, 5))
    return logits.astype(np.float32), features.astype(np.float32), labels


@pytest.mark.parametrize("size", [1, 50])
def test_the_gate_keeps_an_independent_stream_as_it_is(device_bundle, size):
    logits, features, _ = stream(run=1)
    found, events, _ = play(LameAlone(context(device_bundle)), logits, features, size)
    assert np.array_equal(found, logits)
    assert not events


@pytest.mark.parametrize("size", [1, 50])
def test_the_gate_opens_on_a_correlated_stream_and_that_pays(device_bundle, size):
    logits, features, labels = stream(run=32)
    found, events, _ = play(LameAlone(context(device_bundle, correlated=0.15)), logits, features, size)
    assert events[0] == "lame: on, the stream is correlated"
    late = slice(256, None)
    assert (found.argmax(1) != labels)[late].mean() < 0.7 * (logits.argmax(1) != labels)[late].mean()


@pytest.mark.parametrize("size", [1, 50])
def test_a_stuck_sensor_is_no_correlated_stream(device_bundle, size):
    logits, features, _ = stream(run=1)
    sticks = np.repeat(np.arange(len(logits)), np.where(np.arange(len(logits)) % 8, 1, 12))
    stuck = features[sticks] * (1 + 1e-7)  # the same frame in another batch rounds otherwise
    found, events, _ = play(LameAlone(context(device_bundle)), logits[sticks], stuck, size)
    assert np.array_equal(found, logits[sticks]) and not events


def test_repeated_frames_are_answered_as_they_came_and_lend_no_neighbours(device_bundle):
    lame = LameAlone(context(device_bundle, gate=False))
    logits, features, _ = stream(run=32)
    once, again = np.arange(6), np.array([0, 1, 2, 2, 2, 3, 4, 5])
    plain = lame.watch(lame.init(), Answered(logits[once], features[once]))
    stuck = lame.watch(lame.init(), Answered(logits[again], features[again]))
    np.testing.assert_array_equal(stuck.logits[[0, 1, 2, 5, 6, 7]], plain.logits)
    np.testing.assert_array_equal(stuck.logits[3:5], logits[[2, 2]])


def test_kappa_is_that_of_cohen_and_knows_no_skew():
    rng = np.random.default_rng(0)
    drawn = rng.choice(4, 20_000, p=[0.7, 0.2, 0.06, 0.04])
    empty = Persistence(np.zeros(4))
    assert abs(empty.after(drawn, 10**9).kappa) < 0.03
    runs = np.repeat(drawn[:5000], 4)
    assert empty.after(runs, 10**9).kappa == pytest.approx(0.75, abs=0.03)
    assert empty.after(np.zeros(500, int), 256).kappa == 0
    assert empty.kappa == 0


def test_persistence_does_not_see_how_a_stream_was_cut():
    drawn = np.random.default_rng(0).integers(0, 4, 300)
    whole = Persistence(np.zeros(4)).after(drawn, 50)
    parts = Persistence(np.zeros(4))
    for start in range(0, 300, 7):
        parts = parts.after(drawn[start : start + 7], 50)
    np.testing.assert_allclose(parts.classes, whole.classes)
    assert parts.kappa == pytest.approx(whole.kappa)
    assert parts.seen == whole.seen == 50


def test_the_window_lends_neighbours_to_a_single_frame(device_bundle):
    logits, features, _ = stream(run=32, frames=64)
    method = LameAlone(context(device_bundle, gate=False))
    found, _, state = play(method, logits, features, 1)
    assert np.array_equal(found[:1].argmax(1), logits[:1].argmax(1))
    assert not np.array_equal(found.argmax(1), logits.argmax(1))
    assert state.own.logits.shape == (32, 5) and state.own.features.shape == (32, 16)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = refine(log_p[-32:].astype(float), nearest(features[-32:], 5))[-1]
    np.testing.assert_allclose(np.exp(found[-1]), expected, atol=1e-5)


def test_reference_mode_is_as_published(reference_bundle):
    logits, features, _ = stream(run=1, frames=40)
    found, _, state = play(LameAlone(context(reference_bundle)), logits, features, 20)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = published(log_p[20:].astype(float), features[20:].astype(float), "knn", 5)
    np.testing.assert_allclose(np.exp(found[20:]), expected, atol=1e-5)
    assert not len(state.own.logits)


@pytest.mark.parametrize("part", ["logits", "features"])
def test_broken_answers_leave_no_mark(device_bundle, part):
    logits, features, _ = stream(run=32, frames=64)
    method = LameAlone(context(device_bundle, gate=False))
    _, _, state = play(method, logits, features, 8)
    broken = {"logits": logits[:4].copy(), "features": features[:4].copy()}
    broken[part][1, 0] = np.nan
    step = method.watch(state, Answered(**broken))
    assert step.state.own is state.own
    assert step.events[0].startswith("refused")
    assert np.array_equal(step.logits, broken["logits"], equal_nan=True)


def test_what_cannot_be_is_refused(device_bundle, reference_bundle):
    with pytest.raises(ConfigError, match="affinity is 'cosine'"):
        LameAlone(context(device_bundle, affinity="cosine"))
    with pytest.raises(ConfigError, match="window is -1"):
        LameAlone(context(device_bundle, window=-1))
    around = Lame(context(reference_bundle), Tent(context(reference_bundle)))
    with pytest.raises(ConfigError, match="features, which tent does not give"):
        around.watch(around.init(), Answered(np.zeros((2, 5), np.float32)))
