"""The one loop, on the device and in replay: look at some frames, answer all of them, learn, go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.methods.protocol import FEATURES, Answered, Method, S
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
    predictor: Predictor, method: Method[S], batches: Iterable[Array], *, clock: Clock = time.perf_counter
) -> Iterator[Answer]:
    """Yield one answer per batch of preprocessed frames [N, ...]. No labels, no I/O.

    A batch is answered in parts: the frames that the method wants to look at go through the tapped twin and are learned
    from; the others, and the next batch, are answered with what was learned.
    """
    state = method.init()
    predictor.apply(method.delta(state))
    passed = 0
    for frames in batches:
        logits: list[Array] = []
        events: list[str] = []
        answer_s = learn_s = 0.0
        done = looked = 0
        while done < len(frames):
            started = clock()
            left = len(frames) - done
            count = min(method.look(state, left, passed), left)
            if not count:
                passed += left
                answered = predictor.answer(frames[done:], features=FEATURES in method.watches)
                if method.watches:
                    answered, state, told = _watched(method, state, answered)
                    events.extend(told)
                    predictor.apply(method.delta(state))
                logits.append(answered.logits)
                answer_s += clock() - started
                break
            part = frames[done : done + count]
            seen = predictor.look_for(method, part)
            looked_at = clock()
            step = method.step(state, seen)
            answered = Answered(step.logits, step.features) if step.logits is not None else Answered.of(seen)
            state, told = step.state, step.events
            learned = clock()
            if method.watches:
                answered, state, more = _watched(method, state, answered)
                told += more
            watched = clock()
            predictor.apply(method.delta(state))
            applied = clock()
            logits.append(answered.logits)
            answer_s += looked_at - started + watched - learned
            learn_s += learned - looked_at + applied - watched
            events.extend(told)
            passed = 0
            done += count
            looked += count
        yield Answer(np.concatenate(logits), answer_s, learn_s, looked, tuple(events))


def _watched(method: Method[S], state: S, answered: Answered) -> tuple[Answered, S, tuple[str, ...]]:
    """Show the method an answer, and let it have the last word on it."""
    step = method.watch(state, answered)
    if step.logits is not None:
        answered = replace(answered, logits=step.logits)
    return answered, step.state, step.events
