"""The courier: what it is given arrives, once and in order, whatever the link does; and its caller never waits."""

from __future__ import annotations

import threading
import time

import pytest
from brokers import QUICK, TOPICS, Device, settings_for, wait_until

from device_agents.broker import free_port
from device_agents.courier import LinkChange
from device_agents.mqtt import Link
from device_agents.sender import Pace
from edge_adapt.errors import ConfigError


class Nowhere:
    def __init__(self):
        self.host, self.port = "127.0.0.1", free_port()


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_contract_everything_arrives(broker, protocol, device, observer):
    """The same on each broker and each protocol."""
    port = type("At", (), {"port": broker.port if protocol == "5" else broker.port_311})
    watcher = observer(broker, client_id=f"watch{protocol}") if broker.kind == "mosquitto" else None
    mine = device(port, mqtt={"protocol": protocol}, folder=f"d{protocol}").start()
    mine.courier.latest(TOPICS.reported, {"ver": 1})
    mine.courier.telemetry("perf", {"fps": 15})
    mine.courier.event("drift", {"size": 2})
    mine.courier.ack(TOPICS.ack("a1"), {"code": "done"})
    wait_until(lambda: mine.courier.waiting == 0 and mine.courier._sender.idle)
    if watcher is not None:
        expected = (TOPICS.birth, TOPICS.state, TOPICS.reported, TOPICS.tele("perf"), TOPICS.event("drift"))
        wait_until(lambda: all(watcher.of(topic) for topic in (*expected, TOPICS.ack("a1"))))
        seqs = [m["seq"] for topic in ("event/", "tele/", "ack/") for m in watcher.of(f"{TOPICS.root}/{topic}")]
        assert sorted(seqs) == [1, 2, 3]
    mine.stop()
    assert mine.changes[0] == LinkChange(True, "connected") and not mine.alerts


def test_a_command_comes_in_with_all_that_belongs_to_it(mosquitto, device, observer):
    broker = mosquitto()
    mine = device(broker).start()
    other = observer(broker)
    other.publish(TOPICS.cmd("ping"), b'{"v":1}')
    other.publish(TOPICS.cmd("stay"), b'{"v":1}', retain=True)
    wait_until(lambda: len(mine.received) == 2)
    assert [m.retain for m in mine.received] == [False, False]
    mine.stop()
    again = device(broker, folder="again").start()
    wait_until(lambda: again.received)
    assert again.received[0].topic == TOPICS.cmd("stay") and again.received[0].retain, "kept by the broker: flagged"


def test_birth_state_and_will_carry_one_session_number_that_rises(mosquitto, device, observer, proxy):
    broker = mosquitto()
    cut = proxy(broker)
    watcher = observer(broker)
    mine = device(cut).start()
    wait_until(lambda: watcher.of(TOPICS.state))
    cut.mode = "refuse"
    cut.cut()
    lost = wait_until(lambda: [m for m in watcher.of(TOPICS.state) if m["d"]["s"] == "lost"], 8)
    first = watcher.of(TOPICS.birth)[0]["d"]
    assert lost[0]["d"] == {"s": "lost", "boot": first["boot"], "bd": first["bd"]}
    cut.mode = "pass"
    wait_until(lambda: mine.courier.online)
    births = wait_until(lambda: watcher.of(TOPICS.birth)[1:])
    assert births[0]["d"]["bd"] > first["bd"]
    mine.stop()
    again = device(broker).start()
    wait_until(lambda: len(watcher.of(TOPICS.birth)) == 3)
    assert watcher.of(TOPICS.birth)[2]["d"]["bd"] > births[0]["d"]["bd"], "also over a restart"
    again.stop()


def test_a_short_blip_sends_no_will(mosquitto, device, observer, proxy):
    broker = mosquitto()
    cut = proxy(broker)
    watcher = observer(broker)
    mine = device(cut).start()
    wait_until(lambda: watcher.of(TOPICS.state))
    cut.cut()
    wait_until(lambda: mine.courier.connects == 2 and mine.courier.online)
    wait_until(lambda: len(watcher.of(TOPICS.state)) >= 2)
    time.sleep(0.3)
    assert {m["d"]["s"] for m in watcher.of(TOPICS.state)} == {"ready"}


