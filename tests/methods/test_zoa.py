"""ZOA: two passes, a gradient that is right on average, ports that stay bounded, and harm that is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_adapt.bundle import Bundle
from edge_adapt.delta import PORT_SCALE, PORT_SHIFT, Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError
from edge_adapt.methods.protocol import Answered, Context
from edge_adapt.methods.zoa import LONGEST, Sums, Zoa, ZoaState
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail


def zoa(bundle: Bundle, seed: int = 3, **settings: Any) -> Zoa:
    return Zoa(Context(bundle, lambda: Tail(bundle), seed=seed, settings=settings))


@pytest.fixture(scope="module")
def engine(device_bundle: Bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(device_bundle)


@pytest.fixture
def predictor(device_bundle: Bundle, engine: OnnxRuntimeEngine) -> Predictor:
    made = Predictor(device_bundle, engine)
    engine.apply(made._merge(Delta.source()))
    return made


def other(frames: np.ndarray) -> np.ndarray:
    return (0.7 * frames + 0.3).astype(np.float32)


def walked(method: Zoa, predictor: Predictor, frames: np.ndarray, size: int) -> tuple[ZoaState, list[str]]:
    """The looks and steps of a stream, without its answers."""
    state, events = method.init(), []
    for start in range(0, len(frames), size):
        predictor.apply(method.delta(state))
        step = method.step(state, predictor.look(frames[start : start + size], method.needs | method.watches))
        state = step.state
        events += step.events
    return state, events


def test_two_passes_for_every_frame(device_bundle, predictor, tiny_frames):
    walked(zoa(device_bundle), predictor, tiny_frames, 32)
    assert predictor.passes == 2 * len(tiny_frames)


def loss_by_hand(method: Zoa, numbers: np.ndarray, seen: Any) -> float:
    """In the order of the paper: frames through the ports, their moments, their answers' entropy."""
    means, seconds = seen.taps
    p = np.exp(seen.logits.astype(float))
    p /= p.sum(1, keepdims=True)
    behind = np.exp(numbers[0]) * means + numbers[1]
    within = np.exp(2 * numbers[0]) * (seconds - means**2)
    mean, std = behind.mean(0), np.sqrt(within.mean(0) + behind.var(0))
    apart = (mean - method.source_mean) ** 2 + (std - method.source_std) ** 2
    return float(-(p * np.log(p)).sum(1).mean() + apart.mean())


def test_a_step_is_one_sided_spsa(device_bundle, predictor, tiny_frames):
    """Golden, with the draw repeated by hand."""
    method = zoa(device_bundle, pull=0.0)
    batch = other(tiny_frames[:32])
    seen = predictor.look(batch, method.needs | method.watches)
    found = method.step(method.init(), seen).state
    rng = np.random.default_rng([3, 0])
    shape = (2, device_bundle.channels)
    nudges = rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1, shape)
    assert np.abs(nudges).min() >= 0.5 and np.abs(nudges).max() <= 1
    ports = Delta.of_ports(np.exp(0.02 * nudges[0]), 0.02 * nudges[1])
    nudged = loss_by_hand(method, 0.02 * nudges, predictor.rehearse(batch, ports, method.needs | method.watches))
    slope = (nudged - loss_by_hand(method, np.zeros(shape), seen)) / 0.02
    np.testing.assert_allclose(found.numbers, -5e-4 * slope / nudges, rtol=1e-3, atol=1e-9)
    assert abs(slope) > 1e-3  # so that the comparison can fail
    np.testing.assert_allclose(found.delta[PORT_SCALE], np.exp(found.numbers[0]), rtol=1e-6)
    np.testing.assert_allclose(found.delta[PORT_SHIFT], found.numbers[1], rtol=1e-5, atol=1e-9)


def test_what_a_guard_holds_back_is_still_learned_from(device_bundle, predictor, tiny_frames):
    """A look with source in force says nothing of the ports so far: they take a pass of their own."""
    method = zoa(device_bundle)
    state, _ = walked(method, predictor, other(tiny_frames), 32)
    batch = other(tiny_frames[:32])
    needs = method.needs | method.watches
    predictor.apply(method.delta(state))
    expected = method.step(state, predictor.look(batch, needs)).state
    predictor.apply(Delta.source())
    found = method.step(state, predictor.look(batch, needs)).state
    assert not found.delta.same_as(state.delta)
    np.testing.assert_allclose(found.numbers, expected.numbers, rtol=0.02, atol=1e-6)


def test_the_loss_goes_down(device_bundle, predictor, tiny_frames):
    method = zoa(device_bundle, lr=2e-3, pull=0.0)
    batch = other(tiny_frames[:64])
    state, _ = walked(method, predictor, np.concatenate([batch] * 40), 32)
    needs = method.needs | method.watches
    before, after = (
        loss_by_hand(method, numbers, predictor.rehearse(batch, method._ports(numbers), needs))
        for numbers in (np.zeros_like(state.numbers), state.numbers)
    )
    assert state.steps == 80
    assert after < before


