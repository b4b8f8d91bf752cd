"""The live loop: answer at once, learn elsewhere.

Two threads share it. The answering one calls `answer`: it runs the engine, drops frames worth learning from into a
mailbox, and goes on. The learning one calls `work`: it takes one letter from the mailbox, looks at its frames through
the tapped twin on the bank of weights that nobody answers with, lets the method make a new state of what it saw, and
puts what follows in force. That second pass costs more than to answer through the twin would; but it is paid from the
budget of learning, on another core, and an answer takes as long as without any learning.

A state is a value, so the answering thread may use the latest one that was published, for what to look at and for last
corrections, while the next one is being made. What the mailbox has no room for, or the budget no time, is shed and
counted; an answer never is.

Everything that changes what is learned goes through the mailbox, also resets and other wishes from outside. So the
letters in their order say all about a run: `Reply.done` and `Reply.version` tell which state and which weights an
answer was given with, and a replay that waits for the same gives the same answers, bit for bit.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Generic

from numpy.typing import NDArray

from edge_adapt.delta import Delta
from edge_adapt.errors import ConfigError, EdgeAdaptError
from edge_adapt.methods.protocol import FEATURES, TAPS, Answered, Method, Observation, S
from edge_adapt.monitor.gauge import EVERY, Gauge
from edge_adapt.runtime.budget import Budget
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.runtime.probation import Probation, Verdict
from edge_adapt.runtime.shadow import Shadow

Array = NDArray[Any]
Slot = str
SOURCE, OWN, GIVEN = "source", "own", "adapter"
"""Which adapter answers: none; what this device learned; what came from outside."""
WATCHED = 256
"""Answers that may wait to be shown to the method."""
FAILURES = 3
"""Steps in a row that may fail before learning is switched off."""


@dataclass(frozen=True)
class Learned(Generic[S]):
    """Everything that learning and its owner decided so far. A value: keep one and you have a snapshot."""

    state: S
    slot: Slot = OWN
    """Which adapter shall answer."""
    given: Delta | None = None
    """The adapter that came from outside."""
    probation: Probation | None = None
    """While it is on trial."""
    frozen: bool = False
    """True while nothing is to be learned."""
    may_answer: tuple[Slot, ...] = (OWN, GIVEN)
    """Slots that may answer; where another one is chosen, source does."""
    failures: int = 0
    """Steps in a row that failed."""
    done: int = 0
    """Letters that this came from."""


@dataclass(frozen=True)
class Reply:
    """Answers to one batch."""

    logits: Array
    """[N, K]."""
    version: int
    """Change of weights that they were given with; 0 is the model as exported."""
    done: int
    """Letters that the state behind them came from."""
    looked: int
    """Frames that went to the learner."""
    posted: tuple[bool, ...]
    """For each letter of this batch, whether the mailbox took it."""


@dataclass(frozen=True)
class _Look:
    frames: Array
    learn: bool = True
    """False: nothing is learned from it, it is for the gauge alone, and no letter that counts."""


@dataclass(frozen=True)
class _Watch:
    answered: Answered


@dataclass(frozen=True)
class _Wish:
    change: Callable[[Learned[Any]], Learned[Any]]
    granted: Future[Learned[Any]]


class LiveLoop(Generic[S]):
    """One method at work on one predictor, for two threads."""

    def __init__(
        self,
        predictor: Predictor,
        method: Method[S],
        budget: Budget,
        *,
        queue: int = 4,
        begin: Learned[S] | None = None,
        gauge: Gauge | None = None,
        tell: Callable[[str], None] = lambda event: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            queue: looks that may wait to be learned from.
            begin: where to go on, such as a snapshot; None: from source.
            gauge: reads every look; what is learned, and so every answer, is the same without it.
            tell: takes events of the method and its guards. Called from the learning thread; about a method that
                fails while it is asked about answers, from the answering one.
        Raises: ConfigError if the method can only answer by itself.
        """
        if method.answers:
            raise ConfigError(
                f"{method.name} gives the answers itself, so that each would wait for its learning",
                remedy="use moments, auto, or a method that learns from the engine's answers; replay runs any method",
            )
        self.predictor, self.method, self.budget = predictor, method, budget
        self.gauge = gauge if gauge is not None and gauge.reads else None
        self._queue, self._tell, self._clock = queue, tell, clock
        self._mail: deque[_Look | _Watch | _Wish] = deque()
        self._arrived = threading.Condition()
        self._looks = self._watches = 0
        """Letters of each kind in the mailbox."""
        self._passed = self._unread = 0
        """Frames answered unseen since the last look, and unread since the last that the gauge had."""
        self._closed = False
        self.counts: Counter[str] = Counter()
        """looks, steps, shed, watched, failed."""
        self.learn_s = 0.0
        """Seconds of learning so far."""
        self.busy_since: float | None = None
        """When the letter in work was begun; None while there is none."""
        self.shadow = Shadow()
        """What the answers would be in the modes that only watch. The learning thread's; nothing is decided by it."""
        self.source = predictor.source
        self.learned: Learned[S] = begin or Learned(method.init())
        self._put_in_force(self.learned)

    # The answering thread.

    def answer(self, frames: Array, *, learn: bool = True) -> Reply:
        """Answer preprocessed frames [N, ...]; what is to be learned from them is posted, if that is wanted.

        Raises: EngineError.
        """
        learned = self._current()
        count = self._to_look_at(learned, len(frames)) if learn else 0
        answered = self.predictor.answer(frames, features=FEATURES in self.method.watches)
        posted = [self._post(_Look(frames[:count]))] if count else []
        if learn:
            self._passed = len(frames) - count + (0 if count else self._passed)
            if self.method.watches and not learned.frozen:
                posted.append(self._post(_Watch(answered)))
            self._read_now_and_then(frames, looked=count > 0)
        return Reply(self._corrected(learned, answered), answered.version, learned.done, count, tuple(posted))

    def _current(self) -> Learned[S]:
        """What the next batch is answered with."""
        return self.learned

    def _needs(self, learned: Learned[S]) -> frozenset[str]:
        needs = self.method.needs | self.method.watches
        if learned.probation is not None and self.predictor.bundle.manifest.sites:
            needs |= {TAPS}
        return needs

    def _to_look_at(self, learned: Learned[S], frames: int) -> int:
        """How many frames to look at: what the method wants, if there is room, time and leave for it."""
        if learned.frozen:
            return 0
        wanted = self._wanted_looks(learned, frames) if self.method.needs else 0
        if learned.probation is not None:
            wanted = max(wanted, 1)
        if wanted and (self._looks >= self._queue or self.budget.denies()):
            self.counts["shed"] += 1
            return 0
        return wanted

    def _read_now_and_then(self, frames: Array, *, looked: bool) -> None:
        """A look for the gauge alone, where the method takes none."""
        self._unread = 0 if looked else self._unread + len(frames)
        if self.gauge is None or self._unread < EVERY or self._looks or self.budget.denies():
            return
        self._unread = 0
        self._post(_Look(frames[:1], learn=False))

    def _corrected(self, learned: Learned[S], answered: Answered) -> Array:
        """The method's last word on an answer, where what it learned answers. What it makes of its state is dropped
        here: the learning thread does it again, in order."""
        if not self.method.watches or self._slot(learned) != OWN:
            return answered.logits
        try:
            logits = self.method.watch(learned.state, answered).logits
        except Exception as error:  # the answer is there; whatever the method makes of it
            self._spoiled(error)
            return answered.logits
        return answered.logits if logits is None else logits

    def _wanted_looks(self, learned: Learned[S], frames: int) -> int:
        try:
            return min(self.method.look(learned.state, frames, self._passed), frames)
        except Exception as error:
            self._spoiled(error)
            return 0

    def _spoiled(self, error: Exception) -> None:
        self.counts["failed"] += 1
        self._tell(f"learning failed: {type(error).__name__}: {_first_line(error)}")

    def _post(self, letter: _Look | _Watch | _Wish) -> bool:
        with self._arrived:
            if self._closed:
                return False
            if isinstance(letter, _Look):
                self._looks += 1
            elif isinstance(letter, _Watch):
                if self._watches >= WATCHED:
                    self.counts["unwatched"] += 1
                    return False
                self._watches += 1
            self._mail.append(letter)
            self._arrived.notify()
            return True

    # Anybody.

    def ask(self, change: Callable[[Learned[S]], Learned[S]]) -> Future[Learned[S]]:
        """Have the learning thread change what is learned, behind what is in the mailbox already.

        The future gives the value that is then in force, or the error, after which nothing has changed.
        """
        wish = _Wish(change, Future())
        if not self._post(wish):
            wish.granted.set_exception(ConfigError("the agent is stopping", remedy="ask the next one"))
        return wish.granted

    @property
    def waiting(self) -> int:
        """Looks that wait to be learned from."""
        return self._looks

    def close(self) -> None:
        """No more letters are taken, and `work` returns at once. What waits is dropped."""
        with self._arrived:
            self._closed = True
            for letter in self._mail:
                if isinstance(letter, _Wish):
                    letter.granted.set_exception(ConfigError("the agent is stopping", remedy="ask the next one"))
            self._mail.clear()
            self._arrived.notify_all()

    # The learning thread.

    def work(self, timeout_s: float = 0.0) -> bool:
        """Deal with one letter; False if none came in time. Never raises for what a method does."""
        with self._arrived:
            if not self._mail and not self._closed:
                self._arrived.wait(timeout_s)
            if not self._mail:
                return False
            letter = self._mail.popleft()
            self._looks -= isinstance(letter, _Look)
            self._watches -= isinstance(letter, _Watch)
        self.busy_since = started = self._clock()
        try:
            if isinstance(letter, _Wish):
                self._grant(letter)
            elif isinstance(letter, _Look) and not letter.learn:
                self._read(letter)
            else:
                self._learn(letter)
        finally:
            spent = self._clock() - started
            self.learn_s += spent
            if isinstance(letter, _Look):
                self.budget.spend(spent)
            self.busy_since = None
        return True

    def _learn(self, letter: _Look | _Watch) -> None:
        learned = self.learned
        done = learned.done + 1
        if learned.frozen:
            self.learned = replace(learned, done=done)
            return
        try:
            new, events = self._stepped(learned, letter)
            self._put_in_force(new)
        except Exception as error:  # whatever it is, answers go on
            self.counts["failed"] += 1
            failures = learned.failures + 1
            self.learned = replace(learned, failures=failures, frozen=failures >= FAILURES, done=done)
            self._tell(f"learning failed: {type(error).__name__}: {_first_line(error)}")
            if failures == FAILURES:
                self._tell(f"learning is off: {failures} steps in a row failed")
            return
        # A method that can watch but not learn fails all the same.
        self.learned = replace(new, failures=0 if isinstance(letter, _Look) else learned.failures, done=done)
        for event in events:
            self._tell(event)

    def _stepped(self, learned: Learned[S], letter: _Look | _Watch) -> tuple[Learned[S], tuple[str, ...]]:
        if isinstance(letter, _Watch):
            self.counts["watched"] += 1
            step = self.method.watch(learned.state, letter.answered)
            return replace(learned, state=step.state), step.events
        seen = self._looked(letter)
        self.counts["looks"] += len(seen.frames)
        self.counts["steps"] += 1
        self._gauged(seen, learned)
        step = self.method.step(learned.state, seen)
        new = replace(learned, state=step.state)
        if OWN not in learned.may_answer:
            own = self.method.delta(step.state)
            self.shadow = self.shadow.after(seen, own) if own else self.shadow
        tried, events = self._tried(new, seen)
        return tried, (*step.events, *events)

    def _looked(self, letter: _Look) -> Observation:
        delta = self.predictor.delta
        needs = self._needs(self.learned) if letter.learn else frozenset()
        if self.gauge is not None:
            needs |= self.gauge.needs
        seen = self.predictor.rehearse(letter.frames, delta, needs)
        return replace(seen, trunk=lambda frames: self.predictor.trunk_aside(frames, delta))

    def _read(self, letter: _Look) -> None:
        try:
            seen = self._looked(letter)
        except Exception as error:
            self._tell(f"gauge failed: {type(error).__name__}: {_first_line(error)}")
        else:
            self._gauged(seen, self.learned)

    def _gauged(self, seen: Observation, learned: Learned[S]) -> None:
        """Never raises: nothing depends on what the gauge makes of it."""
        if self.gauge is None or seen.logits is None:
            return
        try:
            self.gauge.after(seen, self._corrected(learned, Answered.of(seen)))
        except Exception as error:
            self._tell(f"gauge failed: {type(error).__name__}: {_first_line(error)}")

    def _tried(self, learned: Learned[S], seen: Observation) -> tuple[Learned[S], tuple[str, ...]]:
        """One more look at an adapter that is on probation."""
        if learned.probation is None or learned.given is None:
            return learned, ()
        probation = learned.probation.after(seen, learned.given, self.source)
        if probation.verdict is Verdict.OPEN:
            return replace(learned, probation=probation), ()
        if probation.verdict is Verdict.PASSED:
            return replace(learned, probation=None), ("adapter: probation passed",)
        back = replace(learned, probation=None, given=None, slot=probation.fallback)
        return back, (f"rollback: adapter on probation: {probation.reason}",)

    def _grant(self, wish: _Wish) -> None:
        learned = self.learned
        try:
            new = replace(wish.change(learned), done=learned.done + 1)
            self._put_in_force(new)
        except EdgeAdaptError as error:
            self.learned = replace(learned, done=learned.done + 1)
            wish.granted.set_exception(error)
        except Exception as error:
            self.learned = replace(learned, done=learned.done + 1)
            wish.granted.set_exception(
                ConfigError(f"{type(error).__name__}: {_first_line(error)}", remedy="see the log of the agent")
            )
        else:
            self.learned = new
            wish.granted.set_result(new)

    def wanted(self, learned: Learned[S]) -> Delta:
        """What shall be in force."""
        slot = self._slot(learned)
        if slot == OWN:
            return self.method.delta(learned.state) or self.source
        return (learned.given if slot == GIVEN else None) or self.source

    def _slot(self, learned: Learned[S]) -> Slot:
        """Which adapter answers."""
        return learned.slot if learned.slot in learned.may_answer else SOURCE

    def _put_in_force(self, learned: Learned[S]) -> None:
        self.predictor.apply(self.wanted(learned))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
