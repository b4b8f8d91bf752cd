"""Builds a plan in a process of its own, so that a crash, a kill or a lack of memory there is only a delay here."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_adapt.engines.cache import PlanCache, PlanKey
from edge_adapt.errors import ArtifactError, EngineError

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""The first and two more."""
REFUSED, DISK_FULL = 3, 4
"""Exit codes of a builder after which another try makes no sense."""

Command = Callable[[Path, int], Sequence[str]]
"""File to write and number of the attempt, from 0 -> the program that builds. It prints progress, a JSON object
`{"phase": ..., "done": ..., "total": ...}` a line, and leaves a sealed plan in the file."""


@dataclass(frozen=True)
class Progress:
    """How far a build is."""

    phase: str
    done: int
    total: int
    left_s: float | None
    """Estimated; None while nothing is done."""

    def __str__(self) -> str:
        left = "" if self.left_s is None else f", about {self.left_s:.0f} s left"
        return f"{self.phase} {self.done}/{self.total}{left}"


@dataclass(frozen=True)
class Outcome:
    """How a builder ended."""

    code: int
    """Exit code; negative is the number of a signal."""
    last: str = ""
    """The last line that it printed besides progress."""

    @property
    def is_final(self) -> bool:
        """True if another try would end the same way."""
        return self.code in (REFUSED, DISK_FULL)

    def __str__(self) -> str:
        if self.code < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-self.code).name}"
        return f"{self.last or 'no reason given'} (exit code {self.code})"


def remaining_s(elapsed_s: float, done: int, total: int) -> float | None:
    """Seconds that are left if every step takes as long as those so far; None before the first."""
    return elapsed_s * (total - done) / done if done > 0 else None


def progress_of(line: str, elapsed_s: float) -> Progress | None:
    """What a line of the builder says; None if it is no progress."""
    try:
        raw: Any = json.loads(line)
        phase, done, total = str(raw["phase"]), int(raw["done"]), int(raw["total"])
    except (ValueError, KeyError, TypeError):
        return None
    if not 0 <= done <= total:
        return None
    return Progress(phase[:80], done, total, remaining_s(elapsed_s, done, total))


class Builder:
    """Has plans built, one at a time. `cancel` may be called from any thread."""

    def __init__(
        self,
        cache: PlanCache,
        *,
        tell: Callable[[str], None] = log.warning,
        report: Callable[[Progress], None] = lambda progress: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            tell: takes what went wrong, in one line.
            report: takes progress.
        """
        self._cache, self._tell, self._report, self._clock = cache, tell, report, clock
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._cancelled = False

    def plan(self, key: PlanKey, command: Command) -> bytes:
        """From the cache, or built. Raises: EngineError after the last attempt; nothing half-written is left."""
        try:
            kept = self._cache.load(key)
        except ArtifactError as error:
            self._tell(f"{error.what}; it is built again")
            kept = None
        if kept is not None:
            return kept
        outcome = Outcome(0)
        for attempt in range(ATTEMPTS):
            made, outcome = self._attempt(key, command, attempt)
            if made is not None:
                return made
            if outcome.is_final or self._cancelled:
                break
            self._tell(f"building a plan failed, attempt {attempt + 1} of {ATTEMPTS}: {outcome}")
        raise EngineError(f"no plan could be built: {outcome}", remedy="free memory or disk space and restart")

    def cancel(self) -> None:
        """End a build that is under way, and begin no other."""
        with self._lock:
            self._cancelled = True
            if self._child is not None:
                self._child.kill()

    def _attempt(self, key: PlanKey, command: Command, attempt: int) -> tuple[bytes | None, Outcome]:
        """A plan that is published, or why there is none."""
        staged: Path | None = None
        try:
            staged = self._cache.stage(key)
            outcome = self._run(command(staged, attempt))
            return (self._cache.publish(staged, key) if outcome.code == 0 else None), outcome
        except ArtifactError as error:
            return None, Outcome(1, error.what)
        except OSError as error:
            return None, Outcome(DISK_FULL, f"{error.strerror or error}")
        finally:
            for left in () if staged is None else staged.parent.glob(f"{staged.name}*"):
                with contextlib.suppress(OSError):
                    left.unlink()

    def _run(self, command: Sequence[str]) -> Outcome:
        last: deque[str] = deque(maxlen=1)
        started = self._clock()
        with self._lock:
            if self._cancelled:
                return Outcome(1, "cancelled")
            child = self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace",
            )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                progress = progress_of(line, self._clock() - started)
                if progress is not None:
                    self._report(progress)
                elif line.strip():
                    last.append(line.strip()[:300])
            return Outcome(child.wait(), last[0] if last else "")
        finally:
            with self._lock:
                self._child = None
            if child.poll() is None:
                child.kill()
                child.wait()
            if child.stdout is not None:
                child.stdout.close()
