"""The supervisor: a part that shows no life is started again, and one that needs it too often is given up.

All times are monotonic, so that a clock that is set wakes no watchdog.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 10.0
"""Wait before a second restart in a row, and the longest it doubles to."""
Happening = Literal["restarted", "given up"]


class Stage(Protocol):
    """A part of the agent with a thread of its own."""

    name: ClassVar[str]

    def silent_s(self, now: float) -> float:
        """Seconds since it last showed life; infinity if its thread is dead. Having nothing to do is no silence."""
        ...

    def restart(self) -> None:
        """Leave the old thread to itself, and begin anew. Raises: EdgeAdaptError if that fails."""
        ...


@dataclass
class _Record:
    restarts: deque[float] = field(default_factory=deque)
    """When it was restarted, within the window."""
    not_before: float = 0.0
    given_up: bool = False


class Supervisor:
    """Watches stages. `check` is called every second or so, from one thread."""

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        stuck_s: float,
        restarts: int,
        window_s: float,
        tell: Callable[[str, str, Happening], None],
    ) -> None:
        """tell: takes the stage's name, the reason, and what was done about it."""
        self._stages, self._stuck_s, self._most, self._window_s = stages, stuck_s, restarts, window_s
        self._tell = tell
        self._records = {stage.name: _Record() for stage in stages}
        self.restarts = 0

    @property
    def given_up(self) -> tuple[str, ...]:
        """Names of the stages that are not started any more."""
        return tuple(name for name, record in self._records.items() if record.given_up)

    def check(self, now: float) -> None:
        """Restart what is stuck or dead, within the budget. now: monotonic seconds."""
        for stage in self._stages:
            record = self._records[stage.name]
            silent = stage.silent_s(now)
            if record.given_up or silent < self._stuck_s or now < record.not_before:
                continue
            reason = "its thread ended" if silent == float("inf") else f"no sign of life for {silent:.1f} s"
            self._revive(stage, record, reason, now)

    def _revive(self, stage: Stage, record: _Record, reason: str, now: float) -> None:
        while record.restarts and now - record.restarts[0] > self._window_s:
            record.restarts.popleft()
        if len(record.restarts) >= self._most:
            record.given_up = True
            self._tell(stage.name, f"{reason}; {self._most} restarts within {self._window_s:g} s", "given up")
            return
        record.restarts.append(now)
        record.not_before = now + min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (len(record.restarts) - 1))
        self.restarts += 1
        try:
            stage.restart()
        except Exception as error:  # a part that cannot be started is tried again, until it is given up
            reason = f"{reason}; its restart failed: {str(error).splitlines()[0]}"
        self._tell(stage.name, reason, "restarted")
