"""Commands in their turn: one heavy one at a time, threads that answer, buttons of this machine, and the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from command_bench import SHA, TOPICS, Bench, fails_with, statuses
from spent import spending

from device_agents.commands import Commands
from device_agents.envelope import SystemClock
from device_agents.request import Limits
from edge_adapt.errors import ConfigError, StateError

DEADLINE_S = 10.0


def test_one_heavy_command_at_a_time_and_light_ones_meanwhile(bench):
    for verb in ("snapshot", "restore", "ping"):
        bench.commands.receive(bench.incoming(verb))
    bench.commands.pump()
    told = [(reply.data["verb"], reply.data["status"], reply.data["code"]) for reply in bench.replies]
    assert told == [
        ("snapshot", "accepted", "accepted"),
        ("restore", "rejected", "busy"),
        ("ping", "accepted", "accepted"),
        ("snapshot", "done", "ok"),
        ("ping", "done", "ok"),
    ]


def test_a_command_that_was_refused_as_busy_never_runs_later(bench):
    """Its sender was told so: a copy that the broker delivers late must not prove that wrong."""
    busy = bench.incoming("restore")
    bench.commands.receive(bench.incoming("snapshot"))
    bench.commands.receive(busy)
    bench.commands.pump()
    assert statuses(bench.deliver(busy)) == ["rejected"]
    assert bench.control.verbs == ["snapshot"]


def test_the_queue_of_accepted_commands_has_an_end(tmp_path):
    bench = Bench(tmp_path, limits=Limits(rate=1e9, burst=1e9, queue=3))
    for _ in range(5):
        bench.commands.receive(bench.incoming("ping"))
    bench.commands.pump()
    assert statuses(bench.replies) == ["accepted"] * 3 + ["rejected"] * 2 + ["done"] * 3
    bench.close()


def test_what_waited_too_long_does_not_begin(bench):
    bench.control.does = lambda verb, arguments: bench.clock.turn(60) or {}
    bench.commands.receive(bench.incoming("snapshot"))
    bench.commands.receive(bench.incoming("rollback"))
    bench.commands.pump()
    assert bench.control.verbs == ["snapshot"]
    last = bench.replies[-1].data
    assert (last["verb"], last["status"], last["code"]) == ("rollback", "rejected", "expired")


def waits_on(go: threading.Event) -> Callable[..., dict[str, Any]]:
    def does(verb: str, arguments: Any) -> dict[str, Any]:
        go.wait(DEADLINE_S)
        return {}

    return does


def waits_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


@pytest.fixture
def started(bench: Bench) -> Iterator[Bench]:
    """With its threads, and the clock of the machine."""
    bench.commands = Commands(bench.control, bench.ledger, TOPICS, bench.replies.append, clock=SystemClock())
    bench.commands.start()
    yield bench
    assert bench.commands.stop(DEADLINE_S)


def test_a_started_one_answers_quickly(started):
    for number in range(15):
        began = time.monotonic()
        started.commands.receive(started.incoming("ping"))
        waits_for(lambda wanted=2 * (number + 1): len(started.replies) == wanted)
        assert time.monotonic() - began < 3
    assert statuses(started.replies) == ["accepted", "done"] * 15


def test_what_is_accepted_is_told_while_another_one_still_runs(started):
    go = threading.Event()
    started.control.does = waits_on(go)
    try:
        started.commands.receive(started.incoming("snapshot"))
        waits_for(lambda: started.commands.running)
        assert started.commands.running[0] == "snapshot"
        started.commands.receive(started.incoming("ping"))
        started.commands.receive(started.incoming("drain"))
        waits_for(lambda: len(started.replies) == 3)
        assert statuses(started.replies) == ["accepted", "accepted", "rejected"]
    finally:
        go.set()
    waits_for(lambda: len(started.replies) == 5)


def test_leaving_a_command_takes_the_network_thread_no_time(started):
    sound, huge = started.incoming("ping"), started.incoming("ping", payload=b"[" * 10_000_000)
    with spending() as spent:
        for _ in range(500):
            started.commands.receive(sound)
            started.commands.receive(huge)
    assert spent.cpu_s / 1000 < 0.001


def test_a_button_goes_the_same_way_and_is_told_the_outcome(started):
    started.control.does = lambda verb, arguments: {"kept": 3}
    told = started.commands.submit_local("reset", {}, "page")
    assert (told["status"], told["result"]) == ("done", {"kept": 3})
    assert started.commands.execute("snapshot", {}, by="page") == {"kept": 3}
    assert started.control.asked == [("reset", {}, "page"), ("snapshot", {}, "page")]
    assert [(one.by, one.reason) for one in started.ledger.audit()] == [("page", "asked on the device")]
    assert started.replies == [], "nobody else is told"


@pytest.mark.parametrize(
    ("verb", "arguments", "expected"),
    [
        ("snapshto", {}, "unknown-verb"),
        ("freeze", {"on": 1}, "bad-arguments"),
        ("load-adapter", {"file": "../x", "sha256": SHA}, "bad-arguments"),
    ],
)
def test_a_button_is_checked_too(started, verb, arguments, expected):
    assert started.commands.submit_local(verb, arguments, "page")["code"] == expected
    with pytest.raises(ConfigError, match=expected):
        started.commands.execute(verb, arguments, by="page")
    assert started.control.asked == []


def test_a_button_that_fails_raises_for_who_pressed_it(started):
    started.control.does = fails_with(StateError("no older adapter", remedy="none"))
    with pytest.raises(StateError, match="no older adapter"):
        started.commands.execute("rollback", {}, by="page")


def test_a_button_is_refused_while_a_heavy_command_runs(started):
    go = threading.Event()
    started.control.does = waits_on(go)
    started.commands.receive(started.incoming("snapshot"))
    waits_for(lambda: started.commands.running)
    assert started.commands.submit_local("commit-adapter", {}, "page")["code"] == "busy"
    go.set()


def test_stopping_finishes_what_runs_and_refuses_what_waits(bench):
    go = threading.Event()
    bench.control.does = waits_on(go)
    commands = Commands(bench.control, bench.ledger, TOPICS, bench.replies.append, clock=SystemClock())
    commands.start()
    commands.receive(bench.incoming("snapshot"))
    commands.receive(bench.incoming("rollback"))
    waits_for(lambda: len(bench.replies) == 2)
    threading.Timer(0.05, go.set).start()
    assert commands.stop(DEADLINE_S)
    told = [(reply.data["verb"], reply.data["status"], reply.data["code"]) for reply in bench.replies[2:]]
    assert told == [("snapshot", "done", "ok"), ("rollback", "failed", "stopping")]
    assert commands.submit_local("ping", {}, "page")["code"] == "stopping"
    bench.restart()
    assert bench.ledger.interrupted() == []


def test_a_stop_does_not_wait_for_ever(bench):
    go = threading.Event()
    bench.control.does = waits_on(go)
    commands = Commands(bench.control, bench.ledger, TOPICS, bench.replies.append, clock=SystemClock())
    commands.start()
    commands.receive(bench.incoming("snapshot"))
    waits_for(lambda: commands.running)
    began = time.monotonic()
    assert not commands.stop(0.1)
    assert time.monotonic() - began < 2
    go.set()
    assert commands.stop(DEADLINE_S)