def test_a_graceful_stop_says_offline_and_no_will_follows(mosquitto, device, observer):
    broker = mosquitto()
    watcher = observer(broker)
    mine = device(broker).start()
    mine.courier.event("decision", {"n": 1})
    mine.stop()
    wait_until(lambda: watcher.of(TOPICS.state)[-1]["d"]["s"] == "offline")
    assert len(watcher.of(TOPICS.event("decision"))) == 1, "what waited was sent first"
    late = observer(broker, client_id="late")
    wait_until(lambda: late.of(TOPICS.state))
    assert late.of(TOPICS.state)[0]["d"]["s"] == "offline"


def test_trap_nothing_is_lost_offline_and_a_restart_sends_it(mosquitto, device, observer):
    """paho loses QoS 0 while offline, and everything with the process."""
    away = Nowhere()
    mine = device(away).start(online=False)
    for n in range(20):
        mine.courier.telemetry("perf", {"n": n})
        mine.courier.event("drift", {"n": n})
    wait_until(lambda: mine.courier.waiting == 40)
    mine.stop(0.2)
    broker = mosquitto(port=away.port)
    watcher = observer(broker)
    again = device(broker, boot="b0000002").start()
    wait_until(lambda: again.courier.waiting == 0)
    wait_until(lambda: len(watcher.of(f"{TOPICS.root}/event/")) == 20)
    for topic in ("event/drift", "tele/perf"):
        told = watcher.of(f"{TOPICS.root}/{topic}")
        assert [m["d"]["n"] for m in told] == list(range(20)) and all(m["hist"] for m in told)
        assert {m["boot"] for m in told} == {"b0000001"}


def test_trap_telemetry_on_a_dying_link_is_sent_again(mosquitto, device, observer, proxy):
    """QoS 0 into a connection that is already dead: paho says it is sent."""
    broker = mosquitto()
    hole = proxy(broker)
    watcher = observer(broker)
    mine = device(hole).start()
    mine.courier.telemetry("perf", {"n": 0})
    wait_until(lambda: watcher.of(TOPICS.tele("perf")))
    hole.mode = "hole"
    for n in range(1, 6):
        mine.courier.telemetry("perf", {"n": n})
    time.sleep(0.1)
    hole.cut()
    hole.mode = "pass"
    wait_until(lambda: {m["d"]["n"] for m in watcher.of(TOPICS.tele("perf"))} == set(range(6)))


def test_telemetry_from_before_the_subscription_is_told_late(mosquitto, device, observer, monkeypatch):
    """It is overtaken by what is measured after, which must not pass for older."""
    broker, real, go = mosquitto(), Link._on_subscribe, threading.Event()
    monkeypatch.setattr(Link, "_on_subscribe", lambda *facts: go.wait(10) and real(*facts))
    watcher = observer(broker)
    mine = device(broker).start(online=False)
    wait_until(lambda: mine.courier.connects == 1)
    for n in range(60):
        mine.courier.telemetry("perf", {"n": n})
    wait_until(lambda: mine.courier.waiting == 60)
    go.set()
    wait_until(lambda: mine.courier.online)
    for n in range(60, 65):
        mine.courier.telemetry("perf", {"n": n})
    wait_until(lambda: len(watcher.of(TOPICS.tele("perf"))) == 65)
    told = watcher.of(TOPICS.tele("perf"))
    assert [m["d"]["n"] for m in told if m["hist"]] == list(range(60))
    assert [m["d"]["n"] for m in told if not m["hist"]] == list(range(60, 65))


def test_trap_a_lost_puback_forces_a_new_connection(mosquitto, device, observer, proxy):
    """paho sends QoS 1 again only after a reconnect, which by itself it would not make."""
    broker = mosquitto()
    hole = proxy(broker)
    watcher = observer(broker)
    mine = device(hole).start()
    hole.mode = "hole"
    mine.courier.event("drift", {})
    change = wait_until(lambda: [c for c in mine.changes if not c.online])
    assert "not answered" in change[0].reason
    hole.mode = "pass"
    wait_until(lambda: watcher.of(TOPICS.event("drift")))
    assert watcher.of(TOPICS.event("drift"))[0]["hist"]


def test_trap_a_dead_network_thread_is_noticed_and_the_link_rebuilt(mosquitto, device, observer):
    broker = mosquitto()
    mine = device(broker).start()
    mine.courier._link._client.on_message = lambda *_: 1 / 0
    observer(broker).publish(TOPICS.cmd("ping"), b"{}")
    wait_until(lambda: mine.courier.connects == 2 and mine.courier.online)
    assert any("ZeroDivisionError" in change.reason for change in mine.changes)
    wait_until(lambda: mine.received)


