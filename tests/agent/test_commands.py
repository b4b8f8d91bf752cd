"""Commands from the network: what is answered, what is refused, and that nothing runs twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_bench import ARGUMENTS, GROUP, TOPICS, Bench, code, fails_with, statuses

from device_agents.commands import Commands
from device_agents.mqtt import Incoming
from device_agents.request import Limits, may_answer
from edge_adapt.errors import ArtifactError, ConfigError, StateError


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
