"""Windows of several known domains: told from those of one, and answered frame by frame."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import Context
from edge_adapt.preprocess import Preprocess
from edge_adapt.routing import mixed
from edge_adapt.routing.bank import Bank
from edge_adapt.routing.router import MIXED, ROUTE, RouterConfig
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail

WIDTH = 256
NEAR = RouterConfig().near


def frames_of(domain: int, count: int, seed: int = 0) -> np.ndarray:
    """[count, width] of unit length around a direction of the domain's own."""
    rng = np.random.default_rng((domain, seed))
    made = np.random.default_rng(domain).normal(size=WIDTH) + 0.7 * rng.normal(size=(count, WIDTH))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def bank() -> Bank:
    made = Bank.of(frames_of(0, 64).mean(axis=0), 64.0, None)
    for domain in (1, 2):
        made = made.grown(frames_of(domain, 64), None, 0)
    return made


def test_a_window_of_one_domain_gains_nothing_one_of_several_much(bank):
    assert all(mixed.gain(bank, frames_of(domain, 16, 7), NEAR) < 0.02 for domain in range(3))
    assert mixed.gain(bank, np.concatenate([frames_of(1, 8, 7), frames_of(2, 8, 7)]), NEAR) > 0.3
    assert mixed.gain(bank, np.concatenate([frames_of(domain, 6, 7) for domain in range(3)]), NEAR) > 0.3
    assert mixed.gain(bank, frames_of(9, 16), NEAR) < 0.05, "a domain that nobody knows is not several"


def test_a_new_domain_with_strangers_among_it_is_not_several_known_ones(bank):
    """It lies away from the entry that it is nearest to, and the strangers choose another one."""
    new = frames_of(1, 11, 7) + 0.6 * frames_of(9, 11, 7)
    window = np.concatenate([new / np.linalg.norm(new, axis=1, keepdims=True), frames_of(2, 5, 7)]).astype(np.float32)
    assert mixed.gain(bank, window, near=1e9) > 0.25
    assert mixed.gain(bank, window, NEAR) == 0
    few = np.concatenate([frames_of(1, 4, 7), frames_of(2, 10, 7), window[:2]])
    assert mixed.gain(bank, few, NEAR) > 0.25, "some frames that are of neither leave a mixture one"


def test_an_entry_that_one_window_alone_was_met_of_makes_no_mixture(bank):
    """Strangers found such entries."""
    window = np.concatenate([frames_of(1, 4, 7), frames_of(3, 12, 7)])
    founded = bank.grown(frames_of(3, 16), None, 0)
    assert mixed.gain(founded, window, NEAR) == 0
    met = founded.with_entry(3, founded.entries[3].met(frames_of(3, 16, 1), None, 0))
    assert mixed.gain(met, window, NEAR) > 0.25


def test_each_frame_goes_to_its_own_domain_and_a_foreign_one_to_source(bank):
    order = [2, 0, 1, 1, 2, 0]
    window = np.concatenate([frames_of(domain, 1, 5) for domain in order])
    assert mixed.places(bank, window, near=2.0).tolist() == order
    assert mixed.places(bank, frames_of(9, 4), near=2.0).tolist() == [0] * 4


@pytest.fixture(scope="module")
def mixing(device_bundle, tiny_data):
    """A router that knows clean and dark, a predictor, both kinds of frames, and the router's state."""
    tail = Tail(device_bundle)
    method = build("moments", Context(device_bundle, lambda: tail, settings={"router": "hdc"}))
    engine = OnnxRuntimeEngine(device_bundle)
    predictor, shape = Predictor(device_bundle, engine), Preprocess(device_bundle.manifest.input)
    clean, dark = shape(tiny_data.images), shape((tiny_data.images * 0.25).astype(np.uint8))
    state = method.init()
    for frames in (clean, dark, clean, dark):
        for start in range(0, 96, 8):
            step = method.step(state, predictor.look_for(method, frames[start : start + 8]))
            state = step.state
            predictor.apply(method.delta(state))
    yield method, predictor, clean, dark, state
    engine.close()


def with_own(state, **values):
    """The router's state with other values in its own part."""
    return replace(state, own=replace(state.own, **values))


def told(method, predictor, state, frames, size=8):
    """Steps over frames: the state, the events, and the last step."""
    events = []
    for start in range(0, len(frames), size):
        step = method.step(state, predictor.look_for(method, frames[start : start + size]))
        state = step.state
        events += step.events
        predictor.apply(method.delta(state))
    return state, events, step


def test_mixed_frames_are_answered_each_by_its_entry_and_nobody_learns(mixing):
    method, predictor, clean, dark, state = mixing
    both = np.concatenate([clean[:32], dark[32:64]])[np.random.default_rng(0).permutation(64)]
    state = with_own(state, in_doubt=True)
    state, events, _ = told(method, predictor, state, both)
    assert events.count(MIXED) == 1
    assert state.own.mixed
    before = state.own.bank
    some = np.concatenate([clean[96:112], dark[96:112]])
    state, events, step = told(method, predictor, state, some, size=32)
    assert state.own.bank is before
    assert step.stands.all()
    place = before.place("domain-1")
    by_source = predictor.rehearse(some[:16], method.host.delta(before.entries[0].state), frozenset()).logits
    by_dark = predictor.rehearse(some[16:], method.host.delta(before.entries[place].state), frozenset()).logits
    right = np.abs(step.logits - np.concatenate([by_source, by_dark])).max(axis=1) < 1e-5
    assert right.mean() > 0.8, "a single frame may look like the other domain"
    assert not np.allclose(by_dark, predictor.rehearse(some[16:], method.source, frozenset()).logits, atol=1e-3)

    state, events, _ = told(method, predictor, state, dark[:64])
    assert not state.own.mixed
    assert f"{ROUTE}domain-1" in events or state.own.active == place


def test_taps_that_are_not_finite_are_told_while_domains_are_mixed(mixing):
    method, predictor, clean, _, state = mixing
    state = with_own(state, mixed=True)
    broken = clean[:8].copy()
    broken[3] = np.nan
    step = method.step(state, predictor.look_for(method, broken))
    assert step.events == ("refused: taps are not finite",)
    assert step.state is state