def test_trap_a_stuck_network_thread_is_given_up(mosquitto, device, observer):
    broker = mosquitto()
    free = threading.Event()
    mine = device(broker).start()
    mine.courier._link._client.on_message = lambda *_: free.wait(20)
    observer(broker).publish(TOPICS.cmd("ping"), b"{}")
    wait_until(lambda: mine.courier.connects == 2, 15)
    free.set()
    assert any("hung" in change.reason or "answered" in change.reason for change in mine.changes)


def test_trap_a_handler_that_fails_or_dawdles_breaks_nothing(mosquitto, device, observer):
    broker = mosquitto()
    seen = []

    def handle(message):
        seen.append(message)
        time.sleep(0.2)
        raise RuntimeError("a bug of the agent")

    mine = device(broker, on_message=handle).start()
    sender = observer(broker)
    for n in range(3):
        sender.publish(TOPICS.cmd("ping"), str(n))
    wait_until(lambda: len(seen) == 3)
    mine.courier.event("drift", {})
    wait_until(lambda: sender.of(TOPICS.event("drift")))
    assert [m.payload for m in seen] == [b"0", b"1", b"2"] and mine.courier.connects == 1


def test_trap_backoff_is_ours_and_jittered(device):
    """paho doubles from 1 to 120 s, all devices at once."""
    waits = []

    def uniform(low, high):
        waits.append((low, high))
        return high / 10

    mine = device(Nowhere(), pace=Pace(backoff_s=(0.1, 0.8), uniform=uniform)).start(online=False)
    wait_until(lambda: len(waits) >= 5)
    assert waits[:5] == [(0, 0.1), (0, 0.2), (0, 0.4), (0, 0.8), (0, 0.8)]
    assert len(mine.changes) == 1, "one trouble is told once"


def test_a_refused_login_waits_longest_and_asks_for_a_person(mosquitto, device):
    waits = []
    pace = Pace(backoff_s=(0.1, 8.0), uniform=lambda low, high: waits.append((low, high)) or high)
    mine = device(mosquitto("allow_anonymous false"), pace=pace).start(online=False)
    wait_until(lambda: mine.alerts == ["auth"])
    assert waits == [(4.0, 8.0)] and not mine.changes[0].stopped


# retained values


def test_retained_values_come_again_at_each_connect_and_only_the_latest(mosquitto, device, observer):
    broker = mosquitto()
    mine = device(broker).start()
    mine.courier.latest(TOPICS.reported, {"ver": 1})
    mine.courier.latest(TOPICS.alert("disk"), {"text": "full"})
    wait_until(lambda: mine.courier._sender.idle)
    broker.kill()
    wait_until(lambda: not mine.courier.online)
    mine.courier.latest(TOPICS.reported, {"ver": 2})
    mine.courier.latest(TOPICS.reported, {"ver": 3})
    mine.courier.latest(TOPICS.alert("disk"), None)
    broker.start()
    wait_until(lambda: mine.courier.online and mine.courier._sender.idle)
    late = observer(broker)
    wait_until(lambda: late.of(TOPICS.reported))
    assert [m["d"]["ver"] for m in late.of(TOPICS.reported, retain=True)] == [3]
    assert late.of(TOPICS.birth) and late.of(TOPICS.state) and not late.of(TOPICS.alert("disk"))


def test_retained_values_keep_a_distance(mosquitto, device, observer):
    broker = mosquitto()
    watcher = observer(broker)
    mine = device(broker, pace=Pace(backoff_s=(0.05, 0.3), latest_gap_s=0.5)).start()
    wait_until(lambda: watcher.of(TOPICS.state))
    start = time.monotonic()
    n = 0
    while time.monotonic() - start < 1.3:
        mine.courier.latest(TOPICS.state, {"s": "degraded", "n": (n := n + 1)})
        time.sleep(0.01)
    wait_until(lambda: watcher.of(TOPICS.state)[-1]["d"].get("n") == n)
    assert len(watcher.of(TOPICS.state)) <= 5


