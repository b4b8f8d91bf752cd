"""Brokers, a faulty network and an observer, for every test that speaks MQTT."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from device_agents.broker import EmbeddedBroker, free_port
from device_agents.courier import Courier, LinkChange
from device_agents.envelope import Envelopes, SystemClock
from device_agents.mqtt import Incoming
from device_agents.outbox import Outbox
from device_agents.sender import Pace
from device_agents.settings import MqttSettings
from device_agents.topics import Topics

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
QUICK = Pace(backoff_s=(0.05, 0.3), stable_s=5.0, latest_gap_s=0.05, drain_per_s=2000)
TOPICS = Topics("ea/v1", "lab", "dev1", groups=("all",))


def wait_until(what: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """What `what` says, as soon as it is true; fails the test if it never is."""
    end = time.monotonic() + timeout_s
    while not (answer := what()):
        if time.monotonic() > end:
            pytest.fail(f"did not happen within {timeout_s} s")
        time.sleep(0.01)
    return answer


class Mosquitto:
    """A mosquitto of our own, on a free port of loopback, in its own folder."""

    def __init__(self, folder: Path, *, port: int | None = None, lines: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.host, self.port = "127.0.0.1", port or free_port()
        self.folder = folder
        self._config = folder / "mosquitto.conf"
        if not any(line.startswith("listener") for line in lines):
            lines = [f"listener {self.port} 127.0.0.1", *lines]
        if not any("allow_anonymous" in line for line in lines):
            lines = [*lines, "allow_anonymous true"]
        user = [] if os.getuid() else ["user root"]
        self._config.write_text("\n".join([*user, *lines, "log_dest file " + str(folder / "log")]) + "\n")
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> Mosquitto:
        assert MOSQUITTO is not None
        self._child = subprocess.Popen([MOSQUITTO, "-c", str(self._config)], stderr=subprocess.DEVNULL)
        end = time.monotonic() + 5
        while time.monotonic() < end and self._child.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), 0.2):
                return self
            time.sleep(0.01)
        self.kill()
        raise RuntimeError(f"mosquitto did not start: {self.log}")

    @property
    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def signal(self, number: int) -> None:
        assert self._child is not None
        self._child.send_signal(number)

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGCONT)
            self._child.send_signal(number)
            self._child.wait(5)
        self._child = None

    def restart(self, *, keep: bool = True) -> Mosquitto:
        """Kill and start again on the same port. `keep` False: without what it had saved."""
        self.kill()
        if not keep:
            (self.folder / "mosquitto.db").unlink(missing_ok=True)
        return self.start()


class Proxy:
    """A TCP proxy that can be told to misbehave. One thread, plain selectors.

    `mode`: `pass`; `hole` keeps connections open and swallows everything; `refuse` resets whoever connects.
    `delay_s` holds each chunk back; `bytes_per_s` throttles each direction.
    """

    def __init__(self, target: tuple[str, int], *, port: int = 0) -> None:
        self.mode, self.delay_s, self.bytes_per_s = "pass", 0.0, 0.0
        self.connects = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", port))
        self.host, self.port = self._listener.getsockname()[:2]
        self._stop = threading.Event()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._late: list[tuple[float, socket.socket, bytes]] = []
        self._free_at: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Reset every connection now."""
        with self._lock:
            for sock in list(self._pairs):
                self._close(sock, reset=True)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)
        self.cut()
        self._selector.close()
        self._listener.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            for key, _ in self._selector.select(0.005):
                with self._lock:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj in self._pairs:
                        self._pass(key.fileobj)
            with self._lock:
                self._send_late()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        if self.mode == "refuse":
            _reset(client)
            return
        self.connects += 1
        try:
            server = socket.create_connection(self._target, 1)
        except OSError:
            _reset(client)
            return
        for one, other in ((client, server), (server, client)):
            self._pairs[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(2048 if self.bytes_per_s else 65_536)
        except OSError:
            data = b""
        if not data:
            self._close(sock)
        elif self.mode == "pass":
            now = time.monotonic()
            at = max(now, self._free_at.get(sock, 0.0)) + self.delay_s
            if self.bytes_per_s:
                at += len(data) / self.bytes_per_s
                self._free_at[sock] = at
            self._late.append((at, self._pairs[sock], data))

    def _send_late(self) -> None:
        now, rest = time.monotonic(), []
        for at, sock, data in self._late:
            if at > now:
                rest.append((at, sock, data))
            elif sock in self._pairs:
                try:
                    sock.sendall(data)
                except OSError:
                    self._close(sock, reset=True)
        self._late = rest

    def _close(self, sock: socket.socket, *, reset: bool = False) -> None:
        for one in (sock, self._pairs.get(sock)):
            if one is not None and one in self._pairs:
                del self._pairs[one]
                self._free_at.pop(one, None)
                self._selector.unregister(one)
                _reset(one) if reset else one.close()


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Observer:
    """Another client: sees every topic, and may publish."""

    def __init__(self, port: int, *, client_id: str = "observer", filters: Sequence[str] = ("#",), **facts: Any):
        self.messages: queue.SimpleQueue[paho.MQTTMessage] = queue.SimpleQueue()
        self.seen: list[paho.MQTTMessage] = []
        self._ready, self.connected = threading.Event(), threading.Event()
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5)
        self.client.on_message = lambda _c, _u, message: self.seen.append(message)
        self.client.on_subscribe = lambda *_: self._ready.set()
        self.client.on_socket_open = lambda _c, _u, sock: sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client.on_connect = lambda *_: self.client.subscribe([(each, 1) for each in filters])
        if "tls" in facts:
            self.client.tls_set_context(facts["tls"])
        if "username" in facts:
            self.client.username_pw_set(facts["username"], facts.get("password"))
        self.client.connect(facts.get("host", "127.0.0.1"), port)
        self.client.loop_start()
        assert self._ready.wait(5)

    def of(self, topic: str, *, retain: bool | None = None) -> list[dict[str, Any]]:
        """Payloads of a topic, or of all below it where it ends in a slash."""
        fits = [m for m in list(self.seen) if m.topic == topic or (topic.endswith("/") and m.topic.startswith(topic))]
        return [json.loads(m.payload) for m in fits if m.payload and (retain is None or m.retain == retain)]

    def publish(self, topic: str, payload: bytes | str, **facts: Any) -> None:
        self.client.publish(topic, payload, qos=1, **facts).wait_for_publish(5)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()
        self.client.on_message = self.client.on_subscribe = self.client.on_connect = None


