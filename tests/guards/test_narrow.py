"""The guard against few classes: what it tells apart, and what answers meanwhile."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hosts import CLASSES, Host, Taught, sharp
from hosts import observed as looked

from edge_adapt.delta import PORT_SHIFT, Delta
from edge_adapt.guards.default import guarded, taught_too
from edge_adapt.guards.narrow import CHANGE, DOUBT, FEW, MANY, SETTLE, WINDOW, Narrow, Window
from edge_adapt.methods.protocol import FEATURES, TAPS, Answered, Context, Labelled, Step

LOOK = 16
WIDTH = 16


class Domains(Host):
    """A host that says where its domain changes."""

    watches = frozenset()

    def __init__(self, changes=(), **facts) -> None:
        super().__init__(**facts)
        self.changes = changes

    def step(self, state, seen):
        step = super().step(state, seen)
        return replace(step, again=True, events=(CHANGE,) if step.state.frames in self.changes else ())


def shifted(bundle, size):
    return Delta({PORT_SHIFT: np.full(bundle.channels, size, np.float32)})


def of_many(bundle, seed=0, count=LOOK):
    """A look at frames of all classes: answers sure, features as wide as source's."""
    return seen(bundle, seed, count, np.arange(count) % CLASSES, width=1.0, height=8.0)


def of_one(bundle, seed=0, count=LOOK, plain=None):
    """A look at frames of one class, through ports that were set from it: unsure of many kinds, features close.

    plain: what source makes of them; by default it answers that class alone.
    """
    plain = plain or seen(bundle, seed, count, np.zeros(count, int), width=0.25, height=8.0)
    classes = np.random.default_rng(seed).integers(0, CLASSES, count)
    return seen(bundle, seed, count, classes, width=0.3, height=1.0, plain=plain)


def noise(bundle, seed=0, count=LOOK, width=0.3):
    """A look at frames of all classes that noise has left little of: source is no better, its features as close."""
    plain = seen(bundle, seed, count, np.arange(count) % CLASSES, width=width, height=1.0)
    return of_one(bundle, seed, count, plain)


def of_mixed(bundle, seed=0, count=LOOK):
    """A look at frames of one class and many domains: to ports many classes, features as wide as source's."""
    far = np.where(np.arange(count) % 4, 1.0, 2.0)[:, None]  # one domain in four is far from source
    plain = seen(bundle, seed, count, np.zeros(count, int), width=1.0, height=8.0)
    plain = apart(plain, bundle, seed, 0.8 * far)
    look = seen(bundle, seed, count, np.arange(count) % CLASSES, width=1.0, height=8.0, plain=plain)
    return apart(look, bundle, seed, 1.5 * far)


def of_three(bundle, seed=0, count=LOOK):
    """A look at frames of three classes and one domain near source: to ports many classes, and unsure."""
    plain = seen(bundle, seed, count, np.arange(count) % 3, width=0.3, height=8.0)
    return apart(of_one(bundle, seed, count, apart(plain, bundle, seed, 0.5)), bundle, seed, 0.5)


def apart(look, bundle, seed, width):
    """That look with tap means that lie `width` times as wide about source's own middle as source's do."""
    middle, usual = (bundle.source[f"taps.{name}"] for name in ("mean", "frame_std"))
    means = np.random.default_rng(seed).normal(middle, width * usual, (len(look.frames), len(usual)))
    return replace(look, taps=(means, np.square(means) + 1.0))


def stretched(bundle, seed=0, count=LOOK):
    """A look at frames of one class that source takes for several, its features a third as wide as with ports."""
    return noise(bundle, seed, count, width=0.1)


def seen(bundle, seed, count, classes, *, width, height, plain=None):
    """A look with source weights or others; `plain` is what source would give."""
    usual = np.square(bundle.source["class.std"]).sum() + bundle.source["class.mean"].var(axis=0).sum()
    rng = np.random.default_rng(seed)
    size = bundle.source["class.mean"].shape[1]
    features = rng.normal(0, width * np.sqrt(usual / size), (count, size)).astype(np.float32)
    look = replace(looked(bundle, count, seed), features=features, logits=sharp(classes, height))

    def rehearse(frames, delta):
        given = plain if plain is not None and not delta else look
        return replace(given, delta=delta, rehearse=rehearse)

    return replace(look, delta=shifted(bundle, 0.5), rehearse=rehearse)


def fed(guard, state, looks):
    """The state after looks, and the events."""
    events = []
    for look in looks:
        step = guard.step(state, look)
        state = step.state
        events += step.events
    return state, events


