"""A short cut of `make fuzz`: 2,000 payloads over every topic that an agent listens to."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

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


def test_the_long_check_prints_tables_and_keeps_its_figures(tmp_path):
    program = Path(__file__).parents[1] / "long" / "fuzz.py"
    command = [sys.executable, str(program), "--short", "--count", "100", "--json", str(tmp_path / "fuzz.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "100 payloads in" in done.stdout and "| configurations |" in done.stdout
    figures = json.loads((tmp_path / "fuzz.json").read_text())
    assert figures["payloads"] == 100 and figures["failures"] == 0 and sum(figures["configurations"].values()) == 20
    assert "| promise" in (tmp_path / "fuzz.md").read_text()
