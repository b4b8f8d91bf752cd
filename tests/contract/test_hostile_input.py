"""What no stream and no setting may do to a method, whichever is registered: with its guards on the device, alone in
reference mode.

On the device: weights stay finite, the answers to sound frames are at least as good as the source's, and what was done
about it is an event with a name. In reference mode methods run as published and guards are there for who asks: answers
may be bad, as the paper's would be, but nothing raises, and what is in force stays finite.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError
from edge_adapt.methods.catalogue import build, fitting
from edge_adapt.methods.protocol import Context
from edge_adapt.plugins import METHODS, find, names
from edge_adapt.runtime.loop import adapt
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.streams.data import Dataset
from edge_adapt.tail import Tail

MARGIN = 80.0
"""Points of error that a method may lie above source, times the root of the frames: chance alone has 50."""
CHEAP = {"cotta": {"views": 1}, "vida": {"views": 2}}
"""Settings that change only how long a method takes, where it has them."""
HUGE = 1e6


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
def name(request, bundle) -> str:
    if request.param not in fitting(bundle):
        pytest.skip(f"{request.param} asks for what this bundle lacks, and is refused")
    return request.param


@dataclasses.dataclass
class Played:
    """How a stream went."""

    logits: np.ndarray
    events: list[str]
    state: Any
    predictor: Predictor


@pytest.fixture
def play(bundle, engine, tail, name):
    """Run a stream through a method, as a device would."""

    def run(frames, size: int = 8, *, method: str | None = None, **settings) -> Played:
        chosen = method or name
        known = fields(chosen, bundle, tail)
        cheap = {key: value for key, value in CHEAP.get(chosen, {}).items() if key in known}
        built = build(chosen, Context(bundle, lambda: tail, 0, {**cheap, **settings}))
        kept = Kept(built)
        predictor = Predictor(bundle, engine)
        engine.apply(predictor._merge(Delta.source()))
        batches = (frames[at : at + size] for at in range(0, len(frames), size))
        answers = list(adapt(predictor, kept, batches))
        logits = np.concatenate([answer.logits for answer in answers])
        return Played(logits, [event for answer in answers for event in answer.events], kept.state, predictor)

    return run


class Kept:
    """A method, and the last state that it gave."""

    def __init__(self, method) -> None:
        self.method, self.state = method, None

    def __getattr__(self, name):
        return getattr(self.method, name)

    def step(self, state, seen):
        made = self.method.step(state, seen)
        self.state = made.state
        return made

    def watch(self, state, answered):
        made = self.method.watch(state, answered)
        self.state = made.state
        return made


def fields(method: str, bundle: Bundle, tail: Tail) -> set[str]:
    """Names of a method's settings."""
    settings = getattr(find(METHODS, method)(Context(bundle, lambda: tail)), "config", None)
    return {item.name for item in dataclasses.fields(settings)} if settings is not None else set()


