"""The ring: who gives way, who waits, and nobody for ever."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_adapt.runtime.ring import Ring


@pytest.mark.parametrize(("policy", "kept"), [("newest", [3, 4, 5]), ("oldest", [1, 2, 3]), ("block", [1, 2, 3])])
def test_the_policy_says_what_a_full_ring_keeps(policy, kept):
    ring: Ring[int] = Ring(3, policy)
    taken = [ring.put(item) for item in (1, 2, 3, 4, 5)]
    assert taken == [True] * 3 + [policy == "newest"] * 2
    assert ring.dropped == (0 if policy == "block" else 2) and len(ring) == 3
    assert ring.take(9) == kept and ring.take(9) == []


@given(st.sampled_from(["newest", "oldest", "block"]), st.lists(st.integers(-1, 3), max_size=60))
def test_nothing_is_lost_that_is_not_counted_and_the_order_stays(policy, moves):
    ring: Ring[int] = Ring(4, policy)
    out, refused, number = [], 0, 0
    for move in moves:
        if move < 0:
            refused += not ring.put(number) and policy == "block"
            number += 1
        else:
            out += ring.take(move)
        assert len(ring) <= 4
    out += ring.take(9)
    assert out == sorted(set(out)) and len(out) + ring.dropped + refused == number


def test_block_waits_for_room_and_no_longer_than_it_shall():
    ring: Ring[int] = Ring(1, "block")
    ring.put(1)
    started = time.monotonic()
    assert not ring.put(2, 0.05)
    assert 0.04 < time.monotonic() - started < 2
    taker = threading.Timer(0.02, ring.take)
    taker.start()
    assert ring.put(2, 5)
    taker.join()
    assert ring.take() == [2]


def test_take_waits_for_the_first_item_alone():
    ring: Ring[int] = Ring(8)
    putter = threading.Timer(0.02, ring.put, [1])
    putter.start()
    started = time.monotonic()
    assert ring.take(8, 5) == [1] and time.monotonic() - started < 2
    putter.join()
    assert ring.take(8, 0.01) == []


def test_a_closed_ring_gives_out_what_is_left_and_wakes_everybody():
    ring: Ring[int] = Ring(1, "block")
    ring.put(1)
    answers: list[object] = []
    threads = [threading.Thread(target=lambda: answers.append(ring.put(2, 5)))]
    for thread in threads:
        thread.start()
    ring.close()
    for thread in threads:
        thread.join(5)
    assert answers == [False] and ring.closed
    assert ring.take(1, 5) == [1]
    started = time.monotonic()
    assert ring.take(1, 5) == [] and time.monotonic() - started < 3 and not ring.put(3)
