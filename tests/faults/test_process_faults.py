"""Faults that need a process of its own, `edge-adapt run`: rows 3, 22, 23, 25 and 35."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from agents import ROOT, Child, child, mqtt_to, settings, stream, until
from brokers import mosquitto, observer
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_adapt.runtime.snapshots import SnapshotStore

__all__ = ["child", "mosquitto", "observer", "settings", "stream"]
PLENTY = {"learn_ms_per_s": 1000.0}
LIVES = 15
WARM_FRAMES, MORE_FRAMES = 6000, 12_000
ENDED = ("done", "failed", "rejected")


class Desk:
    """Watches one agent over MQTT, and commands it."""

    def __init__(self, watcher: Any) -> None:
        self.watcher = watcher

    def states(self) -> list[dict[str, Any]]:
        return [each["d"] for each in self.watcher.of(f"{ROOT}/state")]

    def ready(self, alive: Child) -> str:
        """Wait for a boot that was not there before; returns it."""
        known = {state["boot"] for state in self.states() if state["s"] != "lost"}

        def fresh() -> str | None:
            assert alive.running(), alive.text[-2000:]
            ready = (state["boot"] for state in self.states() if state["s"] in ("ready", "degraded"))
            return next((boot for boot in ready if boot not in known), None)

        return until(fresh, timeout_s=60)

    def send(self, verb: str, key: str, **arguments: Any) -> None:
        properties = Properties(PacketTypes.PUBLISH)
        properties.MessageExpiryInterval = 60
        body = {"v": 1, "id": key, "by": "desk", "reason": "a test", "d": arguments}
        self.watcher.publish(f"{ROOT}/cmd/{verb}", json.dumps(body), properties=properties)

    def outcomes(self, key: str) -> list[tuple[str, str, str]]:
        """Status, code and result of every final answer to a command."""
        answers = [each["d"] for each in self.watcher.of(f"{ROOT}/ack/{key}")]
        final = [each for each in answers if each["status"] in ENDED]
        return [(each["status"], each["code"], json.dumps(each.get("result"))) for each in final]


def on_disk(state: Path, work: Path) -> set[str]:
    """Ids of the events that the outbox had taken when the agent was killed: acknowledged, and not to be lost."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for path in state.glob("outbox.db*"):
        shutil.copy(path, work)
    with closing(sqlite3.connect(work / "outbox.db")) as db:
        return {json.loads(payload)["id"] for (payload,) in db.execute("SELECT payload FROM event")}


def latest_generation(state: Path, work: Path, bundle: Any) -> int:
    """Of the snapshots as they lie there; fails the test if one is bad."""
    shutil.rmtree(work, ignore_errors=True)
    if not (state / "snapshots").exists():
        return 0
    shutil.copytree(state / "snapshots", work)
    store = SnapshotStore.of(work, bundle)
    found = store.load_latest()
    assert store.take_reports() == []
    return 0 if found is None else found.generation


@pytest.mark.fault(3)
def test_killed_at_random_it_boots_keeps_what_it_acknowledged_and_does_nothing_twice(
    child, mosquitto, observer, tmp_path, device_bundle
):
    """R2, R3, R5: after each of 15 SIGKILLs it answers again; snapshots are good, events arrive, commands ran once."""
    broker, chance, state = mosquitto("max_queued_messages 0"), random.Random(3), tmp_path / "state"
    desk = Desk(observer(broker))
    facts = {**mqtt_to(broker), "snapshots": {"every_s": 600.0}, "budget": PLENTY}
    keys: list[str] = []
    owed: set[str] = set()
    boots = []
    for life in range(LIVES):
        agent = child(**facts)
        boots.append(desk.ready(agent))
        end = time.monotonic() + chance.uniform(0.05, 1.0)
        while time.monotonic() < end:
            keys.append(f"k{life}-{len(keys)}")
            desk.send("reset" if len(keys) % 3 == 0 else "snapshot", keys[-1])
            time.sleep(0.08)
        agent.kill()
        owed |= on_disk(state, tmp_path / "copied")
        latest_generation(state, tmp_path / "kept", device_bundle)
    agent = child(**facts)
    boots.append(desk.ready(agent))
    for key in keys:  # as a sender would that never heard of an end
        desk.send("reset" if int(key.partition("-")[2]) % 3 == 2 else "snapshot", key)
        time.sleep(0.11)
    until(lambda: all(desk.outcomes(key) for key in keys))
    assert len(set(boots)) == LIVES + 1
    sessions = [state["bd"] for state in desk.states()]
    assert sessions == sorted(sessions)
    until(lambda: owed <= {each["id"] for each in desk.watcher.of(f"{ROOT}/event/")})
    check_once(desk, [key for key in keys if int(key.partition("-")[2]) % 3 != 2], state, tmp_path, device_bundle)


