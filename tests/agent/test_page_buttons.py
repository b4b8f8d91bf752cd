"""Buttons of the page: what they do, and that no other site can press them or read along."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from brokers import wait_until
from lively import lively_board
from page_client import Client

from device_agents.dashboard import routes
from device_agents.dashboard.guard import command_refused, host_refused, own_names
from edge_adapt.errors import StateError

COMMAND = {"content-type": "application/json"}


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client(lively_board())
    yield made
    made.page.stop()


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
