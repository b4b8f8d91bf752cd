"""A short cut of the fuzz of configurations; `config_fuzz.py` is the long one."""

from __future__ import annotations

import config_fuzz
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32))
def test_a_mutated_example_gives_settings_or_a_config_error(seed):
    assert config_fuzz.outcome(config_fuzz.mutated(seed, config_fuzz.EXAMPLE.read_bytes())) in ("accepted", "refused")


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace"))))
def test_any_bytes_give_settings_or_a_config_error(data):
    assert config_fuzz.outcome(data) == "refused"


def test_it_sees_both_outcomes_and_whatever_else_comes_out(monkeypatch):
    found = config_fuzz.fuzz(60, 7)
    assert found.outcomes["accepted"] > 0 and found.outcomes["refused"] > 0 and not found.crashes
    monkeypatch.setattr(config_fuzz, "parse_config", lambda *given, **facts: 1 // 0)
    assert len(config_fuzz.fuzz(10, 7).crashes) == 10
