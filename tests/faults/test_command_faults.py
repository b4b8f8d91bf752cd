"""Malicious commands and floods of them: rows 15 and 16 of the fault table."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_bench import ARGUMENTS, GROUP, SHA, TOPICS, Bench, RecordingControl, code
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spent import spending

from device_agents.answers import Reply
from device_agents.commands import Commands
from device_agents.desired import Desired
from device_agents.envelope import SystemClock
from device_agents.ledger import Ledger
from device_agents.mqtt import Incoming
from device_agents.request import Limits
from device_agents.settings import AgentSettings

CPU_S = 0.05
"""What one malicious command may cost."""
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
DEEP = b'{"v":1,"d":' + b'{"a":' * 2_000 + b"1" + b"}" * 2_001
TEXT = st.text(max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def body(**changed: Any) -> bytes:
    return json.dumps({"v": 1, "d": {}, **changed}).encode()


CORPUS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no JSON": ("reset", {"payload": b'{"v":1,'}, "malformed"),
    "not UTF-8": ("reset", {"payload": b'{"v":1,"d":{"x":"\xff"}}'}, "malformed"),
    "half a character": ("reset", {"payload": b'{"v":1,"d":{"x":"\\ud800"}}'}, "malformed"),
    "not a number": ("record", {"payload": b'{"v":1,"d":{"on":true,"seconds":NaN}}'}, "malformed"),
    "beyond all numbers": ("record", {"payload": b'{"v":1,"d":{"on":true,"seconds":1e999}}'}, "malformed"),
    "digits without end": ("record", {"payload": b'{"v":1,"d":' + b"9" * 10_000 + b"}"}, "malformed"),
    "ten megabytes": ("reset", {"payload": b'{"v":1,"d":"' + b"x" * 10_000_000 + b'"}'}, "too-large"),
    "a bomb of lists": ("reset", {"payload": b"[" * 16_000}, "malformed"),
    "a bomb of objects": ("reset", {"payload": DEEP}, "malformed"),
    "another version": ("reset", {"payload": body(v=2)}, "malformed"),
    "unknown verb": ("reset", {"topic": TOPICS.cmd("format-disk")}, "unknown-verb"),
    "a method of the code": ("reset", {"topic": TOPICS.cmd("submit_local")}, "unknown-verb"),
    "wrong type": ("freeze", {"payload": body(d={"on": "yes"})}, "bad-arguments"),
    "too many fields": ("reset", {"payload": body(d={f"x{n}": n for n in range(1_000)})}, "bad-arguments"),
    "too many labels": ("label-reveal", {"payload": body(d={"labels": [[1, 1]] * 2_000})}, "bad-arguments"),
    "expired": ("reset", {"expiry_s": 0}, "expired"),
    "without an expiry": ("reset", {"expiry_s": None}, "no-expiry"),
    "good for ever": ("reset", {"expiry_s": 2**32 - 1}, "far-expiry"),
    "without an id": ("reset", {"properties": (("reason", "x"),)}, "no-key"),
    "an id that is a path": ("reset", {"properties": (("idem", "../../x"), ("reason", "x"))}, "bad-key"),
    "an id that is a wildcard": ("reset", {"properties": (("idem", "#"), ("reason", "x"))}, "bad-key"),
    "without a reason": ("reset", {"properties": (("idem", "x"),)}, "no-reason"),
    "a name that is a path": (
        "load-adapter",
        {"payload": body(d={"file": "../../etc/passwd", "sha256": SHA})},
        "bad-arguments",
    ),
    "a name that is a whole path": (
        "load-adapter",
        {"payload": body(d={"file": "/etc/passwd", "sha256": SHA})},
        "bad-arguments",
    ),
    "a transfer that is a path": (
        "load-adapter",
        {"payload": body(d={"transfer": "..", "sha256": SHA})},
        "bad-arguments",
    ),
    "an address of a file": (
        "load-adapter",
        {"payload": body(d={"url": "file:///etc/passwd", "sha256": SHA})},
        "bad-arguments",
    ),
    "a slot that is a path": ("restore", {"payload": body(d={"slot": "../A"})}, "bad-arguments"),
    "an answer to a foreign topic": ("reset", {"response_topic": "bank/transfers"}, "reply-topic"),
    "an answer that is a command": ("reset", {"response_topic": "ea/v1/hall/cam2/cmd/reset"}, "reply-topic"),
    "an answer that is our own command": ("reset", {"response_topic": TOPICS.cmd("reset")}, "reply-topic"),
    "an answer that is a state": ("reset", {"response_topic": TOPICS.state}, "reply-topic"),
    "an answer to everybody": ("reset", {"response_topic": "ea/v1/#"}, "reply-topic"),
    "a foreign topic in the body": (
        "reset",
        {"payload": body(reply_to="bank/transfers")},
        "reply-topic",
    ),
    "a long answer topic": ("reset", {"response_topic": "ea/v1/" + "x/" * 20_000}, "bad-header"),
    "long correlation data": ("reset", {"correlation": b"x" * 60_000}, "bad-header"),
    "a long reason": ("reset", {"properties": (("idem", "x"), ("reason", "x" * 60_000))}, "bad-header"),
    "a reason that writes a line of its own": (
        "reset",
        {"properties": (("idem", "x"), ("reason", "fine\nroot did it"))},
        "bad-header",
    ),
}


@pytest.mark.fault(15)
@pytest.mark.parametrize("name", CORPUS)
def test_a_malicious_command_is_rejected_by_name_changes_nothing_and_costs_little(bench, name):
    """A malicious command gets a rejected ack and is counted; no state changes; less than 50 ms of CPU."""
    verb, changed, expected = CORPUS[name]
    incoming = bench.incoming(verb, **changed)
    before, files = bench.control.state_hash, _files(bench.path.parent)
    with spending() as spent:
        replies = bench.deliver(incoming)
    assert spent.cpu_s < CPU_S
    assert code(replies) == expected
    assert bench.control.state_hash == before
    assert _files(bench.path.parent) == files, "nothing was written but the ledger"
    assert bench.commands.counts["rejected"] == bench.commands.counts[f"rejected:{expected}"] == 1
    (reply,) = replies
    assert reply.topic.startswith(f"{TOPICS.root}/ack/")
    assert len(json.dumps(reply.data)) < 2_000
    assert len(reply.correlation or b"") <= 256


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.fault(15)
def test_a_retained_command_is_dropped_and_a_replayed_one_answered_from_the_ledger(bench):
    """Retained: dropped, counted, not answered. Replayed, in this process or the next: answered, not carried out."""
    assert bench.send("reset", retain=True) == []
    assert bench.send("reset", retain=True, topic=f"{GROUP}reset") == []
    assert bench.commands.counts["retained"] == 2
    captured = bench.incoming("reset")
    first = bench.deliver(captured)
    state = bench.control.state_hash
    for _ in range(3):
        assert bench.deliver(captured) == first[-1:]
        assert bench.deliver(replace(captured, expiry_s=300)) == first[-1:]
        bench.restart()
        bench.clock.turn(600)
    assert bench.control.state_hash == state
    assert bench.control.verbs == ["reset"]


@pytest.mark.fault(15)
def test_no_answer_to_a_rejection_can_be_taken_for_a_command(bench):
    """An answer that comes back as a command, to this device or another, is refused: no loop, no reflection."""
    bench.send("ping", topic=TOPICS.cmd("format-disk"))
    answer = json.dumps({"v": 1, "d": dict(bench.replies[-1].data)}).encode()
    assert code(bench.deliver(Incoming(TOPICS.cmd("reset"), answer, expiry_s=30))) in ("no-key", "bad-arguments")
    assert bench.control.asked == []


@pytest.mark.fault(15)
@settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
@given(
    verb=st.sampled_from([*ARGUMENTS, "reset ", "RESET", "x", "", "../reset"]),
    head=st.dictionaries(st.sampled_from(["v", "id", "by", "reason", "reply_to", "expires_ms"]), JSON, max_size=6),
    arguments=JSON,
    expiry=st.none() | st.integers(-5, 400),
    answer=st.none() | TEXT,
    properties=st.lists(st.tuples(st.sampled_from(["idem", "by", "reason", "x"]), TEXT), max_size=4),
    retain=st.booleans(),
    group=st.booleans(),
)
def test_whatever_is_sent_is_done_or_rejected_by_name(
    bench, verb, head, arguments, expiry, answer, properties, retain, group
):
    """Any JSON in any place: it is carried out once and told so, or rejected by name, and then nothing changed."""
    payload = json.dumps({"v": 1, **head, "d": arguments}).encode("utf-8", "surrogatepass")
    topic = (GROUP if group else f"{TOPICS.root}/cmd/") + verb
    before, asked = bench.control.state_hash, len(bench.control.asked)
    replies = bench.deliver(Incoming(topic, payload, retain, expiry, answer, b"c", tuple(properties)))
    bench.clock.turn(10)
    bench.commands.pump()
    statuses = [reply.data["status"] for reply in replies or bench.replies]
    if "done" not in statuses or len(bench.control.asked) == asked:
        assert bench.control.state_hash == before
    else:
        assert len(bench.control.asked) == asked + 1
        assert not retain and expiry is not None and 0 < expiry <= 300
    for reply in bench.replies:
        assert reply.topic.startswith("ea/v1/")
    bench.replies.clear()


@pytest.mark.fault(15)
@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
@given(document=JSON | st.fixed_dictionaries({"ver": st.integers() | JSON, "config": JSON}))
def test_whatever_is_desired_is_applied_whole_or_not_at_all(tmp_path, document):
    """Any JSON as a desired document: the settings stay valid, and stay what they were if it is refused."""
    file = AgentSettings.model_validate({"bundle": "b", "source": {"kind": "camera"}})
    desired = Desired(file, lambda settings: None, path=tmp_path / "desired.json")
    before, version = desired.settings, desired.applied_version
    outcome = desired.take(document)
    if not outcome.applied:
        assert (desired.settings, desired.applied_version) == (before, version)
        assert outcome.text
    assert len(json.dumps(desired.reported(slots={}, versions={}))) < 16_000


@pytest.mark.fault(16)
def test_a_flood_costs_little_is_bounded_and_answered_by_a_note_a_second(tmp_path):
    """5,000 commands a second: ten a second run, queues and answers stay bounded, the network's thread is not held."""
    control, replies, clock = RecordingControl(), list[Reply](), SystemClock()
    ledger = Ledger(tmp_path / "commands.db", clock=clock)
    commands = Commands(control, ledger, TOPICS, replies.append, clock=clock)
    flood = [
        Incoming(TOPICS.cmd("ping"), b'{"v":1}', expiry_s=30, properties=(("idem", f"k{number}"),))
        for number in range(10_000)
    ]
    threads = threading.active_count()
    commands.start()
    began, spent, most_waiting = time.monotonic(), 0.0, 0
    for number, incoming in enumerate(flood):
        at = time.thread_time()
        commands.receive(incoming)
        spent += time.thread_time() - at
        if number % 250 == 249:
            most_waiting = max(most_waiting, commands._inbox.qsize() + commands._waiting.qsize())
            time.sleep(0.05)
    deadline = time.monotonic() + 5
    while not any(reply.data["status"] == "suppressed" for reply in replies) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert commands.stop(5)
    lasted = time.monotonic() - began
    assert spent / len(flood) < 0.0002, "the network's thread only leaves a letter"
    limits, counts = commands.limits, commands.counts
    assert counts["accepted"] <= limits.burst + limits.rate * lasted + 1
    assert counts["accepted"] == len(control.asked)
    assert counts["accepted"] + counts["suppressed"] == len(flood)
    assert most_waiting <= limits.inbox + limits.queue
    notes = [reply for reply in replies if reply.data["status"] == "suppressed"]
    assert 1 <= len(notes) <= lasted + 2
    assert len(replies) == 2 * counts["accepted"] + len(notes)
    assert threading.active_count() == threads
    ledger.close()


@pytest.mark.fault(16)
def test_a_flood_of_ten_megabyte_commands_is_not_kept_in_memory(bench):
    """What waits to be looked at is small, however large what came was."""
    huge = bench.incoming("ping", payload=bytes(10_000_000), response_topic="ea/v1/" + "x" * 60_000)
    for _ in range(60):
        bench.commands.receive(replace(huge, properties=(("idem", "x" * 60_000),) * 100))
    waiting = list(bench.commands._inbox.queue)
    assert len(waiting) == 60
    assert all(not letter.payload and not letter.properties and not letter.response_topic for letter in waiting)


@pytest.mark.fault(16)
def test_the_flood_of_one_sender_ends_and_the_next_command_is_served(tmp_path):
    """After a flood the device answers as before."""
    bench = Bench(tmp_path, limits=Limits())
    for _ in range(5_000):
        bench.commands.receive(bench.incoming("ping"))
    bench.commands.pump()
    bench.clock.turn(1)
    bench.replies.clear()
    replies = bench.send("snapshot")
    assert [reply.data["status"] for reply in replies if "verb" in reply.data] == ["accepted", "done"]
    bench.close()
