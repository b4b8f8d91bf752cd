"""A method: takes off the answers what the network has been saying all along, whatever it was shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_adapt.delta import Delta
from edge_adapt.errors import ConfigError
from edge_adapt.methods.protocol import LOGITS, Answered, Context, Observation, Step, configured

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """What can be set, as in `settings: {method: {strength: 0.5}}` of a plan."""

    strength: float = 0.5
    """Share of the mean that is taken off; 0 leaves the answers as they are."""
    memory: int = 128
    """Frames over which older answers fade to a third."""

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ConfigError(f"level.strength is {self.strength}, expected 0 to 1", remedy="use the default, 0.5")
        if self.memory < 1:
            raise ConfigError(f"level.memory is {self.memory}, expected 1 or more", remedy="use the default, 128")


@dataclass(frozen=True)
class LevelState:
    """A value: every step makes another one, so that an old one is a snapshot."""

    mean: Array
    """[K], of the softmax of past answers."""


class Level:
    """Sees every answer before it leaves and has the last word on it; learns nothing in the network itself."""

    name: ClassVar[str] = "level"
    requires: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    watches: frozenset[str] = frozenset({LOGITS})
    answers = False

    def __init__(self, context: Context, config: LevelConfig | None = None) -> None:
        self.config: LevelConfig = configured(config or LevelConfig(), context.settings)
        self.classes = context.bundle.manifest.outputs
        self._delta = Delta.source()

    def init(self) -> LevelState:
        return LevelState(np.full(self.classes, 1 / self.classes))

    def look(self, state: LevelState, frames: int, passed: int) -> int:
        return 0  # answers are enough

    def step(self, state: LevelState, seen: Observation) -> Step[LevelState]:
        return Step(state)

    def watch(self, state: LevelState, answered: Answered) -> Step[LevelState]:
        logits = answered.logits.astype(np.float64)
        fine = np.isfinite(logits).all(axis=1)
        levelled = logits - self.config.strength * np.log(state.mean)
        if not fine.any():
            return Step(state, events=("refused: answers are not finite",))
        shares = np.exp(logits[fine] - logits[fine].max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        kept = (1 - 1 / self.config.memory) ** len(shares)
        mean = kept * state.mean + (1 - kept) * shares.mean(axis=0)
        return Step(LevelState(mean), levelled.astype(np.float32))

    def delta(self, state: LevelState) -> Delta:
        return self._delta  # the same object: nothing in the engine ever changes
