"""One link to a broker: each trap of paho that we know has its test here, named after the trap."""

from __future__ import annotations

import os
import queue
import re
import socket
import threading
import time
from pathlib import Path

import pytest
from brokers import wait_until

import device_agents
from device_agents.broker import free_port
from device_agents.mqtt import Acked, Down, Incoming, Link, LinkOptions, Message, Subscribed, Up
from edge_adapt.errors import StateError


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class Opened:
    """A link and what it told."""

    def __init__(self, broker, protocol="5", **facts):
        port = broker.port if protocol == "5" else getattr(broker, "port_311", broker.port)
        self.news = queue.SimpleQueue()
        options = LinkOptions(**{"client_id": "ea-t", "host": "127.0.0.1", "port": port, "protocol": protocol, **facts})
        self.link = Link(options, self.news)
        self.link.open()

    def next(self, kind, timeout=5.0):
        while True:
            link, item = self.news.get(timeout=timeout)
            assert link is self.link
            if isinstance(item, kind):
                return item


@pytest.fixture
def opened():
    made = []

    def make(*args, **facts):
        made.append(Opened(*args, **facts))
        return made[-1]

    yield make
    for each in made:
        each.link.close()
        assert not each.link.alive


@pytest.fixture(params=["5", "3.1.1"])
def protocol(request):
    return request.param


def test_contract_publish_subscribe_and_retain(broker, protocol, opened):
    """The same on each broker and each protocol."""
    mine = opened(broker, protocol)
    mine.next(Up)
    mine.link.subscribe([f"own/{protocol}/#"])
    assert mine.next(Subscribed).codes == (1,)
    assert mine.link.publish(Message(f"own/{protocol}/kept", b"1", retain=True)) > 0
    assert mine.next(Acked).code < 0x80
    other = opened(broker, protocol, client_id="ea-other")
    other.next(Up)
    other.link.subscribe([f"own/{protocol}/#"])
    # The broker is shared: what another test cleared may still come in.
    got = next(seen for seen in iter(lambda: other.next(Incoming), None) if seen.topic == f"own/{protocol}/kept")
    assert (got.topic, got.payload, got.retain) == (f"own/{protocol}/kept", b"1", True)
    mine.link.publish(Message(f"own/{protocol}/kept", b"", retain=True))
    assert other.next(Incoming).payload == b""


def test_contract_properties_travel(broker, opened):
    mine, other = opened(broker), opened(broker, client_id="ea-other")
    for each in (mine, other):
        each.next(Up)
    other.link.subscribe(["p/#"])
    other.next(Subscribed)
    mine.link.publish(Message("p/x", b"{}", expiry_s=100, correlation=b"\x00c", properties=(("idem", "7"),)))
    got = other.next(Incoming)
    assert got.correlation == b"\x00c" and got.properties == (("idem", "7"),) and not got.retain
    assert got.expiry_s is not None and 90 <= got.expiry_s <= 100


def test_contract_the_will_is_sent_when_the_socket_is_cut(broker, protocol, opened, proxy):
    port = broker.port if protocol == "5" else broker.port_311
    cut = proxy(type("Where", (), {"host": "127.0.0.1", "port": port}))
    will = Message(f"will/{protocol}", b"lost", retain=False)
    mine = opened(cut, protocol, will=will, will_delay_s=0)
    mine.next(Up)
    other = opened(broker, protocol, client_id="ea-other")
    other.next(Up)
    other.link.subscribe([f"will/{protocol}"])
    other.next(Subscribed)
    cut.cut()
    assert mine.next(Down).closed_by_peer
    assert other.next(Incoming, timeout=10).payload == b"lost"


def test_a_graceful_close_sends_no_will(broker, opened):
    mine = opened(broker, will=Message("will/none", b"lost"), will_delay_s=0)
    mine.next(Up)
    other = opened(broker, client_id="ea-other")
    other.next(Up)
    other.link.subscribe(["will/none"])
    other.next(Subscribed)
    assert mine.link.close(graceful=True)
    with pytest.raises(queue.Empty):
        other.next(Incoming, timeout=0.5)


