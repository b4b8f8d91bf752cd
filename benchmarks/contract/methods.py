"""Promises of methods, and of wrappers and routers, which are methods once they are around one."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.contract.stand import Broken, Inapplicable, Promise, Stand, alike, copied, hold, size_of
from edge_adapt.delta import Delta
from edge_adapt.errors import ConfigError, StateError
from edge_adapt.methods.catalogue import offers
from edge_adapt.methods.protocol import CUT, FEATURES, LOGITS, TAPS, Answered, Compacts, Context, Method
from edge_adapt.plugins import METHODS, ROUTERS, WRAPPERS, find
from edge_adapt.runtime.loop import adapt
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.runtime.state_io import pack, packages, unpack

Array = NDArray[Any]

MEGABYTE = 1 << 20
HOST = "moments"
"""The method that a wrapper or a router is tried around."""


@dataclass(frozen=True)
class MethodSubject:
    """A method, wrapper or router to try."""

    group: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Besides the defaults, such as what makes it fast enough to try."""

    def make(self, stand: Stand, seed: int = 0, **settings: Any) -> Method[Any]:
        """A fresh one. Raises: Inapplicable if the bundle cannot serve it."""
        found = find(self.group, self.name)
        requires = found.requires if self.group == METHODS else found.demands
        if missing := requires - offers(stand.bundle):
            raise Inapplicable(f"requires {', '.join(sorted(missing))}, which this bundle has not")
        context = Context(stand.bundle, lambda: stand.tail, seed, {**self.settings, **settings})
        if self.group == METHODS:
            return found(context)  # type: ignore[no-any-return]
        host = find(METHODS, HOST)(dataclasses.replace(context, settings={}))
        return found(context, host)  # type: ignore[no-any-return]


def played(stand: Stand, method: Method[Any], frames: Array, size: int) -> tuple[Array, Delta]:
    """Answers [N, K] to frames in batches of `size`, and the delta that was in force at the end."""
    with stand.predictor() as predictor:
        batches = (frames[at : at + size] for at in range(0, len(frames), size))
        answers = np.concatenate([answer.logits for answer in adapt(predictor, method, batches)])
        return answers, predictor.delta


def learned(method: Method[Any], state: Any, predictor: Predictor, frames: Array) -> Any:
    """The state after a look at some frames, as the loop would leave it."""
    predictor.apply(method.delta(state))
    seen = predictor.look_for(method, frames)
    step = method.step(state, seen)
    if not method.watches:
        return step.state
    answered = Answered.of(seen) if step.logits is None else Answered(step.logits, step.features)
    return method.watch(step.state, answered).state


def says_what_it_is(stand: Stand, subject: MethodSubject) -> None:
    method = subject.make(stand)
    if subject.group != ROUTERS:
        hold(method.name == subject.name, f"is registered as {subject.name!r} and calls itself {method.name!r}")
    hold(method.needs <= {TAPS, CUT, FEATURES}, f"needs {sorted(method.needs)}: known are taps, cut and features")
    hold(method.watches <= {LOGITS, FEATURES}, f"watches {sorted(method.watches)}: known are logits and features")
    hold(isinstance(method.answers, bool), f"answers is {method.answers!r}, expected true or false")
    delta = method.delta(method.init())
    hold(isinstance(delta, Delta), f"delta() gives {type(delta).__name__}, expected a Delta")
    hold(delta.same_as(Delta.source()), "delta of init() is not source")


def same_seed_same_answers(stand: Stand, subject: MethodSubject) -> None:
    for count, size in ((32, 1), (128, 64)):
        frames = stand.shifted[:count]
        (first, delta), (second, _) = (played(stand, subject.make(stand), frames, size) for _ in range(2))
        classes = stand.bundle.manifest.outputs
        hold(first.shape == (count, classes), f"answers {first.shape} to {count} frames, expected {(count, classes)}")
        hold(np.isfinite(first).all(), f"answers are not finite in batches of {size}")
        hold(np.array_equal(first, second), f"the same seed gives other answers in batches of {size}")
        hold(delta.is_finite(), f"the delta is not finite after batches of {size}")


def a_step_is_pure(stand: Stand, subject: MethodSubject) -> None:
    method, frames = subject.make(stand), stand.shifted
    state = method.init()
    with stand.predictor() as predictor:
        for start in range(0, 96, 32):
            predictor.apply(method.delta(state))
            seen = predictor.look_for(method, frames[start : start + 32].copy())
            before, shown = copied(state), copied(dataclasses.replace(seen, trunk=None))
            first = method.step(state, seen)
            hold(alike(copied(state), before), "step() changes the state that it is given")
            hold(alike(copied(dataclasses.replace(seen, trunk=None)), shown), "step() changes what it is shown")
            again = method.step(state, seen)  # a state that was kept is a rollback
            hold(alike(copied(again.state), copied(first.state)), "the same step gives another state")
            hold(alike(copied(again.logits), copied(first.logits)), "the same step gives another answer")
            hold(method.delta(again.state).same_as(method.delta(first.state)), "the same step gives another delta")
            state = first.state
            if method.watches:
                answered = Answered.of(seen) if first.logits is None else Answered(first.logits, first.features)
                state = _watched_purely(method, state, answered)


def _watched_purely(method: Method[Any], state: Any, answered: Answered) -> Any:
    """The state after an answer was watched. Raises: Broken."""
    before, shown = copied(state), copied(answered)
    first, again = (method.watch(state, answered) for _ in range(2))
    hold(alike(copied(state), before), "watch() changes the state that it is given")
    hold(alike(copied(answered), shown), "watch() changes the answer that it is shown")
    hold(alike(copied(again.state), copied(first.state)), "the same watch gives another state")
    hold(alike(copied(again.logits), copied(first.logits)), "the same watch gives another answer")
    return first.state


