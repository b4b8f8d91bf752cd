"""The life of the page: a socket, a thread, and uvicorn in it. Reads the board; the agent never waits for it."""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING

from device_agents.board import Board
from device_agents.control import Control
from device_agents.settings import PageSettings
from edge_adapt.errors import ConfigError, EngineError

if TYPE_CHECKING:
    import uvicorn

START_S, STOP_S = 10.0, 5.0
WILDCARDS = ("0.0.0.0", "::")


class Page:
    """The local page, with `/statez`, `/livez`, `/readyz` and `/metrics` beside it."""

    def __init__(self, settings: PageSettings, board: Board, control: Control) -> None:
        self.settings, self.board, self.control = settings, board, control
        self._closing = threading.Event()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._port = settings.port

    @property
    def address(self) -> str:
        """Where a browser finds it; right once it has been started."""
        host = socket.gethostname() if self.settings.host in WILDCARDS else self.settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}"

    def start(self) -> None:
        """Serve, in a thread.

        Raises: ConfigError if the port is taken, the host is not ours, or the extra `dashboard` is not installed.
        """
        try:
            import uvicorn

            from device_agents.dashboard.routes import Routes
        except ImportError as error:
            raise ConfigError(
                f"the page needs a library that is missing: {error.name or error}",
                remedy="pip install 'edge-adapt[dashboard]', or leave `page` out of the configuration",
            ) from error
        sock = _listen(self.settings)
        self._port = sock.getsockname()[1]
        routes = Routes(self.board, self.control, bound=self.settings.host, closing=self._closing)
        config = uvicorn.Config(
            routes.app(),
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=64,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=1,
        )
        self._closing.clear()
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([sock],), name="page", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_S
        while not self._server.started:
            if time.monotonic() > deadline or not self._thread.is_alive():
                self.stop()
                sock.close()
                raise EngineError(f"the page did not start within {START_S:g} s", remedy="see the log above")
            time.sleep(0.01)

    def stop(self) -> None:
        """Hang up on every page and join the thread, within a few seconds. May be called twice."""
        self._closing.set()
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(STOP_S)
        self._server = self._thread = None


def _listen(settings: PageSettings) -> socket.socket:
    """A bound socket. Raises: ConfigError."""
    where = f"{settings.host}:{settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"page.host is {settings.host!r}: {error}", remedy="127.0.0.1 is this machine") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"the page cannot listen on {where}: {error.strerror}",
            remedy="another program has that port, or the address is not ours: change page.port, 0 takes any free one",
        ) from error
    return sock
