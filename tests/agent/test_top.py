"""`edge-adapt top`, printed once and watched, against a page that runs."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO

import pytest
from lively import Asked, lively_board
from rich.console import Console

from device_agents.board import Board
from device_agents.dashboard import view
from device_agents.dashboard.server import Page
from device_agents.settings import PageSettings
from device_agents.top import fetch, render, span, sparkline
from edge_adapt.errors import ConfigError, DataError

SCREEN_BACK = b"\x1b[?1049l"


@pytest.fixture
def page() -> Iterator[Page]:
    page = Page(PageSettings(port=0), lively_board(), Asked())
    page.start()
    yield page
    page.stop()


def text(board: Board, width: int = 110) -> str:
    console = Console(width=width, file=StringIO())
    console.print(render(view.statez(board), width))
    return console.file.getvalue()


def test_the_view_tells_what_the_board_knows() -> None:
    shown = text(lively_board())
    for part in (
        *("line-camera-07", "plant-3", "● ready", "bounded_auto"),
        *("an adapter from outside, version 41", "1,403,211", "12 dropped"),
        *("91.4 % (88.2 to 94.1)", "163 of 250 ms/s", "17,904", "412 MB", "7.4 W", "ood gate", "1 d 2 h"),
        *("coffee mug", "p99", "Adapter A was rolled back", "MQTT online", "5 waiting"),
    ):
        assert part in shown, part


def test_an_agent_that_knows_nothing_yet_is_shown_too() -> None:
    shown = text(Board())
    assert "● init" in shown
    assert "not known yet" in shown
    assert "no answer yet" in shown
    assert "no events yet" in shown


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert max(len(line) for line in text(lively_board(), width).splitlines()) <= width


def test_text_from_outside_is_no_markup() -> None:
    board = lively_board()
    board.tell("drift", "[red]not[/red] [link=x]a command[/] \x1b[2J", 0)
    shown = text(board)
    assert "[red]not[/red] [link=x]a command[/]" in shown
    assert "\x1b" not in shown


def test_a_sparkline_is_a_scale_of_its_own() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.0, 0.5, 1.0], 8, 0.0, 1.0) == "▁▅█"
    assert sparkline([5, 5], 4) == "▁▁"
    assert sparkline([1, None, 1], 4, 0.0, 1.0) == "█ █"
    assert sparkline([None, None], 4) == ""
    assert sparkline([], 4) == ""
    assert sparkline([0, 0, 9, 9, 4, 4], 3) == "▁█▄"  # means of what shares a column
    assert sparkline([7, 0, 0, 9, 9], 3, 0.0, 9.0) == "▆▁█"  # the newest columns are full ones
    assert len(sparkline(list(range(601)), 60)) <= 60


def test_spans() -> None:
    assert [span(seconds) for seconds in (9.9, 75, 7500, 200_000)] == ["9 s", "1 min 15 s", "2 h 05 min", "2 d 7 h"]


def test_it_prints_once_from_the_command_line(page: Page) -> None:
    done = run("--once", "--url", page.address)
    assert done.returncode == 0, done.stderr
    assert "line-camera-07" in done.stdout


@contextmanager
def watching(page: Page) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`top` in a terminal of its own: the process, and our end of the terminal."""
    ours, theirs = pty.openpty()
    arguments = command("--every", "0.1", "--url", page.address)
    with subprocess.Popen(
        arguments, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(theirs)
        try:
            yield process, ours
        finally:
            process.kill()
            os.close(ours)


def test_ctrl_c_leaves_quietly_and_gives_the_screen_back(page: Page) -> None:
    with watching(page) as (process, terminal):
        drawn = read_until(terminal, b"line-camera-07")
        process.send_signal(signal.SIGINT)
        drawn += read_until(terminal, SCREEN_BACK)
        assert process.wait(10) == 0
    assert b"Traceback" not in drawn


def test_an_agent_that_goes_away_is_waited_for(page: Page) -> None:
    with watching(page) as (process, terminal):
        read_until(terminal, b"line-camera-07")
        page.stop()
        read_until(terminal, b"not connected")
        process.send_signal(signal.SIGINT)
        read_until(terminal, SCREEN_BACK)
        assert process.wait(10) == 0


def test_nobody_there_is_one_clear_sentence() -> None:
    done = run("--once", "--url", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "no agent answers at http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("url", ["file:///etc/passwd", "127.0.0.1", "http://[", ""])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="no agent answers"):
        fetch(url)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"status": 1}', b"\xff", b"[" * 100_000])
def test_something_else_that_answers(body: bytes) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(DataError, match="no agent of edge-adapt"):
            fetch(f"http://127.0.0.1:{server.server_port}")
        thread.join()


def read_until(terminal: int, wanted: bytes, timeout_s: float = 30.0) -> bytes:
    """What a terminal shows, up to some bytes; fails if they do not come."""
    shown, end = b"", time.monotonic() + timeout_s
    while wanted not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"{wanted!r} was not shown, but {shown[-500:]!r}"
        shown += os.read(terminal, 65_536)
    return shown


def command(*arguments: str) -> list[str]:
    script = (
        "import sys, typer; from edge_adapt.cli import WRONG; from edge_adapt.errors import EdgeAdaptError\n"
        "from device_agents.top import top\n"
        "app = typer.Typer(); app.command()(top)\n"
        "try: app(standalone_mode=False)\n"
        "except EdgeAdaptError as error: print(error, file=sys.stderr); sys.exit(WRONG)\n"
    )
    return [sys.executable, "-c", script, *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "110"},
    )
