"""The watchdog: what was learned is tried now and then, and taken back where it does harm.

A trial that is passed keeps the host's state; the last one kept comes back when a trial is failed. What failed then
rests, twice as long each time, and is in force again only after it passed a trial in the shadow. Ports begin there too:
until their first trial is passed, source answers, and the host sees what it would see with them in force.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from edge_adapt.delta import PORT_SCALE, PORT_SHIFT, Delta
from edge_adapt.guards.rows import picked
from edge_adapt.guards.trial import AGREE, EACH, Trial
from edge_adapt.methods.protocol import LOGITS, TAPS, Answered, Context, Method, Observation, Step, compacted
from edge_adapt.methods.wrapper import Wrapped, Wrapper
from edge_adapt.monitor.collapse import Recent
from edge_adapt.probabilities import entropy, softmax

Array = NDArray[Any]
Part = Literal["nothing", "learned", "all"]

COLLAPSE, ROLLBACK = "guard: collapse", "guard: rollback"
LEAP, RETURN = "guard: step too large", "guard: back in force"

PERIOD = 2048
"""Answered frames from one trial to the next."""
FIRST, HURRY = 64, 256
"""The same at the start and after a failure, until the first trial is passed, and then for some trials; and `HURRY`
whenever the answers are of one class alone."""
REST, LONGEST = 512, 64_000
"""Answered frames that what failed is not used, the first time and at most."""
WARY, PEACE = 3, 12
"""Trials passed in a row after which there is no hurry, and after which a failure counts as the first."""
RELIABLE, CERTAIN = 64, 0.4
"""What was learned is used from so many looked-at frames on, whose entropy is below this share of ln K (EATA's)."""
REACH, SMALL = 1.0, 0.5
"""A tensor may move from source by so many times its own size, as root mean square; small ones count as `SMALL`."""


@dataclass(frozen=True)
class Watch:
    """What the watchdog remembers, beside the host's state."""

    good: Any
    """The host's state that passed the last trial, or its first."""
    recent: Recent
    full: Delta
    """The host's delta."""
    plain: Delta
    """Its ports alone: what is in force while what was learned is held back."""
    rests: Part = "nothing"
    """What is not in force."""
    rest: int = 0
    """Answered frames before it may be tried again."""
    failures: int = 0
    passes: int = 0
    """Trials passed since the last failure."""
    since: int = 0
    """Answered frames since the last verdict."""
    reliable: int = 0
    """Looked-at frames that the network was sure of, at most `RELIABLE`."""
    trusted: bool = False
    """True once ports passed a trial; until then they rest."""
    taught: bool = False
    """True once the host learned from labels: what a person says may contradict source, and is judged no more."""
    trial: Trial | None = None


class Watchdog(Wrapper[Watch]):
    """Collapse monitor, probation with rollback, a limit to what one step may change, and a least number of frames.

    A host that looks at no frame is judged by how it changes the answers, all the time.
    A host that answers itself in reference mode has no plain network beside it: there only a collapse counts, seen
    beside the source's own answers.
    """

    name: ClassVar[str] = "watchdog"
    adds: ClassVar[frozenset[str]] = frozenset({LOGITS})

    def __init__(self, context: Context, host: Method[Any]) -> None:
        super().__init__(context, host)
        self.reference = context.reference and host.answers
        self.classes = context.bundle.manifest.outputs
        self.source = Delta.source()
        self.sees_answers_only = not host.needs
        self._tail = context.tail
        stored = context.bundle.source
        self._moments = (
            (stored["taps.mean"].astype(np.float64), stored["taps.second"].astype(np.float64))
            if TAPS in self.needs and "taps.mean" in stored
            else None
        )
        sizes = [site.channels for site in context.bundle.manifest.sites]
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int)

    def init(self) -> Wrapped[Watch]:
        host = self.host.init()
        delta = self.host.delta(host)
        reliable = RELIABLE if self.sees_answers_only else 0
        trusted = self._moments is None or self.reference
        return Wrapped(
            host, Watch(host, Recent.of(self.classes), delta, plain(delta), reliable=reliable, trusted=trusted)
        )

    def delta(self, state: Wrapped[Watch]) -> Delta:
        own = state.own
        if own.rests == "all":
            return self.source
        return own.plain if _held_back(own) else self.host.delta(state.host)

    def compact(self, state: Wrapped[Watch]) -> Wrapped[Watch]:
        """Ports need no second state to go back to: they are estimated anew soon.

        An open trial stays, for in short visits it would never end: `replay --scenario recurring --limit 100
        --batch-size 16 --router hdc` is at 30.8 % without it and at 29.1 with it, over six seeds.
        """
        host, own = compacted(self.host, state.host), state.own
        same = own.good is state.host or own.full is own.plain
        trial = None if own.trial is None else own.trial.halved()
        return Wrapped(host, replace(own, good=host if same else compacted(self.host, own.good), trial=trial))

    def look(self, state: Wrapped[Watch], frames: int, passed: int) -> int:
        """While everything rests, none."""
        return 0 if state.own.rests == "all" and state.own.rest else super().look(state, frames, passed)

    def step(self, state: Wrapped[Watch], seen: Observation) -> Step[Wrapped[Watch]]:
        given, source = self.delta(state), None
        if state.own.rests == "all" and seen.rehearse is not None:
            given, source = _allowed(state.own), seen
            seen = replace(seen.rehearse(seen.frames, given), rehearse=seen.rehearse)
        own = self._counted(state.own, seen)
        step = self.host.step(state.host, seen)
        kept = None if step.aside is None else ~step.aside
        tried = self._is_due(own) and seen.rehearse is not None and (kept is None or bool(kept.any()))
        if tried:
            own = replace(own, trial=self._evidence(own, *_without(kept, step, seen, source), given))
        made, events = self._followed(Wrapped(step.state, own)), step.events
        changed = made.own.full is not state.own.full
        if changed and not own.rest and not own.taught and self._leaps(made.own.full):
            made, event = self._failed(made, "learned", LEAP)
            events = (*events, event)
        elif tried:
            made, told = self._judged(made)
            events = (*events, *told)
        if source is not None and not self.answers:  # answers of what is not in force
            step = replace(step, logits=None, features=None, stands=None)
        held_back = _held_back(own) and seen.logits is not None and self.answers
        return replace(step, state=made, logits=seen.logits if held_back else step.logits, events=events)

    def watch(self, state: Wrapped[Watch], answered: Answered) -> Step[Wrapped[Watch]]:
        corrected, events = answered, tuple[str, ...]()
        if state.own.rests != "all":  # else these are answers of another network than the one it learns to correct
            state, corrected, events = self.watched_by_host(state, answered)
        final = answered if _held_back(state.own) else corrected
        own, count = state.own, len(final.logits)
        own = replace(
            own,
            recent=own.recent.after(final.logits.argmax(axis=1)),
            since=own.since + count,
            rest=max(0, own.rest - count),
        )
        if self.sees_answers_only and not own.rest:  # no look, no pass: evidence that costs nothing
            trial = own.trial or Trial.empty()
            own = replace(own, trial=trial.with_answers(corrected.logits[:EACH], answered.logits[:EACH]))
        state = self._followed(Wrapped(state.host, own))
        if self.reference and own.rests == "all" and not own.rest:  # no trial in the shadow: the host answers itself
            state = self._followed(Wrapped(self.host.init(), replace(own, rests="nothing", trusted=True)))
            events = (*events, RETURN)
        elif self.sees_answers_only:
            state, told = self._judged(state)
            events = (*events, *told)
        return Step(state, final.logits, events)

    def _followed(self, state: Wrapped[Watch]) -> Wrapped[Watch]:
        """With the host's delta of now, cut back to its ports once for each; ports that nobody tried yet rest."""
        full = self.host.delta(state.host)
        if full is state.own.full:
            return state
        own = replace(state.own, full=full, plain=plain(full))
        rests: Part = "all" if own.plain and not own.trusted else own.rests
        return Wrapped(state.host, replace(own, rests=rests))

    def _counted(self, own: Watch, seen: Observation) -> Watch:
        """Count the frames that the network is sure of, until there are enough."""
        if own.reliable >= RELIABLE:
            return own
        if seen.logits is None:  # a method as published: it answers from the first frame
            return replace(own, reliable=RELIABLE)
        sure = int((entropy(softmax(seen.logits)) < CERTAIN * np.log(self.classes)).sum())
        return replace(own, reliable=min(RELIABLE, own.reliable + sure))

    def _is_due(self, own: Watch) -> bool:
        """True if the frames of this look are to be evidence."""
        if own.rest or own.taught:
            return False
        if own.rests == "all":
            return True
        if own.trial is not None or (not own.passes and own.since >= FIRST):
            return True
        return own.since >= (HURRY if own.passes < WARY or own.recent.is_constant else PERIOD)

    def _evidence(
        self, own: Watch, step: Step[Any], seen: Observation, source: Observation | None, in_force: Delta
    ) -> Trial:
        """What these frames give with what was learned, without it, and with source, where that was not seen yet."""
        assert seen.rehearse is not None
        frames, trial = seen.frames[:EACH], own.trial or Trial.empty()
        plainly = seen
        if seen.logits is None or own.plain is not in_force:
            plainly = seen.rehearse(frames, own.plain)
        learned = seen
        if _held_back(own) and own.full.keys() - own.plain.keys():
            learned = seen.rehearse(frames, own.full)
        elif step.logits is not None:
            learned = replace(seen, logits=step.logits, features=step.features)
        assert plainly.logits is not None
        assert learned.logits is not None
        trial = trial.with_answers(self._corrected(step.state, learned), plainly.logits[:EACH])
        if own.plain and self._moments is not None:
            source = source or seen.rehearse(frames, self.source)
            assert source.logits is not None
            trial = trial.with_certainty(plainly.logits[:EACH], source.logits[:EACH])
            trial = trial.with_taps(_first(plainly.taps), _first(source.taps))
        return trial

    def _corrected(self, state: Any, learned: Observation) -> Array:
        """The answers [n, K] that the host would let go; nothing of it stays, for a state is a value."""
        answered = Answered.of(learned)
        features = None if answered.features is None else answered.features[:EACH]
        answered = Answered(answered.logits[:EACH], features)
        logits = self.host.watch(state, answered).logits if self.host.watches else None
        return answered.logits if logits is None else logits

    def _judged(self, state: Wrapped[Watch]) -> tuple[Wrapped[Watch], tuple[str, ...]]:
        """The verdict, once there is evidence enough."""
        trial = state.own.trial
        if trial is None or not trial.is_complete:
            return state, ()
        collapsed = trial.collapsed(self.classes)
        harmful = collapsed if self.reference else trial.agreement < AGREE
        strange = self._moments is not None and trial.strange_taps(*self._moments, self._starts)
        if strange or trial.unsure or harmful:
            part: Part = "all" if strange or trial.unsure or self.reference else "learned"
            state, event = self._failed(state, part, COLLAPSE if collapsed else ROLLBACK)
            return state, (event,)
        own = state.own
        passes = own.passes + (own.rests != "all")  # ports alone were tried in the shadow: the next trial is soon
        passed = replace(
            own,
            good=state.host,
            rests="nothing",
            trial=None,
            since=0,
            passes=passes,
            failures=0 if passes >= PEACE else own.failures,
            trusted=own.trusted or bool(own.plain),
        )
        return Wrapped(state.host, passed), (RETURN,) if own.rests != "nothing" and own.failures else ()

    def _failed(self, state: Wrapped[Watch], part: Part, event: str) -> tuple[Wrapped[Watch], str]:
        """Take back what was learned, and let it rest; what collapsed starts from source."""
        own = state.own
        host = own.good if part == "learned" and event != COLLAPSE else self.host.init()
        own = replace(
            own,
            good=host,
            rests=part,
            rest=min(LONGEST, REST * 2 ** min(own.failures, 10)),
            failures=own.failures + 1,
            passes=0,
            since=0,
            trial=None,
            trusted=own.trusted and part != "all",
        )
        return self._followed(Wrapped(host, own)), event

    def _leaps(self, delta: Delta) -> bool:
        """True if a tensor of the tail is further from source than any sound step brings it."""
        if not delta.tail:
            return False
        source = self._tail().parameters
        for name, value in delta.tail.items():
            base = source[name].numpy() if name in source else np.zeros_like(value)
            if not _size(value - base) <= REACH * max(_size(base), SMALL):
                return True
        return False