def check_once(desk: Desk, keys: list[str], state: Path, tmp_path: Path, bundle: Any) -> None:
    """Each snapshot command raised the generation once or, if it was interrupted, at most once."""
    done, interrupted = [], 0
    for key in keys:
        outcomes = set(desk.outcomes(key))
        assert len(outcomes) == 1, f"{key} had several ends: {outcomes}"
        status, code, result = outcomes.pop()
        assert status == "done" or code in ("interrupted", "busy", "suppressed"), (key, status, code)
        interrupted += code == "interrupted"
        if status == "done":
            done.append(json.loads(result)["generation"])
    assert len(done) == len(set(done)) and len(done) > LIVES
    assert len(done) <= latest_generation(state, tmp_path / "last", bundle) <= len(done) + interrupted


def clock_from(start: str) -> tuple[str, ...]:
    """Words in front of a command whose wall clock begins there. Without the wrapper, which would get the signals."""
    if shutil.which("faketime") is None:
        pytest.skip("faketime is not installed (Debian: apt install faketime)")
    words = ["faketime", "-f", f"@{start}", "printenv", "LD_PRELOAD"]
    library = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    return ("env", f"LD_PRELOAD={library}", f"FAKETIME=@{start}")


@pytest.mark.fault(22)
def test_a_clock_in_1970_is_told_and_disturbs_nothing(child, mosquitto, observer):
    """R1, R7: every message says `unsync`; it answers, obeys, keeps snapshots, and stops as usual."""
    broker = mosquitto()
    desk = Desk(observer(broker))
    facts = {**mqtt_to(broker), "snapshots": {"every_s": 0.5}}
    agent = child(before=clock_from("1970-01-02 00:00:00"), **facts)
    desk.ready(agent)
    desk.send("ping", "one")
    until(lambda: desk.outcomes("one"))
    assert desk.outcomes("one")[0][0] == "done"
    until(lambda: any(each["d"]["answered"] > 200 for each in desk.watcher.of(f"{ROOT}/tele/perf")))
    until(lambda: any(each["d"]["snapshot_age_s"] for each in desk.watcher.of(f"{ROOT}/tele/adapt")))
    told = desk.watcher.of(f"{ROOT}/")
    assert {each["clk"] for each in told if "clk" in each and "data" not in each and each.get("boot")} == {"unsync"}
    assert desk.watcher.of(f"{ROOT}/tele/host")[-1]["d"]["restarts"] == 0
    agent.signal(signal.SIGTERM)
    assert agent.wait() == 0


def resources(desk: Desk, frames: int) -> dict[str, float]:
    """Median memory, and the fewest files and threads, of some looks after so many frames were answered."""
    host, perf = f"{ROOT}/tele/host", f"{ROOT}/tele/perf"
    until(lambda: any(each["d"]["answered"] >= frames for each in desk.watcher.of(perf)), timeout_s=180)
    seen = len(desk.watcher.of(host))
    until(lambda: len(desk.watcher.of(host)) >= seen + 5)
    looks = [each["d"] for each in desk.watcher.of(host)[seen:]]
    memory = statistics.median(look["rss_mb"] for look in looks)
    return {"rss_mb": memory, **{name: min(look[name] for look in looks) for name in ("fds", "threads")}}


@pytest.mark.fault(23)
def test_once_it_is_warm_it_does_not_grow(child, mosquitto, observer):
    """R4: learning, saving and telling all the while; a frame that is kept by mistake would be 768 bytes."""
    broker = mosquitto()
    desk = Desk(observer(broker))
    agent = child(**mqtt_to(broker), snapshots={"every_s": 1.0}, budget=PLENTY)
    desk.ready(agent)
    early = resources(desk, WARM_FRAMES)
    late = resources(desk, WARM_FRAMES + MORE_FRAMES)
    assert late["rss_mb"] - early["rss_mb"] < 6.0
    assert late["fds"] <= early["fds"] and late["threads"] <= early["threads"]