@pytest.mark.parametrize("size", [1, 5])
def test_small_looks_are_gathered(device_bundle, predictor, tiny_frames, size):
    method = zoa(device_bundle, window=10)
    state, _ = walked(method, predictor, other(tiny_frames[:20]), size)
    assert state.steps == 2
    whole, _ = walked(method, predictor, other(tiny_frames[:20]), 10)
    np.testing.assert_allclose(state.numbers, whole.numbers, rtol=0.02, atol=1e-7)
    assert method.look(state, 100, 0) == 10
    part, _ = walked(method, predictor, other(tiny_frames[:4]), 4)
    assert method.look(part, 100, 0) == 6


def test_it_is_the_same_by_seed_and_a_step_is_pure(device_bundle, predictor, tiny_frames):
    states = [walked(zoa(device_bundle, seed), predictor, other(tiny_frames), 32)[0] for seed in (1, 1, 2)]
    assert states[0].delta.same_as(states[1].delta)
    assert not states[0].delta.same_as(states[2].delta)
    method = zoa(device_bundle, 1)
    seen = predictor.look(other(tiny_frames[:32]), method.needs | method.watches)
    before = states[0].numbers.copy()
    first, again = method.step(states[0], seen).state, method.step(states[0], seen).state
    assert first.delta.same_as(again.delta)
    assert np.array_equal(states[0].numbers, before)


def test_a_change_of_domain_starts_anew(device_bundle, predictor, tiny_frames):
    method = zoa(device_bundle)
    stream = np.concatenate([tiny_frames[:96], -2 * tiny_frames[:32]])
    state, events = walked(method, predictor, stream, 32)
    assert events == ["domain change"]
    assert not state.numbers.any() and not state.history.count and state.steps == 3
    assert method.delta(state).same_as(Delta.source())
    _, none = walked(method, predictor, tiny_frames, 32)
    assert not none


def test_answers_are_shifted_by_the_frames_before(device_bundle):
    method = zoa(device_bundle)
    rows = device_bundle.source["head.weight"]
    features = np.random.default_rng(0).normal(1, 1, (64, rows.shape[1])).astype(np.float32)
    given = Answered(features @ rows.T, features)
    first = method.watch(method.init(), given)
    assert np.array_equal(first.logits, given.logits)
    second = method.watch(first.state, given)
    source = method.shift.expected(first.state.history)
    trust = 64 / (64 + 256)
    shifted = given.logits + trust * (source - features.mean(0)) @ rows.T
    np.testing.assert_allclose(second.logits, shifted, atol=1e-4)
    broken = Answered(given.logits, np.full_like(features, np.nan))
    refused = method.watch(second.state, broken)
    assert refused.state is second.state and refused.events[0].startswith("refused")


@pytest.mark.parametrize("kind", ["alike", "nan", "wild"])
def test_ports_stay_finite_and_bounded(device_bundle, predictor, tiny_frames, kind):
    frames = other(tiny_frames).copy()
    settings: dict[str, Any] = {}
    if kind == "alike":
        frames[:] = frames[:1]
    elif kind == "nan":
        frames[70, 0, 0, 0] = np.nan
    else:
        settings = {"lr": 1e6}
    state, events = walked(zoa(device_bundle, **settings), predictor, frames, 32)
    assert np.isfinite(state.numbers).all() and np.abs(state.numbers).max() <= LONGEST
    assert any(event.startswith("refused") for event in events) == (kind == "nan")
    assert state.frames is None or len(state.frames) < 32


def test_a_loss_that_is_not_finite_is_refused(device_bundle, predictor, tiny_frames, monkeypatch):
    monkeypatch.setattr(Zoa, "loss", lambda self, numbers, sums: float("nan"))
    method = zoa(device_bundle)
    step = method.step(method.init(), predictor.look(tiny_frames[:32], method.needs | method.watches))
    assert step.events == ("refused: the loss is not finite",)
    assert not step.state.numbers.any()


def test_sums_are_those_of_all_frames():
    empty = Sums(np.zeros(2), np.zeros(2))
    assert empty.frames == 0
    filled = Sums(np.array([2.0, 0.0]), np.array([4.0, 2.0]), frames=2)
    np.testing.assert_allclose(filled.moments, [[1, 0], [1, 1]])


def test_what_cannot_be_is_refused(device_bundle):
    with pytest.raises(ConfigError, match="nudge is 0"):
        zoa(device_bundle, nudge=0.0)
    with pytest.raises(ConfigError, match="no setting 'learning_rate'"):
        zoa(device_bundle, learning_rate=1.0)
