"""What the answers of one method were worth: errors, times, events, and which entry of the bank gave them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.scenarios import Shift
from benchmarks.visits import BLOCK
from edge_adapt.routing.router import ROUTE
from edge_adapt.runtime.loop import Answer

Array = NDArray[Any]

WINDOWS = 200
"""Points of an error curve."""


class Score:
    """Counts what was answered. The only place where labels are read."""

    def __init__(self, method: str, shifts: Sequence[Shift]) -> None:
        self.method, self.shifts = method, shifts
        self.frames = 0
        self._expected = np.concatenate([expected_of(shift) for shift in shifts])
        self.total = len(self._expected)
        self._wrong = np.full(self.total, np.nan)
        self._answer: list[float] = []
        self._learn: list[float] = []
        self._events: list[dict[str, Any]] = []
        self._entries: list[dict[str, Any]] = []
        self._looked = 0
        self._worked_s = 0.0
        self._started = time.perf_counter()

    def add(self, frames: int, answer: Answer) -> None:
        """The next so many frames, all of one shift."""
        part = slice(self.frames, self.frames + frames)
        expected = self._expected[part]
        self._wrong[part] = np.where(expected < 0, np.nan, answer.logits.argmax(axis=1) != expected)
        self._worked_s += answer.answer_s + answer.learn_s
        self._answer.append(answer.answer_s * 1e3 / frames)
        self._learn.append(answer.learn_s * 1e3 / frames)
        self._tell(answer.events)
        self._looked += answer.looked
        self.frames += frames

    def _tell(self, events: Sequence[str]) -> None:
        for event in events:
            if not event.startswith(ROUTE):
                self._events.append({"frame": self.frames, "name": event})
                continue
            entry = event.removeprefix(ROUTE)
            if not self._entries or self._entries[-1]["entry"] != entry:
                self._entries.append({"frame": self.frames, "entry": entry})

    @property
    def worked_s(self) -> float:
        """Seconds of answering and learning."""
        return self._worked_s

    @property
    def mean_ms(self) -> float:
        """Milliseconds of answering and learning a frame."""
        return self._worked_s * 1e3 / self.frames

    def row(self, costs: Mapping[str, Any]) -> dict[str, Any]:
        """The method's row of results.json; `costs` are those that are measured around it."""
        errors = self._errors()
        return {
            "method": self.method,
            "error_mean": round(float(np.mean(list(errors.values()))), 3) if errors else None,
            "errors": errors,
            "answer_ms": _milliseconds(self._answer),
            "learn_ms": _milliseconds(self._learn),
            **costs,
            "frames": self.frames,
            "looked": self._looked,
            "seconds": round(time.perf_counter() - self._started, 2),
            "timeline": self._timeline() if errors else {"frames": [], "error": []},
            "visits": list(self._visits()) if errors else [],
            "events": self._events,
            "entries": self._entries,
        }

    def _parts(self) -> Iterator[tuple[int, Shift, Array]]:
        """Start of each shift, the shift, and what was wrong there, NaN where it is not scored."""
        start = 0
        for shift in self.shifts:
            yield start, shift, self._wrong[start : start + len(shift.images)]
            start += len(shift.images)

    def _errors(self) -> dict[str, float]:
        """Per cent by name of the shift, or by domain where one has several; a name that returns counts as one."""
        found: dict[str, list[Array]] = {}
        for _, shift, wrong in self._parts():
            several = shift.domains is not None and len(shift.domain_names) > 1
            for name in shift.domain_names if several else [shift.name]:
                found.setdefault(name, []).append(wrong[shift.domains == name] if several else wrong)
        errors = {name: _per_cent(np.concatenate(parts)) for name, parts in found.items()}
        return {name: round(error, 3) for name, error in errors.items() if error is not None}

    def _timeline(self) -> dict[str, Any]:
        window = max(32, -(-self.total // WINDOWS))
        ends = [min(stop, self.total) for stop in range(window, self.total + window, window)]
        return {"frames": ends, "error": [_per_cent(self._wrong[max(0, end - window) : end], 2) for end in ends]}

    def _visits(self) -> Iterator[dict[str, Any]]:
        """Every stretch of a shift that comes more than once, with the error of each block of it."""
        names = [shift.name for shift in self.shifts]
        for start, shift, wrong in self._parts():
            if names.count(shift.name) > 1:
                blocks = [_per_cent(wrong[first : first + BLOCK], 4) for first in range(0, len(wrong), BLOCK)]
                yield {"name": shift.name, "start": start, "frames": len(wrong), "error": blocks}


def expected_of(shift: Shift) -> Array:
    """The label of each frame, -1 where none is scored."""
    if shift.labels is None:
        return np.full(len(shift.images), -1)
    return shift.labels if shift.counts is None else np.where(shift.counts, shift.labels, -1)


def _per_cent(wrong: Array, digits: int = 9) -> float | None:
    known = wrong[~np.isnan(wrong)]
    return round(float(known.mean()) * 100, digits) if len(known) else None


def _milliseconds(values: list[float]) -> dict[str, float]:
    array = np.array(values)
    return {
        "p50": round(float(np.percentile(array, 50)), 4),
        "p99": round(float(np.percentile(array, 99)), 4),
        "mean": round(float(array.mean()), 4),
    }
