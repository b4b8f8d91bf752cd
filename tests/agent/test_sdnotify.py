"""Messages to systemd, received by a socket of ours."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_agents.sdnotify import Notifier, watchdog_interval_s


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A socket that plays systemd, and what systemd would put in NOTIFY_SOCKET."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@edge-adapt-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name if request.param == "path" else "\0" + name[1:])
        sock.settimeout(2)
        yield sock, name


def test_each_message_arrives_as_systemd_expects_it(manager: tuple[socket.socket, str]) -> None:
    sock, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    assert notifier.there
    for send, expected in (
        (lambda: notifier.ready("answers 15 a second"), b"READY=1\nSTATUS=answers 15 a second"),
        (notifier.ready, b"READY=1"),
        (lambda: notifier.status("degraded: thermal"), b"STATUS=degraded: thermal"),
        (notifier.alive, b"WATCHDOG=1"),
        (lambda: notifier.stopping("saving"), b"STOPPING=1\nSTATUS=saving"),
    ):
        assert send()
        assert sock.recv(1024) == expected


def test_a_reload_tells_when_it_began(manager: tuple[socket.socket, str]) -> None:
    sock, name = manager
    before = time.monotonic_ns() // 1000
    assert Notifier({"NOTIFY_SOCKET": name}).reloading()
    first, second = sock.recv(1024).decode().split("\n")
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


def test_a_status_cannot_smuggle_in_another_message(manager: tuple[socket.socket, str]) -> None:
    sock, name = manager
    Notifier({"NOTIFY_SOCKET": name}).status("fine\nSTOPPING=1")
    assert sock.recv(1024) == b"STATUS=fine STOPPING=1"


@pytest.mark.parametrize("name", ["", "relative", "vsock:2:1234"])
def test_without_systemd_nothing_happens(name: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": name} if name else {})
    assert not notifier.there
    assert not notifier.alive()


def test_a_manager_that_went_away_hurts_nobody(tmp_path: Path) -> None:
    assert not Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()


def test_a_manager_that_does_not_read_holds_up_nobody(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        sent = [notifier.alive() for _ in range(5000)]
    assert sent[0]
    assert not sent[-1]  # the queue is full, and we are here all the same


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_interval_of_the_watchdog(environment: dict[str, str], seconds: float | None) -> None:
    assert watchdog_interval_s(environment) == seconds
    assert Notifier(environment).watchdog_interval_s == seconds
