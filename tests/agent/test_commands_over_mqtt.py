"""Commands over real brokers: answered where the sender listens, in both versions of the protocol, and quickly."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from brokers import TOPICS, Device, Observer, wait_until
from command_bench import RecordingControl
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from device_agents.answers import Reply
from device_agents.commands import Commands
from device_agents.envelope import SystemClock
from device_agents.ledger import Ledger
from device_agents.request import Limits

REPLIES = "ea/v1/lab/_ctrl/desk/reply"


@pytest.fixture
def served(tmp_path: Path, device: Callable[..., Device]) -> Iterator[Callable[..., SimpleNamespace]]:
    """A factory: a device on a broker whose commands are carried out by a control that writes down."""
    made: list[SimpleNamespace] = []

    def make(broker: Any, **facts: Any) -> SimpleNamespace:
        control, clock, limits = RecordingControl(), SystemClock(), Limits(rate=1e6, burst=1e6)
        ledger = Ledger(tmp_path / "commands.db", clock=clock)

        def reply(told: Reply) -> None:
            one.courier.ack(told.topic, told.data, told.correlation)

        commands = Commands(control, ledger, TOPICS, reply, clock=clock, limits=limits)
        one = device(broker, on_message=commands.receive, **facts)
        commands.start()
        one.start()
        made.append(SimpleNamespace(device=one, control=control, commands=commands, ledger=ledger))
        return made[-1]

    yield make
    for one in made:
        one.commands.stop(5)
        one.ledger.close()


def request(key: str) -> Properties:
    """Properties of a request, MQTT 5."""
    properties = Properties(PacketTypes.PUBLISH)
    properties.ResponseTopic, properties.CorrelationData, properties.MessageExpiryInterval = REPLIES, key.encode(), 30
    properties.UserProperty = [("idem", key), ("by", "desk"), ("reason", "a test")]
    return properties


def answers(observer: Observer, topic: str) -> list[dict[str, Any]]:
    return [one["d"] for one in observer.of(topic)]


def test_request_and_response_of_mqtt_5(broker, served, observer):
    one, desk = served(broker), observer(broker)
    desk.publish(TOPICS.cmd("reset"), b'{"v":1,"d":{}}', properties=request("k1"))
    wait_until(lambda: len(answers(desk, REPLIES)) == 2)
    assert [told["status"] for told in answers(desk, REPLIES)] == ["accepted", "done"]
    assert one.control.asked == [("reset", {}, "desk")]
    came = [message for message in desk.seen if message.topic == REPLIES]
    assert [message.properties.CorrelationData for message in came] == [b"k1", b"k1"]


def test_a_body_is_enough_for_the_older_protocol(broker, served, observer):
    older = SimpleNamespace(host=broker.host, port=broker.port_311)
    one, desk = served(older, mqtt={"protocol": "3.1.1"}), observer(broker)
    body = {"v": 1, "id": "k1", "by": "desk", "expires_ms": int(time.time() * 1000) + 60_000, "d": {"on": True}}
    desk.publish(TOPICS.cmd("freeze"), json.dumps(body))
    wait_until(lambda: len(answers(desk, TOPICS.ack("k1"))) == 2)
    assert one.control.asked == [("freeze", {"on": True}, "desk")]


def test_a_retained_command_and_a_command_sent_twice(mosquitto, served, observer):
    broker = mosquitto()  # where no earlier session of the device waits
    desk = observer(broker)
    desk.publish(TOPICS.cmd("reset"), b'{"v":1}', retain=True, properties=request("k0"))
    one = served(broker)
    for _ in range(3):
        desk.publish(TOPICS.cmd("rollback"), b'{"v":1}', properties=request("k1"))
    wait_until(lambda: len(answers(desk, REPLIES)) == 4)
    assert one.control.verbs == ["rollback"]
    assert one.commands.counts["retained"] == 1


def test_the_round_trip_is_short(mosquitto, served, observer):
    """Over loopback, each command written to disk twice: on a busy machine p50 within 20 ms, p99 within 200 ms."""
    broker = mosquitto("set_tcp_nodelay true")
    served(broker)
    desk = observer(broker, filters=(REPLIES,))
    took_ms = []
    for number in range(100):
        began = time.monotonic()
        desk.publish(TOPICS.cmd("ping"), b'{"v":1}', properties=request(f"k{number}"))
        end = began + 5
        while len(desk.seen) < 2 * (number + 1) and time.monotonic() < end:
            time.sleep(0.0002)
        took_ms.append(1000 * (time.monotonic() - began))
    p50, p99 = np.percentile(took_ms, (50, 99))
    print(f"command round trip: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    assert [told["status"] for told in answers(desk, REPLIES)] == ["accepted", "done"] * 100
    assert p50 < 20 and p99 < 200
