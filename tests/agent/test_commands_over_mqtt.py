"""Commands over real brokers: answered where the sender listens, in both versions of the protocol, and quickly."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