@pytest.fixture(scope="module")
def stream(tiny_frames, tiny_data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """384 frames of another domain, with labels."""
    return np.tile(shifted(tiny_frames), (3, 1, 1, 1)), np.tile(tiny_data.labels, 3)


def shifted(frames) -> np.ndarray:
    return (frames * np.float32(0.8) + np.float32(0.3)).astype(np.float32)


def error(logits, labels) -> float:
    return float((logits.argmax(axis=1) != labels).mean() * 100)


def assert_as_good(logits, source, labels) -> None:
    assert error(logits, labels) <= error(source, labels) + MARGIN / np.sqrt(len(labels))


def assert_sound(played: Played, frames: int) -> None:
    """Everything finite, whatever came."""
    assert played.logits.shape == (frames, 5)
    assert played.predictor.delta.is_finite()
    for piece in numbers(played.state):
        assert not np.isnan(piece).any()


def numbers(value: Any):
    """All arrays and tensors of floats inside a state. Infinity may stand for a place that is still empty."""
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        if np.issubdtype(value.dtype, np.floating):
            yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from numbers(getattr(value, item.name))
    elif hasattr(value, "items"):
        for part in value.values():
            yield from numbers(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from numbers(part)


def assert_no_worse(play, bundle, frames, labels, size: int, **settings) -> Played:
    """A method on the device errs no more than source, within the margin; everywhere it stays sound."""
    played = play(frames, size, **settings)
    assert_sound(played, len(frames))
    if not bundle.is_reference:
        plain = play(frames, size, method="source")
        fine = np.isfinite(plain.logits).all(axis=1) & np.isfinite(frames).all(axis=(1, 2, 3))
        assert_as_good(played.logits[fine], plain.logits[fine], labels[fine])
        assert np.isfinite(played.logits[fine]).all()
    return played


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_frames_that_are_not_finite(play, bundle, name, stream, bad):
    frames, labels = stream[0].copy(), stream[1]
    frames[64:68] = bad
    frames[200, 0, 0, 0] = bad  # one pixel is enough
    played = assert_no_worse(play, bundle, frames, labels, 8)
    if name != "source" and not bundle.is_reference:
        assert np.isfinite(played.logits).all()
        assert any(event.startswith("guard: bad") for event in played.events)


@pytest.mark.parametrize("count", [16, 256])
def test_identical_images(play, bundle, stream, count):
    frames, labels = stream[0].copy(), stream[1].copy()
    frames[64 : 64 + count], labels[64 : 64 + count] = frames[3], labels[3]
    assert_no_worse(play, bundle, frames, labels, 16)


def test_a_batch_of_one(play, bundle, stream):
    assert_no_worse(play, bundle, stream[0][:160], stream[1][:160], 1)


def test_a_class_never_seen_before(play, bundle, stream):
    """Four classes first, the fifth later and then alone."""
    frames, labels = stream
    late = np.flatnonzero(labels == 4)
    order = np.concatenate([np.flatnonzero(labels != 4), late, late])
    assert_no_worse(play, bundle, frames[order], labels[order], 8)


def test_pure_noise(play, bundle, stream):
    """Noise for a long while. A method has 160 frames to get over it, or a guard to notice that it does not."""
    noise = np.random.default_rng(0).normal(0, 3, (192, *stream[0].shape[1:])).astype(np.float32)
    frames = np.concatenate([stream[0][:64], noise, stream[0]])
    played = play(frames, 8)
    assert_sound(played, len(frames))
    if not bundle.is_reference:
        plain = play(frames, 8, method="source")
        assert_as_good(played.logits[416:], plain.logits[416:], stream[1][160:])


def test_a_learning_rate_of_a_million(play, bundle, name, tail, stream):
    if "lr" not in fields(name, bundle, tail):
        pytest.skip(f"{name} has no learning rate")
    played = assert_no_worse(play, bundle, *stream, 8, lr=HUGE)
    if not bundle.is_reference and not any(event.startswith(("guard:", "refused:")) for event in played.events):
        usual = play(stream[0], 8)
        assert np.array_equal(played.logits, usual.logits)  # it learned nothing, such as for want of labels


def test_a_learning_rate_of_a_million_in_reference_mode_with_guards(play, bundle, name, tail, stream):
    if not bundle.is_reference or "lr" not in fields(name, bundle, tail):
        pytest.skip("on the device guards are there by default, and a method needs a learning rate")
    played = play(*stream[:1], 32, lr=HUGE, guards=True)
    assert_sound(played, len(stream[0]))
    assert np.isfinite(played.logits).all()


def test_what_a_bundle_cannot_serve_is_refused_before_the_stream(bundle, tail):
    poor = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"sites": (), "head": None}))
    refused = [method for method in names(METHODS) if method not in fitting(poor)]
    assert "moments" in refused
    for method in refused:
        with pytest.raises(ConfigError, match=f"{method} cannot run on bundle 'tiny'"):
            build(method, Context(poor, lambda: tail))


def test_an_unknown_guard_is_refused(bundle, tail):
    with pytest.raises(ConfigError, match="no guard 'watchdoc'"):
        build("moments", Context(bundle, lambda: tail, 0, {"guards": ["watchdoc"]}))
    with pytest.raises(ConfigError, match="expected true, false or a list"):
        build("moments", Context(bundle, lambda: tail, 0, {"guards": 3}))
