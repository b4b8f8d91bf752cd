"""Each guard around a host that does as it is told, and the watchdog around one that does harm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hosts import CLASSES, Count, Host, Taught, observed, sharp

from edge_adapt.bundle import Bundle
from edge_adapt.delta import PORT_SCALE, PORT_SHIFT, Delta
from edge_adapt.guards.default import GUARDS, guarded
from edge_adapt.guards.finite import BAD_ANSWERS, BAD_DELTA, BAD_FRAMES, Finite
from edge_adapt.guards.narrow import Narrow
from edge_adapt.guards.repeated import REPEATED, Repeated
from edge_adapt.guards.reset import RESET, Reset
from edge_adapt.guards.trial import Trial
from edge_adapt.guards.watchdog import COLLAPSE, LEAP, RETURN, ROLLBACK, Watchdog, taught
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import Answered, Context, Labelled
from edge_adapt.tail import Tail

# Finite


@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e30])
def test_bad_frames_are_kept_from_the_host_and_counted(context, bad):
    guard = Finite(context, Host())
    seen = observed(context.bundle, 8)
    seen.frames[2, 1, 3, 3] = seen.frames[5, 0, 0, 0] = bad
    step = guard.step(guard.init(), seen)
    assert (step.state.host.frames, step.state.own) == (6, 2)
    assert step.events == (BAD_FRAMES,)
    assert guard.step(step.state, observed(context.bundle, 8)).state.own == 2


def test_bad_taps_alone_are_bad_frames(context):
    guard = Finite(context, Host())
    seen = observed(context.bundle, 8)
    seen.taps[1][0, 3] = np.nan
    assert guard.step(guard.init(), seen).state.host.frames == 7


def test_a_bad_answer_becomes_the_frequencies_of_source(context):
    guard = Finite(context, Host())
    logits = sharp([1, 2, 3])
    logits[1, 0] = np.nan
    step = guard.watch(guard.init(), Answered(logits))
    assert step.logits[[0, 2]] == pytest.approx(sharp([1, 3]))
    assert np.exp(step.logits[1]) == pytest.approx(context.bundle.source["prior"], abs=1e-5)
    assert step.events == (BAD_ANSWERS,)
    assert step.state.host.answers == 2


def test_what_the_host_makes_of_an_answer_is_checked_too(context):
    guard = Finite(context, Host(correct=lambda logits: logits * np.nan))
    step = guard.watch(guard.init(), Answered(sharp([1, 2])))
    assert step.logits == pytest.approx(sharp([1, 2]))
    assert BAD_ANSWERS in step.events


@pytest.mark.parametrize("number", [np.nan, -1.0, 0.0])
def test_a_bad_delta_is_not_used(context, number):
    channels = context.bundle.channels
    guard = Finite(context, Host(lambda frames: Delta.of_ports(np.full(channels, number), np.zeros(channels))))
    step = guard.step(guard.init(), observed(context.bundle, 8))
    assert step.events == (BAD_DELTA,)
    assert step.state.host == Count()


# Repeated


def test_a_frozen_camera_is_looked_at_once(context):
    guard = Repeated(context, Host())
    seen = observed(context.bundle, 8)
    seen.frames[3:] = seen.frames[3]
    step = guard.step(guard.init(), seen)
    assert (step.state.host.frames, step.events) == (4, (REPEATED,))
    again = guard.step(step.state, replace(seen, frames=np.repeat(seen.frames[7:], 8, axis=0)))
    assert (again.state.host.frames, again.events) == (4, (REPEATED,))


# Reset


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_reset_counts_frames_not_batches(context, size):
    guard = Reset(context, Host(), period=200)
    state, resets = guard.init(), []
    for number in range(700 // size):
        step = guard.watch(state, Answered(np.zeros((size, CLASSES))))
        if RESET in step.events:
            resets.append((number + 1) * size)
            assert step.state.host == Count()
        state = step.state
    assert len(resets) == 3
    assert all(abs(reset - expected) < size for reset, expected in zip(resets, (200, 400, 600), strict=True))


# Trial


def test_a_burst_is_no_collapse_and_no_contradiction():
    trial = Trial.empty().with_answers(sharp([2] * 32), sharp([2] * 24 + [0, 1, 3, 4] * 2, 2.0))
    assert not trial.collapsed(CLASSES)
    assert trial.agreement == 1


def test_one_class_for_all_is_a_collapse():
    trial = Trial.empty().with_answers(sharp([2] * 32), sharp([0, 1, 2, 3] * 8))
    assert trial.collapsed(CLASSES)
    assert trial.agreement == pytest.approx(0.25, abs=0.1)


def test_only_what_the_plain_network_is_sure_of_counts():
    plain = np.concatenate([sharp([0, 1] * 8, 9.0), sharp([0, 1] * 8, 0.5)])
    assert Trial.empty().with_answers(np.concatenate([sharp([0, 1] * 8), sharp([3] * 16)]), plain).agreement == 1


def test_ports_that_make_activations_stranger():
    source = np.zeros((32, 4)), np.ones((32, 4))
    worse, better = (np.full((32, 4), shift) for shift in (0.9, 0.1))
    facts = np.zeros(4), np.ones(4), np.array([0, 2])
    here = np.full((32, 4), 0.3), np.full((32, 4), 1.09)
    assert Trial.empty().with_taps((worse, 1 + worse**2), here).strange_taps(*facts)
    assert not Trial.empty().with_taps((better, 1 + better**2), here).strange_taps(*facts)
    assert not Trial.empty().with_taps(source, source).strange_taps(*facts)
    assert not Trial.empty().strange_taps(*facts)


# Watchdog


def play(guard, bundle: Bundle, frames: int, *, plain=None, learned=None, state=None, taps_shift=0.0, height=8.0):
    """Give looks of 8: `plain` and `learned` are classes [8] that the network answers without and with the tail.

    Ports move the taps by `taps_shift` frame deviations, and leave logits of `height`.
    """
    events: list[tuple[int, str]] = []
    state = guard.init() if state is None else state
    rng = np.random.default_rng(0)

    def answers(delta: Delta, classes):
        return classes if learned is None or not delta.tail else learned

    for start in range(0, frames, 8):
        classes = rng.integers(0, CLASSES, 8) if plain is None else np.asarray(plain)

        def rehearse(shown, delta, classes=classes, start=start):
            ports = delta.get(PORT_SHIFT) is not None
            shift = taps_shift if ports else 0.0
            seen = observed(bundle, len(shown), start, shift=shift, classes=np.asarray(answers(delta, classes)))
            return replace(seen, logits=seen.logits * (height / 8.0 if ports else 1.0))

        in_force = guard.delta(state)
        told: tuple[str, ...] = ()
        if guard.look(state, 8, 0):
            seen = replace(rehearse(np.zeros((8, 3, 16, 16), np.float32), in_force), rehearse=rehearse)
            step = guard.step(state, seen)
            state, told, logits = step.state, step.events, seen.logits
        else:
            logits = sharp(answers(in_force, classes))
        step = guard.watch(state, Answered(logits))
        state = step.state
        events += [(start, event) for event in (*told, *step.events)]
    return state, events


CONTRADICTS = {"plain": [0, 1, 2, 3, 4, 0, 1, 2], "learned": [1, 2, 3, 4, 0, 1, 2, 3]}


def tail_delta(context: Context, factor: float) -> Delta:
    name, value = next(iter(context.tail().norm_parameters.items()))
    return Delta({f"tail/{name}": value.numpy() * np.float32(factor)})


def some_ports(context: Context) -> Delta:
    channels = context.bundle.channels
    return Delta({PORT_SCALE: np.ones(channels), PORT_SHIFT: np.full(channels, 3.0)})


def test_a_sound_host_is_left_alone(context):
    delta = tail_delta(context, 1.1)
    guard = Watchdog(context, Host(lambda frames: delta))
    state, events = play(guard, context.bundle, 6000)
    assert events == []
    assert guard.delta(state) is delta
    assert state.own.passes > 4


def test_a_burst_of_one_class_does_not_trip_it(context):
    guard = Watchdog(context, Host(lambda frames: tail_delta(context, 1.1)))
    _, events = play(guard, context.bundle, 3000, plain=[3] * 8, learned=[3] * 8)
    assert events == []


def test_a_collapse_is_named_and_taken_back(context):
    delta = tail_delta(context, 1.2)
    guard = Watchdog(context, Host(lambda frames: delta))
    state, events = play(guard, context.bundle, 400, learned=[3] * 8)
    # Too few sure frames at first, then the first trial: within 200 frames.
    assert [event for _, event in events] == [COLLAPSE]
    assert events[0][0] < 200
    assert not guard.delta(state).tail
    assert state.host.frames > 0  # it goes on learning, in the shadow


def test_what_contradicts_the_plain_network_is_rolled_back_to_the_last_good_state(context):
    good, bad = tail_delta(context, 1.1), tail_delta(context, 1.3)
    guard = Watchdog(context, Host(lambda frames: good if frames < 600 else bad))
    state, _ = play(guard, context.bundle, 560)
    assert guard.delta(state) is good
    kept = state.own.good
    state, events = play(guard, context.bundle, 400, **CONTRADICTS, state=state)
    assert [event for _, event in events] == [ROLLBACK]
    assert state.own.failures == 1
    assert state.own.good is kept


def test_rests_grow_and_end_with_a_trial_in_the_shadow(context):
    delta = tail_delta(context, 1.2)
    guard = Watchdog(context, Host(lambda frames: delta))
    state, events = play(guard, context.bundle, 6000, **CONTRADICTS)
    falls = [at for at, event in events if event == ROLLBACK]
    assert len(falls) >= 3
    gaps = np.diff(falls)
    assert (gaps[1:] > 1.7 * gaps[:-1]).all()
    assert not guard.delta(state).tail
    state, events = play(guard, context.bundle, 6000, state=state)
    assert [event for _, event in events] == [RETURN]
    assert guard.delta(state) is delta


def test_a_step_that_is_too_large_is_not_even_tried(context):
    guard = Watchdog(context, Host(lambda frames: tail_delta(context, 1e6)))
    state, events = play(guard, context.bundle, 80)
    assert events[0] == (0, LEAP)
    assert not guard.delta(state).tail


def test_ports_that_do_harm_give_way_to_source(context):
    guard = Watchdog(context, Host(lambda frames: some_ports(context)))
    state, events = play(guard, context.bundle, 300, taps_shift=9.0)
    assert events[0][1] == ROLLBACK
    assert state.own.rests == "all"
    assert guard.delta(state).same_as(Delta.source())
    assert guard.look(state, 8, 100) == 0


def test_ports_take_force_once_they_passed_a_trial(context):
    guard = Watchdog(context, Host(lambda frames: some_ports(context)))
    state, events = play(guard, context.bundle, 32)
    assert state.own.rests == "all"
    assert guard.delta(state).same_as(Delta.source())
    state, more = play(guard, context.bundle, 16, state=state)
    assert guard.delta(state) is state.host.delta
    assert events + more == []


def test_ports_that_leave_little_of_the_certainty_never_take_force(context):
    guard = Watchdog(context, Host(lambda frames: some_ports(context)))
    state, events = play(guard, context.bundle, 5000, height=1.0)
    assert {event for _, event in events} == {ROLLBACK}
    falls = [at for at, _ in events]
    assert len(falls) >= 3
    assert (np.diff(falls)[1:] > 1.7 * np.diff(falls)[:-1]).all()
    assert guard.delta(state).same_as(Delta.source())
    state, events = play(guard, context.bundle, 6000, state=state)
    assert [event for _, event in events] == [RETURN]
    assert guard.delta(state) is state.host.delta


def test_certainty_of_one_class_alone_is_no_reason_against_ports(context):
    guard = Watchdog(context, Host(lambda frames: some_ports(context)))
    state, events = play(guard, context.bundle, 400, plain=[3] * 8, height=1.0)
    assert events == []
    assert guard.delta(state) is state.host.delta


def test_ports_of_a_host_that_was_taught_need_no_trial(context):
    guard = Watchdog(context, Host(lambda frames: some_ports(context)))
    state, _ = play(guard, context.bundle, 8)
    assert state.own.rests == "all"
    state = replace(state, own=taught(state.own))
    state, _ = play(guard, context.bundle, 64, state=state)
    assert guard.delta(state) is state.host.delta


def test_a_host_that_spoils_answers_is_held_back_without_a_look(context):
    class Blind(Host):
        needs: frozenset[str] = frozenset()

        def look(self, state, frames, passed):
            return 0

    guard = Watchdog(context, Blind(correct=lambda logits: np.roll(logits, 1, axis=1)))
    state, events = play(guard, context.bundle, 120)
    assert ROLLBACK in [event for _, event in events]
    step = guard.watch(state, Answered(sharp([1, 2, 3])))
    assert step.logits.argmax(axis=1).tolist() == [1, 2, 3]


def test_what_was_taught_by_labels_is_judged_no_more(context):
    delta = tail_delta(context, 1.2)
    host = Taught(lambda frames: delta)
    guard = guarded(host, context)
    state = guard.init()
    labelled = Labelled(np.zeros((2, 8, 16, 16)), np.array([0, 1]))
    state = guard.learn_from(state, labelled).state
    assert guard.predict(state, np.zeros((2, 1))).shape == (2, CLASSES)
    assert "reset" not in [part.name for part in chain(guard)]
    watchdog = next(part for part in chain(guard) if part.name == "watchdog")
    inner = state
    while not hasattr(inner.own, "taught"):
        inner = inner.host
    _, events = play(watchdog, context.bundle, 600, learned=[3] * 8, state=inner)
    assert events == []


def test_a_state_of_before_is_a_rollback(context):
    guard = Watchdog(context, Host(lambda frames: tail_delta(context, 1.2)))
    state, _ = play(guard, context.bundle, 80)
    first, told = play(guard, context.bundle, 400, learned=[3] * 8, state=state)
    again, retold = play(guard, context.bundle, 400, learned=[3] * 8, state=state)
    assert told == retold
    assert first.own.failures == again.own.failures == 1


# Defaults


def chain(method) -> list[Any]:
    found = []
    while hasattr(method, "host"):
        found.append(method)
        method = method.host
    return found


def test_who_has_which_guards(device_bundle, reference_bundle):
    tails = {bundle.id: Tail(bundle) for bundle in (device_bundle, reference_bundle)}

    def names(method: str, bundle: Bundle, **settings) -> list[str]:
        made = build(method, Context(bundle, lambda: tails[bundle.id], 0, settings))
        return [part.name for part in chain(made)][::-1]

    everything = list(GUARDS)
    assert names("tent", device_bundle) == everything
    assert names("moments", device_bundle) == everything
    assert names("source", device_bundle) == []
    assert names("tent", device_bundle, guards=False) == []
    assert names("tent", device_bundle, guards=["finite", "reset"]) == ["reset", "finite"]
    assert names("tent", reference_bundle) == []
    assert names("tent", reference_bundle, guards=True) == [name for name in everything if name != Narrow.name]