class Device:
    """A courier with all that it needs, and what it told."""

    def __init__(self, folder: Path, settings: MqttSettings, **facts: Any) -> None:
        self.topics = facts.pop("topics", TOPICS)
        self.clock = facts.pop("clock", SystemClock())
        self.received: list[Incoming] = []
        self.changes: list[LinkChange] = []
        self.envelopes = Envelopes(facts.pop("boot", "b0000001"), self.clock)
        self.outbox = Outbox(folder / "outbox.db", int(settings.outbox_mb * 1e6), self.clock)
        self.courier = Courier(
            settings,
            self.topics,
            self.envelopes,
            self.outbox,
            clock=self.clock,
            on_message=facts.pop("on_message", self.received.append),
            on_link=self.changes.append,
            pace=facts.pop("pace", QUICK),
            **facts,
        )

    def start(self, *, online: bool = True) -> Device:
        self.courier.latest(self.topics.birth, {"what": "a test"})
        self.courier.latest(self.topics.state, {"s": "ready"})
        self.courier.start()
        if online:
            wait_until(lambda: self.courier.online)
        return self

    def stop(self, timeout: float = 5.0) -> None:
        self.courier.stop(timeout)

    @property
    def alerts(self) -> list[str]:
        return [change.alert for change in self.changes if change.alert]


def settings_for(broker: Any, **facts: Any) -> MqttSettings:
    """Settings for a broker or a proxy; a short keepalive."""
    return MqttSettings(host="127.0.0.1", port=broker.port, **{"keepalive_s": 2, **facts})


# fixtures: import them where they are needed


@pytest.fixture(scope="session")
def iotcore_broker() -> Iterator[EmbeddedBroker]:
    pytest.importorskip("iotcore", reason="iotcore is not installed")
    with EmbeddedBroker(port_311=0) as broker:
        yield broker


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """A factory; every broker that it made is killed at the end."""
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed (Debian: apt install mosquitto)")
    made: list[Mosquitto] = []

    def make(*lines: str, name: str = "broker", port: int | None = None, start: bool = True) -> Mosquitto:
        broker = Mosquitto(tmp_path / f"{name}{len(made)}", port=port, lines=lines)
        made.append(broker)
        return broker.start() if start else broker

    yield make
    for broker in made:
        broker.kill()


@pytest.fixture
def proxy() -> Iterator[Callable[..., Proxy]]:
    """A factory of proxies in front of a broker."""
    made: list[Proxy] = []

    def make(broker: Any, **facts: Any) -> Proxy:
        made.append(Proxy((broker.host, broker.port), **facts))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Callable[..., Device]]:
    """A factory of couriers; each is stopped at the end."""
    made: list[Device] = []

    def make(broker: Any, *, mqtt: dict[str, Any] | None = None, folder: str = "device", **facts: Any) -> Device:
        made.append(Device(tmp_path / folder, settings_for(broker, **(mqtt or {})), **facts))
        return made[-1]

    yield make
    for each in made:
        each.stop(1.0)


@pytest.fixture
def observer() -> Iterator[Callable[..., Observer]]:
    made: list[Observer] = []

    def make(broker: Any, **facts: Any) -> Observer:
        made.append(Observer(broker.port, **facts))
        return made[-1]

    yield make
    for each in made:
        each.close()
