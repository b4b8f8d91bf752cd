"""What is kept of a state while its domain is away: little, and enough to go on from."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.guards.strange import FIRST
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import Answered, Context, compacted
from edge_adapt.preprocess import Preprocess
from edge_adapt.routing.bank import size
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail


@pytest.fixture
def predictor(device_bundle):
    with closing(OnnxRuntimeEngine(device_bundle)) as engine:
        yield Predictor(device_bundle, engine)


@pytest.fixture
def dark(device_bundle, tiny_data):
    return Preprocess(device_bundle.manifest.input)((tiny_data.images[:128] * 0.3).astype(np.uint8))


def made(bundle, name):
    tail = Tail(bundle)
    return build(name, Context(bundle, lambda: tail))


def after(method, state, predictor, frames):
    for start in range(0, len(frames), 8):
        predictor.apply(method.delta(state))
        seen = predictor.look_for(method, frames[start : start + 8])
        state = method.step(state, seen).state
        if method.watches:
            state = method.watch(state, Answered.of(seen)).state
    return state


def inside(state):
    """The states of the wrappers, the outermost first, and the method's own."""
    found = []
    while hasattr(state, "host"):
        found.append(state.own)
        state = state.host
    return [*found, state]


@pytest.mark.parametrize("name", ["moments", "auto", "tent"])
def test_what_is_kept_is_smaller_and_goes_on_as_if_nothing_had_been(device_bundle, predictor, dark, name):
    method = made(device_bundle, name)
    state = after(method, method.init(), predictor, dark)
    kept = compacted(method, state)
    assert size(kept) < 0.5 * size(state)
    assert method.delta(kept) is method.delta(state)
    whole, back = (after(method, one, predictor, dark[:32]) for one in (state, kept))
    expected, found = method.delta(whole), method.delta(back)
    assert found and found.keys() == expected.keys()
    for key in (key for key in expected if key.startswith("port")):
        np.testing.assert_allclose(found[key], expected[key], atol=1e-4)


def test_of_ports_alone_one_state_is_kept_for_all_who_want_one(device_bundle, predictor, dark):
    method = made(device_bundle, "moments")
    state = after(method, method.init(), predictor, np.tile(dark, (2, 1, 1, 1)))
    whole, kept = inside(state), inside(compacted(method, state))
    assert len({id(part) for part in _moments(whole)}) > 1, "the guards hold states of several times"
    assert len({id(part) for part in _moments(kept)}) == 1


def test_an_open_trial_stays_open(device_bundle, predictor, dark):
    """Else ports would never come into force where visits are shorter than a trial."""
    method = made(device_bundle, "moments")
    state = after(method, method.init(), predictor, dark[:24])
    trial, kept = (next(part.trial for part in inside(one) if hasattr(part, "trial")) for one in (
        state, compacted(method, state)))  # fmt: skip
    assert 0 < len(trial.answers) < 32
    assert np.array_equal(kept.answers, trial.answers) and kept.tapped == trial.tapped
    np.testing.assert_allclose(kept.ours, trial.ours, rtol=1e-5)


def _moments(parts):
    """The states of `moments` that the guards and the method hold."""
    for part in parts:
        for held in (getattr(part, "good", None), getattr(part, "wide", None)):
            if held is not None:
                yield inside(held)[-1]
    yield parts[-1]


@pytest.mark.parametrize("frames", [4, 16, FIRST + 16])
def test_the_first_frames_of_a_domain_are_not_kept(device_bundle, predictor, dark, frames):
    method = made(device_bundle, "moments")
    state = compacted(method, after(method, method.init(), predictor, dark[:frames]))
    usual = next(part for part in inside(state) if hasattr(part, "first"))
    assert not len(usual.first)
    assert bool(len(usual.distances)) == (frames >= 8)
    back = after(method, state, predictor, dark[64:96])
    assert method.delta(back).is_finite()
