"""One connection to a broker, and the only file that knows paho. The courier makes a new `Link` for every attempt.

paho's callbacks only put a value into a queue, so none can raise, block, or be blocked. The network loop runs in our
own thread: an error there ends the link with a reason instead of leaving a client that claims to be connected.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_adapt.errors import StateError

AUTH_CODES = frozenset({0x86, 0x87, 0x8A, 0x8C})
PROTOCOL_CODE, TAKEN_OVER, UNKNOWN = 0x84, 0x8E, 0x80
CONNECT_TIMEOUT_S, LOOP_S = 5.0, 1.0
SELECT_LIMIT = 1024
HEADROOM = 512  # topic and properties of a packet, beside its payload
INBOX = 1000
JSON_TYPE = "application/json"


@dataclass(frozen=True)
class Message:
    """What goes out."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    expiry_s: int | None = None
    correlation: bytes | None = None
    properties: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Incoming:
    """What came in. `retain`: the broker kept it from earlier; a command must not be obeyed then."""

    topic: str
    payload: bytes
    retain: bool = False
    expiry_s: int | None = None
    """Seconds it is still good for; None: its sender set no limit, or the protocol is 3.1.1."""
    response_topic: str | None = None
    correlation: bytes | None = None
    properties: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Up:
    """The broker let us in."""

    largest_packet: int | None
    in_flight: int
    session_present: bool
    keepalive_s: int | None


@dataclass(frozen=True)
class Subscribed:
    codes: tuple[int, ...]
    """One for each filter; 0x80 and above is a refusal."""


@dataclass(frozen=True)
class Acked:
    mid: int
    code: int


@dataclass(frozen=True)
class Down:
    """The link is over; it comes once, and last."""

    reason: str
    code: int | None = None
    """Reason code of the broker, if it gave one."""
    closed_by_peer: bool = False
    tls: bool = False


News = Up | Subscribed | Acked | Down | Incoming


@dataclass(frozen=True)
class LinkOptions:
    """What a link needs to know."""

    client_id: str
    host: str
    port: int
    protocol: str = "5"
    username: str | None = None
    password: str | None = None
    tls: ssl.SSLContext | None = None
    keepalive_s: int = 20
    session_expiry_s: int = 3600
    in_flight: int = 16
    largest_in: int = 16_384
    """Largest payload that is taken, bytes."""
    will: Message | None = None
    will_delay_s: int = 5


