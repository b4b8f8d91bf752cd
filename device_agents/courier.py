"""The courier: takes what the agent tells, never makes it wait, and sees that it reaches the broker some day.

One thread owns the outbox, the link and every timer. Whoever tells something only puts it into a queue.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from device_agents.connecting import Rival, alert_of, expired, expiry_warning, link_options
from device_agents.envelope import Clock, Envelopes
from device_agents.mqtt import TAKEN_OVER, Acked, Down, Incoming, Link, LinkOptions, Subscribed, Up
from device_agents.outbox import Outbox
from device_agents.pacing import Backoff, Bucket, Suppressed
from device_agents.sender import Pace, Sender
from device_agents.settings import MqttSettings
from device_agents.topics import Topics
from edge_adapt.errors import ConfigError, StateError

log = logging.getLogger(__name__)
Kind = Literal["ack", "event", "tele"]
BUSY_S, CALM_S = 0.01, 0.1
CONNECTING_S = 30.0
TIDY_MS = 60_000
CROWDED = 2000  # waiting in memory; telemetry is refused above


@dataclass(frozen=True)
class LinkChange:
    """What `on_link` is told, from the courier's thread: when the link comes or goes, and when a person should act."""

    online: bool
    reason: str
    alert: str | None = None
    """auth, protocol, tls, certificate, taken-over, subscription, message, outbox: worth an alert of that name."""
    stopped: bool = False
    """True: the courier will not try again."""


@dataclass(frozen=True)
class _Add:
    store: Kind
    topic: str
    payload: bytes
    correlation: bytes | None = None


@dataclass(frozen=True)
class _Keep:
    topic: str
    data: Mapping[str, Any] | None
    plain: bool


