"""The envelope: what leaves is complete and finite, what comes in is bounded and plain."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spent import spending

from device_agents.envelope import DEEPEST, Envelopes, SystemClock, as_historic, new_ulid, unwrap
from edge_adapt.errors import ConfigError

LIMIT = 16_384


class Still:
    """A clock that stands."""

    def __init__(self, wall: int = 1_800_000_000_000) -> None:
        self.wall = wall

    def wall_ms(self) -> int:
        return self.wall

    def mono_ms(self) -> int:
        return 77

    def quality(self) -> Any:
        return "rtc"


def test_every_field_is_there():
    text = Envelopes("b0b0b0b0", Still()).wrap({"a": 1})
    told = json.loads(text)
    assert len(told.pop("id")) == 26
    assert told == {
        "v": 1, "seq": 1, "boot": "b0b0b0b0", "ts": 1_800_000_000_000, "mono": 77, "clk": "rtc", "hist": False,
        "d": {"a": 1},
    }  # fmt: skip


def test_seq_has_no_gap_and_a_retained_value_takes_none():
    envelopes = Envelopes("b", Still())
    numbers = [json.loads(envelopes.wrap({}, numbered=n))["seq"] for n in (True, False, True, False, False, True)]
    assert numbers == [1, 1, 2, 2, 2, 3]


def test_seq_is_unique_across_threads():
    envelopes = Envelopes("b", Still())
    with ThreadPoolExecutor(8) as pool:
        seqs = list(pool.map(lambda _: json.loads(envelopes.wrap({}))["seq"], range(400)))
    assert sorted(seqs) == list(range(1, 401))


def test_nan_becomes_null_and_is_counted():
    envelopes = Envelopes("b", Still())
    told = json.loads(envelopes.wrap({"a": float("nan"), "b": [1.0, float("inf")], "c": np.array([np.nan, 2.0])}))
    assert told["d"] == {"a": None, "b": [1.0, None], "c": [None, 2.0]}
    assert envelopes.not_finite == 3


def test_numpy_sets_and_paths_can_be_told():
    told = json.loads(Envelopes("b", Still()).wrap({"n": np.float32(0.5), "s": {"b", "a"}, "p": LIMIT.__class__}))
    assert told["d"] == {"n": 0.5, "s": ["a", "b"], "p": "<class 'int'>"}


def test_a_late_payload_differs_in_one_field():
    fresh = Envelopes("b", Still()).wrap({"text": '"hist":false'})
    told, late = json.loads(fresh), json.loads(as_historic(fresh))
    assert late == {**told, "hist": True}


def test_ulids_sort_by_time_and_differ():
    early, late = Still(1_700_000_000_000), Still(1_700_000_000_001)
    assert new_ulid(early) < new_ulid(late)
    assert len({new_ulid(early) for _ in range(1000)}) == 1000


def test_the_system_clock_is_steady_and_says_how_good_it_is(monkeypatch):
    clock = SystemClock()
    assert clock.quality() in ("sync", "rtc")
    assert clock.mono_ms() <= clock.mono_ms()
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    assert clock.quality() == "unsync"


@pytest.mark.parametrize(
    ("payload", "names"),
    [
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"", "no JSON"),
        (b"[]", "not an object"),
        (b"{}", "v None"),
        (b'{"v":2}', "v 2"),
        (b'{"v":true}', "v True"),
        (b'{"v":"1"}', "v '1'"),
        (b'{"v":1,"d":NaN}', "no JSON number"),
        (b'{"v":1,"d":1e999}', "beyond"),
        (b'{"v":1,"d":"\\ud800"}', "surrogate"),
        (b'{"v":1,"d":' + b"9" * 5000 + b"}", "no JSON"),
        (b'{"v":1,"d":' + b"[" * 8000 + b"]" * 8000 + b"}", "deeper"),
        (b'{"v":1,"d":' + b"[" * DEEPEST + b"]" * DEEPEST + b"}", "deeper"),
        (b'{"v":1,"d":"' + b"x" * LIMIT + b'"}', "bytes"),
    ],
)
def test_hostile_payloads_are_refused_by_name_and_quickly(payload, names):
    with spending() as spent, pytest.raises(ConfigError, match=names):
        unwrap(payload, limit=LIMIT)
    assert spent.cpu_s < 0.05


def test_unknown_fields_and_the_deepest_nesting_are_taken():
    payload = b'{"v":1,"new":0,"d":' + b"[" * (DEEPEST - 1) + b"]" * (DEEPEST - 1) + b"}"
    assert unwrap(payload, limit=LIMIT)["new"] == 0


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_whatever_comes_in_only_a_config_error_comes_out(payload):
    with suppress(ConfigError):
        assert unwrap(payload, limit=LIMIT)["v"] == 1


@given(
    st.dictionaries(
        st.text(max_size=5), st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), st.lists)
    )
)
def test_what_is_wrapped_can_be_unwrapped(data):
    payload = Envelopes("b", Still()).wrap(data)
    with suppress(ConfigError):  # half a character: Python allows it, we send it escaped, and refuse it coming in
        assert unwrap(payload, limit=1 << 20)["d"].keys() == data.keys()
