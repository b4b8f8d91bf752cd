"""A short cut of the fuzz of configurations; `config_fuzz.py` is the long one."""

from __future__ import annotations

import subprocess
import sys

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


def test_the_program_prints_a_table_and_sees_both_outcomes():
    command = [sys.executable, config_fuzz.__file__, "--count", "60", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    count, accepted, refused, crashed, _ = (cell.strip() for cell in done.stdout.splitlines()[2].strip("|").split("|"))
    assert count == "60" and int(accepted) > 0 and int(refused) > 0 and crashed == "0"
