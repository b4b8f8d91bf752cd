"""Somebody else with our name: noticed by the births that we did not send."""

from __future__ import annotations

import json

from device_agents.connecting import Rival


def birth(boot, id_):
    return json.dumps({"v": 1, "id": id_, "boot": boot, "d": {}}).encode()


def test_rival_needs_two_births_of_one_other_process():
    rival = Rival("a")
    assert rival.met(birth("b", "1"), first_connection=True) is None, "left by a predecessor"
    assert rival.met(birth("a", "2"), first_connection=False) is None, "our own"
    assert rival.met(birth("b", "3"), first_connection=False) is None
    assert rival.met(birth("b", "3"), first_connection=False) is None, "the same one, restored by the broker"
    assert rival.met(birth("c", "4"), first_connection=False) is None
    assert rival.met(b"garbage", first_connection=False) is None
    assert rival.met(birth("b", "5"), first_connection=False) == "b"


def test_of_two_rivals_one_stays():
    first, second = Rival("a"), Rival("b")
    assert [first.met(birth("b", str(n)), first_connection=False) for n in range(2)] == [None, "b"]
    assert [second.met(birth("a", str(n)), first_connection=False) for n in range(7)] == [None] * 7
    assert second.met(birth("a", "7"), first_connection=False) == "a", "the other one never gave up"


def test_births_that_somebody_makes_up_fill_no_memory():
    rival = Rival("a")
    for number in range(1000):
        assert rival.met(birth(f"b{number}", "1"), first_connection=False) is None
    assert len(rival._births) <= 16
    for odd in (None, 7, ["b"], "", "b" * 65):
        assert [rival.met(birth(odd, str(n)), first_connection=False) for n in range(9)] == [None] * 9
        assert [rival.met(birth("x", odd), first_connection=False) for _ in range(9)] == [None] * 9
