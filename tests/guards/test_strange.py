"""Strange frames: told from their domain's own, kept from the host, answered from source, and no evidence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hosts import Host, observed, sharp

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.guards.strange import STRANGE, Strange
from edge_adapt.guards.trial import Trial
from edge_adapt.guards.watchdog import Watchdog
from edge_adapt.methods.protocol import Observation


def settled(guard: Strange, bundle: Bundle, looks: int = 8):
    state = guard.init()
    for seed in range(looks):
        state = guard.step(state, observed(bundle, 8, seed)).state
    return state


def mixed(bundle: Bundle, seed: int, shift: float, foreign: tuple[int, ...], far: float) -> Observation:
    """A look at 8 frames of a domain `shift` deviations from source, and some that are `far` away."""
    seen, others = observed(bundle, 8, seed, shift=shift), observed(bundle, 8, seed + 1000, shift=far)
    assert seen.taps is not None
    assert others.taps is not None
    for part, other in zip(seen.taps, others.taps, strict=True):
        part[list(foreign)] = other[list(foreign)]
    return seen


def test_one_strange_frame_does_not_reach_the_host(context):
    guard = Strange(context, Host())
    state = settled(guard, context.bundle)
    before = state.host.frames
    step = guard.step(state, observed(context.bundle, 1, 9, shift=20))
    assert step.events == (STRANGE,)
    assert step.aside is not None
    assert step.aside.all()
    assert step.state.host.frames == before
    assert guard.look(step.state, 5, 0) >= 1


def test_a_look_of_strange_frames_is_another_domain_and_all_of_it_is_learned_from(context):
    guard = Strange(context, Host())
    state = settled(guard, context.bundle)
    whole = guard.step(state, observed(context.bundle, 8, 9, shift=20))
    assert whole.events == ()
    assert whole.state.host.frames == state.host.frames + 8


def test_strange_frames_one_by_one_become_another_domain_soon(context):
    guard = Strange(context, Host())
    state = settled(guard, context.bundle)
    before = state.host.frames
    for seed in range(8):
        state = guard.step(state, observed(context.bundle, 1, 50 + seed, shift=20)).state
    assert state.host.frames >= before + 4


@pytest.mark.parametrize("shift", [0, 5])
def test_strangers_are_told_apart_in_a_domain_far_from_source_though_three_in_ten_are(context, shift):
    guard = Strange(context, Host())
    state, aside = guard.init(), []
    rng = np.random.default_rng(0)
    for seed in range(30):
        foreign = tuple(np.flatnonzero(rng.random(8) < 0.3))
        step = guard.step(state, mixed(context.bundle, seed, shift, foreign, -12.0))
        state = step.state
        rows = np.zeros(8, bool) if step.aside is None else step.aside
        aside.append((np.isin(np.arange(8), foreign), rows))
    truth, found = (np.concatenate(parts[1:]) for parts in zip(*aside, strict=True))
    assert found[truth].mean() > 0.9
    assert found[~truth].mean() < 0.1


def test_healthy_frames_are_seldom_told_to_be_strange_and_few_stay_aside(context):
    guard = Strange(context, Host())
    state, events = guard.init(), []
    for seed in range(200):
        step = guard.step(state, observed(context.bundle, 4, seed))
        state, events = step.state, events + list(step.events)
    assert len(events) <= 4
    assert state.host.frames > 0.85 * 800


def test_the_strangest_are_answered_from_source_and_that_stands(context):
    ports = Delta.of_ports(np.ones(context.bundle.channels), np.zeros(context.bundle.channels))
    guard = Strange(context, Host(lambda frames: ports))
    state = settled(guard, context.bundle)
    seen = mixed(context.bundle, 9, 0.0, (2,), 20.0)
    answer = sharp([4])

    def rehearse(frames, delta):
        assert delta.same_as(Delta.source())
        return replace(seen, frames=frames, logits=np.repeat(answer, len(frames), axis=0), features=None)

    step = guard.step(state, replace(seen, delta=ports, rehearse=rehearse))
    assert step.stands is not None
    assert step.stands.tolist() == [False, False, True] + [False] * 5
    assert step.logits[2] == pytest.approx(answer[0])
    assert np.delete(step.logits, 2, axis=0) == pytest.approx(np.delete(seen.logits, 2, axis=0))


def test_a_stranger_is_no_evidence_against_what_was_learned(context):
    """Its answers change as ports come into force, and mean nothing before and after."""
    guard = Watchdog(context, Strange(context, Host()))
    state = guard.init()
    for seed in range(4):
        state = guard.step(state, observed(context.bundle, 8, seed)).state
    seen = mixed(context.bundle, 9, 0.0, (0, 3), 20.0)
    tried = replace(state, own=replace(state.own, trial=Trial.empty()))
    step = guard.step(tried, replace(seen, delta=Delta.source(), rehearse=lambda frames, delta: seen))
    assert step.aside is not None
    assert step.aside[[0, 3]].all()
    assert len(step.state.own.trial.answers) == int((~step.aside).sum())
