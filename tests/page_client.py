"""The page over real HTTP: requests, commands, and listening."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from lively import Asked

from device_agents.board import Board
from device_agents.dashboard.server import Page
from device_agents.settings import PageSettings


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