def test_an_alert_from_before_a_crash_is_cleared_unless_raised_again(mosquitto, device, observer):
    broker = mosquitto()
    mine = device(broker).start()
    for name in ("old", "still"):
        mine.courier.latest(TOPICS.alert(name), {"text": name})
    wait_until(lambda: mine.courier._sender.idle)
    mine.stop()
    again = device(broker)
    again.courier.latest(TOPICS.alert("still"), {"text": "still"})
    again.start()
    wait_until(lambda: again.courier._sender.idle)
    late = observer(broker)
    wait_until(lambda: late.of(TOPICS.alert("still")))
    assert not late.of(TOPICS.alert("old"))


def test_a_plain_value_has_no_envelope(mosquitto, device, observer):
    broker = mosquitto()
    mine = device(broker).start()
    mine.courier.latest("homeassistant/device/x/config", {"name": "x"}, plain=True)
    late = observer(broker)
    wait_until(lambda: late.of("homeassistant/device/x/config") == [{"name": "x"}])


# rates and sizes


def test_a_flood_of_events_is_held_back_and_counted_once(mosquitto, device, observer):
    broker = mosquitto()
    watcher = observer(broker)
    mine = device(broker).start()
    taken = sum(mine.courier.event("guard", {"n": n}) for n in range(120))
    assert taken == 50
    told = wait_until(lambda: watcher.of(TOPICS.event("suppressed")))
    assert [m["d"] for m in told] == [{"suppressed": 70, "kinds": {"guard": 70}}]
    assert len(watcher.of(TOPICS.event("guard"))) == 50
    seqs = [m["seq"] for m in watcher.of(f"{TOPICS.root}/event/")]
    assert sorted(seqs) == list(range(1, 52))


def test_a_message_beyond_our_own_cap_is_put_aside_and_told(mosquitto, device):
    mine = device(mosquitto()).start()
    mine.courier.event("decision", {"x": "y" * 20_000})
    mine.courier.telemetry("perf", {"x": "y" * 20_000})
    mine.courier.latest(TOPICS.reported, {"x": "y" * 20_000})
    wait_until(lambda: mine.alerts.count("message") == 3)
    assert mine.outbox.quarantined == 2 and mine.courier.waiting == 0 and mine.courier.connects == 1


def test_a_refused_topic_is_put_aside_without_a_loop(mosquitto, device, tmp_path):
    acl = tmp_path / "acl"
    acl.write_text("topic read #\ntopic write ea/v1/lab/dev1/state\ntopic write ea/v1/lab/dev1/birth\n")
    mine = device(mosquitto(f"acl_file {acl}")).start()
    mine.courier.event("drift", {})
    wait_until(lambda: mine.outbox.quarantined == 1)
    wait_until(lambda: any("0x87" in change.reason for change in mine.changes))
    assert mine.courier.connects == 1


# start and stop


def test_a_missing_password_file_is_told_before_anything_starts(device, tmp_path):
    mine = device(Nowhere(), mqtt={"username": "x", "password_file": tmp_path / "none"})
    with pytest.raises(ConfigError, match="password_file"):
        mine.courier.start()


def test_stopping_twice_or_unstarted_is_fine(tmp_path):
    mine = Device(tmp_path / "a", settings_for(Nowhere()))
    mine.stop()
    mine.stop()
    other = Device(tmp_path / "b", settings_for(Nowhere())).start(online=False)
    other.stop(0.2)
    other.stop(0.2)
    assert not [thread for thread in threading.enumerate() if thread.name in ("courier", "mqtt-network")]


def test_stop_keeps_its_time_with_a_broker_that_hangs(mosquitto, device):
    broker = mosquitto()
    mine = device(broker).start()
    broker.pause()
    mine.courier.event("drift", {})
    start = time.monotonic()
    mine.stop(1.0)
    assert time.monotonic() - start < 3.5
    broker.resume()
    again = device(broker, boot="b0000002")
    assert again.courier.waiting == 1, "it is on disk"


def test_a_subscription_that_is_refused_is_told(mosquitto, device, monkeypatch):
    real = Link._on_subscribe
    refused = type("Code", (), {"value": 0x87})
    monkeypatch.setattr(Link, "_on_subscribe", lambda s, c, u, m, codes, p: real(s, c, u, m, [refused, *codes[1:]], p))
    mine = device(mosquitto()).start()
    wait_until(lambda: "subscription" in mine.alerts)
    assert TOPICS.desired in mine.changes[-1].reason and mine.courier.online


def test_quick_pace_is_only_for_tests():
    assert Pace().backoff_s == (1.0, 60.0) and Pace().stable_s == 60 and Pace().latest_gap_s >= 1
    assert Pace() != QUICK
