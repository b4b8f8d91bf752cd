"""Back to source every so many frames: no drift is longer than that.

Press et al., "RDumb: A simple approach that questions our progress in continual test-time adaptation", NeurIPS 2023.
"""

from __future__ import annotations

from typing import Any, ClassVar

from edge_adapt.methods.protocol import LOGITS, Answered, Context, Method, Step
from edge_adapt.methods.wrapper import Wrapped, Wrapper

RESET = "guard: periodic reset"

PERIOD = 64_000
"""Answered frames, as 1,000 batches of 64 in the paper; frames, so that the size of a batch does not matter."""


class Reset(Wrapper[int]):
    """The host starts anew each time `period` frames were answered. Its own state counts them."""

    name: ClassVar[str] = "reset"
    adds: ClassVar[frozenset[str]] = frozenset({LOGITS})

    def __init__(self, context: Context, host: Method[Any], *, period: int = PERIOD) -> None:
        super().__init__(context, host)
        self.period = period

    def start(self) -> int:
        return 0

    def watch(self, state: Wrapped[int], answered: Answered) -> Step[Wrapped[int]]:
        step = super().watch(state, answered)
        count = state.own + len(answered.logits)
        if count < self.period:
            return Step(Wrapped(step.state.host, count), step.logits, step.events)
        return Step(Wrapped(self.host.init(), count % self.period), step.logits, (*step.events, RESET))