class Link:
    """One attempt at one connection. `news` gets (this link, what happened), from another thread.

    `publish` refuses unless the link is up, so paho never queues anything that would be lost with the process.
    """

    def __init__(self, options: LinkOptions, news: queue.SimpleQueue[Any]) -> None:
        self.dropped = 0
        """Incoming messages refused because the queue was full, or for their size."""
        self._options, self._news = options, news
        self._v5 = options.protocol == "5"
        self._up = self._closing = False
        self._lost: Down | None = None
        self._beat = time.monotonic()
        self._client: paho.Client | None = self._build()
        self._thread = threading.Thread(target=self._run, name="mqtt-network", daemon=True)

    def open(self) -> None:
        """Start connecting, in the link's own thread; `Up` or `Down` tells how it went."""
        self._thread.start()

    @property
    def up(self) -> bool:
        return self._up and self._thread.is_alive()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def silent_s(self) -> float:
        """Seconds since the network thread last went round; it does so every second unless it is stuck."""
        return time.monotonic() - self._beat

    def subscribe(self, filters: Sequence[str]) -> None:
        """Ask for all filters at QoS 1; `Subscribed` answers."""
        client = self._ready()
        if self._v5:
            client.subscribe([(each, SubscribeOptions(qos=1)) for each in filters])
        else:
            client.subscribe([(each, 1) for each in filters])

    def publish(self, message: Message) -> int:
        """Send now; `Acked` follows for QoS 1. Returns its packet id. Raises: StateError if the link is not up."""
        client = self._ready()
        info = client.publish(
            message.topic, message.payload, message.qos, message.retain, self._properties(message, PacketTypes.PUBLISH)
        )
        if info.rc != paho.MQTT_ERR_SUCCESS:
            raise StateError(f"paho refused: {paho.error_string(info.rc)}", remedy="send again when the link is up")
        return info.mid

    def close(self, timeout_s: float = 1.0, *, graceful: bool = False) -> bool:
        """End the link. `graceful` sends DISCONNECT, so that the will is not sent. False: its thread hangs."""
        client, self._closing, self._up = self._client, True, False
        if not self._thread.is_alive():
            return True
        if client is not None and graceful:
            client.disconnect()
            self._thread.join(timeout_s)
        if client is not None:
            with suppress(OSError, AttributeError):  # AttributeError: the socket went meanwhile
                client.socket().shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # inside

    def _ready(self) -> paho.Client:
        client = self._client
        if client is None or not self.up:
            raise StateError("the link is down", remedy="keep the message until it is up")
        return client

    def _build(self) -> paho.Client:
        options = self._options
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=options.client_id,
            clean_session=None if self._v5 else options.session_expiry_s == 0,
            protocol=MQTTProtocolVersion.MQTTv5 if self._v5 else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        client.max_inflight_messages_set(options.in_flight)
        client.max_queued_messages_set(options.in_flight)
        client.connect_timeout = CONNECT_TIMEOUT_S
        if options.username is not None:
            client.username_pw_set(options.username, options.password)
        if options.tls is not None:
            client.tls_set_context(options.tls)
        if options.will is not None:
            will = options.will
            properties = self._properties(will, PacketTypes.WILLMESSAGE)
            client.will_set(will.topic, will.payload, will.qos, will.retain, properties)
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_publish, client.on_subscribe = self._on_publish, self._on_subscribe
        client.on_message, client.on_socket_open = self._on_message, self._on_socket_open
        client.on_socket_register_write = lambda *_: None  # else paho writes from the thread that publishes
        return client

    def _run(self) -> None:
        client = self._client
        assert client is not None
        reason: Down | None = None
        try:
            self._connect(client)
            while client.loop(LOOP_S) == paho.MQTT_ERR_SUCCESS:
                self._beat = time.monotonic()
        except ssl.SSLError as error:
            reason = Down(f"TLS: {error.reason or error}{_detail(error)}", tls=True)
        except OSError as error:
            reason = Down(f"{self._options.host}:{self._options.port}: {error.strerror or error}")
        except Exception as error:  # a bug, here or in paho: the courier builds a new link
            reason = Down(f"the network thread failed: {type(error).__name__}: {error}")
        finally:
            self._up, self._client = False, None  # the last reference: paho closes its sockets with it
            self._say(reason or self._lost or Down("the connection was lost", closed_by_peer=True))

    def _connect(self, client: paho.Client) -> None:
        options = self._options
        facts: dict[str, Any] = {}
        if self._v5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = options.session_expiry_s
            properties.ReceiveMaximum = options.in_flight
            properties.MaximumPacketSize = options.largest_in + HEADROOM
            facts = {"clean_start": options.session_expiry_s == 0, "properties": properties}
        client.connect(options.host, options.port, options.keepalive_s, **facts)

    def _properties(self, message: Message, packet: int) -> Properties | None:
        if not self._v5:
            return None
        properties = Properties(packet)  # type: ignore[no-untyped-call]
        if message.payload:
            properties.ContentType = JSON_TYPE
        if message.expiry_s is not None:
            properties.MessageExpiryInterval = message.expiry_s
        if message.correlation is not None:
            properties.CorrelationData = message.correlation
        if message.properties:
            properties.UserProperty = list(message.properties)
        if packet == PacketTypes.WILLMESSAGE:
            properties.WillDelayInterval = self._options.will_delay_s
        return properties

    def _say(self, news: News) -> None:
        self._news.put((self, news))

    def _on_socket_open(self, _client: Any, _data: Any, sock: Any) -> None:
        if sock.fileno() >= SELECT_LIMIT:
            raise OSError(0, f"more than {SELECT_LIMIT} files are open, and paho's select() cannot watch this socket")
        if self._closing:
            raise OSError(0, "the link was closed while it connected")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_connect(self, _client: Any, _data: Any, flags: Any, code: ReasonCode, facts: Properties | None) -> None:
        if code.is_failure:
            self._lost = Down(f"the broker refused: {code} (0x{code.value:02X})", code.value, closed_by_peer=True)
            return
        most = min(self._options.in_flight, getattr(facts, "ReceiveMaximum", 65_535))
        self._up = not self._closing
        self._say(
            Up(
                largest_packet=getattr(facts, "MaximumPacketSize", None),
                in_flight=most,
                session_present=bool(flags.session_present),
                keepalive_s=getattr(facts, "ServerKeepAlive", None),
            )
        )

    def _on_disconnect(self, _client: Any, _data: Any, flags: Any, code: ReasonCode, _facts: Any) -> None:
        self._up = False
        if self._lost is None:
            by_broker = bool(flags.is_disconnect_packet_from_server)
            text = f"the broker ended the session: {code} (0x{code.value:02X})" if by_broker else f"lost: {code}"
            timeout = "Keep alive" in str(code)
            self._lost = Down(text, code.value if by_broker else None, closed_by_peer=by_broker or not timeout)

    def _on_subscribe(self, _client: Any, _data: Any, _mid: int, codes: list[ReasonCode], _facts: Any) -> None:
        self._say(Subscribed(tuple(code.value for code in codes)))

    def _on_publish(self, _client: Any, _data: Any, mid: int, code: ReasonCode, _facts: Any) -> None:
        self._say(Acked(mid, code.value))

    def _on_message(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        if self._news.qsize() >= INBOX or len(message.payload) > self._options.largest_in:
            self.dropped += 1
            return
        with suppress(UnicodeDecodeError):  # a topic that is no UTF-8 is none of ours
            self._say(_incoming(message))


def _incoming(message: paho.MQTTMessage) -> Incoming:
    facts = message.properties
    return Incoming(
        topic=message.topic,
        payload=bytes(message.payload),
        retain=message.retain,
        expiry_s=getattr(facts, "MessageExpiryInterval", None),
        response_topic=getattr(facts, "ResponseTopic", None),
        correlation=getattr(facts, "CorrelationData", None),
        properties=tuple((str(name), str(value)) for name, value in getattr(facts, "UserProperty", ())),
    )


def _detail(error: ssl.SSLError) -> str:
    message = getattr(error, "verify_message", "")
    return f" ({message})" if message else ""
