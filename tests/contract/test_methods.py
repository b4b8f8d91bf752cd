"""What every registered method must keep to, on both kinds of bundle. A new method is tested by being registered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError
from edge_adapt.methods.catalogue import offers
from edge_adapt.methods.protocol import CUT, FEATURES, LOGITS, TAPS, Context, Observation
from edge_adapt.plugins import METHODS, find, names
from edge_adapt.runtime.loop import adapt
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail

NO_NAN_TEST: dict[str, str] = {}
"""Method -> why a NaN frame may break it; nothing may, so far."""
CHEAP = {"cotta": {"views": 2}, "lae": {"reliable": 1.0}, "mos": {"reliable": 1.0}}
"""Settings that change how long a method takes (32 views of the paper are many for a test of the contract), or that
let it learn at all: of answers from the tiny network, none is sure."""


@pytest.fixture(scope="module", params=["device_bundle", "reference_bundle"])
def bundle(request) -> Bundle:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def engine(bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(bundle)


@pytest.fixture(scope="module")
def tail(bundle) -> Tail:
    return Tail(bundle)


@pytest.fixture(params=names(METHODS))
def name(request) -> str:
    return request.param


@pytest.fixture
def build(bundle, tail, name) -> Callable[..., Any]:
    def make(seed: int = 0, **settings):
        merged = {**CHEAP.get(name, {}), **settings}
        missing = find(METHODS, name).requires - offers(bundle)
        if missing:
            pytest.skip(f"{name} requires {', '.join(sorted(missing))}, which this bundle has not")
        return find(METHODS, name)(Context(bundle, lambda: tail, seed, merged))

    return make


@pytest.fixture
def play(bundle, engine, build):
    """Run a stream through a fresh method; the answers, and the predictor as it was left."""

    def run(frames, size: int, seed: int = 0) -> tuple[np.ndarray, Predictor]:
        predictor = Predictor(bundle, engine)
        engine.apply(predictor._merge(Delta.source()))
        batches = (frames[at : at + size] for at in range(0, len(frames), size))
        return np.concatenate([answer.logits for answer in adapt(predictor, build(seed), batches)]), predictor

    return run


def look(predictor: Predictor, method, frames) -> Observation:
    """What the loop would show the method."""
    return predictor.look_for(method, frames)


def shifted(frames) -> np.ndarray:
    """Another domain, so that methods have something to do."""
    return (frames * np.float32(0.5) + np.float32(0.8)).astype(np.float32)


def pieces(value: Any) -> list[Any]:
    """All arrays, tensors and numbers inside a state, in order."""
    if isinstance(value, torch.Tensor):
        return [value.detach().numpy()]
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Delta)):
        return [piece for item in dataclasses.fields(value) for piece in pieces(getattr(value, item.name))]
    if hasattr(value, "items"):
        return [piece for key in sorted(value) for piece in (key, *pieces(value[key]))]
    if isinstance(value, (list, tuple)):
        return [piece for item in value for piece in pieces(item)]
    return [value]


def copied(value: Any) -> list[Any]:
    return [np.array(piece) if isinstance(piece, np.ndarray) else piece for piece in pieces(value)]


def assert_alike(first: list[Any], second: list[Any]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def size_of(value: Any) -> int:
    return sum(piece.nbytes if isinstance(piece, np.ndarray) else 8 for piece in pieces(value))


def test_it_says_what_it_is(build, name):
    method = build()
    assert method.name == name
    assert method.needs <= {TAPS, CUT, FEATURES}
    assert method.watches <= {LOGITS, FEATURES}
    assert isinstance(method.answers, bool)
    assert isinstance(method.delta(method.init()), Delta)
    assert method.delta(method.init()).same_as(Delta.source())


@pytest.mark.parametrize("size", [1, 64])
def test_the_same_seed_gives_the_same_answers(play, tiny_frames, size):
    frames = shifted(tiny_frames)[: 32 if size == 1 else 128]
    (first, left), (second, _) = play(frames, size), play(frames, size)
    assert first.shape == (len(frames), 5)
    assert np.isfinite(first).all()
    assert np.array_equal(first, second)
    assert left.delta.is_finite()


def test_a_step_changes_neither_its_state_nor_its_input(bundle, engine, build, tiny_frames):
    method, predictor = build(), Predictor(bundle, engine)
    state = method.init()
    frames = shifted(tiny_frames)
    for start in range(0, 96, 32):
        predictor.apply(method.delta(state))
        seen = look(predictor, method, frames[start : start + 32].copy())
        before, shown = copied(state), copied(dataclasses.replace(seen, trunk=None))
        first = method.step(state, seen)
        assert_alike(copied(state), before)
        assert_alike(copied(dataclasses.replace(seen, trunk=None)), shown)
        again = method.step(state, seen)  # a state that was kept is a rollback
        assert_alike(copied(again.state), copied(first.state))
        assert_alike(copied(again.logits), copied(first.logits))
        assert method.delta(again.state).same_as(method.delta(first.state))
        state = first.state
    predictor.apply(Delta.source())


def test_the_delta_is_the_same_object_while_nothing_changed(bundle, engine, build, tiny_frames):
    method, predictor = build(), Predictor(bundle, engine)
    state = method.init()
    for start in range(0, 128, 8):
        assert method.delta(state) is method.delta(state)
        delta = method.delta(state)
        predictor.apply(delta)
        state = method.step(state, look(predictor, method, shifted(tiny_frames)[start : start + 8])).state
        after = method.delta(state)
        assert after is delta or not after.same_as(delta) or not after
    predictor.apply(Delta.source())


def test_it_looks_at_no_more_than_there_is(build, tiny_frames):
    method = build()
    state = method.init()
    for frames in (1, 3, 64):
        for passed in (0, 1, 1000):
            assert method.look(state, frames, passed) >= 0
    first = method.look(state, 64, 0)
    assert first == method.look(state, 64, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_frames_that_are_not_finite_leave_no_mark(play, name, tiny_frames, bad):
    if name in NO_NAN_TEST:
        pytest.skip(NO_NAN_TEST[name])
    frames = shifted(tiny_frames)
    frames[40:44] = bad
    answers, left = play(frames, 8)
    assert answers.shape == (128, 5)
    assert np.isfinite(answers[48:]).all()
    assert np.isfinite(answers[:40]).all()
    assert left.delta.is_finite()


def test_a_state_does_not_grow(bundle, engine, build, tiny_frames):
    method, predictor = build(), Predictor(bundle, engine)
    state = method.init()
    frames, sizes = shifted(tiny_frames), []
    for number in range(300):
        predictor.apply(method.delta(state))
        at = number * 2 % 128
        state = method.step(state, look(predictor, method, frames[at : at + 2])).state
        sizes.append(size_of(state) + method.delta(state).nbytes)
    assert max(sizes[150:]) <= max(sizes[:150])
    assert max(sizes) < 1 << 20
    assert method.delta(state).is_finite()
    predictor.apply(Delta.source())


def test_an_unknown_setting_is_refused_with_the_nearest(build, name):
    if name == "source":
        pytest.skip("source has no settings")
    with pytest.raises(ConfigError, match="no setting 'no_such_setting'"):
        build(no_such_setting=1)


def test_what_it_answers_depends_on_no_frame_that_comes_later(play, tiny_frames):
    frames = shifted(tiny_frames)
    other = frames.copy()
    other[64:] = 0
    assert np.array_equal(play(frames, 16)[0][:64], play(other, 16)[0][:64])
