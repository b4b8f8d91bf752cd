"""Telling: what leaves the agent over MQTT, made from the board. Nothing here waits for a network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

from device_agents.board import Board, Event, Status
from device_agents.settings import TelemetrySettings
from device_agents.topics import Topics

GROUPS = ("perf", "adapt", "ood", "host")
CLEAR_AFTER = 2
"""An alert ends when its reason was gone for so many looks in a row."""
MQTT_KINDS = ("drift", "reset", "rollback", "guard", "fault", "decision")
"""Kinds of events that have a topic; others stay on the board."""


class Outlet(Protocol):
    """The part of the courier that is used here."""

    def latest(self, topic: str, data: Mapping[str, Any] | None) -> None: ...

    def telemetry(self, group: str, data: Mapping[str, Any]) -> None: ...

    def event(self, kind: str, data: Mapping[str, Any]) -> bool: ...


class Teller:
    """Sends what changed. `tick` is called every second or so, from one thread."""

    def __init__(self, board: Board, outlet: Outlet, topics: Topics, settings: TelemetrySettings) -> None:
        self._board, self._outlet, self._topics = board, outlet, topics
        self.settings = settings
        self._state: tuple[str, tuple[str, ...]] | None = None
        self._told: dict[str, tuple[float, Mapping[str, Any]]] = {}
        """Group -> when it was told last, and what."""
        self._alerts: dict[str, int] = {}
        """Alert -> looks since its reason was last there."""
        self._event = 0

    def tick(self, now: float) -> None:
        """now: monotonic seconds."""
        status = self._board.status
        self._tell_state(status)
        self._tell_alerts(status)
        for event in self._board.events(self._event):
            self._event = event.number
            if event.kind in MQTT_KINDS:
                self._outlet.event(event.kind, _event(event))
        for group in GROUPS:
            self._tell_group(group, telemetry(group, status), now)

    def _tell_state(self, status: Status) -> None:
        state = (status.state, status.why)
        if state != self._state:
            self._state = state
            self._outlet.latest(self._topics.state, {"s": status.state, "boot": status.boot, "why": list(status.why)})

    def _tell_alerts(self, status: Status) -> None:
        reasons = {_slug(reason): reason for reason in status.why}
        for name, reason in reasons.items():
            if name not in self._alerts:
                self._outlet.latest(self._topics.alert(name), {"text": reason, "state": status.state})
            self._alerts[name] = 0
        for name in [name for name in self._alerts if name not in reasons]:
            self._alerts[name] += 1
            if self._alerts[name] >= CLEAR_AFTER:
                del self._alerts[name]
                self._outlet.latest(self._topics.alert(name), None)

    def _tell_group(self, group: str, data: Mapping[str, Any], now: float) -> None:
        """When something changed, but not too often; and now and then in any case."""
        told = self._told.get(group)
        if told is not None:
            since = now - told[0]
            if since < self.settings.minimum_s or (data == told[1] and since < self.settings.interval_s):
                return
            if since < self.settings.interval_s and not _is_news(data, told[1]):
                return
        self._told[group] = (now, data)
        self._outlet.telemetry(group, data)


def telemetry(group: str, status: Status) -> dict[str, Any]:
    """One group of figures, flat. None is not known."""
    if group == "perf":
        latency = {f"latency_{name}_ms": value for name, value in status.latency_ms.items()}
        return {"answered": status.answered, "fps": status.fps, **latency, **dict(status.frames)}
    if group == "adapt":
        return {
            "mode": status.mode,
            "slot": status.slot,
            "route": status.route,
            "version": status.version,
            "on_probation": status.on_probation,
            "frozen": status.frozen,
            **dict(status.learn),
            "guards": dict(status.guards),
            "snapshot_age_s": status.snapshot_age_s,
        }
    if group == "ood":
        return {"share": status.ood, "confidence": status.confidence, "estimate": status.estimate}
    return {**dict(status.host), "uptime_s": round(status.uptime_s, 1), "restarts": status.restarts}


def _is_news(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """True if something that is no running figure changed: a mode, a slot, a flag, a kind of fault."""
    words = [{name: value for name, value in data.items() if isinstance(value, (str, bool))} for data in (new, old)]
    return words[0] != words[1] or new.keys() != old.keys()


def _event(event: Event) -> dict[str, Any]:
    return {"n": event.number, "at": event.ts, "text": event.text, "severity": event.severity, **dict(event.facts)}


def _slug(reason: str) -> str:
    """A reason as a level of a topic; what changes in it, such as a number, is left out."""
    words = re.sub(r"[^a-z]+", "-", reason.lower()).strip("-")
    return words[:48] or "reason"
