"""The one loop, on the device and in replay: look at some frames, answer all of them, learn, go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from edge_adapt.methods.protocol import FEATURES, Answered, Method, S, Step
from edge_adapt.runtime.predictor import Predictor

Array = NDArray[Any]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Answer:
    """What left the loop for one batch."""

    logits: Array
    """[N, K], in arrival order, each given before anything was learned from that frame (unless the method says not)."""
    answer_s: float
    """Seconds in the engine, or in the method where that answers."""
    learn_s: float
    """Seconds of learning, and of putting what was learned in force."""
    looked: int
    """Frames that were looked at."""
    events: tuple[str, ...]


def adapt(
    predictor: Predictor,
    method: Method[S],
    batches: Iterable[Array],
    *,
    between: Callable[[S], Step[S] | None] | None = None,
    clock: Clock = time.perf_counter,
) -> Iterator[Answer]:
    """Yield one answer per batch of preprocessed frames [N, ...]. No labels, no I/O.

    A batch is answered in parts: the frames that the method wants to look at go through the tapped twin and are learned
    from; the others, and the next batch, are answered with what was learned. Parts that a step declares to be `again`
    are answered once more with what was learned from all of them, since their answers have not left yet.

    `between` is called before each batch, with the method's state: whoever has labels for older frames hands them to
    the method there, and gives back what it made of them, or None. The time counts as learning.
    """
    stream = _Stream(predictor, method, clock)
    for frames in batches:
        yield stream.batch(frames, between)


class _Stream(Generic[S]):
    """A method at work: its state between batches, and what it told within one."""

    def __init__(self, predictor: Predictor, method: Method[S], clock: Clock) -> None:
        self.predictor, self.method, self.clock = predictor, method, clock
        self.state = method.init()
        self.passed = 0
        """Frames answered unseen since the last look."""
        self.events: list[str] = []
        self.learn_s = 0.0
        predictor.apply(method.delta(self.state))

    def batch(self, frames: Array, between: Callable[[S], Step[S] | None] | None = None) -> Answer:
        """Look, learn and answer until every frame has its answer."""
        started, self.learn_s, self.events = self.clock(), 0.0, []
        if between is not None:
            self._learn_between(between)
        logits: list[Array] = []
        held: list[Answered] = []  # answers to frames[settled:done] that may be given again
        settled = done = looked = 0
        while done < len(frames):
            left = len(frames) - done
            count = min(self.method.look(self.state, left, self.passed), left)
            if not count:
                break
            answered, again = self._look(frames[done : done + count])
            held.append(answered)
            done += count
            looked += count
            if not again:
                # What was held before is settled by a part that is not.
                logits += [*self._settle(frames[settled : done - count], held[:-1]), self._watched(answered)]
                held, settled = [], done
        logits += self._settle(frames[settled:done], held)
        if done < len(frames):
            self.passed += len(frames) - done
            logits.append(self._watched(self._answer(frames[done:])))
        answer_s = self.clock() - started - self.learn_s
        return Answer(np.concatenate(logits), answer_s, self.learn_s, looked, tuple(self.events))

    def _learn_between(self, between: Callable[[S], Step[S] | None]) -> None:
        """Let somebody else hand the method something, and put what it learned in force."""
        started = self.clock()
        step = between(self.state)
        if step is not None:
            self.state = step.state
            self.events.extend(step.events)
            self.predictor.apply(self.method.delta(self.state))
        self.learn_s += self.clock() - started

    def _look(self, frames: Array) -> tuple[Answered, bool]:
        """Answer some frames and learn from them; True if they may be answered again."""
        seen = self.predictor.look_for(self.method, frames)
        started = self.clock()
        step = self.method.step(self.state, seen)
        self.state, self.passed = step.state, 0
        self.events.extend(step.events)
        self.predictor.apply(self.method.delta(self.state))
        self.learn_s += self.clock() - started
        if step.logits is None:
            return Answered.of(seen), step.again
        return Answered(step.logits, step.features, stands=step.stands), step.again

    def _settle(self, frames: Array, held: list[Answered]) -> list[Array]:
        """Final answers to frames looked at in several parts: with what was learned from all of them."""
        if not held:
            return []
        return [self._watched(held[0] if len(held) == 1 else _standing(held, self._answer(frames)))]

    def _answer(self, frames: Array) -> Answered:
        return self.predictor.answer(frames, features=FEATURES in self.method.watches)

    def _watched(self, answered: Answered) -> Array:
        """Show the method an answer, and let it have the last word on it."""
        if not self.method.watches:
            return answered.logits
        step = self.method.watch(self.state, answered)
        self.state = step.state
        self.events.extend(step.events)
        self.predictor.apply(self.method.delta(self.state))
        return answered.logits if step.logits is None else step.logits


def _standing(held: list[Answered], again: Answered) -> Answered:
    """Answers given again, but for those that stand as they were."""
    parts = [np.zeros(len(part.logits), bool) if part.stands is None else part.stands for part in held]
    stands = np.concatenate(parts)
    if not stands.any():
        return again
    return replace(
        again, logits=np.where(stands[:, None], np.concatenate([part.logits for part in held]), again.logits)
    )
