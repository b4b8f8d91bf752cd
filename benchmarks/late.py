"""Labels that come late: the true class of a frame, so many frames after it was answered, for whoever can use it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from edge_adapt.methods.protocol import Labelled, LearnsFromLabels, Method, Step
from edge_adapt.runtime.predictor import Predictor

Array = NDArray[Any]


@dataclass(frozen=True)
class Waiting:
    """A batch whose labels are on their way."""

    due: int
    """Frames answered when they come."""
    frames: Array
    """[n, ...], as they are given to `learn_from`: the tensor at the cut."""
    labels: Array
    """[n]."""
    right: Array
    """[n] bool: what was answered."""


class LateLabels:
    """Hands labels over between two batches: `answered` after each, `between` before the next.

    A method that learns from labels gets them; `arrived` holds what has come since somebody last asked, which is how
    an estimate of the error hears of them.
    """

    def __init__(self, predictor: Predictor, method: Method[Any], delay: int) -> None:
        self._predictor, self._delay = predictor, delay
        self._learner: Any = method if isinstance(method, LearnsFromLabels) else None
        self._waiting: deque[Waiting] = deque()
        self._newest: Waiting | None = None
        self._frames = 0
        self.labelled = 0
        """Frames whose labels have come."""
        self._right = self._count = 0

    def answered(self, frames: Array, expected: Array, logits: Array) -> None:
        """Frames [N, ...] as the network is fed, labels [N], -1 where none will come, and answers [N, K]."""
        self._frames += len(frames)
        known = expected >= 0
        right = logits[known].argmax(axis=1) == expected[known]
        self._newest = Waiting(self._frames + self._delay, frames[known], expected[known], right)

    def begin_anew(self) -> None:
        """The method forgets, and what is on its way to it is lost."""
        self._waiting.clear()
        self._newest = None

    def between(self, state: Any) -> Step[Any] | None:
        """What the method has learned from the labels that have come by now; None if nothing."""
        self._queue()
        due = []
        while self._waiting and self._waiting[0].due <= self._frames:
            due.append(self._waiting.popleft())
        for part in due:
            self.labelled += len(part.labels)
            self._right, self._count = self._right + int(part.right.sum()), self._count + len(part.right)
        if not due or self._learner is None:
            return None
        events: tuple[str, ...] = ()
        for part in due:
            step = self._learner.learn_from(state, Labelled(part.frames, part.labels))
            state, events = step.state, (*events, *step.events)
        return Step(state, events=events)

    def _queue(self) -> None:
        """Put what was answered last in line, as it is at the cut now: nothing was learned since."""
        part, self._newest = self._newest, None
        if part is not None and len(part.labels):
            cut = part.frames if self._learner is None else self._predictor.trunk(part.frames)
            self._waiting.append(replace(part, frames=cut))

    def arrived(self) -> tuple[int, int]:
        """Answers that were right, and labels in all, since this was last asked."""
        found = self._right, self._count
        self._right = self._count = 0
        return found
