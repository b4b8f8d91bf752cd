"""The agent on the network: courier, teller, birth, and where each message that comes in belongs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from device_agents.answers import Reply
from device_agents.board import Board
from device_agents.commands import Commands
from device_agents.courier import Courier, LinkChange
from device_agents.desired import Desired
from device_agents.envelope import Clock, Envelopes
from device_agents.homeassistant import STATUS_TOPIC, discovery
from device_agents.mqtt import Incoming
from device_agents.outbox import Outbox
from device_agents.settings import AgentSettings
from device_agents.telling import GROUPS, Teller
from device_agents.topics import Topics
from device_agents.transfer import Transfers
from device_agents.verbs import catalogue
from edge_adapt.streams.live.protocol import FrameSource
from edge_adapt.streams.live.pushed import PushedSource

OUTBOX = "outbox.db"
TROUBLING = ("taken-over", "auth", "certificate", "tls")
"""Alerts of the courier that make the agent `degraded`; a broker that is away does not."""
LARGEST_IMAGE = 8 << 20
"""Bytes of an encoded image that comes over MQTT."""
Tell = Callable[..., None]


class Network:
    """Everything about MQTT but the protocol itself. Optional: the agent runs without."""

    def __init__(
        self,
        settings: AgentSettings,
        topics: Topics,
        board: Board,
        clock: Clock,
        *,
        boot: str,
        folder: Path,
        about: Callable[[], Mapping[str, Any]],
    ) -> None:
        """about: facts for the birth document. Raises: ConfigError for certificates that cannot be read."""
        assert settings.mqtt is not None
        self._settings, self._mqtt, self._topics, self._about = settings, settings.mqtt, topics, about
        outbox = Outbox(folder / OUTBOX, int(self._mqtt.outbox_mb * 1_000_000), clock)
        pushed = settings.source.topic if settings.source.kind == "mqtt" else None
        filters = [pushed] if pushed else []
        if settings.telemetry.home_assistant:
            filters.append(STATUS_TOPIC)
        self.courier = Courier(
            self._mqtt,
            topics,
            Envelopes(boot, clock),
            outbox,
            clock=clock,
            on_message=self._came,
            on_link=self._link,
            filters=filters,
            largest_in=LARGEST_IMAGE if pushed else None,
        )
        self.teller = Teller(board, self.courier, topics, settings.telemetry)
        self._pushed = pushed
        self._alerts: set[str] = set()
        self._board, self._version = board, version("edge-adapt")
        self._reported: dict[str, Any] | None = None
        """As published last."""

    def connect(
        self, commands: Commands, desired: Desired, transfers: Transfers, source: FrameSource, tell: Tell
    ) -> None:
        """Say who gets what comes in. Once, before `start`."""
        self._commands, self._desired, self._transfers, self._tell = commands, desired, transfers, tell
        self._source = source

    def start(self) -> None:
        """Raises: ConfigError for what cannot be read; a broker that is away is no error."""
        self.courier.start()
        self.rebirth()

    def stop(self, timeout_s: float) -> None:
        self.teller.tick(float("inf"))
        self.courier.stop(timeout_s)

    def tick(self, now: float) -> None:
        """Tell what changed. now: monotonic seconds."""
        self.teller.tick(now)
        self.report()

    def rebirth(self) -> None:
        """Publish birth, reported and, if wanted, the announcement to Home Assistant."""
        self.courier.latest(
            self._topics.birth,
            {
                **self._about(),
                "commands": catalogue(),
                "telemetry": list(GROUPS),
                "limits": {"max_payload": self._mqtt.max_payload},
            },
        )
        self._reported = None
        self.report()
        if self._settings.telemetry.home_assistant:
            topic, document = discovery(self._settings, self._topics, version=self._version)
            self.courier.latest(topic, document, plain=True)

    def report(self) -> None:
        """Publish what is in force, if it is something else than was published last."""
        status = self._board.status
        found = self._desired.reported(
            slots={"answers": status.slot, "on_probation": status.on_probation, "frozen": status.frozen},
            versions={"edge_adapt": self._version, "bundle": status.bundle_id},
        )
        if found != self._reported:
            self._reported = found
            self.courier.latest(self._topics.reported, found)

    def reply(self, reply: Reply) -> None:
        """An answer to a command."""
        self.courier.ack(reply.topic, reply.data, reply.correlation)
        if reply.data.get("status") == "done":
            self.report()

    @property
    def online(self) -> bool:
        return self.courier.online

    @property
    def waiting(self) -> int:
        return self.courier.waiting

    @property
    def troubles(self) -> frozenset[str]:
        """Alerts of the link that make the agent `degraded`."""
        outbox = () if self.courier.trouble is None else ("outbox cannot be written",)
        return frozenset((*self._alerts, *outbox))

    def _came(self, incoming: Incoming) -> None:
        """One message, in the courier's thread."""
        if incoming.topic == self._pushed:
            if isinstance(self._source, PushedSource):
                self._source.push(incoming.payload)
            return
        if incoming.topic == STATUS_TOPIC:
            if incoming.payload == b"online":
                self.rebirth()
            return
        place = self._topics.parse(incoming.topic)
        if place is None:
            return
        if place.kind == "cmd":
            self._commands.receive(incoming)
        elif place.kind == "desired":
            self._wished(incoming)
        elif place.kind == "xfer":
            self._came_in_part(place.parts[0], int(place.parts[1]), incoming.payload)

    def _came_in_part(self, id: str, number: int, payload: bytes) -> None:
        """A chunk of a transfer, or the offer before it; the sender is told what is missing, not of every chunk."""
        progress = self._transfers.receive(id, number, payload)
        if number == 0 or progress.problem or not progress.missing:
            self.courier.ack(self._topics.ack(id), asdict(progress))

    def _wished(self, incoming: Incoming) -> None:
        if not incoming.payload:
            return
        outcome = self._desired.receive(incoming, limit=self._mqtt.max_payload)
        severity = "info" if outcome.applied else "warning"
        fields = [f"{change.path}: {change.old} -> {change.new}" for change in outcome.changes]
        why = [f"{one.field}: {one.why}" for one in outcome.rejected]
        self._tell("state", f"desired: {outcome.text}", severity, changes=fields, rejected=why)
        self.report()

    def _link(self, change: LinkChange) -> None:
        """What the courier has to say about the link."""
        if change.alert in TROUBLING:
            self._alerts.add(f"link: {change.alert}")
        elif change.online:
            self._alerts.clear()
        severity = "error" if change.stopped else "warning" if change.alert else "info"
        self._tell("state", f"link {'up' if change.online else 'down'}: {change.reason}", severity)
