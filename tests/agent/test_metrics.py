"""What Prometheus would read, parsed back by its own parser."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from lively import START, lively_board
from prometheus_client.parser import text_string_to_metric_families

from device_agents.board import Board, Point, State
from device_agents.metrics import Metrics


def samples(board: Board) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels) -> value."""
    found = {}
    for family in text_string_to_metric_families(Metrics(board).text().decode()):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def value(found: dict[Any, float], name: str, **labels: str) -> float:
    return found[f"edge_adapt_{name}", tuple(sorted(labels.items()))]


def test_everything_on_the_board_is_told_in_base_units() -> None:
    found = samples(lively_board())
    for name, labels, expected in (
        ("answered_total", {}, 1_403_211),
        ("restarts_total", {}, 1),
        ("frames_refused_total", {"reason": "dropped"}, 12),
        ("frames_refused_total", {"reason": "frozen sensor"}, 3),
        ("learn_looks_total", {}, 18_211),
        ("learn_steps_total", {}, 17_904),
        ("learn_shed_total", {}, 307),
        ("learn_queue", {}, 2),
        ("learn_used_ratio", {}, 0.163),
        ("learn_allowed_ratio", {}, 0.25),
        ("guard_events_total", {"guard": "ood gate"}, 214),
        ("ood_ratio", {}, 0.03),
        ("estimated_accuracy_ratio", {"bound": "low"}, 0.882),
        ("estimated_accuracy_ratio", {"bound": "value"}, 0.914),
        ("answer_latency_quantile_seconds", {"quantile": "0.99"}, 0.0367),
        ("resident_memory_bytes", {}, 412.3 * 2**20),
        ("temperature_celsius", {}, 58.5),
        ("outbox_messages", {}, 5),
        ("frames_per_second", {}, 14.9),
        ("link", {"link": "online"}, 1),
        ("slot", {"slot": "adapter"}, 1),
    ):
        assert value(found, name, **labels) == pytest.approx(expected), name


def test_one_state_is_one_and_all_others_are_zero() -> None:
    board = Board()
    for state in get_args(State):
        board.update(state=state)
        found = samples(board)
        states = {known: value(found, "state", state=known) for known in get_args(State)}
        assert states == {known: float(known == state) for known in get_args(State)}


def test_the_window_of_latencies_adds_up() -> None:
    board = Board()
    for latency in (0.5, 1.0, 3.0, 30.0, 7000.0):
        board.answered(Point(START, "a", 0.9, None, latency, 1))
    found = samples(board)
    buckets = {dict(labels)["le"]: count for (name, labels), count in found.items() if name.endswith("_seconds_bucket")}
    assert (buckets["0.001"], buckets["0.005"], buckets["0.05"], buckets["5"], buckets["+Inf"]) == (2, 3, 4, 4, 5)
    assert list(buckets.values()) == sorted(buckets.values())
    assert value(found, "answer_latency_seconds_gcount") == 5
    assert value(found, "answer_latency_seconds_gsum") == pytest.approx(7.0345)


def test_what_is_not_known_is_left_out() -> None:
    names = {name for name, _ in samples(Board())}
    for absent in ("estimated_accuracy_ratio", "ood_ratio", "frames_per_second", "resident_memory_bytes"):
        assert f"edge_adapt_{absent}" not in names
    assert "edge_adapt_answered_total" in names


def test_names_from_outside_cannot_break_the_text() -> None:
    board = Board()
    board.update(
        guards={'evil"} 1\nedge_adapt_fake 7 # {': 3}, device="line\nbreak\\", latency_ms={"p50": float("nan")}
    )
    board.answered(Point(START, "a", 0.9, None, float("nan"), 1))
    found = samples(board)
    assert value(found, "guard_events_total", guard='evil"} 1\nedge_adapt_fake 7 # {') == 3
    assert np.isnan(value(found, "answer_latency_quantile_seconds", quantile="0.5"))
    assert not any(name == "edge_adapt_fake" for name, _ in found)


def test_every_family_is_documented_and_ours() -> None:
    families = list(text_string_to_metric_families(Metrics(lively_board()).text().decode()))
    assert len(families) > 20
    for family in families:
        assert family.name.startswith("edge_adapt"), family.name
        if not family.name.endswith(("_gcount", "_gsum")):
            assert family.documentation.endswith("."), family.name


def test_two_agents_in_one_process_do_not_mix() -> None:
    one, other = Board(), Board()
    one.update(answered=1)
    other.update(answered=2)
    first, second = Metrics(one), Metrics(other)
    assert b"answered_total 1.0" in first.text()
    assert b"answered_total 2.0" in second.text()
