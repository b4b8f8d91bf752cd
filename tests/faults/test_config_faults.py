"""Fault row 30: a configuration that is wrong, or being written, when it is read again."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
from agents import child, settings, stream, until

from device_agents.settings import AgentSettings
from edge_adapt.config import changes, load_config
from edge_adapt.errors import ConfigError

__all__ = ["child", "settings", "stream"]
EXAMPLE = Path(__file__).resolve().parents[2] / "packaging" / "agent.example.yaml"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "agent.yaml"
    path.write_bytes(EXAMPLE.read_bytes())
    return path


@pytest.mark.fault(30)
def test_a_file_that_is_cut_anywhere_within_a_line_is_refused_with_a_line(config):
    """Whatever byte a slow writer has got to, settings that nobody wrote never take force."""
    whole = config.read_bytes()
    for end in range(len(whole)):
        config.write_bytes(whole[:end])
        if whole[:end].endswith(b"\n"):
            continue  # looks whole: see the next test
        with pytest.raises(ConfigError, match=r"agent\.yaml:\d+: "):
            load_config(config, AgentSettings)


@pytest.mark.fault(30)
def test_a_file_that_is_cut_between_lines_is_refused_or_says_nothing_that_was_not_written(config):
    """Such a file looks whole. What is missing from it has its default, and what is there its value."""
    whole = config.read_bytes()
    settings = load_config(config, AgentSettings).model_dump()
    outcomes = []
    for end in (place + 1 for place, byte in enumerate(whole) if byte == ord("\n")):
        config.write_bytes(whole[:end])
        try:
            part = load_config(config, AgentSettings).model_dump(exclude_unset=True)
        except ConfigError as error:
            outcomes.append(f"{config}:" in str(error))
            continue
        outcomes.append(_agrees(part, settings))
    assert all(outcomes) and len(outcomes) == whole.count(b"\n")


@pytest.mark.fault(30)
def test_a_reload_of_a_bad_file_leaves_the_old_settings_alone(config):
    """Every error is told with its line, and the settings that are in force are a value that nothing writes to."""
    old = load_config(config, AgentSettings)
    text = config.read_text()
    config.write_text(text.replace("learn_ms_per_s: 250", "learn_ms_per_s: -1").replace("mode: shadow", "mode: shadwo"))
    with pytest.raises(ConfigError) as caught:
        load_config(config, AgentSettings)
    told = str(caught.value)
    lines = config.read_text().splitlines()
    mode, budget = (next(n for n, line in enumerate(lines, 1) if word in line) for word in ("shadwo", "ms_per_s: -1"))
    assert f"{config}:{mode}: mode is 'shadwo', expected 'shadow', 'recommend' or 'bounded_auto'" in told
    assert f"{config}:{budget}: budget.learn_ms_per_s is -1, expected greater than 0" in told
    config.write_text(text.replace("learn_ms_per_s: 250", "learn_ms_per_s: 100"))
    (change,) = changes(old, load_config(config, AgentSettings))
    assert str(change) == "budget.learn_ms_per_s: 250.0 -> 100.0 (now)"
    assert old.budget.learn_ms_per_s == 250.0


@pytest.mark.fault(30)
def test_a_running_agent_that_reads_a_half_written_file_names_the_line_and_answers_on(child, tmp_path):
    """R1: SIGHUP too early changes nothing but the log; SIGHUP afterwards takes what was written."""
    answers, config = tmp_path / "answers.jsonl", tmp_path / "child" / "agent.yaml"
    agent = child("--answers", str(answers), log_level="info")
    until(lambda: answers.exists() and answers.stat().st_size)
    text = config.read_text().replace('"bounded_auto"', '"shadow"')
    config.write_text(text[: len(text) // 2])
    agent.signal(signal.SIGHUP)
    until(lambda: re.search(r"the configuration was not reloaded, the old one stays: .*agent\.yaml:\d+: ", agent.text))
    size = answers.stat().st_size
    until(lambda: answers.stat().st_size > size, "it answers no more")
    assert "mode is shadow" not in agent.text
    config.write_text(text)
    agent.signal(signal.SIGHUP)
    until(lambda: "mode is shadow, was bounded_auto" in agent.text)
    assert agent.running()


def _agrees(part: Any, whole: Any) -> bool:
    """True if whatever the part says, the whole says too; None and () are no saying."""
    if isinstance(part, dict):
        return all(_agrees(value, whole[name]) for name, value in part.items())
    return part in (None, ()) or part == whole