def plain(delta: Delta) -> Delta:
    """The ports of a delta alone; the same object if it has nothing else."""
    ports = {name: delta[name] for name in (PORT_SCALE, PORT_SHIFT) if name in delta}
    return delta if len(ports) == len(delta) else Delta(ports)


def _allowed(own: Watch) -> Delta:
    """What would be in force if nothing rested."""
    return own.plain if own.reliable < RELIABLE else own.full


def _without(
    kept: Array | None, step: Step[Any], seen: Observation, source: Observation | None
) -> tuple[Step[Any], Observation, Observation | None]:
    """The same of the frames that are `kept` [N]: a stranger is no evidence, whatever is answered to it."""
    if kept is None:
        return step, seen, source
    logits, features = (None if part is None else part[kept] for part in (step.logits, step.features))
    step = replace(step, logits=logits, features=features)
    return step, picked(seen, kept), None if source is None else picked(source, kept)


def _first(taps: tuple[Array, Array] | None) -> tuple[Array, Array] | None:
    return None if taps is None else (taps[0][:EACH], taps[1][:EACH])


def taught(own: Watch) -> Watch:
    """Once the host learned from labels: nothing is held back, or judged, any more."""
    return replace(own, taught=True, trusted=True, rests="nothing", rest=0, reliable=RELIABLE, trial=None)


def _held_back(own: Watch) -> bool:
    """True if what was learned is not in force: it rests, or it was learned from too few frames."""
    return own.rests != "nothing" or own.reliable < RELIABLE


def _size(value: Array) -> float:
    return float(np.sqrt(np.square(value, dtype=np.float64).mean()))