@pytest.fixture
def crowd() -> Iterator[str]:
    """A core that three others keep busy; returns its number."""
    if shutil.which("taskset") is None:
        pytest.skip("taskset is not installed (Debian: apt install util-linux)")
    core = str(min(os.sched_getaffinity(0)))
    words = ["taskset", "-c", core, sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(words) for _ in range(3)]
    yield core
    for each in others:
        each.kill()
        each.wait()


@pytest.mark.fault(25)
def test_starved_of_processor_time_it_answers_every_frame_and_learns_within_its_budget(
    child, mosquitto, observer, crowd
):
    """R1: on a quarter of a core, 15 frames a second: none is dropped, and learning takes no more than it may."""
    broker = mosquitto()
    desk = Desk(observer(broker))
    source = {"fps": 15.0, "policy": "newest"}
    agent = child(before=("taskset", "-c", crowd), **mqtt_to(broker), source=source, budget={"learn_ms_per_s": 100.0})
    desk.ready(agent)
    told = desk.watcher.of
    until(lambda: any(each["d"]["answered"] >= 225 for each in told(f"{ROOT}/tele/perf")), timeout_s=60)
    assert told(f"{ROOT}/tele/perf")[-1]["d"]["dropped"] == 0
    reports = [each["d"] for each in told(f"{ROOT}/tele/adapt")]
    settled = reports[len(reports) // 2 :]  # the first seconds may spend what the bucket held from the start
    assert settled[-1]["steps"] > 0 and statistics.median(each["ms_per_s"] for each in settled) <= 150


@pytest.mark.fault(35)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_drains_saves_and_says_goodbye(child, mosquitto, observer, tmp_path, device_bundle, number):
    """R2, R3, R7: within its 5 s what it learned is saved and nothing is left to send; then `offline`, and exit 0."""
    broker = mosquitto()
    desk = Desk(observer(broker))
    agent = child(**mqtt_to(broker), snapshots={"every_s": 600.0}, budget=PLENTY)
    desk.ready(agent)
    until(lambda: any(each["d"]["version"] > 2 for each in desk.watcher.of(f"{ROOT}/tele/adapt")))
    start = time.monotonic()
    agent.signal(number)
    assert agent.wait() == 0, agent.text
    assert time.monotonic() - start < 8
    assert "frames answered" in agent.text and "Traceback" not in agent.text
    assert latest_generation(tmp_path / "state", tmp_path / "kept", device_bundle) == 1
    assert on_disk(tmp_path / "state", tmp_path / "copied") == set()
    later = Desk(observer(broker, client_id="later", filters=[f"{ROOT}/state"]))
    until(lambda: [state["s"] for state in later.states()] == ["offline"])


@pytest.mark.fault(35)
def test_a_second_signal_forces_it(child, mosquitto, observer):
    """R2: whoever cannot wait need not; the next start goes on from what was kept."""
    broker = mosquitto()
    desk = Desk(observer(broker))
    agent = child(**mqtt_to(broker))
    desk.ready(agent)
    broker.pause()  # a goodbye that is never acknowledged takes its time
    agent.signal(signal.SIGTERM)
    time.sleep(0.3)
    assert agent.running()
    start = time.monotonic()
    agent.signal(signal.SIGTERM)
    assert agent.wait() == 130
    assert time.monotonic() - start < 3


@pytest.mark.fault(35)
def test_without_a_broker_it_stops_at_once(child, tmp_path):
    """R2: nothing to wait for, so it does not; a drained source and a signal afterwards are no second signal."""
    agent = child("--answers", str(tmp_path / "answers.jsonl"))
    until(lambda: (tmp_path / "answers.jsonl").exists() and (tmp_path / "answers.jsonl").stat().st_size > 0)
    start = time.monotonic()
    agent.signal(signal.SIGINT)
    assert agent.wait() == 0
    assert time.monotonic() - start < 3
    for line in (tmp_path / "answers.jsonl").read_text().splitlines():
        json.loads(line)