def looks(of, bundle, frames):
    return [of(bundle, seed) for seed in range(-(-frames // LOOK))]


LONG = SETTLE + WINDOW


@pytest.fixture
def guard(context, device_bundle):
    """Around a host whose ports say how many frames it has seen."""
    return Narrow(context, Domains(deltas=lambda frames: shifted(device_bundle, frames / 1000)))


def test_a_window_of_all_classes_is_wide_and_one_of_unsure_and_close_ones_narrow(device_bundle, guard):
    for of, narrow in ((of_many, False), (of_one, True)):
        window = guard.empty
        for look in looks(of, device_bundle, WINDOW):
            window = window.after(look.features, look.logits)
        assert window.count == WINDOW and window.narrow(guard.usual) is narrow


def test_close_features_alone_or_unsure_answers_alone_are_not_narrow(device_bundle, guard):
    classes = np.arange(WINDOW) % CLASSES
    for width, height in ((0.3, 8.0), (1.0, 1.0)):
        look = seen(device_bundle, 0, WINDOW, classes, width=width, height=height)
        assert not guard.empty.after(look.features, look.logits).narrow(guard.usual)


def test_the_sums_are_those_of_all_frames_at_once(device_bundle, guard):
    look = of_many(device_bundle, count=WINDOW)
    parts = guard.empty
    for start in range(0, WINDOW, 7):
        parts = parts.after(look.features[start : start + 7], look.logits[start : start + 7])
    assert parts.spread == pytest.approx(look.features.astype(np.float64).var(axis=0).sum(), rel=1e-9)
    shares = np.exp(look.logits) / np.exp(look.logits).sum(axis=1, keepdims=True)
    entropy = lambda p: -(p * np.log(p)).sum(axis=-1)  # noqa: E731
    expected = entropy(shares.mean(axis=0)) - entropy(shares).mean()
    assert parts.told == pytest.approx(expected / np.log(CLASSES), rel=1e-5)


def test_frames_that_are_not_finite_are_left_out(device_bundle, guard):
    look = of_many(device_bundle)
    features = look.features.copy()
    features[3] = np.nan
    assert guard.empty.after(features, look.logits).count == LOOK - 1


def test_few_classes_leave_source_in_force_until_there_are_many(device_bundle, guard):
    state, events = fed(guard, guard.init(), looks(of_one, device_bundle, LONG))
    assert events == [FEW] and not guard.delta(state) and state.host == guard.host.init()
    state, events = fed(guard, state, looks(of_one, device_bundle, 2 * LONG))
    assert events == [] and not guard.delta(state)
    state, events = fed(guard, state, looks(of_many, device_bundle, 2 * LONG))
    assert events == [MANY] and guard.delta(state) is guard.host.delta(state.host)


def test_a_hold_ends_by_what_began_it_whatever_frames_near_source_say(device_bundle, guard):
    state, _ = fed(guard, guard.init(), looks(of_one, device_bundle, LONG))
    state, events = fed(guard, state, looks(of_three, device_bundle, LONG))
    assert events == [MANY] and guard.delta(state) is guard.host.delta(state.host)


def test_what_source_takes_for_many_classes_too_is_noise_and_not_held(device_bundle, guard):
    state, events = fed(guard, guard.init(), looks(noise, device_bundle, 4 * LONG))
    assert events == [] and guard.delta(state) is guard.host.delta(state.host)


def test_features_that_ports_stretch_are_of_few_classes_whatever_source_answers(device_bundle, guard):
    state, events = fed(guard, guard.init(), looks(stretched, device_bundle, LONG))
    assert events == [FEW] and not guard.delta(state)


def test_source_is_asked_only_where_a_window_looks_narrow(device_bundle, guard):
    asked = []

    def counting(look):
        rehearse = look.rehearse
        return replace(look, rehearse=lambda frames, delta: asked.append(delta) or rehearse(frames, delta))

    for of, most in ((of_many, 0), (noise, (WINDOW - DOUBT) // LOOK + 1)):
        settled, _ = fed(guard, guard.init(), looks(of, device_bundle, SETTLE))
        fed(guard, settled, map(counting, looks(of, device_bundle, WINDOW)))
        assert len(asked) == most and not any(asked)


def test_after_wide_windows_of_this_domain_a_narrow_one_needs_no_more(device_bundle, guard):
    wide, _ = fed(guard, guard.init(), looks(of_many, device_bundle, LONG))
    assert fed(guard, wide, looks(noise, device_bundle, WINDOW))[1] == [FEW]


def test_what_was_learned_of_this_domain_before_stays_in_force(device_bundle, guard):
    wide, _ = fed(guard, guard.init(), looks(of_many, device_bundle, LONG))
    good = guard.delta(wide)
    state, events = fed(guard, wide, looks(of_one, device_bundle, WINDOW))
    assert events == [FEW] and guard.delta(state) is good
    assert state.host is wide.own.wide  # learning goes on from there, in the shadow
    assert guard.delta(fed(guard, state, looks(of_one, device_bundle, 2 * LONG))[0]) is good


def test_what_was_learned_of_another_domain_does_not(context, device_bundle):
    host = Domains(changes=(LONG + LOOK,), deltas=lambda frames: shifted(device_bundle, frames / 1000))
    guard = Narrow(context, host)
    wide, _ = fed(guard, guard.init(), looks(of_many, device_bundle, LONG))
    state, events = fed(guard, wide, looks(of_one, device_bundle, LOOK + LONG))
    assert events == [CHANGE, FEW] and not guard.delta(state)


def test_in_the_shadow_the_host_is_shown_what_its_own_ports_would_give(device_bundle, guard):
    state, _ = fed(guard, guard.init(), looks(of_one, device_bundle, LONG))
    shown = []
    step = guard.host.step
    guard.host.step = lambda inner, look: shown.append(look.delta) or step(inner, look)
    state, _ = fed(guard, state, looks(of_one, device_bundle, 2 * LOOK))
    assert shown[1].same_as(shifted(device_bundle, LOOK / 1000))
    assert not guard.step(state, of_one(device_bundle)).again


def test_where_domains_are_mixed_source_answers_and_the_host_goes_on(device_bundle, guard):
    state, events = fed(guard, guard.init(), looks(of_mixed, device_bundle, SETTLE))
    assert events == [FEW] and not guard.delta(state) and state.host.frames == SETTLE
    state, events = fed(guard, state, looks(of_mixed, device_bundle, 2 * WINDOW))
    assert events == [] and not guard.delta(state) and state.host.frames == SETTLE + 2 * WINDOW
    state, events = fed(guard, state, looks(of_many, device_bundle, 2 * WINDOW))
    assert events == [MANY] and guard.delta(state) is guard.host.delta(state.host)


def test_labels_end_it(context, device_bundle):
    host = Taught(deltas=lambda frames: shifted(device_bundle, 0.1))
    guard = taught_too(Narrow, host)(context, host)
    state, events = fed(guard, guard.init(), looks(of_one, device_bundle, LONG))
    assert FEW in events
    state = guard.learn_from(state, Labelled(np.zeros((1, 4)), np.array([0]))).state
    assert not state.own.held
    state, events = fed(guard, state, looks(of_one, device_bundle, 2 * LONG))
    assert FEW not in events


def test_it_stands_around_methods_that_set_statistics_where_sources_spread_is_known(context, device_bundle):
    bare = {name: part for name, part in device_bundle.source.items() if not name.startswith("class.")}
    without = Context(replace(device_bundle, source=bare), context.tail)
    alone = {"guards": ["narrow"]}
    assert isinstance(guarded(Host(), replace(context, settings=alone)), Narrow)
    assert isinstance(guarded(Host(), replace(without, settings=alone)), Host)
    blind = Host()
    blind.needs = frozenset()
    assert guarded(blind, replace(context, settings=alone)) is blind
    assert Narrow(context, Host()).needs >= {TAPS, FEATURES}


def test_an_empty_step_of_the_host_changes_nothing(device_bundle, guard, monkeypatch):
    monkeypatch.setattr(guard.host, "step", lambda state, look: Step(state))
    state, events = fed(guard, guard.init(), looks(of_many, device_bundle, LONG))
    assert events == [] and state.host == guard.host.init() and isinstance(state.own.window, Window)


def test_in_the_shadow_the_host_corrects_no_answer(context, device_bundle):
    host = Host(deltas=lambda frames: shifted(device_bundle, 0.1), correct=lambda logits: logits + 1)
    guard = Narrow(context, host)
    state, _ = fed(guard, guard.init(), looks(of_one, device_bundle, LONG))
    for before, corrected in ((guard.init(), 1), (state, 0)):
        step = guard.watch(before, Answered(sharp([1, 2])))
        assert np.array_equal(step.logits, sharp([1, 2]) + corrected)
        assert step.state.host.answers - before.host.answers == 2 * corrected
