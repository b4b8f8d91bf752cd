"""What goes over a link that is up, in which order, and what is known to have arrived. Belongs to the courier's thread.

At most a window of messages waits for acknowledgement. Telemetry goes at QoS 0; it is kept until something that was
sent after it is acknowledged (one connection keeps order), so a dying link loses none of it.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from device_agents.envelope import Envelopes, as_historic, plain_json
from device_agents.mqtt import HEADROOM, Link, Message, Up
from device_agents.outbox import Outbox
from device_agents.pacing import Bucket, Uniform
from device_agents.rows import Row
from device_agents.topics import Topics
from edge_adapt.errors import StateError

EXPIRY_S = {"ack": 3600, "event": 86_400, "tele": 86_400, "thin": 86_400}
UNCONFIRMED = 200
SUSPECT, CONVICTED = 2, 2


@dataclass(frozen=True)
class Pace:
    """How fast the courier tells and tries again. The defaults are for devices; tests make them small."""

    backoff_s: tuple[float, float] = (1.0, 60.0)
    stable_s: float = 60.0
    uniform: Uniform = random.uniform
    commit_ms: int = 50
    in_flight: int = 16
    in_flight_bytes: int = 32_768
    drain_per_s: float = 200.0
    """Old messages a second after an outage, so that sending them costs the answers nothing."""
    latest_gap_s: float = 1.0
    event_rate: float = 5.0
    event_burst: float = 50.0
    tele_expiry_s: int = 20
    suspect_ms: int = 1000
    """A message that may be poison is sent again only on a link that has held for so long, and alone."""


@dataclass
class Kept:
    """A retained value: only the latest counts. `data` None clears it at the broker."""

    data: Mapping[str, Any] | None
    plain: bool = False
    """Send it without an envelope."""
    fresh: bool = True
    sent_ms: float | None = None


@dataclass(frozen=True)
class Flight:
    """A message that waits for its acknowledgement."""

    order: int
    sent_ms: int
    size: int
    row: Row | None = None
    topic: str | None = None
    alone: bool = False


class Sender:
    """Sends retained values, waiting rows and live telemetry; `problems` collects what a person should hear of.

    Args:
        max_payload: our own limit in bytes; the broker may set a lower one.
        quiet_ms: after so much silence something is sent that the broker has to acknowledge.
    """

    def __init__(
        self, topics: Topics, envelopes: Envelopes, outbox: Outbox, pace: Pace, *, max_payload: int, quiet_ms: int
    ) -> None:
        self.problems: list[str] = []
        self.session = 0
        self.alive_ms = 0
        """When the broker last showed that it hears us."""
        self.round_trip_ms: int | None = None
        self._topics, self._envelopes, self._outbox, self._pace = topics, envelopes, outbox, pace
        self._max_payload = self._limit = max_payload
        self._quiet_ms = quiet_ms
        self._window = pace.in_flight
        self._link: Link | None = None
        self._values: dict[str, Kept] = {topic: Kept(None) for topic in outbox.remembered()}
        self._flights: dict[int, Flight] = {}
        self._live: deque[tuple[int, str, bytes]] = deque()
        self._order = self._historic = self._begun_ms = 0
        self._drain = Bucket(pace.drain_per_s, max(1.0, pace.drain_per_s / 10))
        self._tries: Counter[int] = Counter()
        self._alone: Counter[int] = Counter()

    # the link comes and goes

    def begin(self, link: Link, up: Up, now: int) -> None:
        """The link is up: every retained value is due."""
        largest = up.largest_packet - HEADROOM if up.largest_packet else self._max_payload
        self._limit = min(self._max_payload, largest)
        self._window = min(self._pace.in_flight, up.in_flight)
        self._link, self.alive_ms, self._begun_ms = link, now, now
        first = (self._topics.birth, self._topics.state)
        order = sorted(self._values, key=lambda topic: first.index(topic) if topic in first else len(first))
        self._values = {topic: self._values[topic] for topic in order}
        for kept in self._values.values():
            kept.fresh, kept.sent_ms = True, None

    def go_live(self) -> None:
        """Telemetry goes at once from now on. What waits, and is overtaken by it, counts as told late."""
        self._historic = self._outbox.last_id

    def end(self, *, closed_by_peer: bool) -> None:
        """The link is gone. Telemetry that may not have arrived waits again, and so does all that was in flight."""
        self._link = None
        for _, topic, payload in self._live:
            self._outbox.add("tele", topic, payload)
        self._live.clear()
        if closed_by_peer:
            self._suspect()
        self._flights.clear()

    def _suspect(self) -> None:
        """A message that the broker hung up on again and again, at last alone on a link that had held, is poison."""
        for flight in self._flights.values():
            if flight.row is None:
                continue
            self._tries[flight.row.id] += 1
            self._alone[flight.row.id] += flight.alone
            if self._alone[flight.row.id] >= CONVICTED:
                self._quarantine(flight.row, "the broker hangs up when it is sent")

    # what to send

    def keep(self, topic: str, data: Mapping[str, Any] | None, *, plain: bool = False) -> None:
        """Set a retained value."""
        old = self._values.get(topic)
        self._values[topic] = Kept(data, plain, sent_ms=old.sent_ms if old else None)
        if topic.startswith(self._topics.alert("x")[:-1]) and data is not None:
            self._outbox.remember(topic)

    def hurry(self, topic: str) -> None:
        """Send a retained value at once, however lately it was sent."""
        self._values[topic].sent_ms = None

    def value(self, topic: str) -> Mapping[str, Any]:
        kept = self._values.get(topic)
        return (kept.data if kept else None) or {}

    def live(self, topic: str, payload: bytes) -> bool:
        """Telemetry, at QoS 0. False: it has to wait."""
        if self._link is None or len(payload) > self._limit:
            return False
        # Where the link is down already, `end` comes soon, and has it wait behind what was sent before it.
        with suppress(StateError):
            self._link.publish(Message(topic, payload, qos=0, expiry_s=self._pace.tele_expiry_s))
        self._order += 1
        self._live.append((self._order, topic, payload))
        return True

    def pump(self, now: int) -> None:
        """Send as much as the window allows: retained values first, then acknowledgements, then the rest in order."""
        try:
            while self._free() and (topic := self._due(now)) is not None:
                self._send_value(topic, now)
            if self._outbox.waiting > sum(flight.row is not None for flight in self._flights.values()):
                self._send_rows(now)
            quiet = now - self.alive_ms
            if not self._flights and (quiet >= self._quiet_ms or len(self._live) >= UNCONFIRMED):
                self._probe(now)
        except StateError:
            return  # the link went down meanwhile; its last news says why

    def acked(self, mid: int, code: int, now: int) -> None:
        """The broker answered for a packet."""
        flight = self._flights.pop(mid, None)
        if flight is None:
            return
        self.alive_ms, self.round_trip_ms = now, now - flight.sent_ms
        while self._live and self._live[0][0] < flight.order:
            self._live.popleft()
        if code >= 0x80:
            self._refused(flight, code)
        elif flight.row is not None:
            self._outbox.done(flight.row)
        elif flight.topic is not None:
            self._cleared(flight.topic)
        if flight.row is not None:
            self._tries.pop(flight.row.id, None)
            self._alone.pop(flight.row.id, None)

    @property
    def idle(self) -> bool:
        """Nothing waits for an acknowledgement, and no retained value is to be sent."""
        return not self._flights and not any(kept.fresh for kept in self._values.values())

    def oldest_ms(self) -> int | None:
        """When the message was sent that has waited longest for its acknowledgement."""
        return min((flight.sent_ms for flight in self._flights.values()), default=None)

    # inside

    def _free(self) -> bool:
        if any(flight.alone for flight in self._flights.values()):
            return False
        size = sum(flight.size for flight in self._flights.values())
        return len(self._flights) < self._window and (not size or size < self._pace.in_flight_bytes)

    def _due(self, now: int) -> str | None:
        gap = 1000 * self._pace.latest_gap_s
        for topic, kept in self._values.items():
            if kept.fresh and (kept.sent_ms is None or now - kept.sent_ms >= gap):
                return topic
        return None

    def _send_value(self, topic: str, now: int) -> None:
        kept = self._values[topic]
        payload = b"" if kept.data is None else self._payload(topic, kept)
        kept.fresh, kept.sent_ms = False, now
        if len(payload) > self._limit:
            self.problems.append(f"{topic} has {len(payload)} bytes, more than {self._limit}; it was not sent")
            return
        try:
            self._fly(Message(topic, payload, retain=True), now, topic=topic)
        except StateError:
            kept.fresh = True
            raise

    def _payload(self, topic: str, kept: Kept) -> bytes:
        data = kept.data or {}
        if kept.plain:
            return plain_json(data)
        if topic in (self._topics.state, self._topics.birth):
            data = {**data, "boot": self._envelopes.boot, "bd": self.session}
        return self._envelopes.wrap(data, numbered=False)

    def _send_rows(self, now: int) -> None:
        skipped = {flight.row.id for flight in self._flights.values() if flight.row is not None}
        suspects = {id_ for id_, tries in self._tries.items() if tries >= SUSPECT}
        if now - self._begun_ms < self._pace.suspect_ms:
            skipped |= suspects  # the rest goes first; a link that flaps must not make anything look like poison
        for row in self._outbox.next(self._window - len(self._flights), skipped):
            late = row.id <= self._historic
            suspect = row.id in suspects
            if not self._free() or (suspect and self._flights):
                return
            if late and row.store != "ack" and not self._drain.take(now):
                return
            if len(row.payload) > self._limit:
                self._quarantine(row, f"{len(row.payload)} bytes, more than {self._limit}")
                continue
            payload = as_historic(row.payload) if late else row.payload
            message = Message(row.topic, payload, expiry_s=EXPIRY_S[row.store], correlation=row.correlation)
            self._fly(message, now, row=row, alone=suspect)

    def _fly(
        self, message: Message, now: int, *, row: Row | None = None, topic: str | None = None, alone: bool = False
    ) -> None:
        if self._link is None:
            raise StateError("the link is down", remedy="keep the message until it is up")
        self._order += 1
        mid = self._link.publish(message)
        self._flights[mid] = Flight(self._order, now, len(message.payload), row, topic, alone)

    def _probe(self, now: int) -> None:
        """Something to acknowledge, so that a broker that hangs is noticed."""
        facts = {"waiting": self._outbox.waiting, "rtt_ms": self.round_trip_ms, "bd": self.session}
        payload = self._envelopes.wrap(facts, numbered=False)
        self._fly(Message(self._topics.tele("link"), payload, expiry_s=self._pace.tele_expiry_s), now)

    def _refused(self, flight: Flight, code: int) -> None:
        if flight.row is not None:
            self._quarantine(flight.row, f"the broker refused it with 0x{code:02X}")
        else:
            self.problems.append(f"the broker refused {flight.topic or 'a message'} with 0x{code:02X}: see its ACL")

    def _cleared(self, topic: str) -> None:
        kept = self._values.get(topic)
        if kept is not None and kept.data is None and not kept.fresh:
            del self._values[topic]
            self._outbox.forget(topic)

    def _quarantine(self, row: Row, why: str) -> None:
        self._outbox.quarantine(row, why)
        self.problems.append(f"a message for {row.topic} was put aside: {why}")
