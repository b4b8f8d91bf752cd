"""The page over real HTTP: what it tells, what it refuses, and that it holds up nobody."""

from __future__ import annotations

import http.client
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from brokers import wait_until
from lively import START, Asked, answers, lively_board
from PIL import Image

from device_agents.board import Board, Point
from device_agents.dashboard import routes, view
from device_agents.dashboard.guard import command_refused, host_refused, own_names
from device_agents.dashboard.picture import SIDE, png
from device_agents.dashboard.server import Page
from device_agents.settings import PageSettings
from edge_adapt.errors import ConfigError, StateError

COMMAND = {"content-type": "application/json"}


class Client:
    """One page, its board and control, and requests to it."""

    def __init__(self, board: Board) -> None:
        self.board, self.control = board, Asked()
        self.page = Page(PageSettings(port=0), board, self.control)
        self.page.start()
        self.host = urlsplit(self.page.address).netloc

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        name, _, port = self.host.partition(":")
        connection = http.client.HTTPConnection(name, int(port), timeout=10)
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        try:
            connection.request(method, path, body, {"host": self.host, **named})
            answer = connection.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    @property
    def token(self) -> str:
        found = re.search(rb'edge-adapt-token" content="([^"]+)"', self.ask("/")[2])
        assert found
        return found[1].decode()

    def command(self, verb: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        known = {"content_type": "application/json", "x_edge_adapt_token": self.token, "origin": f"http://{self.host}"}
        status, _, answer = self.ask(f"/command/{verb}", "POST", data, **(known | headers))
        return status, json.loads(answer)

    def listen(self) -> tuple[socket.socket, Any]:
        """A page that is open: its socket, and the stream to read lines from."""
        name, _, port = self.host.partition(":")
        sock = socket.create_connection((name, int(port)), 10)
        sock.sendall(f"GET /events HTTP/1.1\r\nhost: {self.host}\r\n\r\n".encode())
        return sock, sock.makefile("rb")


def messages(stream: Any) -> Iterator[tuple[str, Any]]:
    """Server-sent events: kind and data. (Lengths of chunks stand between, and are passed over.)"""
    kind = ""
    for line in stream:
        if line.startswith(b"event: "):
            kind = line[7:].strip().decode()
        elif line.startswith(b"data: "):
            yield kind, json.loads(line[6:])


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client(lively_board())
    yield made
    made.page.stop()


# What it tells


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


# The stream


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
    monkeypatch.setattr(routes, "STALLED_S", 0.5)
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
    assert slowest < 0.25  # writing to the board took no longer for it
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


# Buttons


def test_each_button_reaches_the_control(client: Client) -> None:
    for verb, body in (("snapshot", {}), ("rollback", {}), ("reset", {}), ("freeze", {"on": True})):
        assert client.command(verb, body) == (200, {"done": verb, "result": {"version": 42}})
    assert client.control.asked == [
        ("snapshot", {}, "page"),
        ("rollback", {}, "page"),
        ("reset", {}, "page"),
        ("freeze", {"on": True}, "page"),
    ]


@pytest.mark.parametrize(
    "headers",
    [
        {"x_edge_adapt_token": ""},
        {"x_edge_adapt_token": "wrong"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"content_type": "text/plain"},
        {"content_type": "application/x-www-form-urlencoded"},
    ],
)
def test_another_site_cannot_press_a_button(client: Client, headers: dict[str, str]) -> None:
    status, told = client.command("reset", **headers)
    assert status == 403
    assert told["error"]
    assert client.control.asked == []


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.0.2.1", "", "localhost@evil.example"])
def test_a_foreign_name_that_points_here_reads_nothing(client: Client, host: str) -> None:
    for path in ("/", "/statez", "/events", "/frame.png", "/metrics", "/livez", "/readyz"):
        status, _, body = client.ask(path, host=host)
        assert status == 421, path
        assert b"line-camera" not in body, path


def test_commands_of_a_foreign_name_are_refused_too(client: Client) -> None:
    status, _ = client.command("reset", host="evil.example", origin="http://evil.example")
    assert status == 421
    assert client.control.asked == []


@pytest.mark.parametrize("host", ["localhost:1234", "LOCALHOST", "127.0.0.1", "[::1]:80", "127.9.9.9"])
def test_our_own_names_are_known_through_any_tunnel(client: Client, host: str) -> None:
    assert client.ask("/livez", host=host)[0] == 200


def test_a_page_that_is_open_to_others_knows_addresses_and_its_own_name() -> None:
    names = own_names("0.0.0.0")
    for host, fine in (("192.0.2.1:8765", True), (socket.gethostname(), True), ("evil.example", False)):
        assert (host_refused(host, names, bound="0.0.0.0") is None) == fine, host


def test_an_old_browser_without_origin_still_needs_the_token() -> None:
    assert command_refused(COMMAND | {"x-edge-adapt-token": "t"}, "t") is None
    assert command_refused(COMMAND | {"x-edge-adapt-token": "ü"}, "t") is not None


@pytest.mark.parametrize(
    ("verb", "body", "status"),
    [
        ("load-adapter", {}, 404),
        ("", {}, 404),
        ("freeze", {}, 422),
        ("freeze", {"on": 1}, 422),
        ("freeze", {"on": True, "more": 1}, 422),
        ("snapshot", {"on": True}, 422),
        ("snapshot", [], 200),  # an empty body
        ("reset", b"[]", 422),
        ("reset", b"{", 422),
        ("reset", b"\xff\xfe", 422),
        ("reset", b"[" * 1000, 422),
        ("reset", b" " * 5000, 413),
    ],
)
def test_a_wrong_command_is_refused_and_named(client: Client, verb: str, body: Any, status: int) -> None:
    if verb == "":
        assert client.ask("/command/", "POST")[0] == 404
        return
    found, told = client.command(verb, body)
    assert found == status
    if status != 200:
        assert told["error"]
        assert told["remedy"]
        assert client.control.asked == []


def test_a_get_is_no_command(client: Client) -> None:
    assert client.ask("/command/reset", x_edge_adapt_token=client.token)[0] == 405


def test_what_the_agent_refuses_is_told_with_its_remedy(client: Client) -> None:
    client.control.error = StateError("there is no adapter before this one", remedy="reset instead")
    assert client.command("rollback") == (
        409,
        {"error": "there is no adapter before this one", "remedy": "reset instead"},
    )


def test_a_fault_inside_the_agent_shows_nothing_of_its_inside(client: Client) -> None:
    client.control.error = RuntimeError("secret path /home/x")
    status, told = client.command("rollback")
    assert status == 500
    assert "secret" not in json.dumps(told)
    assert client.ask("/livez")[0] == 200


def test_one_command_at_a_time_and_a_slow_one_leaves_the_page_alive(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "COMMAND_S", 0.5)
    begun, go_on, told = threading.Event(), threading.Event(), []

    def slow(verb: str, arguments: Any, *, by: str) -> dict[str, Any]:
        begun.set()
        return {"waited": go_on.wait(20)}

    monkeypatch.setattr(client.control, "execute", slow)
    thread = threading.Thread(target=lambda: told.append(client.command("snapshot")))
    thread.start()
    assert begun.wait(10)
    assert client.command("reset")[0] == 409
    assert client.ask("/statez")[0] == 200
    thread.join(10)
    assert told[0][0] == 504
    assert client.command("reset")[0] == 409  # it still runs
    go_on.set()
    wait_until(lambda: client.command("reset")[0] == 200)


# Its life


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
