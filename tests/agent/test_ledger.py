"""The ledger of commands: what it knows survives kills and damage, and it never grows without end."""

from __future__ import annotations

import multiprocessing
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import command_child
import pytest
from command_bench import HandClock

from device_agents import ledger as module
from device_agents.ledger import Entry, Ledger
from edge_adapt.errors import StateError


def entry(key: str, **changed: object) -> Entry:
    sound = Entry(key, "snapshot", "d1", "", "alice", "", False, 1_800_000_000_000, "ea/v1/hall/cam1/ack/k", b"\xff")
    return replace(sound, **changed)


def told(key: str) -> dict[str, str]:
    return {"id": key, "status": "done"}


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def opened(tmp_path: Path, clock: HandClock) -> Iterator[Callable[[], Ledger]]:
    """Opens the same ledger, again and again."""
    made: list[Ledger] = []

    def again() -> Ledger:
        for one in made:
            one.close()
        made.append(Ledger(tmp_path / "commands.db", clock=clock))
        return made[-1]

    yield again
    for one in made:
        one.close()


def test_a_command_is_known_with_its_outcome_after_a_restart(opened):
    ledger = opened()
    assert ledger.find("a") is None
    ledger.accept(entry("a"))
    assert ledger.find("a") == entry("a")
    ledger.begin("a")
    ledger.finish("a", "done", told("a"))
    again = opened()
    assert again.find("a") == entry("a", state="done", reply=told("a"))
    assert again.interrupted() == []


def test_an_id_is_taken_once(opened):
    ledger = opened()
    ledger.accept(entry("a"))
    with pytest.raises(StateError):
        ledger.accept(entry("a", verb="reset"))
    assert ledger.find("a") == entry("a")


def test_what_a_restart_interrupted_has_failed_and_is_told_once(opened):
    ledger = opened()
    for key in "abc":
        ledger.accept(entry(key))
    ledger.begin("b")
    ledger.finish("c", "done", told("c"))
    again = opened()
    first, second = again.interrupted()
    assert (first.key, second.key) == ("a", "b")
    assert first.state == second.state == "failed"
    assert "had not begun" in first.reply["text"] and "may have taken effect" in second.reply["text"]
    assert second.reply["code"] == "interrupted"
    assert again.find("b") == second
    assert again.interrupted() == [], "told once"
    assert opened().interrupted() == []


def test_dangerous_commands_stay_in_the_audit(opened):
    ledger = opened()
    ledger.accept(entry("a", verb="reset", danger=True, reason="camera moved", by="bob"))
    ledger.accept(entry("b"))
    ledger.finish("a", "done", told("a"))
    (found,) = opened().audit()
    assert (found.verb, found.by, found.reason, found.at_ms, found.state) == (
        "reset",
        "bob",
        "camera moved",
        1_800_000_000_000,
        "done",
    )


def test_the_oldest_are_forgotten_by_count_and_the_audit_has_its_own(opened, monkeypatch):
    for name, value in {"KEEP": 20, "KEEP_ALWAYS": 10, "KEEP_DANGEROUS": 5, "PRUNE_EVERY": 1}.items():
        monkeypatch.setattr(module, name, value)
    ledger = opened()
    ledger.accept(entry("open"))
    for number in range(60):
        ledger.accept(entry(f"k{number}", danger=number < 8, state="done", reply=told("k")))
    assert len(ledger) == 1 + 20 + 5
    assert ledger.find("open") is not None, "what is under way is not forgotten"
    assert ledger.find("k39") is None and ledger.find("k40") is not None
    assert [one.key for one in ledger.audit()] == ["k7", "k6", "k5", "k4", "k3"]


def test_a_clock_that_jumps_ahead_forgets_none_of_the_latest(opened, clock, monkeypatch):
    monkeypatch.setattr(module, "KEEP_ALWAYS", 10)
    ledger = opened()
    for number in range(30):
        ledger.accept(entry(f"k{number}", state="done", reply=told("k")))
    clock.turn(2 * 365 * 86_400)
    ledger = opened()
    assert len(ledger) == 10
    assert ledger.find("k29") is not None and ledger.find("k19") is None


def flip(path: Path, where: Callable[[bytes], int]) -> None:
    data = bytearray(path.read_bytes())
    data[where(bytes(data))] ^= 0x40
    path.write_bytes(data)


def page_header(data: bytes) -> int:
    return 4096  # of the second page, the table


