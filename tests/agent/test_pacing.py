"""Pure timers of the link."""

from __future__ import annotations

from device_agents.pacing import Backoff, Bucket, Suppressed


def test_backoff_doubles_its_bound_from_1_to_60_seconds():
    backoff = Backoff(1.0, 60.0, 60.0, uniform=lambda _, high: high)
    assert [backoff.wait_ms() for _ in range(8)] == [1000, 2000, 4000, 8000, 16000, 32000, 60000, 60000]


def test_backoff_is_full_jitter():
    seen = []
    backoff = Backoff(1.0, 60.0, 60.0, uniform=lambda low, high: seen.append((low, high)) or low)
    assert backoff.wait_ms() == 0 and seen == [(0.0, 1.0)]


def test_backoff_starts_over_only_after_a_stable_connection():
    backoff = Backoff(1.0, 60.0, 60.0, uniform=lambda _, high: high)
    waits = [backoff.wait_ms(lasted_ms=lasted) for lasted in (0, 0, 59_999, 60_000, 0)]
    assert waits == [1000, 2000, 4000, 1000, 2000]


def test_what_needs_a_person_waits_longest_at_once():
    assert Backoff(1.0, 60.0, 60.0).wait_ms(hopeless=True) >= 30_000


def test_bucket_gives_its_burst_then_its_rate():
    bucket = Bucket(rate=5, burst=50)
    assert sum(bucket.take(0) for _ in range(200)) == 50
    assert sum(bucket.take(ms) for ms in range(1, 10_001)) == 50
    assert sum(bucket.take(1e9) for _ in range(200)) == 50


def test_suppressed_is_told_once_calm_or_every_ten_seconds():
    held = Suppressed()
    for ms in range(0, 500, 100):
        held.add("guard", ms)
    assert held.due(600) == {}
    assert held.due(1400) == {"guard": 5}
    assert held.due(9000) == {}
    told = 0
    for ms in range(20_000, 45_000, 100):
        held.add("drift", ms)
        told += bool(held.due(ms))
    assert told == 2
