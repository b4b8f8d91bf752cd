"""A short cut of `make fuzz`: 2,000 payloads over every topic that an agent listens to."""

from __future__ import annotations

import random

import payload_fuzz
from payload_fuzz import TARGETS, Source, fuzz


def test_payloads_raise_nothing_and_what_is_wrong_changes_nothing(tmp_path):
    result = fuzz(2_000, 1, tmp_path)
    assert result.failures == [], result.failures[0]
    assert {target for target, _ in result.outcomes} == set(TARGETS)
    told = {outcome for _, outcome in result.outcomes}
    assert {"done", "applied", "taken", "frame", "repeated", "retained", "malformed", "reply-topic"} <= told
    assert result.slowest_ms < 250


def test_the_same_seed_draws_the_same_payloads():
    one, other = Source(random.Random(3)), Source(random.Random(3))
    assert [one.draw(0, 1) for _ in range(200)] == [other.draw(0, 1) for _ in range(200)]


def test_a_change_that_nobody_answers_for_is_found(tmp_path, monkeypatch):
    """The fuzzer sees what it is for: a reader that obeys retained commands, and one that raises."""
    real = payload_fuzz.Agent.take
    monkeypatch.setattr(payload_fuzz.Agent, "take", lambda agent, incoming: real(agent, incoming) and "malformed")
    assert any("something changed" in failure for failure in fuzz(100, 0, tmp_path).failures)
    monkeypatch.setattr(payload_fuzz.Agent, "take", lambda agent, incoming: 1 // 0)
    assert len(fuzz(10, 0, tmp_path).failures) == 10


def test_main_prints_a_table_and_keeps_the_figures(tmp_path, capsys):
    report = tmp_path / "fuzz.json"
    assert payload_fuzz.main(50, 0, report) == 0
    assert "50 payloads in" in capsys.readouterr().out
    assert '"failures": 0' in report.read_text()