# the traps


def test_trap_publish_while_offline_is_refused_and_never_queued_in_paho(opened):
    """rc=4 would mean `queued` for QoS 1 and `lost` for QoS 0; we never get that far."""
    mine = opened(type("Closed", (), {"port": free_port()}))
    for qos in (0, 1):
        with pytest.raises(StateError, match="down"):
            mine.link.publish(Message("t", b"x", qos=qos))
    assert "refused" in mine.next(Down).reason


def test_trap_the_queue_of_paho_is_bounded_before_connecting(mosquitto, opened, proxy):
    hole = proxy(mosquitto())
    mine = opened(hole, in_flight=4)
    mine.next(Up)
    assert mine.link._client.max_queued_messages == mine.link._client.max_inflight_messages == 4
    hole.mode = "hole"
    for _ in range(4):
        mine.link.publish(Message("t", b"x"))
    with pytest.raises(StateError, match="paho refused"):
        mine.link.publish(Message("t", b"x"))


def test_trap_an_exception_in_a_callback_ends_the_link_and_says_so(mosquitto, opened, observer, monkeypatch):
    """With paho's own thread, the thread dies and `is_connected()` stays True."""
    monkeypatch.setattr(Link, "_on_message", lambda *_: 1 / 0)
    broker = mosquitto()
    mine = opened(broker)
    mine.next(Up)
    mine.link.subscribe(["t"])
    mine.next(Subscribed)
    observer(broker).publish("t", b"x")
    assert "ZeroDivisionError" in mine.next(Down).reason
    wait_until(lambda: not mine.link.alive)
    assert not mine.link.up


def test_trap_waiting_for_a_publish_is_forbidden_and_paho_is_known_in_one_file():
    """`wait_for_publish` in a callback deadlocks; nobody but mqtt.py may touch paho at all."""
    for file in Path(device_agents.__file__).parent.rglob("*.py"):
        text = file.read_text()
        assert "wait_for_publish" not in text, file
        assert file.name == "mqtt.py" or not re.search(r"^\s*(import|from) paho", text, re.MULTILINE), file


def test_trap_puback_does_not_wait_for_whoever_handles_the_message(mosquitto, opened, observer):
    """paho acknowledges after the callback: ours only enqueues, so a slow consumer is no redelivery loop."""
    broker = mosquitto()
    mine = opened(broker, in_flight=2)
    mine.next(Up)
    mine.link.subscribe(["t"])
    mine.next(Subscribed)
    sender = observer(broker)
    for n in range(10):  # more than the receive maximum: without PUBACK the broker stops after two
        sender.publish("t", str(n))
    wait_until(lambda: mine.news.qsize() >= 10)
    assert mine.link.close()
    again = opened(broker, in_flight=2)
    assert again.next(Up).session_present
    with pytest.raises(queue.Empty):
        again.next(Incoming, timeout=0.3)


def test_trap_the_packet_size_of_the_broker_is_told(mosquitto, opened):
    """paho ignores it and is thrown out for ever; the sender checks against it."""
    mine = opened(mosquitto("max_packet_size 20000"))
    assert mine.next(Up).largest_packet == 20_000


def test_trap_two_clients_with_one_id_end_the_older_link(mosquitto, opened):
    """Without a reason from mosquitto 2.0.11; what the courier makes of it is fault 14."""
    broker = mosquitto()
    first = opened(broker)
    first.next(Up)
    second = opened(broker)
    second.next(Up)
    down = first.next(Down)
    assert down.closed_by_peer and down.code in (None, 0x8E)
    time.sleep(0.3)
    assert second.link.up, "nobody kicked back"


def test_trap_the_first_connect_does_not_raise_when_the_broker_is_away(opened):
    start = time.monotonic()
    mine = opened(type("Closed", (), {"port": free_port()}))
    assert time.monotonic() - start < 2
    assert f"127.0.0.1:{mine.link._options.port}" in mine.next(Down).reason


