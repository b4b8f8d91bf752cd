"""The one loop, on the device and in replay: look at some frames, answer all of them, learn, go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.methods.protocol import CUT, Method, Observation, S
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
                logits.append(predictor.answer(frames[done:]))
                answer_s += clock() - started
                break
            part = frames[done : done + count]
            # A method that answers itself at the input needs nothing from the engine.
            alone = method.answers and predictor.bundle.is_reference and method.needs <= {CUT}
            seen = (
                Observation(part, None, part, trunk=predictor.trunk)
                if alone
                else predictor.look(part, method.needs)
            )
            answered = clock()
            step = method.step(state, seen)
            state = step.state
            if not alone:
                predictor.apply(method.delta(state))
            learned = clock()
            answer = step.logits if step.logits is not None else seen.logits
            assert answer is not None
            logits.append(answer)
            answer_s += answered - started
            learn_s += learned - answered
            events.extend(step.events)
            passed = 0
            done += count
            looked += count
        yield Answer(np.concatenate(logits), answer_s, learn_s, looked, tuple(events))
