"""The frozen model: no learning at all. What every other method is measured against."""

from __future__ import annotations

from typing import ClassVar

from edge_adapt.delta import Delta
from edge_adapt.methods.protocol import Answered, Context, Observation, Step


class Source:
    """Answers with the weights as exported, and never looks."""

    name: ClassVar[str] = "source"
    requires: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    watches: frozenset[str] = frozenset()
    answers = False

    def __init__(self, context: Context) -> None:
        self._delta = Delta.source()

    def init(self) -> None:
        return None

    def look(self, state: None, frames: int, passed: int) -> int:
        return 0

    def step(self, state: None, seen: Observation) -> Step[None]:
        return Step(None)

    def watch(self, state: None, answered: Answered) -> Step[None]:
        return Step(None)

    def delta(self, state: None) -> Delta:
        return self._delta