def inside_a_key(data: bytes) -> int:
    return data.index(b"victim") + 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"not a database at all" * 500),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(bytes(8192)),
        lambda path: flip(path, page_header),
        lambda path: flip(path, inside_a_key),
        lambda path: flip(path, lambda data: data.index(b"interesting")),
        lambda path: sqlite3_run(path, "PRAGMA user_version = 99"),
        lambda path: sqlite3_run(path, "ALTER TABLE commands DROP COLUMN reply"),
    ],
    ids=["garbage", "cut", "zeros", "flipped header", "flipped key", "flipped reply", "later schema", "lost column"],
)
def test_a_damaged_ledger_is_set_aside_and_a_new_one_works(opened, tmp_path, damage):
    ledger = opened()
    for key in ("a", "victim", "b"):
        ledger.accept(entry(key, state="done", reply={"text": "interesting"}))
    ledger.close()
    path = tmp_path / "commands.db"
    damage(path)
    ledger = opened()
    assert ledger.set_aside == tmp_path / "commands.db.bad"
    assert ledger.set_aside.exists()
    assert ledger.find("victim") is None
    ledger.accept(entry("c"))
    assert opened().set_aside is None
    assert opened().find("c") is not None


def sqlite3_run(path: Path, statement: str) -> None:
    db = sqlite3.connect(path)
    db.execute(statement)
    db.commit()
    db.close()


def test_damage_while_it_is_open_is_noticed_by_the_next_call_at_the_latest_and_then_it_works_again(opened, tmp_path):
    ledger = opened()
    for number in range(200):
        ledger.accept(entry(f"k{number}", state="done", reply={"text": "x" * 500}))
    ledger.close()
    ledger = opened()
    path = tmp_path / "commands.db"
    path.write_bytes(path.read_bytes()[:4096] + b"\xaa" * (path.stat().st_size - 4096))
    with pytest.raises(StateError):
        [ledger.find(f"k{number}") for number in range(200)]
    assert ledger.set_aside is not None
    ledger.accept(entry("c"))
    assert ledger.find("c") == entry("c")
    assert ledger.trouble is None


def test_a_folder_that_is_not_there_is_an_error_of_each_call_and_is_tried_again(tmp_path, clock):
    ledger = Ledger(tmp_path / "later" / "commands.db", clock=clock)
    assert "commands.db" in (ledger.trouble or "")
    with pytest.raises(StateError, match=r"later/commands\.db"):
        ledger.accept(entry("a"))
    (tmp_path / "later").mkdir()
    ledger.accept(entry("a"))
    assert ledger.trouble is None
    assert ledger.find("a") == entry("a")
    ledger.close()


def test_a_closed_ledger_stays_closed(opened):
    ledger = opened()
    ledger.close()
    with pytest.raises(StateError, match="closed"):
        ledger.find("a")


def test_many_threads_may_use_it(opened):
    ledger = opened()

    def work(who: int) -> None:
        for number in range(10):
            ledger.accept(entry(f"{who}-{number}"))
            ledger.finish(f"{who}-{number}", "done", told("x"))

    threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ledger) == 40


def test_no_command_runs_twice_however_often_the_process_is_killed(tmp_path):
    """R5: twenty kills at random instants, every command sent again after each of them."""
    count, rng = 600, random.Random(0)
    family = multiprocessing.get_context("forkserver")
    family.set_forkserver_preload(["device_agents.commands", "device_agents.mqtt"])  # a child begins at once
    for kill_after_s in (*(rng.uniform(0.0, 0.12) for _ in range(20)), None):
        ready = family.Event()
        child = family.Process(target=command_child.main, args=(tmp_path, count, ready))
        child.start()
        if kill_after_s is not None:
            assert ready.wait(30)
            time.sleep(kill_after_s)
            child.kill()
        child.join(120)
        assert child.exitcode == (0 if kill_after_s is None else -signal.SIGKILL)
        child.close()

    effects = Counter((tmp_path / "effects").read_text().split())
    told = [line.split() for line in (tmp_path / "told").read_text().splitlines()]
    assert max(effects.values()) == 1, f"carried out twice: {[key for key, times in effects.items() if times > 1]}"
    done = {key for key, status, _ in told if status == "done"}
    interrupted = {key for key, _, code in told if code == "interrupted"}
    assert done | interrupted == {f"k{number}" for number in range(count)}, "each command has an outcome"
    assert not done & interrupted, "and only one"
    assert {key[1:] for key in done} <= effects.keys(), "what was told as done was done"
    assert interrupted, "no kill hit a command under way: the test tests nothing"
