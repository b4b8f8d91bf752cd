"""Adapters fetched by address: nothing waits for a slow server, and no download lasts for ever."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from agents import answered, command, running, settings, stream, until

from device_agents import adapters
from device_agents.adapters import fetched
from device_agents.package import keygen, pack, private_key
from device_agents.request import Limits
from edge_adapt.delta import Delta
from edge_adapt.errors import ArtifactError

__all__ = ["running", "settings", "stream"]


class Server:
    """Sends what it holds, a byte every 10 ms until it is told to go on."""

    def __init__(self, body: bytes) -> None:
        self.go, self.asked = threading.Event(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.set()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                sent = 0
                with suppress(OSError):  # the other end gave up
                    while sent < len(body) and not server.go.wait(0.01):
                        self.wfile.write(body[sent : sent + 1])
                        sent += 1
                    self.wfile.write(body[sent:])

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/night.eadelta"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.go.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Callable[[bytes], Server]]:
    made: list[Server] = []

    def make(body: bytes) -> Server:
        made.append(Server(body))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_other_commands_are_done_while_an_adapter_is_fetched(running, server, device_bundle, tmp_path):
    public = keygen(tmp_path / "key")
    channels = device_bundle.channels
    delta = Delta.of_ports(np.full(channels, 1.01), np.full(channels, 0.01))
    package = pack(delta, device_bundle, private_key(tmp_path / "key"), method="moments", note="a test")
    slow = server(package)
    agent = running(mqtt={"port": 1, "trusted_keys": [public]})
    agent.commands.limits = Limits(local_s=0)
    arguments = {"url": slow.url, "sha256": hashlib.sha256(package).hexdigest()}
    assert command(agent, "load-adapter", **arguments)["status"] == "accepted"
    assert slow.asked.wait(10)
    agent.commands.limits = Limits()
    count = answered(agent)
    assert command(agent, "ping")["status"] == "done"
    assert command(agent, "freeze", on=True)["status"] == "done"
    assert command(agent, "snapshot")["code"] == "busy"  # of heavy ones there is one at a time
    until(lambda: answered(agent) > count)
    assert agent.commands.running == ("load-adapter",)
    slow.go.set()
    until(lambda: agent.core.learned.given is not None, "the adapter never came")
    until(lambda: not agent.commands.running)
    assert command(agent, "snapshot")["status"] == "done"


def test_a_download_that_never_ends_is_given_up(server, monkeypatch):
    monkeypatch.setattr(adapters, "LONGEST_S", 0.1)
    with pytest.raises(ArtifactError, match=r"after 0\.1 s it was not complete"):
        fetched(server(b"x" * 100_000).url)


def test_what_is_too_large_or_not_there_is_refused(server, monkeypatch):
    quick = server(b"x" * 1000)
    quick.go.set()
    assert fetched(quick.url) == b"x" * 1000
    monkeypatch.setattr(adapters, "LARGEST", 999)
    with pytest.raises(ArtifactError, match="more than 999 bytes"):
        fetched(quick.url)
    quick.close()
    with pytest.raises(ArtifactError, match="cannot be fetched"):
        fetched(quick.url)
