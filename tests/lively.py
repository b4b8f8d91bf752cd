"""A board with a day's work on it, and a control that remembers what it was asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from device_agents.board import Board, Point

START = 1_795_262_400_000
LABELS = ("coffee mug", "espresso machine", "kettle", "teapot")


class Asked:
    """Plays the agent behind the buttons."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any], str]] = []
        self.error: Exception | None = None

    def execute(self, verb: str, arguments: Mapping[str, Any], *, by: str) -> dict[str, Any]:
        self.asked.append((verb, dict(arguments), by))
        if self.error is not None:
            raise self.error
        return {"version": 42}


def answers(board: Board, count: int, start: int = START) -> None:
    """Answers, five a second, with a change of the stream in the middle; the last one with its frame."""
    rng = np.random.default_rng(1)
    for index in range(count):
        shift = 0.35 if 0.4 < index / count < 0.55 else 0.0
        point = Point(
            ts=start + 200 * index,
            label=LABELS[index // 70 % 4],
            confidence=float(np.clip(0.91 - shift + rng.normal(0, 0.05), 0.05, 0.999)),
            ood=float(max(0.2, 2.1 + shift * 14 + rng.normal(0, 0.35))),
            latency_ms=float(18 + rng.gamma(2, 2.2)),
            version=38 + (index > count // 2) + (index > 3 * count // 4),
        )
        frame = rng.integers(0, 255, (60, 80, 3)).astype(np.uint8) if index == count - 1 else None
        board.answered(point, frame)


def lively_board(count: int = 300) -> Board:
    """Everything known."""
    board = Board()
    answers(board, count)
    board.tell("state", "Ready after warm-up", START, engine="onnxruntime")
    board.tell("drift", "The stream has changed", START + 25_000, "warning", share=0.41)
    board.tell("rollback", "Adapter A was rolled back", START + 30_000, "error", slot="A", guard="collapse")
    board.update(
        state="ready",
        mode="bounded_auto",
        site="plant-3",
        device="line-camera-07",
        boot="3f9a11c2",
        uptime_s=93_784.0,
        bundle="efficientnet-lite0",
        bundle_id="8c1f",
        method="auto+label_shift",
        engine="onnxruntime",
        slot="adapter",
        version=41,
        answered=1_403_211,
        frames={"dropped": 12, "frozen sensor": 3},
        fps=14.9,
        latency_ms={"p50": 21.2, "p95": 29.0, "p99": 36.7},
        learn={
            "looks": 18_211,
            "steps": 17_904,
            "shed": 307,
            "waiting": 2,
            "ms_per_s": 163.0,
            "allowed_ms_per_s": 250.0,
        },
        guards={"collapse": 1, "ood gate": 214},
        ood=0.03,
        confidence=0.91,
        estimate={"value": 91.4, "low": 88.2, "high": 94.1},
        host={"rss_mb": 412.3, "threads": 14, "fds": 61, "temperature_c": 58.5, "power_w": 7.4},
        link="online",
        waiting=5,
        snapshot_age_s=12.0,
        restarts=1,
    )
    return board
