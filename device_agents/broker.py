"""A broker inside this process, for the demo and for tests: iotcore on loopback, MQTT 5 and, if asked, 3.1.1."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_adapt.errors import ConfigError, EngineError

LISTENER = """
[v{version}.1]
name = "v{version}"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1

[v{version}.1.connections]
connection_timeout_ms = 60000
max_payload_size = {max_payload}
max_inflight_count = 100
dynamic_filters = true
"""
ROUTER = """id = 0

[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = 1048576
max_segment_count = 10
"""


class EmbeddedBroker:
    """Runs in a child that ends with us. Nothing is kept over a restart; no TLS, no access control: loopback only.

    Args:
        port: for MQTT 5; 0 takes a free one.
        port_311: for MQTT 3.1.1; None: no such listener.
    """

    def __init__(self, port: int = 0, *, port_311: int | None = None, max_payload: int = 65_536) -> None:
        self.host = "127.0.0.1"
        self.port = port or free_port()
        self.port_311 = free_port() if port_311 == 0 else port_311
        self._max_payload = max_payload
        self._child: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> EmbeddedBroker:
        """Start, and wait until it listens. Raises: ConfigError without iotcore, EngineError if it does not come up."""
        try:
            from iotcore import Broker
        except ImportError as error:
            raise ConfigError(
                "the embedded broker needs iotcore, which is not installed",
                remedy="pip install 'edge-adapt[demo]', or name the `host` of another broker",
            ) from error
        self._folder = tempfile.TemporaryDirectory(prefix="edge-adapt-broker-")
        config = Path(self._folder.name) / "broker.toml"
        config.write_text(broker_toml(self.port, self.port_311, self._max_payload), "utf-8")
        try:
            self._child = Broker(config_path=str(config)).start()
        except (OSError, RuntimeError) as error:
            self.stop()
            raise EngineError(
                f"the embedded broker did not start on port {self.port}: {error}", remedy="choose another port"
            ) from error
        return self

    def stop(self) -> None:
        """Safe to call twice."""
        if self._child is not None:
            self._child.stop()
            self._child = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> EmbeddedBroker:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def broker_toml(port: int, port_311: int | None, max_payload: int) -> str:
    """The configuration: without a file iotcore speaks 3.1.1 alone, and on every interface."""
    text = ROUTER + LISTENER.format(version=5, port=port, max_payload=max_payload)
    if port_311 is not None:
        text += LISTENER.format(version=4, port=port_311, max_payload=max_payload)
    return text


def free_port() -> int:
    """A TCP port of loopback that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
