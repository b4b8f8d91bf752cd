"""The comparison of ways to learn beside the answers: its form, and that each way does what it says."""

from __future__ import annotations

from benchmarks.agent import SHIFTS, WAYS, agent_latency


def test_every_way_answers_the_same_frames_and_only_two_learn(device_bundle, tiny_data):
    figures = agent_latency(device_bundle, tiny_data, method="moments", fps=200, frames=40, rounds=1)
    assert [(row["pace"], row["learning"]) for row in figures["rows"]] == [
        (pace, way) for pace in ("camera", "flat out") for way in WAYS
    ]
    assert all(row["answers"] == 40 and row["p50_ms"] > 0 for row in figures["rows"])
    assert all(row["p50_ratio"] == row["p99_ratio"] == 1 for row in figures["rows"] if row["learning"] == "off")
    steps = {way: facts["steps"] for way, facts in figures["facts"].items()}
    assert steps["off"] == 0 < min(steps["thread"], steps["process"])
    assert len(SHIFTS) > 1
