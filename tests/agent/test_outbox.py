"""The outbox: order, survival, the cap on bytes, and a disk that misbehaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_agents.envelope import SystemClock
from device_agents.outbox import RAM_BYTES, Outbox

MB = 1_000_000


class Hand:
    """A clock that is moved by hand."""

    now = 0

    def wall_ms(self) -> int:
        return 1_800_000_000_000 + self.now

    def mono_ms(self) -> int:
        return self.now

    def quality(self) -> Any:
        return "rtc"


@pytest.fixture
def box(tmp_path):
    outbox = Outbox(tmp_path / "outbox.db", 8 * MB, Hand())
    yield outbox
    outbox.close()


def reopened(path: Path, cap: int = 8 * MB) -> Outbox:
    return Outbox(path, cap, Hand())


def test_acks_go_first_and_the_rest_in_the_order_it_came(box):
    rows = [box.add(store, f"t/{n}", b"x") for n, store in enumerate(("tele", "event", "ack", "tele", "ack"))]
    box.commit(sync=True)
    assert [row.id for row in box.next(10)] == [rows[n].id for n in (2, 4, 0, 1, 3)]
    assert [row.id for row in box.next(2, skip={rows[2].id})] == [rows[4].id, rows[0].id]


def test_nothing_is_sent_before_it_is_on_disk(box):
    box.add("event", "t", b"x")
    assert box.next(10) == [] and box.waiting == 1
    box.commit(sync=True)
    assert len(box.next(10)) == 1


def test_a_restart_finds_everything_but_what_was_done(tmp_path):
    path = tmp_path / "outbox.db"
    with_rows = reopened(path)
    rows = [with_rows.add("event", f"t/{n}", bytes([n]), correlation=b"c") for n in range(5)]
    with_rows.commit(sync=True)
    with_rows.done(rows[0])
    last = with_rows.last_id
    with_rows.close()
    again = reopened(path)
    assert [(row.topic, row.payload, row.correlation) for row in again.next(9)] == [
        (f"t/{n}", bytes([n]), b"c") for n in range(1, 5)
    ]
    assert again.waiting == 4 and again.add("event", "t", b"").id == last + 1
    again.close()


def test_session_numbers_rise_over_restarts(tmp_path):
    seen = []
    for _ in range(3):
        outbox = reopened(tmp_path / "outbox.db")
        seen += [outbox.next_session(), outbox.next_session()]
        outbox.close()
    assert seen == [1, 2, 3, 4, 5, 6]


def test_alerts_are_remembered_over_restarts(tmp_path):
    outbox = reopened(tmp_path / "outbox.db")
    outbox.remember("alert/a")
    outbox.remember("alert/b")
    outbox.forget("alert/a")
    outbox.close()
    again = reopened(tmp_path / "outbox.db")
    assert again.remembered() == ["alert/b"]
    again.close()


CHILD = """
import sys
from pathlib import Path
from device_agents.envelope import SystemClock
from device_agents.outbox import Outbox
box = Outbox(Path(sys.argv[1]), 8_000_000, SystemClock())
while True:
    row = box.add("event", "t", b"x" * 300)
    if box.commit(sync=False):
        print(row.id, flush=True)
