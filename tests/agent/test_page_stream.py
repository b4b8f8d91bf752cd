"""Server-sent events: everything once, then what is new, and no reader holds up the agent."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from brokers import wait_until
from lively import START, answers, lively_board
from page_client import Client, messages

from device_agents.board import Board, Point
from device_agents.dashboard import routes, view


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client(lively_board())
    yield made
    made.page.stop()


def test_a_listener_gets_everything_once_and_then_what_is_new(client: Client) -> None:
    sock, stream = client.listen()
    with sock, stream:
        said = messages(stream)
        kind, hello = next(said)
        assert kind == "hello"
        assert hello["instance"].encode() in client.ask("/")[2]
        kind, first = next(said)
        assert kind == "news"
        assert len(first["points"]) == 300
        assert len(first["events"]) == 3
        assert first["frame"]
        client.board.tell("drift", "again\n\nevent: evil\ndata: {}", START)
        client.board.update(version=77)
        answers(client.board, 3)
        seen: dict[str, Any] = {}
        while not {"events", "status", "points"} <= seen.keys():
            kind, more = next(said)
            assert kind == "news"
            seen |= more
        assert [event["text"] for event in seen["events"]] == ["again\n\nevent: evil\ndata: {}"]
        assert seen["status"]["version"] == 77
        assert len(seen["points"]) <= 3


def test_silence_is_broken_by_heartbeats(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "HEARTBEAT_S", 0.3)
    sock, stream = client.listen()
    with sock, stream:
        kinds = [kind for kind, _ in (next(said) for said in [messages(stream)] for _ in range(5))]
    assert kinds == ["hello", "news", "beat", "beat", "beat"]


def test_only_so_many_listen_and_one_that_leaves_makes_room(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "LISTENERS", 2)
    open_pages = [client.listen() for _ in range(2)]
    for _, stream in open_pages:
        next(messages(stream))
    status, headers, _ = client.ask("/events")
    assert (status, headers["retry-after"]) == (503, "5")
    for sock, stream in open_pages:
        stream.close()
        sock.close()

    def room() -> bool:
        sock, stream = client.listen()
        with sock, stream:
            return b"200" in stream.readline()

    wait_until(room)


def test_a_listener_that_reads_nothing_holds_up_nobody_and_is_hung_up_on(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "STALLED_S", 2.0)
    monkeypatch.setattr(routes, "LISTENERS", 1)
    sock, stream = client.listen()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    next(messages(stream))
    assert client.ask("/events", "HEAD")[0] == 503
    filler = "x" * 20_000
    slowest, deadline = 0.0, time.monotonic() + 20
    while client.ask("/events", "HEAD")[0] == 503:
        started = time.monotonic()
        for _ in range(50):
            client.board.tell("drift", filler, START)
        slowest = max(slowest, time.monotonic() - started)
        assert time.monotonic() < deadline, "it was never hung up on"
        time.sleep(0.1)
    assert slowest < 1  # writing to the board took no longer for it
    stream.close()
    sock.close()


def test_a_reader_that_lags_gets_a_thinned_curve_that_ends_with_the_newest() -> None:
    board = Board()
    answers(board, 500)
    first, read = view.news(board, view.Cursor())
    assert len(first["points"]) == 500
    assert view.news(board, read)[0] == {}
    answers(board, 400, START + 10**6)
    more, _ = view.news(board, read)
    assert view.POINTS_PER_MESSAGE / 2 < len(more["points"]) <= view.POINTS_PER_MESSAGE
    assert more["points"][-1] == view.point_row(board.points[-1])


def test_points_are_found_again_although_the_ring_moved_on() -> None:
    points = [Point(1, "a", 0.5, None, 1.0, 1) for _ in range(5)]  # equal, yet not the same
    assert view.newer(points, points[2]) == points[3:]
    assert view.newer(points, Point(1, "a", 0.5, None, 1.0, 1)) == points
    assert view.newer(points, points[-1]) == []
    assert view.newer([], None) == []