class Courier:
    """Carries messages between the agent and the broker.

    Args:
        outbox: the courier closes it in `stop`.
        on_message: gets each incoming message, on the courier's thread; should be quick.
        on_link: gets each `LinkChange`, on the courier's thread.
        filters: topics to subscribe to beside our own.
        largest_in: largest payload taken from outside, bytes; `settings.max_payload` if None.
    """

    def __init__(
        self,
        settings: MqttSettings,
        topics: Topics,
        envelopes: Envelopes,
        outbox: Outbox,
        *,
        clock: Clock,
        on_message: Callable[[Incoming], None],
        on_link: Callable[[LinkChange], None],
        pace: Pace | None = None,
        filters: Sequence[str] = (),
        largest_in: int | None = None,
    ) -> None:
        self.connects = 0
        """Connections that the broker accepted."""
        self.lost: Counter[str] = Counter()
        """Messages that never reached the outbox: `large`, `crowded`, `suppressed`."""
        self._settings, self._topics, self._envelopes, self._outbox = settings, topics, envelopes, outbox
        self._clock, self._on_message, self._on_link = clock, on_message, on_link
        self._pace = pace or Pace()
        self._filters = [*topics.subscriptions, topics.birth, *filters]
        self._rival = Rival(envelopes.boot)
        self._largest_in = largest_in or settings.max_payload
        limits = {"max_payload": settings.max_payload, "quiet_ms": 500 * settings.keepalive_s}
        self._sender = Sender(topics, envelopes, outbox, self._pace, **limits)
        self._backoff = Backoff(*self._pace.backoff_s, self._pace.stable_s, self._pace.uniform)
        self._lock = threading.Lock()
        self._bucket = Bucket(self._pace.event_rate, self._pace.event_burst)
        self._suppressed = Suppressed()
        self._news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stop_ms: int | None = None
        self._link: Link | None = None
        self._online = self._ended = False
        self._opened_ms = self._up_ms = self._retry_ms = self._tidied_ms = clock.mono_ms()
        self._commit_due: int | None = None
        self._sync = False
        self._told: LinkChange | None = None
        self._given_up = 0
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)

    # what the agent calls, from any thread

    def start(self) -> None:
        """Raises: ConfigError if certificates or the password cannot be read. A broker that is away is no error."""
        self._options(session=0)
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Send what can be sent in time, say `offline`, disconnect, close the outbox. Safe to call twice."""
        if self._stop_ms is None:
            self._stop_ms = self._clock.mono_ms() + int(1000 * timeout)
        if self._thread.is_alive():
            self._news.put((None, None))
            self._thread.join(timeout + 3.0)
        elif self._thread.ident is None:
            self._outbox.close()

    def latest(self, topic: str, data: Mapping[str, Any] | None, *, plain: bool = False) -> None:
        """A retained value; told again at each connect. None clears it. `plain`: JSON without an envelope."""
        self._news.put((None, _Keep(topic, None if data is None else dict(data), plain)))

    def telemetry(self, group: str, data: Mapping[str, Any]) -> None:
        """A report: sent at once, or kept with `hist`, thinned out after an hour."""
        if self._news.qsize() > CROWDED:
            self.lost["crowded"] += 1
            return
        self._add("tele", self._topics.tele(group), data)

    def event(self, kind: str, data: Mapping[str, Any]) -> bool:
        """Something that happened: on disk within 50 ms, then sent. False: too many lately; it is only counted."""
        with self._lock:
            now = self._clock.mono_ms()
            if not self._bucket.take(now):
                self._suppressed.add(kind, now)
                self.lost["suppressed"] += 1
                return False
        self._add("event", self._topics.event(kind), data)
        return True

    def ack(self, topic: str, data: Mapping[str, Any], correlation: bytes | None = None) -> None:
        """The answer to a command, to `topic`; goes before all else."""
        self._add("ack", topic, data, correlation)

    @property
    def waiting(self) -> int:
        """Messages in the outbox."""
        return self._outbox.waiting

    @property
    def trouble(self) -> str | None:
        """Why the outbox cannot be written; None: it can."""
        return self._outbox.trouble

    @property
    def online(self) -> bool:
        return self._online

    def _add(self, store: Kind, topic: str, data: Mapping[str, Any], correlation: bytes | None = None) -> None:
        with self._lock:  # so that the order in the queue is the order of `seq`
            self._news.put((None, _Add(store, topic, self._envelopes.wrap(data), correlation)))

    # the thread

    def _run(self) -> None:
        while self._stop_ms is None:
            self._guarded_turn()
        self._farewell()

    def _guarded_turn(self) -> None:
        try:
            self._turn()
        except Exception as error:  # a bug must not silence the device for good
            log.exception("the courier failed and goes on")
            self._lose(Down(f"the courier failed: {type(error).__name__}: {error}"), alert="courier")

    def _turn(self) -> None:
        """Do what is due, then take what came."""
        self._do_due(self._clock.mono_ms())
        busy = self._commit_due is not None or (self._online and (self.waiting > 0 or not self._sender.idle))
        try:
            item = self._news.get(timeout=BUSY_S if busy else CALM_S)
            for _ in range(100):
                self._take(*item)
                item = self._news.get_nowait()
        except queue.Empty:
            pass
        if self._online:
            self._sender.pump(self._clock.mono_ms())

    def _take(self, link: Link | None, item: Any) -> None:
        now = self._clock.mono_ms()
        if isinstance(item, _Add):
            self._store(item)
        elif isinstance(item, _Keep):
            self._sender.keep(item.topic, item.data, plain=item.plain)
        elif link is None or link is not self._link:
            return  # news of a link that was given up
        elif isinstance(item, Incoming):
            self._sender.alive_ms = now
            self._deliver(item)
        elif isinstance(item, Acked):
            self._sender.acked(item.mid, item.code, now)
            self._commit_soon(sync=False)
        elif isinstance(item, Up):
            self._rise(link, item, now)
        elif isinstance(item, Subscribed):
            self._subscribed(item)
        elif isinstance(item, Down):
            self._lose(item)

    def _do_due(self, now: int) -> None:
        if self._commit_due is not None and now >= self._commit_due:
            self._commit()
        if now - self._tidied_ms >= TIDY_MS:
            self._tidied_ms = now
            self._outbox.tidy()
        self._tell_suppressed(now)
        for problem in self._sender.problems:
            self._tell(LinkChange(self._online, problem, "message"))
        self._sender.problems.clear()
        if self._link is not None:
            self._supervise(self._link, now)
        elif not self._ended and self._stop_ms is None and now >= self._retry_ms:
            self._connect(now)

    # messages out

    def _store(self, item: _Add) -> None:
        if len(item.payload) > self._settings.max_payload:
            self.lost["large"] += 1
            row = self._outbox.add(item.store, item.topic, item.payload, item.correlation)
            why = f"{len(item.payload)} bytes, more than {self._settings.max_payload}"
            self._outbox.quarantine(row, why)
            self._sender.problems.append(f"a message for {item.topic} was put aside: {why}")
            return
        if item.store == "tele" and self._online and self._sender.live(item.topic, item.payload):
            return
        self._outbox.add(item.store, item.topic, item.payload, item.correlation)
        self._commit_soon(sync=item.store == "event")
        if item.store == "ack":
            self._commit()

    def _commit_soon(self, *, sync: bool) -> None:
        self._sync |= sync
        if self._commit_due is None:
            self._commit_due = self._clock.mono_ms() + self._pace.commit_ms

    def _commit(self) -> None:
        written = self._outbox.commit(sync=self._sync)
        if not written and self._outbox.trouble is not None:
            self._tell(LinkChange(self._online, f"the outbox cannot write: {self._outbox.trouble}", "outbox"))
            self._commit_due = self._clock.mono_ms() + 1000
            return
        self._commit_due, self._sync = None, False

    def _tell_suppressed(self, now: int) -> None:
        with self._lock:
            kinds = self._suppressed.due(now)
        if kinds:
            self._add("event", self._topics.event("suppressed"), {"suppressed": sum(kinds.values()), "kinds": kinds})

    def _tell_losses(self) -> None:
        """Once back: what an outage or damage cost."""
        damage, self._outbox.damage = self._outbox.damage, None
        if damage is not None:
            facts = {"code": "outbox damaged", "why": damage.why, "saved": damage.saved, "lost_at_most": damage.lost}
            self._add("event", self._topics.event("fault"), facts)
        if self._outbox.dropped:
            facts = {"code": "outbox full or old", "dropped": dict(self._outbox.dropped)}
            self._outbox.dropped.clear()
            self._add("event", self._topics.event("fault"), facts)

    def _deliver(self, message: Incoming) -> None:
        if message.topic == self._topics.birth:
            rival = self._rival.met(message.payload, first_connection=self.connects <= 1)
            if rival is not None:
                who = f"another agent (boot {rival:.40}) uses the client id ea-{self._topics.device}"
                self._lose(Down(who, TAKEN_OVER))
            return
        try:
            self._on_message(message)
        except Exception:  # whatever came in, the link goes on
            log.exception("handling a message on %s failed", message.topic)

    # the link

    def _options(self, session: int) -> LinkOptions:
        return link_options(
            self._settings,
            self._topics,
            self._envelopes,
            session=session,
            clock_unset=self._clock.quality() == "unsync",
            in_flight=self._pace.in_flight,
            largest_in=self._largest_in,
        )

    def _connect(self, now: int) -> None:
        try:
            self._sender.session = self._outbox.next_session()
            link = Link(self._options(self._sender.session), self._news)
        except ConfigError as error:
            self._lose(Down(error.what, tls=True))
            return
        self._link, self._opened_ms, self._up_ms = link, now, 0
        link.open()

    def _rise(self, link: Link, up: Up, now: int) -> None:
        self.connects += 1
        self._up_ms = now
        self._sender.begin(link, up, now)
        with suppress(StateError):  # down again already: that news is on its way
            link.subscribe(self._filters)

    def _subscribed(self, answer: Subscribed) -> None:
        refused = [each for each, code in zip(self._filters, answer.codes, strict=False) if code >= 0x80]
        self._online = True
        self._sender.go_live()
        self._tell(LinkChange(True, "connected"))
        if refused:
            self._tell(LinkChange(True, f"the broker refuses to subscribe {', '.join(refused)}", "subscription"))
        warning = expiry_warning(self._settings, self._clock)
        if warning is not None:
            self._tell(LinkChange(True, warning, "certificate"))
        self._tell_losses()

    def _supervise(self, link: Link, now: int) -> None:
        """Is the link alive, its thread not stuck, and does the broker answer?"""
        keepalive_s = self._settings.keepalive_s
        oldest = self._sender.oldest_ms() if self._online else (self._up_ms or None)
        if not link.alive and self._news.empty():
            self._lose(Down("the network thread ended without a word"))
        elif self._up_ms and link.silent_s > max(5.0, keepalive_s):
            self._lose(Down(f"the network thread has hung for {link.silent_s:.0f} s"))
        elif oldest is not None and now - oldest > 1000 * keepalive_s:
            self._lose(Down(f"the broker has not answered for {(now - oldest) / 1000:.0f} s"))
        elif not self._up_ms and now - self._opened_ms > 1000 * max(CONNECTING_S, keepalive_s):
            self._lose(Down(f"no connection within {(now - self._opened_ms) / 1000:.0f} s"))

    def _lose(self, down: Down, alert: str | None = None) -> None:
        """The link is over, or never was: put back what was on its way, and decide when to try again."""
        now = self._clock.mono_ms()
        link, self._link, self._online = self._link, None, False
        self._sender.end(closed_by_peer=down.closed_by_peer)
        self._commit_soon(sync=False)
        alert = alert or alert_of(down)
        if alert is None and not self._up_ms and expired(self._settings, self._clock):
            alert = "certificate"  # a broker that refuses it hangs up without a word
        self._ended = alert == "taken-over"
        if link is not None and not link.close(graceful=self._ended):
            self._given_up += 1
            log.warning("a network thread hangs and was given up (%d so far): %s", self._given_up, down.reason)
        lasted = now - self._up_ms if self._up_ms else 0
        if lasted >= 1000 * self._pace.stable_s:
            self._rival.forget()
        self._up_ms = 0
        wait = self._backoff.wait_ms(lasted_ms=lasted, hopeless=alert in ("auth", "protocol", "tls"))
        self._retry_ms = now + int(wait)
        reason = f"our certificate has expired; {down.reason}" if alert == "certificate" else down.reason
        self._tell(LinkChange(False, reason, alert, stopped=self._ended))

    def _tell(self, change: LinkChange) -> None:
        """The same news is told once."""
        if change == self._told:
            return
        self._told = change
        (log.warning if change.alert else log.info)("link: %s", change.reason)
        try:
            self._on_link(change)
        except Exception:  # the agent's trouble is not the link's
            log.exception("telling about the link failed")

    def _farewell(self) -> None:
        """Send what waits while there is time, then say `offline`, so that the will is not needed."""
        assert self._stop_ms is not None
        start = self._clock.mono_ms()
        self._until(lambda: self.waiting == 0 and self._sender.idle, start + (self._stop_ms - start) * 2 // 3)
        if self._online:
            self._sender.keep(self._topics.state, {**self._sender.value(self._topics.state), "s": "offline"})
            self._sender.hurry(self._topics.state)
            self._until(lambda: self._sender.idle, self._stop_ms)
        self._sender.end(closed_by_peer=False)
        link, self._link, self._online = self._link, None, False
        if link is not None:
            link.close(graceful=True)
        self._outbox.close()

    def _until(self, done: Callable[[], bool], end_ms: int) -> None:
        while self._clock.mono_ms() < end_ms:
            self._guarded_turn()
            if not self._online or (self._news.empty() and done()):
                return