"""


def test_a_committed_event_survives_sigkill(tmp_path):
    path = tmp_path / "outbox.db"
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        told = [int(child.stdout.readline()) for _ in range(50)]
        os.kill(child.pid, signal.SIGKILL)
        told += [int(line) for line in child.stdout.read().split(b"\n")[:-1] if line]
        child.wait()
        child.stdout.close()
        outbox = Outbox(path, 8 * MB, SystemClock())
        assert outbox.damage is None
        assert set(told) <= {row.id for row in outbox.next(100_000)}
        outbox.close()


def test_two_agents_in_one_folder_do_not_share_a_queue(tmp_path):
    first, second = reopened(tmp_path / "outbox.db"), reopened(tmp_path / "outbox.db")
    assert first.trouble is None and "locked" in str(second.trouble)
    second.close()
    first.close()


# the cap


def size_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_the_cap_holds_and_telemetry_goes_before_events(tmp_path):
    clock = Hand()
    outbox = Outbox(tmp_path / "outbox.db", MB, clock)
    events = 0
    for n in range(6000):
        clock.now += 1000
        outbox.add("tele", f"tele/{n % 4}", b"x" * 500)
        if n % 10 == 0:
            outbox.add("event", "event/drift", b"y" * 300)
            events += 1
        if n % 20 == 0:
            outbox.commit(sync=False)
            assert size_on_disk(tmp_path) <= MB
    outbox.commit(sync=False)
    rows = outbox.next(10_000)
    assert sum(row.store == "event" for row in rows) == events
    assert outbox.dropped["event"] == 0 and outbox.dropped["thinned"] > 0
    assert rows[-2].topic.startswith("tele/") and rows[-2].store == "tele", "the latest telemetry is kept whole"
    assert [row.id for row in rows] == sorted(row.id for row in rows)
    assert outbox.waiting == len(rows)
    outbox.close()


def test_events_alone_cannot_break_the_cap_either(tmp_path):
    outbox = Outbox(tmp_path / "outbox.db", MB, Hand())
    for _ in range(40):
        for _ in range(100):
            outbox.add("event", "event/drift", b"y" * 1000)
        outbox.commit(sync=False)
        assert size_on_disk(tmp_path) <= MB
    assert outbox.dropped["event"] > 0
    assert outbox.next(10_000)[-1].id == outbox.last_id, "the newest stay"
    outbox.close()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["tele", "event", "ack"]), st.integers(0, 16_000)), max_size=80))
def test_any_mixture_stays_under_the_cap(tmp_path_factory, load):
    folder = tmp_path_factory.mktemp("cap")
    outbox = Outbox(folder / "outbox.db", 400_000, Hand())
    for store, size in load:
        outbox.add(store, "t", b"z" * size)
        outbox.commit(sync=False)
        assert size_on_disk(folder) <= 400_000
    outbox.close()


def test_telemetry_older_than_an_hour_is_thinned_to_one_a_minute(tmp_path):
    clock = Hand()
    outbox = Outbox(tmp_path / "outbox.db", 8 * MB, clock)
    for second in range(2 * 3600):
        clock.now = second * 1000
        if second % 10 == 0:
            outbox.add("tele", "tele/perf", b"p")
            outbox.add("event", "event/drift", b"e")
    outbox.commit(sync=False)
    outbox.tidy()
    rows = outbox.next(10_000)
    fine = [row for row in rows if row.store == "tele"]
    coarse = [row for row in rows if row.store == "thin"]
    assert len(coarse) == 60 and all(row.at < 3600_000 for row in coarse)
    assert len(fine) == 360
    assert sum(row.store == "event" for row in rows) == 720
    outbox.close()


def test_a_row_thinned_on_its_way_is_done_all_the_same(tmp_path):
    clock = Hand()
    outbox = Outbox(tmp_path / "outbox.db", 8 * MB, clock)
    outbox.add("tele", "t", b"x")
    outbox.commit(sync=False)
    (row,) = outbox.next(1)
    clock.now += 3 * 3600_000
    outbox.tidy()
    outbox.done(row)
    outbox.commit(sync=False)
    assert outbox.next(9) == [] and outbox.waiting == 0
    outbox.close()


def test_age_counts_running_time_and_ignores_the_wall_clock(tmp_path):
    clock = Hand()
    outbox = Outbox(tmp_path / "outbox.db", 8 * MB, clock)
    outbox.add("ack", "t", b"x")
    clock.now += 1_800_000
    outbox.commit(sync=False)
    outbox.close()
    after = Hand()
    after.now = 5  # the machine was started again
    again = Outbox(tmp_path / "outbox.db", 8 * MB, after)
    again.tidy()
    assert again.waiting == 1
    after.now += 1_799_000
    again.tidy()
    assert again.waiting == 1
    after.now += 2_000
    again.tidy()
    assert again.waiting == 0 and again.dropped["ack"] == 1
    again.close()


# a message that cannot be sent


def test_quarantine_keeps_the_newest_and_sends_none(box):
    for n in range(130):
        row = box.add("event", f"t/{n}", b"x")
        box.commit(sync=False)
        box.quarantine(row, "too large")
    box.commit(sync=False)
    assert box.quarantined == 100 and box.waiting == 0 and box.next(10) == []


def test_a_payload_that_rotted_on_disk_is_put_aside(tmp_path):
    path = tmp_path / "outbox.db"
    outbox = reopened(path)
    for n in range(3):
        outbox.add("event", f"t/{n}", b"payload-%d" % n)
    outbox.close()
    path.write_bytes(path.read_bytes().replace(b"payload-1", b"payl0ad-1"))
    again = reopened(path)
    assert [row.topic for row in again.next(9)] == ["t/0", "t/2"]
    assert again.quarantined == 1
    again.close()


# a disk that refuses


def test_a_full_disk_is_no_error_and_is_forgotten_when_freed(tmp_path):
    clock = Hand()
    outbox = Outbox(tmp_path / "outbox.db", 8 * MB, clock)
    outbox._run("PRAGMA max_page_count=1")
    for n in range(200):
        outbox.add("event", f"t/{n}", b"x" * 4000)
    assert not outbox.commit(sync=True)
    assert "full" in str(outbox.trouble)
    assert [row.topic for row in outbox.next(300)] == [f"t/{n}" for n in range(200)], "sent from memory meanwhile"
    outbox._run("PRAGMA max_page_count=100000")
    assert not outbox.commit(sync=True), "not tried again within a second"
    clock.now += 1001
    assert outbox.commit(sync=True) and outbox.trouble is None and outbox.in_memory == 0
    assert len(outbox.next(300)) == 200
    outbox.close()


def test_memory_is_bounded_while_the_disk_is_full(tmp_path):
    outbox = Outbox(tmp_path / "outbox.db", 8 * MB, Hand())
    outbox._run("PRAGMA max_page_count=1")
    for _ in range(600):
        outbox.add("tele", "t", b"x" * 10_000)
        outbox.add("event", "e", b"x" * 1_000)
        outbox.commit(sync=False)
    held = list(outbox._ram.values())
    assert sum(len(row.payload) for row in held) <= RAM_BYTES
    assert sum(row.store == "event" for row in held) == 600 and outbox.dropped["tele"] > 0
    outbox.close()


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    outbox = reopened(tmp_path / "file" / "outbox.db")
    row = outbox.add("event", "t", b"x")
    assert not outbox.commit(sync=True) and outbox.trouble
    assert outbox.next(1) == [row] and outbox.next_session() == 1 and outbox.remembered() == []
    outbox.tidy()
    outbox.close()


# damage


def filled(path: Path, count: int = 400) -> None:
    outbox = reopened(path)
    outbox.next_session()
    for n in range(count):
        outbox.add("event", f"t/{n}", b"e%d" % n + b"x" * 300)
        outbox.add("tele", f"t/{n}", b"t%d" % n + b"x" * 300)
    outbox.close()


def test_a_file_that_is_no_database_is_put_aside(tmp_path):
    path = tmp_path / "outbox.db"
    path.write_bytes(b"no database, " * 1000)
    outbox = reopened(path)
    assert outbox.damage is not None and outbox.damage.saved == 0 and outbox.damage.lost is None
    assert (tmp_path / "outbox.db.bad").exists()
    assert outbox.next_session() > 1_000_000, "after losing count, far above whatever was used"
    outbox.add("event", "t", b"x")
    assert outbox.commit(sync=True)
    outbox.close()


def test_a_zeroed_page_costs_only_what_was_on_it(tmp_path):
    path = tmp_path / "outbox.db"
    filled(path)
    data = bytearray(path.read_bytes())
    page = data.index(b"e200x") // 4096
    data[page * 4096 : (page + 1) * 4096] = bytes(4096)
    path.write_bytes(data)
    outbox = reopened(path)
    assert outbox.damage is not None and outbox.damage.lost is not None
    rows = outbox.next(10_000)
    assert 0 < 800 - len(rows) <= outbox.damage.lost < 40
    assert outbox.next_session() == 2 and outbox.add("event", "t", b"").id == 801
    assert [row.id for row in rows] == sorted(row.id for row in rows)
    outbox.close()


def test_a_page_that_rots_while_running_is_noticed_and_replaced(tmp_path):
    path = tmp_path / "outbox.db"
    filled(path)
    outbox = reopened(path)
    data = path.read_bytes()
    page = data.index(b"e0x") // 4096
    with path.open("r+b") as file:
        file.seek(page * 4096)
        file.write(b"\xff" * 4096)
    outbox._run("PRAGMA cache_size=0")
    outbox._run("PRAGMA shrink_memory")
    outbox.next(900)
    assert outbox.damage is not None
    assert len(outbox.next(900)) > 700
    outbox.close()


@settings(max_examples=30, deadline=None)
@given(at=st.floats(0, 0.999), bit=st.integers(0, 7), cut=st.booleans())
def test_no_flipped_bit_and_no_truncation_makes_it_fail(tmp_path_factory, at, bit, cut):
    path = tmp_path_factory.mktemp("bit") / "outbox.db"
    filled(path, 40)
    data = bytearray(path.read_bytes())
    where = int(at * len(data))
    if cut:
        data = data[:where]
    else:
        data[where] ^= 1 << bit
    path.write_bytes(data)
    outbox = reopened(path)
    outbox.next(100)
    outbox.add("event", "t", b"x")
    outbox.commit(sync=True)
    assert outbox.trouble is None
    assert outbox.next(200)[-1].payload == b"x"
    outbox.close()
