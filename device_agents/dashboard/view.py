"""What the page, `/statez` and `edge-adapt top` show, made from the board, and as JSON. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_agents.board import Board, Point, Status

Array = NDArray[Any]
BINS = 28
POINTS_PER_MESSAGE = 60
"""Answers shown in one message at most; of more, every n-th is shown."""


@dataclass(frozen=True)
class Cursor:
    """How far a reader has read. The board numbers events, not points; a point is found again by identity."""

    event: int = 0
    point: Point | None = None
    frame: Point | None = None
    status: Status | None = None


def statez(board: Board) -> dict[str, Any]:
    """Everything at once."""
    return {
        "status": board.status.as_dict(),
        "points": [point_row(point) for point in board.points],
        "events": [asdict(event) for event in board.events()],
        "latency": latency(board.latencies_ms),
    }


def news(board: Board, read: Cursor) -> tuple[dict[str, Any], Cursor]:
    """What changed since `read`, and where reading stands now; an empty message if nothing did."""
    status, points, events, latest = board.status, board.points, board.events(read.event), board.latest
    new = newer(points, read.point)
    frame = latest[1] if latest else None
    message: dict[str, Any] = {}
    if status is not read.status:
        message["status"] = status.as_dict()
    if new:
        message["points"] = [point_row(point) for point in thinned(new, POINTS_PER_MESSAGE if read.point else len(new))]
        message["latency"] = latency(board.latencies_ms)
    if events:
        message["events"] = [asdict(event) for event in events]
    if frame is not read.frame:
        message["frame"] = True
    cursor = Cursor(
        event=events[-1].number if events else read.event,
        point=points[-1] if points else None,
        frame=frame,
        status=status,
    )
    return message, cursor


def newer(points: Sequence[Point], last: Point | None) -> list[Point]:
    """Points behind `last`; all of them if it is not there any more."""
    for index in range(len(points) - 1, -1, -1):
        if points[index] is last:
            return list(points[index + 1 :])
    return list(points)


def thinned(points: list[Point], most: int) -> list[Point]:
    """At most `most` of them, evenly taken; the newest one always."""
    stride = math.ceil(len(points) / most) if most else 1
    return points[::-1][::stride][::-1] if stride > 1 else points


def point_row(point: Point) -> list[Any]:
    """ts, label, confidence, ood, latency_ms, version: short names cost nothing on the wire if there are none."""
    return [point.ts, point.label, point.confidence, point.ood, point.latency_ms, point.version]


def latency(values_ms: Array) -> dict[str, Any] | None:
    """Histogram of the latest answers with its p50, p95 and p99; None before the first.

    Bins are even, from 0 to a round number above p99: what is slower is counted as `above`, and shifts no scale.
    """
    values = values_ms[np.isfinite(values_ms)]
    if not len(values):
        return None
    p50, p95, p99 = (float(value) for value in np.percentile(values, (50, 95, 99)))
    top = round_up(p99 * 1.25)
    counts, _ = np.histogram(values, BINS, (0.0, top))
    return {
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "top": top,
        "counts": counts.tolist(),
        "above": int((values > top).sum()),
        "n": len(values),
    }


def round_up(value: float) -> float:
    """The next of 1, 2, 3, 4, 5, 6, 8 times a power of ten: scales stand still while figures move a little."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 2, 3, 4, 5, 6, 8, 10) if value <= step * power), 10 * power)


def readiness(status: Status) -> tuple[bool, str]:
    """True if answers may be expected, and why or why not. Ready does not need frames; degraded must prove itself."""
    if status.state == "ready":
        return True, "ready"
    why = ", ".join(status.why) or "no reason given"
    if status.state == "degraded":
        flowing = bool(status.fps)
        return flowing, f"degraded ({why}), answers {'flow' if flowing else 'do not flow'}"
    return False, f"{status.state} ({why})" if status.why else status.state


def plain(value: Any) -> Any:
    """The value with everything that JSON cannot hold replaced: NaN and infinity by null, unknown things by text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def encode(value: Any) -> bytes:
    """As JSON, without a line break: one line of server-sent events holds it."""
    try:
        text = _json(value)
    except (TypeError, ValueError):  # rare, and looking for it each time would cost more than all the rest
        text = _json(plain(value))
    return text.encode("utf-8", "replace")


_json = partial(json.dumps, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
