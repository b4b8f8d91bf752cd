"""A recorded run once more: the live loop in one thread, led by what was recorded about the order of things.

What an agent answers depends on when its learner was done, which no seed decides. The record says it: with which state
and which weights each batch was answered, and which letters the mailbox took. From there all is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from edge_adapt.errors import StateError
from edge_adapt.methods.protocol import S
from edge_adapt.runtime.live import Learned, LiveLoop, Reply

Array = NDArray[Any]
Wishes = Mapping[int, Callable[[Learned[Any]], Learned[Any]]]


class ScriptedLoop(LiveLoop[S]):
    """`play` instead of `answer`; nobody else works."""

    def __init__(self, *arguments: Any, wishes: Wishes | None = None, **facts: Any) -> None:
        """wishes: number of the letter that it was -> what somebody changed from outside."""
        super().__init__(*arguments, **facts)
        self.wishes = wishes or {}

    def play(self, frames: Array, recorded: Reply) -> Reply:
        """Answer a batch as it was answered then. Raises: StateError if the record does not belong to this run."""
        self._until(lambda: self.learned.done >= recorded.done)
        self._held, self._recorded = self.learned, recorded
        self._until(lambda: self.predictor.version >= recorded.version)
        self._taken = iter(recorded.posted)
        return self.answer(frames, learn=bool(recorded.posted))

    def work(self, timeout_s: float = 0.0) -> bool:
        """The next letter, or the wish that stood in its place."""
        change = self.wishes.get(self.learned.done + 1)
        if change is None:
            return super().work(timeout_s)
        new = replace(change(self.learned), done=self.learned.done + 1)
        self._put_in_force(new)
        self.learned = new
        return True

    def _until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            if not self.work():
                raise StateError(
                    f"the record tells of {self._recorded_done()} letters, there were {self.learned.done}",
                    remedy="replay it with the bundle, the method, the settings and the seed it was made with",
                )

    def _recorded_done(self) -> int:
        return self._recorded.done if hasattr(self, "_recorded") else 0

    def _current(self) -> Learned[S]:
        return self._held

    def _to_look_at(self, learned: Learned[S], frames: int) -> int:
        return self._recorded.looked

    def _read_now_and_then(self, frames: Array, *, looked: bool) -> None:
        """No letter of the record."""

    def _post(self, letter: Any) -> bool:
        return super()._post(letter) if next(self._taken, False) else False
