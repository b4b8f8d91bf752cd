"""The board: what the agent last knew about itself. Written by the agent, read by page, telemetry, metrics and tests.

Writing never waits for a reader: readers get values, and ask for what is newer than the number they know.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
State = Literal["init", "ready", "degraded", "safe", "draining", "offline"]
Severity = Literal["info", "warning", "error"]
SLOTS = ("source", "own", "adapter")
"""What may answer: the model as exported, what this device learned, an adapter from outside."""
POINTS, EVENTS, RECENT = 600, 200, 1024


@dataclass(frozen=True)
class Status:
    """One look at the agent. Counters rise from the start of the process; None is not known, never a guess."""

    state: State = "init"
    why: tuple[str, ...] = ()
    """Reasons, such as `thermal` or `all snapshots damaged`, while the state is not `ready`."""
    mode: str = "shadow"
    site: str = ""
    device: str = ""
    boot: str = ""
    uptime_s: float = 0.0
    bundle: str = ""
    """Name of the bundle, and its id."""
    bundle_id: str = ""
    method: str = ""
    engine: str = ""
    slot: str = "source"
    """Which adapter answers: `source`, `own` or `adapter`, one that came from outside."""
    route: str | None = None
    """The domain whose state answers, where a router tells domains apart."""
    version: int = 0
    """Rises with every change of what is in force."""
    on_probation: bool = False
    frozen: bool = False
    """True while somebody told it not to learn."""
    answered: int = 0
    frames: Mapping[str, int] = field(default_factory=dict)
    """Frames not answered from the model, or not learned from, by reason: `dropped`, `shape`, `nan`, `frozen`."""
    fps: float | None = None
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    """p50, p95, p99 of the latest answers, from taking the frame to the answer."""
    learn: Mapping[str, float] = field(default_factory=dict)
    """looks, steps, shed, waiting, ms_per_s, allowed_ms_per_s."""
    guards: Mapping[str, int] = field(default_factory=dict)
    """Events of the guards and the method, by name."""
    ood: float | None = None
    """Share of the latest frames that were stranger than the threshold of the bundle."""
    confidence: float | None = None
    estimate: Mapping[str, float] | None = None
    """Estimated accuracy: `value`, `low`, `high`, in per cent."""
    host: Mapping[str, float] = field(default_factory=dict)
    """rss_mb, threads, fds, temperature_c and power_w where the board tells."""
    link: str = "none"
    """`none`, `online` or `offline`."""
    waiting: int = 0
    """Messages in the outbox."""
    snapshot_age_s: float | None = None
    restarts: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Event:
    """Something worth telling, once."""

    number: int
    ts: int
    """Wall clock, milliseconds."""
    kind: str
    """drift, reset, rollback, guard, fault, decision, command, state."""
    text: str
    severity: Severity = "info"
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """One answer, for the curves of the page."""

    ts: int
    label: str
    confidence: float
    ood: float | None
    latency_ms: float
    version: int


class Board:
    """Thread-safe. `status` is replaced whole; points and events are rings."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._status = Status()
        self._points: deque[Point] = deque(maxlen=POINTS)
        self._events: deque[Event] = deque(maxlen=EVENTS)
        self._event_count = 0
        self._frame: tuple[Array, Point] | None = None
        self._latencies: deque[float] = deque(maxlen=RECENT)
        self._counts: Counter[str] = Counter()

    @property
    def status(self) -> Status:
        with self._lock:
            return self._status

    def update(self, **facts: Any) -> Status:
        """Replace some fields of the status; returns the new one."""
        with self._changed:
            self._status = replace(self._status, **facts)
            self._changed.notify_all()
            return self._status

    def count(self, name: str, by: int = 1) -> None:
        """Count something that happened to frames; shows in `status.frames` with the next update."""
        with self._lock:
            self._counts[name] += by

    @property
    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)

    def answered(self, point: Point, frame: Array | None = None) -> None:
        """One answer left. `frame`: raw [H, W, C] or [H, W] uint8, for the page; kept by reference."""
        with self._lock:
            self._points.append(point)
            self._latencies.append(point.latency_ms)
            if frame is not None:
                self._frame = (frame, point)

    def tell(self, kind: str, text: str, ts: int, severity: Severity = "info", **facts: Any) -> Event:
        """Put an event on the board."""
        with self._changed:
            self._event_count += 1
            event = Event(self._event_count, ts, kind, text, severity, facts)
            self._events.append(event)
            self._changed.notify_all()
            return event

    def events(self, after: int = 0) -> list[Event]:
        """Events with a number above `after`, the oldest first."""
        with self._lock:
            return [event for event in self._events if event.number > after]

    @property
    def points(self) -> list[Point]:
        with self._lock:
            return list(self._points)

    @property
    def latest(self) -> tuple[Array, Point] | None:
        """The latest frame that was shown, with its answer."""
        with self._lock:
            return self._frame

    @property
    def latencies_ms(self) -> Array:
        """[n], of the latest answers."""
        with self._lock:
            return np.array(self._latencies, np.float64)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the next change of status, or event; False if none came."""
        with self._changed:
            return self._changed.wait(timeout_s)