def test_trap_select_cannot_watch_a_high_descriptor_and_the_reason_is_told(mosquitto, opened):
    broker = mosquitto()
    low = os.open("/dev/null", os.O_RDONLY)
    copies = [low]
    try:
        try:
            while copies[-1] < 1024:
                copies.append(os.dup(low))
        except OSError:
            pytest.skip("not allowed to open 1024 files")
        assert "1024 files" in opened(broker).next(Down).reason
    finally:
        for each in copies:
            os.close(each)


def test_trap_a_refused_connect_is_not_a_connection(mosquitto, opened):
    """on_connect fires on refusal too."""
    mine = opened(mosquitto("allow_anonymous false"))
    down = mine.next(Down)
    assert down.code == 0x87 and not mine.link.up


def test_trap_a_refused_connect_has_the_same_code_in_3_1_1(mosquitto, opened):
    assert opened(mosquitto("allow_anonymous false"), "3.1.1").next(Down).code == 0x87


def test_trap_the_session_survives_and_keeps_commands_of_a_short_absence(broker, protocol, opened):
    """clean start false and an expiry above zero: paho's defaults give neither."""
    first = opened(broker, protocol, client_id=f"ea-s{protocol}")
    first.next(Up)
    first.link.subscribe([f"s{protocol}"])
    first.next(Subscribed)
    first.link.close(graceful=True)
    other = opened(broker, protocol, client_id="ea-other")
    other.next(Up)
    other.link.publish(Message(f"s{protocol}", b"while you were away"))
    other.next(Acked)
    again = opened(broker, protocol, client_id=f"ea-s{protocol}")
    assert again.next(Up).session_present
    assert again.next(Incoming).payload == b"while you were away"


def test_trap_small_packets_do_not_wait_for_nagle(mosquitto, opened):
    mine = opened(mosquitto())
    mine.next(Up)
    assert mine.link._client.socket().getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# what else could hurt


def test_a_broker_that_says_nothing_is_given_up(opened):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mine = opened(type("Mute", (), {"port": mute.getsockname()[1]}), keepalive_s=2)
        assert mine.next(Down, timeout=8)


def test_garbage_instead_of_mqtt_ends_the_link(opened):
    with socket.create_server(("127.0.0.1", 0)) as server:
        mine = opened(type("Web", (), {"port": server.getsockname()[1]}))
        sock, _ = server.accept()
        with sock:
            sock.sendall(bytes(range(255, 0, -1)) * 4)
            assert mine.next(Down)


def test_a_host_that_does_not_exist_is_a_reason_not_a_crash(opened):
    assert "nowhere.invalid" in opened(type("No", (), {"port": 1883}), host="nowhere.invalid").next(Down, 20).reason


def test_closing_while_connecting_leaves_no_client_behind(mosquitto, opened, proxy):
    slow = proxy(mosquitto())
    slow.delay_s = 0.3
    mine = opened(slow)
    time.sleep(0.05)
    assert mine.link.close()
    assert isinstance(mine.next(Down), Down) and not mine.link.up


def test_too_large_and_too_many_messages_are_dropped_and_counted(mosquitto, opened, observer):
    broker = mosquitto()
    mine = opened(broker, "3.1.1", largest_in=100)
    mine.next(Up)
    mine.link.subscribe(["t"])
    mine.next(Subscribed)
    sender = observer(broker, filters=("none",))
    sender.publish("t", b"x" * 101)
    sender.publish("t", b"fine")
    assert mine.next(Incoming).payload == b"fine" and mine.link.dropped == 1
    for _ in range(1200):
        sender.client.publish("t", b"y", qos=0)
    wait_until(lambda: mine.link.dropped > 1)
    assert mine.news.qsize() <= 1001


def test_no_descriptor_and_no_thread_stays_behind(mosquitto, opened):
    broker = mosquitto()

    def once():
        mine = Opened(broker)
        mine.next(Up)
        assert mine.link.close(graceful=True)

    once()
    before = open_files(), threading.active_count()
    for _ in range(30):
        once()
    assert (open_files(), threading.active_count()) == before