def a_delta_stays_the_same_object(stand: Stand, subject: MethodSubject) -> None:
    method = subject.make(stand)
    state = method.init()
    with stand.predictor() as predictor:
        for start in range(0, 128, 8):
            delta = method.delta(state)
            hold(method.delta(state) is delta, "delta() of one state gives two objects")
            predictor.apply(delta)
            state = method.step(state, predictor.look_for(method, stand.shifted[start : start + 8])).state
            after = method.delta(state)
            hold(
                after is delta or not after.same_as(delta) or not after,
                "delta() gives another object though nothing changed: every step would rewrite the engine's weights",
            )


def looks_are_counts(stand: Stand, subject: MethodSubject) -> None:
    method = subject.make(stand)
    state = method.init()
    for frames in (1, 3, 64):
        for passed in (0, 1, 1000):
            count = method.look(state, frames, passed)
            hold(count >= 0, f"look() gives {count}")
    hold(method.look(state, 64, 0) == method.look(state, 64, 0), "look() of one state gives two answers")


def bad_frames_leave_no_mark(stand: Stand, subject: MethodSubject) -> None:
    for bad in (np.nan, np.inf):
        frames = stand.shifted
        frames[40:44] = bad
        answers, delta = played(stand, subject.make(stand), frames, 8)
        hold(np.isfinite(answers[:40]).all(), f"answers before frames of {bad} are not finite")
        hold(np.isfinite(answers[48:]).all(), f"answers after frames of {bad} are not finite")
        hold(delta.is_finite(), f"the delta is not finite after frames of {bad}")


def a_state_does_not_grow(stand: Stand, subject: MethodSubject) -> None:
    method, frames, sizes = subject.make(stand), stand.shifted, []
    state = method.init()
    with stand.predictor() as predictor:
        for number in range(300):
            at = number * 2 % 128
            state = learned(method, state, predictor, frames[at : at + 2])
            sizes.append(size_of(state) + method.delta(state).nbytes)
    hold(max(sizes[150:]) <= max(sizes[:150]), f"the state grew from {max(sizes[:150])} to {max(sizes[150:])} bytes")
    hold(max(sizes) < MEGABYTE, f"the state has {max(sizes)} bytes on a network of a few hundred weights")
    hold(method.delta(state).is_finite(), "the delta is not finite after 300 steps")


def a_state_can_be_kept(stand: Stand, subject: MethodSubject) -> None:
    """Snapshots outlive the process: a state goes through bytes, and goes on where it was."""
    method, other, frames = subject.make(stand), subject.make(stand), stand.shifted
    state = method.init()
    with stand.predictor() as predictor:
        for start in range(0, 64, 16):
            state = learned(method, state, predictor, frames[start : start + 16])
    try:
        structure, tensors = pack(state, {"delta": method.delta(state), "init": method.init()})
        back = {"delta": Delta(method.delta(state).tensors), "init": other.init()}
        structure = json.loads(json.dumps(structure, allow_nan=False))
        loaded = unpack(structure, tensors, packages(other), back)
    except StateError as error:
        raise Broken(f"its state cannot be kept: {error.what}") from error
    hold(other.delta(loaded).same_as(method.delta(state)), "its state has another delta after it was kept")


def a_compact_state_goes_on(stand: Stand, subject: MethodSubject) -> None:
    """A router keeps what was learned in a domain that is away in as few bytes as that takes."""
    method = subject.make(stand)
    if not isinstance(method, Compacts):
        raise Inapplicable("keeps the whole of its state")
    state = method.init()
    with stand.predictor() as predictor:
        for start in range(0, 96, 8):
            before = copied(state)
            kept = method.compact(state)
            hold(alike(copied(state), before), "compact() changes the state that it is given")
            hold(method.delta(kept) is method.delta(state), "compact() gives a state of another delta")
            hold(size_of(kept) <= size_of(state), "compact() gives a larger state")
            state = learned(method, state, predictor, stand.shifted[start : start + 8])
        state = method.compact(state)
        for start in range(0, 64, 8):
            state = learned(method, state, predictor, stand.shifted[start : start + 8])
    hold(method.delta(state).is_finite(), "the delta is not finite after a return")


def unknown_settings_are_refused(stand: Stand, subject: MethodSubject) -> None:
    if subject.name == "source":
        raise Inapplicable("has no settings")
    subject.make(stand)
    try:
        subject.make(stand, no_such_setting=1)
    except ConfigError as error:
        hold("no_such_setting" in error.what, f"the error does not name the setting: {error.what}")
        return
    raise Broken("takes a setting called no_such_setting without a word")


def no_answer_depends_on_later_frames(stand: Stand, subject: MethodSubject) -> None:
    frames, other = stand.shifted, stand.shifted
    other[64:] = 0
    (first, _), (second, _) = (played(stand, subject.make(stand), part, 16) for part in (frames, other))
    hold(np.array_equal(first[:64], second[:64]), "an answer depends on frames that come later")


PROMISES = (
    Promise("says what it is", says_what_it_is),
    Promise("same seed same answers", same_seed_same_answers),
    Promise("a step is pure", a_step_is_pure),
    Promise("a delta stays the same object", a_delta_stays_the_same_object),
    Promise("looks are counts", looks_are_counts),
    Promise("bad frames leave no mark", bad_frames_leave_no_mark),
    Promise("a state does not grow", a_state_does_not_grow),
    Promise("a state can be kept", a_state_can_be_kept),
    Promise("a compact state goes on", a_compact_state_goes_on),
    Promise("unknown settings are refused", unknown_settings_are_refused),
    Promise("no answer depends on later frames", no_answer_depends_on_later_frames),
)
GROUPS = (METHODS, WRAPPERS, ROUTERS)
