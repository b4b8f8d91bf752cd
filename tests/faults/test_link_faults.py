"""Faults of the link: rows 8 to 14, 22, 33, 34. The broker may do what it likes; nothing is lost for it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from brokers import QUICK, TOPICS, device, mosquitto, observer, proxy, wait_until

from device_agents.broker import free_port
from device_agents.envelope import Envelopes, SystemClock
from device_agents.outbox import Outbox
from device_agents.sender import Pace

__all__ = ["device", "mosquitto", "observer", "proxy"]


class Hand:
    """A clock that is moved by hand."""

    now = 0

    def wall_ms(self):
        return 1_800_000_000_000 + self.now

    def mono_ms(self):
        return self.now

    def quality(self):
        return "rtc"


class Jumping(SystemClock):
    """The time of day is wrong by so many milliseconds."""

    wrong_ms = 0

    def wall_ms(self):
        return super().wall_ms() + self.wrong_ms


class Closed:
    def __init__(self):
        self.host, self.port = "127.0.0.1", free_port()


def stream(watcher):
    """Everything numbered that arrived, the first copy of each, in order of arrival."""
    told = {}
    for kind in ("tele/", "event/", "ack/"):
        for message in watcher.of(f"{TOPICS.root}/{kind}"):
            if not message["d"].keys() >= {"waiting", "rtt_ms"}:
                told.setdefault(message["seq"], message)
    return told


def speak(mine, count, start=0, every_s=0.0):
    for n in range(start, start + count):
        mine.courier.telemetry("perf", {"n": n})
        if n % 4 == 0:
            mine.courier.event("drift", {"n": n})
        time.sleep(every_s)


@pytest.mark.fault(8)
def test_no_broker_at_the_start_costs_nothing_and_is_connected_later(mosquitto, device, observer, proxy):
    """The agent begins without a broker at once, and connects as soon as there is one."""
    away = Closed()
    start = time.monotonic()
    mine = device(away).start(online=False)
    speak(mine, 20)
    assert time.monotonic() - start < 2
    wait_until(lambda: mine.courier.waiting == 25)
    broker = mosquitto()
    watcher = observer(broker)
    proxy(broker, port=away.port)  # now somebody listens there, and the watcher is ready
    wait_until(lambda: mine.courier.online and mine.courier.waiting == 0)
    wait_until(lambda: stream(watcher).keys() == set(range(1, 26)))


@pytest.mark.fault(9)
def test_a_broker_killed_in_midstream_and_back_empty_loses_nothing(mosquitto, device, observer, proxy):
    """Reconnects with jitter, tells every retained value again, and drains its queue in order, marked `hist`."""
    broker = mosquitto()
    gate = proxy(broker)
    mine = device(gate, pace=replace(QUICK, event_burst=1000)).start()
    mine.courier.latest(TOPICS.reported, {"ver": 7})
    watchers, spoken = [], 0

    def arrived():
        return {seq for each in watchers for seq in stream(each)} == set(range(1, spoken + spoken // 4 + 1))

    for n in range(3):
        watchers.append(observer(broker, client_id=f"watcher{n}"))
        gate.mode = "pass"
        wait_until(lambda: mine.courier.online)
        speak(mine, 40, spoken, 0.002)
        spoken += 40
        wait_until(arrived)  # else the broker dies with what it had acknowledged, and that is its fault
        gate.mode = "hole"
        speak(mine, 20, spoken, 0.002)  # on its way when the broker dies
        broker.kill()
        gate.mode = "refuse"
        speak(mine, 20, spoken + 20, 0.002)
        spoken += 40
        broker.restart(keep=False)
    last = observer(broker, client_id="last")
    watchers.append(last)
    gate.mode = "pass"
    wait_until(lambda: mine.courier.online and mine.courier.waiting == 0)
    wait_until(lambda: last.of(TOPICS.reported) and last.of(TOPICS.birth) and last.of(TOPICS.state))
    wait_until(arrived)
    for topic in (TOPICS.tele("perf"), TOPICS.event("drift")):
        seqs = [message["seq"] for message in last.of(topic) if message["hist"]]
        assert seqs and seqs == sorted(seqs), "what was said meanwhile is marked, and in order"


@pytest.mark.fault(10)
def test_a_broker_that_hangs_is_noticed_within_one_and_a_half_keepalives(mosquitto, device, observer):
    """TCP stays open, nobody answers: noticed in time, everything kept, no thread stuck."""
    keepalive = 4
    broker = mosquitto()
    watcher = observer(broker)
    mine = device(broker, mqtt={"keepalive_s": keepalive}).start()
    wait_until(lambda: mine.courier._sender.idle)
    broker.pause()
    wait_until(lambda: not mine.courier.online, 1.5 * keepalive + 1.5)  # pings alone would need two keepalives
    speak(mine, 8)
    wait_until(lambda: mine.courier.waiting == 10)
    assert sum(thread.name == "mqtt-network" for thread in threading.enumerate()) <= 1
    broker.resume()
    wait_until(lambda: stream(watcher).keys() == set(range(1, 11)))
    assert mine.courier._given_up == 0


@pytest.mark.fault(11)
@pytest.mark.parametrize("ill", ["slow", "throttled", "reset", "black hole"])
def test_a_bad_network_delays_but_loses_nothing(mosquitto, device, observer, proxy, ill):
    """Slow, throttled, reset again and again, or swallowing everything: it all arrives in the end."""
    broker = mosquitto()
    net = proxy(broker)
    watcher = observer(broker)
    mine = device(net, mqtt={"keepalive_s": 2 if ill == "black hole" else 5}).start()
    if ill == "slow":
        net.delay_s = 0.2
    elif ill == "throttled":
        net.bytes_per_s = 10_000
    for n in range(5):
        speak(mine, 8, 8 * n)
        if ill == "reset":
            net.cut()
            time.sleep(0.05)
        if ill == "black hole" and n == 2:
            net.mode = "hole"
    if ill == "black hole":
        wait_until(lambda: not mine.courier.online)
        net.cut()
        net.mode = "pass"
    wait_until(lambda: stream(watcher).keys() == set(range(1, 51)), 20)
    wait_until(lambda: mine.courier.waiting == 0)
    assert mine.courier._given_up == 0 and mine.outbox.quarantined == 0
    if ill in ("slow", "throttled"):
        assert mine.courier.connects == 1, "slow is not dead"


@pytest.mark.fault(12)
def test_a_day_without_a_broker_stays_under_the_cap_and_keeps_every_event(tmp_path):
    """24 hours of virtual time, 4 groups every second: old telemetry is thinned, events are kept, bytes <= cap."""
    clock, cap = Hand(), 6_000_000
    outbox = Outbox(tmp_path / "outbox.db", cap, clock)
    envelopes = Envelopes("b0000001", clock)
    events = 0
    for second in range(24 * 3600):
        clock.now += 1000
        if second % 2 == 0:
            outbox.add("tele", TOPICS.tele(("perf", "adapt", "ood", "host")[second // 2 % 4]), b"t" * 220)
        if second % 60 == 0:
            outbox.add("event", TOPICS.event("drift"), envelopes.wrap({"n": events}))
            events += 1
            outbox.commit(sync=False)
            outbox.tidy()
        if second % 3600 == 0:
            assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= cap
    outbox.commit(sync=False)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= cap
    rows = outbox.next(1_000_000)
    recent = [row for row in rows if row.store == "tele"]
    assert sum(row.store == "event" for row in rows) == events and outbox.dropped["event"] == 0
    assert len(recent) >= 1750, "the last hour is whole"
    assert 4 * 60 * 22 <= sum(row.store == "thin" for row in rows) <= 4 * 60 * 24, "one a minute of each group before"
    outbox.close()


@pytest.mark.fault(13)
def test_a_poison_message_is_put_aside_and_the_link_stays(mosquitto, device, observer):
    """Larger than the broker takes: refused here, quarantined, told; one connection, the rest goes on."""
    broker = mosquitto("max_packet_size 20000")
    watcher = observer(broker)
    mine = device(broker, mqtt={"max_payload": 100_000}).start()
    mine.courier.event("decision", {"x": "y" * 50_000})
    mine.courier.event("drift", {"n": 1})
    wait_until(lambda: watcher.of(TOPICS.event("drift")))
    wait_until(lambda: mine.outbox.quarantined == 1)
    wait_until(lambda: mine.courier.waiting == 0 and "message" in mine.alerts)
    time.sleep(0.5)  # a link that fails would try again meanwhile
    assert mine.courier.connects == 1


@pytest.mark.fault(13)
def test_poison_for_a_broker_that_only_hangs_up_is_found_out(mosquitto, device, observer):
    """MQTT 3.1.1 tells no limit: after a few hang-ups the one message is put aside, and the rest arrives."""
    broker = mosquitto("max_packet_size 20000")
    watcher = observer(broker)
    mqtt = {"max_payload": 100_000, "protocol": "3.1.1", "keepalive_s": 10}
    mine = device(broker, mqtt=mqtt, pace=Pace(backoff_s=(0.02, 0.05))).start()
    mine.courier.event("decision", {"x": "y" * 50_000})
    for n in range(5):
        mine.courier.event("drift", {"n": n})
    wait_until(lambda: mine.outbox.quarantined == 1)
    wait_until(lambda: [m["d"]["n"] for m in watcher.of(TOPICS.event("drift"))][-1:] == [4])
    wait_until(lambda: mine.courier.waiting == 0)
    assert mine.courier.connects <= 5


@pytest.mark.fault(14)
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_of_two_agents_with_one_name_one_stops_and_says_why(mosquitto, device, protocol):
    """No endless mutual kick: three connections each and the last return of one, one alert, the other stays online."""
    broker = mosquitto()
    facts = {"mqtt": {"protocol": protocol, "keepalive_s": 10}, "pace": replace(QUICK, backoff_s=(0.3, 1.0))}
    pair = [device(broker, folder=name, boot=name * 8, **facts).start(online=False) for name in "ab"]
    ended = wait_until(lambda: [each for each in pair if any(change.stopped for change in each.changes)])
    (other,) = [each for each in pair if each is not ended[0]]
    wait_until(calm(other.courier))
    assert not any(change.stopped for change in other.changes)
    assert ended[0].alerts == ["taken-over"] and "ea-dev1" in ended[0].changes[-1].reason
    assert not ended[0].courier.online
    assert all(each.courier.connects <= 5 for each in pair)


def calm(courier, for_s=1.2):
    """Whether a link has held so long, looked at again and again."""
    state = [(0, time.monotonic())]

    def held():
        if not courier.online or courier.connects != state[0][0]:
            state[0] = courier.connects, time.monotonic()
        return time.monotonic() - state[0][1] > for_s

    return held


@pytest.mark.fault(22)
@pytest.mark.parametrize("years", [2, -2, -50])
def test_a_wall_clock_that_jumps_disturbs_no_timer_and_makes_nothing_too_old(mosquitto, device, observer, proxy, years):
    """The link holds; what waits is kept through jumps in both directions and a restart, and arrives."""
    broker, clock, away_ms = mosquitto(), Jumping(), years * 365 * 86_400_000
    gate, watcher = proxy(broker), observer(broker)
    mine = device(gate, clock=clock).start()
    clock.wrong_ms = away_ms
    speak(mine, 8)
    wait_until(lambda: stream(watcher).keys() == set(range(1, 11)))
    wait_until(calm(mine.courier))
    assert mine.courier.connects == 1
    gate.mode = "refuse"
    gate.cut()
    wait_until(lambda: not mine.courier.online)
    for n, wrong_ms in enumerate((away_ms, 0, away_ms)):
        clock.wrong_ms = wrong_ms
        speak(mine, 4, 8 + 4 * n)
    wait_until(lambda: mine.courier.waiting == 15)
    mine.stop(0.1)
    for wrong_ms in (away_ms, 0):
        clock.wrong_ms = wrong_ms
        kept = Outbox(mine.outbox._path, 50_000_000, clock)
        kept.tidy()
        assert kept.waiting == 15
        kept.close()
    gate.mode = "pass"
    device(gate, clock=clock, boot="b0000002").start()
    wait_until(lambda: {message["d"]["n"] for message in watcher.of(f"{TOPICS.root}/tele/perf")} == set(range(20)))
    wait_until(lambda: {message["d"]["n"] for message in watcher.of(TOPICS.event("drift"))} == {0, 4, 8, 12, 16})


@pytest.mark.fault(33)
@pytest.mark.parametrize("harm", ["torn log", "page of zeros", "cut short", "no database"])
def test_a_damaged_queue_is_put_aside_and_what_can_be_read_still_goes(mosquitto, device, observer, harm):
    """The agent starts, the rest is sent, and an event says what was lost at most."""
    broker = mosquitto()
    mine = device(Closed()).start(online=False)
    for n in range(40):
        mine.courier.event("drift", {"n": n, "x": "y" * 300})
    wait_until(lambda: mine.courier.waiting == 40)
    mine.stop(0.1)
    path = mine.outbox._path
    _harm(path, harm)
    watcher = observer(broker)
    again = device(broker, boot="b0000002").start()
    wait_until(lambda: again.courier.waiting == 0 and again.courier._sender.idle)

    def arrived():
        return {message["d"]["n"] for message in watcher.of(TOPICS.event("drift"))}

    if harm == "torn log":
        wait_until(lambda: len(arrived()) == 40)
        assert not path.with_name("outbox.db.bad").exists()
        return
    (told,) = wait_until(lambda: watcher.of(TOPICS.event("fault")))
    saved, most_lost = told["d"]["saved"], told["d"]["lost_at_most"]
    wait_until(lambda: len(arrived()) == saved)
    assert most_lost is None or 40 - saved <= most_lost
    assert path.with_name("outbox.db.bad").exists()
    if harm == "page of zeros":
        assert saved >= 25


def _harm(path: Path, harm: str) -> None:
    data = path.read_bytes()
    if harm == "torn log":
        path.with_name(f"{path.name}-wal").write_bytes(b"\x37\x7f\x06\x82" + bytes(5000))
    elif harm == "page of zeros":
        page = data.index(b"drift") // 4096
        path.write_bytes(data[: page * 4096] + bytes(4096) + data[(page + 1) * 4096 :])
    elif harm == "cut short":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(b"\xff" * len(data))


@pytest.mark.fault(34)
def test_hundreds_of_reconnects_leak_nothing(mosquitto, device, observer, proxy):
    """The network flaps: descriptors and threads are as many as before, not one more, and nothing was lost."""
    broker = mosquitto()
    net = proxy(broker)
    watcher = observer(broker)
    mine = device(net, pace=Pace(backoff_s=(0.001, 0.002), latest_gap_s=0.0)).start()

    def flap(times):
        for n in range(times):
            before = mine.courier.connects
            if n % 20 == 0:
                mine.courier.event("drift", {"n": n})
            net.cut()
            wait_until(lambda before=before: mine.courier.connects > before and mine.courier.online)
            time.sleep(0.001 * (n % 4))

    flap(20)
    wait_until(lambda: mine.courier.waiting == 0 and mine.courier._sender.idle)
    files, threads = _open_files(), threading.active_count()
    flap(400)
    wait_until(lambda: mine.courier.waiting == 0 and mine.courier._sender.idle)
    wait_until(lambda: _open_files() <= files and threading.active_count() <= threads)
    wait_until(lambda: stream(watcher).keys() == set(range(1, 22)))
    assert mine.courier.connects >= 420 and mine.outbox.quarantined == 0


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
