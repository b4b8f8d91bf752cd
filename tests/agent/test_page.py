"""What the page tells over real HTTP, and its life."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from lively import START, Asked, lively_board
from page_client import Client
from PIL import Image

from device_agents.board import Board, Point
from device_agents.dashboard import routes, view
from device_agents.dashboard.picture import SIDE, png
from device_agents.dashboard.server import Page
from device_agents.settings import PageSettings
from edge_adapt.errors import ConfigError


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client(lively_board())
    yield made
    made.page.stop()


def test_the_page_is_one_file_that_needs_nothing_from_elsewhere(client: Client) -> None:
    status, headers, body = client.ask("/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"<!-- style -->" not in body
    assert b"<!-- script -->" not in body
    assert not re.search(rb"""(src|href)=["'](https?:)?//""", body)
    assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")
    assert b"innerHTML" not in body
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"


def test_statez_is_the_whole_board(client: Client) -> None:
    state = json.loads(client.ask("/statez")[2])
    assert state["status"]["device"] == "line-camera-07"
    assert len(state["points"]) == 300
    assert [event["kind"] for event in state["events"]] == ["state", "drift", "rollback"]
    assert state["latency"]["n"] == 300
    assert sum(state["latency"]["counts"]) + state["latency"]["above"] == 300


def test_what_json_cannot_hold_is_null_or_text(client: Client) -> None:
    client.board.answered(Point(START, "\ud800", float("nan"), float("inf"), float("nan"), 1))
    client.board.tell("fault", "strange", START, thing=np.float32(1.5), array={1: (np.int64(2), object)})
    state = json.loads(client.ask("/statez")[2])
    assert state["points"][-1][2:5] == [None, None, None]
    assert state["events"][-1]["facts"]["thing"] == 1.5
    assert state["events"][-1]["facts"]["array"]["1"][0] == 2


@pytest.mark.parametrize(
    ("facts", "status"),
    [
        ({"state": "ready", "fps": None}, 200),
        ({"state": "degraded", "why": ("thermal",), "fps": 14.0}, 200),
        ({"state": "degraded", "why": ("source: unplugged",), "fps": 0.0}, 503),
        ({"state": "degraded", "fps": None}, 503),
        ({"state": "init"}, 503),
        ({"state": "safe", "fps": 14.0}, 503),
        ({"state": "draining", "fps": 14.0}, 503),
        ({"state": "offline"}, 503),
    ],
)
def test_ready_only_where_answers_may_be_expected(client: Client, facts: dict[str, Any], status: int) -> None:
    client.board.update(**facts)
    answer = client.ask("/readyz")
    told = json.loads(answer[2])
    assert (answer[0], told["ready"]) == (status, status == 200)
    assert facts["state"] in told["why"]
    assert all(why in told["why"] for why in facts.get("why", ()))
    assert client.ask("/livez")[0] == 200


def test_metrics_are_beside_it(client: Client) -> None:
    status, headers, body = client.ask("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b'edge_adapt_state{state="ready"} 1.0' in body


def test_the_frame_comes_with_the_answer_to_it(client: Client) -> None:
    status, headers, body = client.ask("/frame.png")
    assert (status, headers["content-type"]) == (200, "image/png")
    assert Image.open(BytesIO(body)).size == (80, 60)
    assert json.loads(headers["edge-adapt-answer"]) == view.point_row(client.board.points[-1])


def test_a_label_of_any_script_fits_in_the_header(client: Client) -> None:
    client.board.answered(Point(START, "茶壺\r\nx: y", 0.5, None, 1.0, 1), np.zeros((4, 4), np.uint8))
    time.sleep(routes.PICTURE_EVERY_S)
    assert json.loads(client.ask("/frame.png")[1]["edge-adapt-answer"])[1] == "茶壺\r\nx: y"


def test_no_frame_is_no_error() -> None:
    client = Client(Board())
    try:
        assert client.ask("/frame.png")[0] == 204
        client.board.answered(Point(START, "a", 0.5, None, 1.0, 1), np.zeros((3, 16, 16, 3), np.uint8))
        assert client.ask("/frame.png")[0] == 204
    finally:
        client.page.stop()


def test_frames_are_encoded_five_times_a_second_at_most(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(routes, "png", lambda frame: made.append(1) or png(frame))
    started = time.monotonic()
    for index in range(40):
        client.board.answered(Point(START + index, "a", 0.5, None, 1.0, 1), np.zeros((8, 8), np.uint8))
        assert client.ask("/frame.png")[0] == 200
    assert 1 <= len(made) <= (time.monotonic() - started) / routes.PICTURE_EVERY_S + 1


@pytest.mark.parametrize(
    ("frame", "size"),
    [
        (np.zeros((8, 8), np.uint8), (8, 8)),
        (np.zeros((2160, 3840, 3), np.uint8), (SIDE, 288)),
        (np.zeros((10, 6, 1), np.float32), (6, 10)),
        (np.full((4, 4, 3), np.nan), (4, 4)),
        (np.full((4, 4, 3), np.inf), (4, 4)),
        (np.zeros((4, 4, 4), np.uint8), (4, 4)),
        (np.zeros((4, 4, 3), bool), (4, 4)),
        (np.zeros((1, 5000), np.uint8), (SIDE, 1)),
        (np.zeros((0, 4), np.uint8), None),
        (np.zeros((3, 4, 5), np.uint8), None),
        (np.zeros(7, np.uint8), None),
    ],
)
def test_any_frame_is_a_small_picture_or_none(frame: np.ndarray, size: tuple[int, int] | None) -> None:
    data = png(frame)
    assert (None if data is None else Image.open(BytesIO(data)).size) == size


def test_values_other_than_bytes_are_stretched() -> None:
    data = png(np.array([[-1.0, 0.0], [0.0, 1.0]]))
    assert data is not None
    assert np.asarray(Image.open(BytesIO(data))).tolist() == [[0, 127], [127, 255]]


def test_start_and_stop_leave_nothing_behind() -> None:
    before = set(threading.enumerate())
    page = Page(PageSettings(port=0), lively_board(), Asked())
    for _ in range(2):
        page.start()
        sock = socket.create_connection(("127.0.0.1", int(page.address.rpartition(":")[2])), 5)
        sock.sendall(b"GET /events HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert sock.recv(15) == b"HTTP/1.1 200 OK"
        started = time.monotonic()
        page.stop()
        assert time.monotonic() - started < 3
        sock.close()
    page.stop()
    assert set(threading.enumerate()) <= before


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}") as caught:
            Page(PageSettings(port=port), Board(), Asked()).start()
    assert "page.port" in caught.value.remedy


def test_a_host_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        Page(PageSettings(host="192.0.2.1", port=0, insecure=True), Board(), Asked()).start()


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name in [name for name in sys.modules if name.startswith((missing, "device_agents.dashboard.routes"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match="library that is missing") as caught:
        Page(PageSettings(port=0), Board(), Asked()).start()
    assert "pip install 'edge-adapt[dashboard]'" in caught.value.remedy
