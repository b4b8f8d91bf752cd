"""The router around moments, on a network whose domains are plain: dark, bright and noisy images."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from edge_adapt.delta import Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError
from edge_adapt.guards.strange import STRANGE
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import Context
from edge_adapt.preprocess import Preprocess
from edge_adapt.routing.bank import KNOWN
from edge_adapt.routing.router import BAD_TAPS, NEW_DOMAIN, ROUTE
from edge_adapt.runtime.loop import adapt
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail

VISIT = 96


def routed(bundle, method="moments", **settings):
    tail = Tail(bundle)
    return build(method, Context(bundle, lambda: tail, settings={"router": settings or "hdc"}))


@pytest.fixture(scope="module")
def domains(tiny_data):
    """Name -> images: as they are, dark, and noisy."""
    images = tiny_data.images
    noise = np.random.default_rng(0).normal(0, 60, images.shape)
    return {
        "clean": images,
        "dark": (images * 0.25).astype(np.uint8),
        "noisy": np.clip(images + noise, 0, 255).astype(np.uint8),
    }


def play(bundle, method, parts, batch=16):
    """The events and the entry that answered at the end of each part."""
    engine = OnnxRuntimeEngine(bundle)
    try:
        predictor, shape = Predictor(bundle, engine), Preprocess(bundle.manifest.input)
        batches = [shape(images[i : i + batch]) for images in parts for i in range(0, len(images), batch)]
        answers = list(adapt(predictor, method, batches, clock=time.perf_counter))
    finally:
        engine.close()
    ends = np.cumsum([-(-len(images) // batch) for images in parts])
    entry, at_end, events = "source", [], []
    for number, answer in enumerate(answers, 1):
        events.append(answer.events)
        entry = next((event[len(ROUTE) :] for event in reversed(answer.events) if event.startswith(ROUTE)), entry)
        if number in ends:
            at_end.append(entry)
    return events, at_end


def visit(images, number):
    return np.roll(images, -number * VISIT, axis=0)[:VISIT]


def test_each_domain_gets_an_entry_and_its_own_one_again(device_bundle, domains):
    order = ["clean", "dark", "noisy"] * 3
    parts = [visit(domains[name], number) for number, name in enumerate(order)]
    events, entries = play(device_bundle, routed(device_bundle), parts)
    first, second, third = entries[:3], entries[3:6], entries[6:]
    assert first[0] == "source"
    assert len(set(first)) == 3
    assert second == third == first
    assert sum(event == NEW_DOMAIN for told in events for event in told) == 2


def test_what_a_domain_learned_is_in_force_again_at_once(device_bundle, domains):
    method = routed(device_bundle)
    engine = OnnxRuntimeEngine(device_bundle)
    try:
        predictor, shape = Predictor(device_bundle, engine), Preprocess(device_bundle.manifest.input)
        state = method.init()
        for name in ("dark", "clean", "dark"):
            for start in range(0, 64, 8):
                frames = shape(domains[name][start : start + 8])
                step = method.step(state, predictor.look_for(method, frames))
                state = method.watch(step.state, step_answer(predictor, method, frames)).state
                predictor.apply(method.delta(state))
        entry = state.own.bank.entries[state.own.active]
        assert entry.name == "domain-1"
        assert entry.visits == 2
        assert not method.delta(state).same_as(Delta.source())
    finally:
        engine.close()


def step_answer(predictor, method, frames):
    return predictor.answer(frames, features="features" in method.watches)


def test_the_cap_holds_and_source_stays(device_bundle, domains):
    rng = np.random.default_rng(1)
    images = domains["clean"]
    parts = [(images[:VISIT] * factor).astype(np.uint8) for factor in (0.1, 0.45, 1.0)]
    parts += [np.clip(images[:VISIT] + rng.normal(0, sigma, images[:VISIT].shape), 0, 255).astype(np.uint8)
              for sigma in (25, 60, 120)]  # fmt: skip
    method = routed(device_bundle, entries=2)
    engine = OnnxRuntimeEngine(device_bundle)
    try:
        predictor, shape = Predictor(device_bundle, engine), Preprocess(device_bundle.manifest.input)
        state = method.init()
        for part in parts:
            for start in range(0, VISIT, 8):
                step = method.step(state, predictor.look_for(method, shape(part[start : start + 8])))
                state, bank = step.state, step.state.own.bank
                predictor.apply(method.delta(state))
                if NEW_DOMAIN in step.events:
                    assert bank.entries[state.own.active].name == f"domain-{bank.made}"
                assert len(bank.entries) <= 3
                assert bank.entries[0].name == "source"
        assert bank.made >= 3
    finally:
        engine.close()


def test_taps_that_are_not_finite_leave_the_bank_unchanged(device_bundle, domains):
    method = routed(device_bundle)
    engine = OnnxRuntimeEngine(device_bundle)
    try:
        predictor, shape = Predictor(device_bundle, engine), Preprocess(device_bundle.manifest.input)
        state = method.init()
        frames = shape(domains["clean"][:8])
        frames[3] = np.nan
        step = method.step(state, predictor.look_for(method, frames))
        assert BAD_TAPS in step.events
        assert step.state.own.bank is state.own.bank
        assert not step.state.own.window.size
    finally:
        engine.close()


def test_a_method_without_taps_is_refused(device_bundle):
    with pytest.raises(ConfigError, match="looks at no taps"):
        routed(device_bundle, "source")


def test_a_router_that_there_is_not_is_refused(device_bundle):
    with pytest.raises(ConfigError, match="no router 'hcd'"):
        build("moments", Context(device_bundle, lambda: Tail(device_bundle), settings={"router": "hcd"}))


@pytest.mark.parametrize("name", ["near", "mixed", "window"])
def test_a_setting_that_can_mean_nothing_is_refused(device_bundle, name):
    with pytest.raises(ConfigError, match=f"router.{name} is 0"):
        routed(device_bundle, **{name: 0})


def test_a_cap_too_small_for_one_entry_is_refused(device_bundle):
    with pytest.raises(ConfigError, match="one entry takes"):
        routed(device_bundle, bytes=10)


def test_a_bundle_without_encoder_is_refused_with_the_remedy(device_bundle):
    bare = replace(
        device_bundle, source={name: value for name, value in device_bundle.source.items() if "encoder" not in name}
    )
    with pytest.raises(ConfigError, match="no encoder") as caught:
        routed(bare)
    assert "--calibration" in str(caught.value.remedy)


def test_strange_frames_among_others_found_no_domain_and_leave_the_descriptor_alone(device_bundle, domains):
    """Three in ten are noise. At worst the first window of a domain holds some, and another founds it anew."""
    rng = np.random.default_rng(0)
    images = np.tile(domains["dark"], (2, 1, 1, 1))
    foreign = rng.random(256) < 0.3
    images[foreign] = rng.integers(0, 256, images[foreign].shape, np.uint8)
    method = routed(device_bundle)
    events, entries = play(device_bundle, method, [domains["clean"][:64], images, domains["clean"][64:128]])
    told = [event for part in events for event in part]
    assert told.count(NEW_DOMAIN) <= 2
    assert STRANGE in told
    assert (entries[0], entries[2]) == ("source", "source")
    assert entries[1].startswith("domain-")


def test_a_frame_whose_answer_is_far_stranger_than_its_domains_is_told_and_left_out(device_bundle, domains):
    method = routed(device_bundle)
    engine = OnnxRuntimeEngine(device_bundle)
    try:
        predictor, shape = Predictor(device_bundle, engine), Preprocess(device_bundle.manifest.input)
        state = method.init()
        for start in range(0, 256, 8):
            seen = predictor.look_for(method, shape(domains["clean"][start % 128 : start % 128 + 8]))
            state = method.step(state, seen).state
        own = replace(state.own, window=state.own.window[:0], scores=np.zeros(0))
        usual = own.bank.entries[0].usual
        assert usual.frames >= KNOWN
        seen = predictor.look(shape(domains["clean"][:8]), method.needs | method.watches)
        *_, second, strangest = np.sort(method.judge(seen.logits, seen.features))
        usual = replace(usual, mean=second, variance=((strangest - second) / 4) ** 2)
        own = replace(own, bank=own.bank.with_entry(0, replace(own.bank.entries[0], usual=usual)))
        own, novel = method._noticed(own, seen)
        assert (novel, len(own.window), len(own.scores)) == (1, 7, 7)
    finally:
        engine.close()


def test_a_window_of_strange_answers_is_no_novelty(device_bundle, domains):
    method = routed(device_bundle)
    engine = OnnxRuntimeEngine(device_bundle)
    try:
        predictor, shape = Predictor(device_bundle, engine), Preprocess(device_bundle.manifest.input)
        own = method.init().own
        usual = replace(own.bank.entries[0].usual, mean=-1e3, frames=KNOWN)
        own = replace(own, in_doubt=False, bank=own.bank.with_entry(0, replace(own.bank.entries[0], usual=usual)))
        seen = predictor.look(shape(domains["clean"][:8]), method.needs | method.watches)
        own, novel = method._noticed(own, seen)
        assert (novel, len(own.window)) == (0, 8)
    finally:
        engine.close()
