"""Commands from the network and from this machine: what is answered, what is refused, and that nothing runs twice."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_bench import ARGUMENTS, GROUP, SHA, TOPICS, Bench, code, statuses

from device_agents.commands import Commands
from device_agents.envelope import SystemClock
from device_agents.mqtt import Incoming
from device_agents.request import Limits, may_answer
from edge_adapt.errors import ArtifactError, ConfigError, StateError

DEADLINE_S = 10.0


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def old_style(verb: str, **changed: Any) -> Incoming:
    """A command as MQTT 3.1.1 has it: everything in the body."""
    body = {"v": 1, "id": "k1", "by": "bob", "reason": "a test", "expires_ms": 1_800_000_030_000, "d": ARGUMENTS[verb]}
    return Incoming(TOPICS.cmd(verb), json.dumps({**body, **changed}).encode())


@pytest.mark.parametrize("verb", ARGUMENTS)
def test_every_verb_is_accepted_carried_out_and_told(bench, verb):
    bench.control.does = lambda verb, arguments: {"seen": verb}
    accepted, done = bench.send(verb)
    assert bench.control.asked == [(verb, ARGUMENTS[verb], "alice")]
    assert accepted.topic == done.topic == TOPICS.ack("k0")
    assert accepted.correlation == done.correlation == b"\x01\x02"
    assert accepted.data == {"id": "k0", "verb": verb, "status": "accepted", "code": "accepted", "text": ""}
    outcome = {"id": "k0", "verb": verb, "status": "done", "code": "ok", "text": "", "duration_ms": 0}
    assert done.data == {**outcome, "result": {"seen": verb}}


def test_a_command_of_the_older_protocol_needs_no_properties(bench):
    accepted, done = bench.deliver(old_style("snapshot", reply_to=f"{TOPICS.root}/reply/desk"))
    assert accepted.topic == done.topic == "ea/v1/hall/cam1/reply/desk"
    assert bench.control.asked == [("snapshot", {}, "bob")]


def test_a_response_topic_below_the_prefix_is_used(bench):
    replies = bench.send("ping", response_topic="ea/v1/hall/_ctrl/desk/reply/1")
    assert [reply.topic for reply in replies] == ["ea/v1/hall/_ctrl/desk/reply/1"] * 2


@pytest.mark.parametrize(
    "topic",
    [
        "other/v1/hall/cam1/ack/1",
        "ea/v12/hall/cam1/ack/1",
        "ea/v1/hall/cam2/cmd/reset",
        "ea/v1/hall/cam2/ack/k0",
        "ea/v1/hall/cam2/desired",
        "ea/v1/hall/cam1/cmd/reset",
        "ea/v1/hall/cam1/state",
        "ea/v1/hall/cam1/desired",
        "ea/v1/hall/_group/line4/cmd/reset",
        "ea/v1/hall/_group/line4/x",
        "ea/v1/hall/_ctrl/plant/state",
        "ea/v1/hall/cam1/ack/+",
        "ea/v1/hall/cam1/ack/#",
        "ea/v1/hall/cam1/../cam2/x",
        "ea/v1/",
        "",
        "$SYS/x",
        f"ea/v1/hall/{'x' * 60}/" + "y/" * 200 + "z",
    ],
)
def test_answers_go_nowhere_else(bench, topic):
    for replies in (bench.send("ping", response_topic=topic), bench.deliver(old_style("ping", reply_to=topic))):
        assert code(replies) in ("reply-topic", "bad-header")
        assert replies[0].topic.startswith(f"{TOPICS.root}/ack/")
    assert bench.control.asked == []


def test_a_body_may_not_choose_a_topic_outside_the_device(bench):
    assert may_answer("ea/v1/hall/_ctrl/desk/reply/1", TOPICS, below=TOPICS.prefix)
    assert code(bench.deliver(old_style("ping", reply_to="ea/v1/hall/_ctrl/desk/reply/1"))) == "reply-topic"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"payload": b"{"}, "malformed"),
        ({"payload": b""}, "malformed"),
        ({"payload": b"[1]"}, "malformed"),
        ({"payload": b'{"v":2,"d":{}}'}, "malformed"),
        ({"payload": b"x" * 16_385}, "too-large"),
        ({"payload": b'{"v":1,"d":[1]}'}, "bad-arguments"),
        ({"payload": b'{"v":1,"d":null}'}, "bad-arguments"),
        ({"topic": "ea/v1/hall/cam1/cmd/snapshto"}, "unknown-verb"),
        ({"properties": ()}, "no-key"),
        ({"properties": (("idem", "../x"),)}, "bad-key"),
        ({"properties": (("idem", ""),)}, "bad-key"),
        ({"properties": (("idem", "a"), ("by", "x" * 65))}, "bad-header"),
        ({"properties": (("idem", "a"), ("reason", "two\nlines"))}, "bad-header"),
        ({"properties": (("idem", "a"), ("reason", "x" * 300))}, "bad-header"),
        ({"correlation": b"x" * 257}, "bad-header"),
        ({"expiry_s": None}, "no-expiry"),
        ({"expiry_s": 301}, "far-expiry"),
        ({"expiry_s": 0}, "expired"),
    ],
)
def test_what_is_wrong_has_a_name_and_is_answered(bench, changed, expected):
    replies = bench.send("ping", **changed)
    assert code(replies) == expected
    assert replies[0].topic.startswith(f"{TOPICS.root}/ack/")
    assert bench.control.asked == []
    assert bench.commands.counts[f"rejected:{expected}"] == 1


def test_an_unknown_verb_is_met_with_the_nearest(bench):
    (reply,) = bench.send("ping", topic="ea/v1/hall/cam1/cmd/snapshto")
    assert "did you mean snapshot" in reply.data["text"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"expires_ms": None}, "no-expiry"),
        ({"expires_ms": 1_800_000_000_000}, "expired"),
        ({"expires_ms": 1_800_000_300_001}, "far-expiry"),
        ({"expires_ms": 30.5}, "bad-header"),
        ({"expires_ms": True}, "bad-header"),
        ({"id": None}, "no-key"),
        ({"id": 7}, "bad-key"),
        ({"by": 7}, "bad-header"),
        ({"reason": ["x"]}, "bad-header"),
        ({"reply_to": 7}, "reply-topic"),
    ],
)
def test_what_is_wrong_in_a_body_has_a_name_too(bench, changed, expected):
    assert code(bench.deliver(old_style("ping", **changed))) == expected
    assert bench.control.asked == []


def test_a_time_on_the_wall_means_nothing_to_a_clock_that_is_not_set(bench):
    bench.clock.kept = "unsync"
    assert code(bench.deliver(old_style("ping"))) == "clock"
    assert statuses(bench.send("ping")) == ["accepted", "done"], "the broker's own expiry still counts"


def test_a_retained_command_is_dropped_and_counted(bench):
    assert bench.send("reset", retain=True) == []
    assert bench.control.asked == []
    assert bench.commands.counts["retained"] == 1


@pytest.mark.parametrize("verb", ["reset", "load-adapter", "set-mode", "set-config"])
def test_danger_needs_a_reason_and_is_audited(bench, verb):
    risky = {"set-mode": {"mode": "bounded_auto"}, "set-config": {"config": {"mode": "bounded_auto"}}}
    arguments = risky.get(verb, ARGUMENTS[verb])
    for reason in ((), (("reason", " "),)):
        assert code(bench.send(verb, arguments, properties=(("idem", "a"), *reason))) == "no-reason"
    assert bench.control.asked == []
    bench.send(verb, arguments)
    (found,) = bench.ledger.audit()
    assert (found.verb, found.by, found.reason, found.at_ms) == (verb, "alice", "a test", bench.clock.wall)
    assert found.state == "done"


def test_a_command_that_comes_twice_runs_once_and_is_answered_twice(bench):
    bench.control.does = lambda verb, arguments: {"n": 1}
    incoming = bench.incoming("rollback")
    first, second = bench.deliver(incoming), bench.deliver(incoming)
    assert second == first[-1:]
    bench.restart()
    assert bench.deliver(incoming) == first[-1:], "and after a restart"
    bench.clock.turn(3600)
    assert bench.deliver(incoming) == first[-1:], "and when it is too late for it"
    assert bench.control.verbs == ["rollback"]


def test_what_failed_is_not_tried_again_by_itself(bench):
    bench.control.does = fails_with(StateError("no older adapter", remedy="none"))
    incoming = bench.incoming("rollback")
    first = bench.deliver(incoming)
    assert bench.deliver(incoming) == first[-1:]
    assert bench.control.verbs == ["rollback"]


def test_an_id_that_is_used_for_something_else_is_refused(bench):
    bench.send("freeze", {"on": True}, properties=(("idem", "a"),))
    assert code(bench.send("freeze", {"on": False}, properties=(("idem", "a"),))) == "key-reused"
    assert code(bench.send("ping", properties=(("idem", "a"),))) == "key-reused"
    assert bench.control.verbs == ["freeze"]


def test_what_a_restart_interrupted_is_told_at_the_next_start_and_not_run(bench):
    incoming = bench.incoming("snapshot")
    bench.commands.receive(incoming)
    bench.commands._clerk(0.0)
    assert statuses(bench.replies) == ["accepted"]
    bench.restart()
    bench.replies.clear()
    bench.commands.start()
    bench.commands.stop(5)
    (reply,) = bench.replies
    assert (reply.topic, reply.correlation) == (TOPICS.ack("k0"), b"\x01\x02")
    assert (reply.data["status"], reply.data["code"]) == ("failed", "interrupted")
    assert "interrupted by a restart" in reply.data["text"]
    assert bench.control.asked == []


def fails_with(error: BaseException) -> Callable[..., dict[str, Any]]:
    def does(verb: str, arguments: Any) -> dict[str, Any]:
        raise error

    return does


@pytest.mark.parametrize(
    ("error", "expected", "says"),
    [
        (ArtifactError("adapter a is not signed", remedy="sign it"), "artifact", "adapter a is not signed; sign it"),
        (ConfigError("no such field", remedy="look"), "config", "no such field; look"),
        (RuntimeError("secret /path"), "internal", "RuntimeError inside the agent"),
        (MemoryError(), "internal", "MemoryError inside the agent"),
    ],
)
def test_what_cannot_be_done_has_failed_with_the_reason(bench, error, expected, says):
    bench.control.does = fails_with(error)
    _, failed = bench.send("snapshot")
    assert (failed.data["status"], failed.data["code"], failed.data["text"]) == ("failed", expected, says)
    bench.control.does = lambda verb, arguments: {}
    assert statuses(bench.send("snapshot")) == ["accepted", "done"], "the next heavy one finds its place free"


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ({"when": Path("x")}, {"when": "x"}),
        ({"x": float("nan")}, {"left_out": "it cannot be written as JSON"}),
        ({"x": "y" * 5000}, {"left_out": "it has 5009 bytes"}),
    ],
)
def test_a_result_fits_into_an_answer(bench, result, told):
    bench.control.does = lambda verb, arguments: result
    assert bench.send("snapshot")[-1].data["result"] == told


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


def test_a_flood_is_met_with_one_note_a_second(tmp_path):
    bench = Bench(tmp_path, limits=Limits())
    for _ in range(10):
        for _ in range(500):
            bench.commands.receive(bench.incoming("ping"))
        bench.commands.pump()
        bench.clock.turn(0.5)
    bench.clock.turn(1)
    bench.commands.pump()
    notes = [reply for reply in bench.replies if reply.data["status"] == "suppressed"]
    assert len(notes) <= 6
    assert sum(note.data["count"] for note in notes) == bench.commands.counts["suppressed"]
    assert notes[0].topic == TOPICS.ack("flood")
    ran = len(bench.control.asked)
    assert 20 <= ran <= 20 + 10 * 5 + 1
    assert ran + bench.commands.counts["suppressed"] == 5_000
    bench.close()


def test_a_group_is_answered_after_a_while_in_order_and_by_each_device_at_its_own_time(tmp_path):
    bench = Bench(tmp_path)
    assert bench.send("snapshot", topic=f"{GROUP}snapshot") == []
    assert bench.control.verbs == ["snapshot"], "it runs at once; only the answer waits"
    bench.clock.turn(5)
    bench.commands.pump()
    assert statuses(bench.replies) == ["accepted", "done"]
    bench.replies.clear()
    seen = 0
    for _ in range(20):
        bench.send("ping", topic=f"{GROUP}ping")
    for _ in range(10):
        bench.clock.turn(0.5)
        bench.commands.pump()
        seen += 0 < len(bench.replies) < 40
    assert len(bench.replies) == 40
    told = [(reply.data["id"], reply.data["status"]) for reply in bench.replies]
    assert all(told.index((key, "accepted")) < told.index((key, "done")) for key, _ in told)
    assert seen >= 3, "spread over the time"
    bench.close()


def test_a_command_to_a_foreign_group_or_device_is_none_of_ours(bench):
    for topic in ("ea/v1/hall/_group/line5/cmd/reset", "ea/v1/hall/cam2/cmd/reset", "ea/v1/hall/cam1/desired", "x"):
        assert bench.send("reset", topic=topic) == []
    assert bench.commands.counts["foreign"] == 4
    assert bench.control.asked == []


def test_without_a_ledger_only_what_may_run_twice_runs_and_then_only_once(bench, tmp_path):
    bench.ledger.close()  # every call fails from here
    assert code(bench.send("rollback")) == "ledger"
    assert code(bench.send("load-adapter")) == "ledger"
    freeze = bench.incoming("freeze")
    first = bench.deliver(freeze)
    assert statuses(first) == ["accepted", "done"]
    assert bench.deliver(freeze) == first[-1:]
    assert bench.commands.submit_local("rollback", {}, "page")["status"] == "accepted"
    bench.commands.pump()
    assert bench.control.verbs == ["freeze", "rollback"]


def test_after_damage_nothing_runs_that_might_have_run_before(bench):
    """R5 holds although the ledger forgot: until every older command has expired, only the harmless are taken."""
    old = bench.incoming("rollback")
    bench.deliver(old)
    bench.ledger.close()
    bench.path.write_bytes(b"garbage" * 1000)
    bench.restart()
    assert code(bench.deliver(old)) == "ledger"
    assert statuses(bench.send("ping")) == ["accepted", "done"]
    bench.clock.turn(301)
    assert statuses(bench.send("rollback")) == ["accepted", "done"]
    assert bench.control.verbs == ["rollback", "ping", "rollback"]


def test_an_answer_that_cannot_be_handed_over_stops_nothing(bench):
    def broken(reply: object) -> None:
        raise OSError("no outbox")

    commands = Commands(bench.control, bench.ledger, TOPICS, broken, clock=bench.clock)
    commands.receive(bench.incoming("ping"))
    commands.pump()
    assert bench.control.verbs == ["ping"]
    assert commands.counts["unsent"] == 2


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
        assert time.monotonic() - began < 1
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
    began = time.thread_time()
    for _ in range(500):
        started.commands.receive(sound)
        started.commands.receive(huge)
    assert (time.thread_time() - began) / 1000 < 0.001


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
