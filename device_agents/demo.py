"""`edge-adapt demo --agent`: broker, agent and page in one process, on digits whose weather changes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from device_agents.agent import Agent
from device_agents.broker import EmbeddedBroker
from device_agents.cli import watched
from device_agents.settings import (
    AgentSettings,
    MethodSettings,
    MqttSettings,
    PageSettings,
    SnapshotSettings,
    SourceSettings,
    TelemetrySettings,
)

PAGE_PORT = 8765
Report = Callable[[str], None]


def run(
    bundle: Path,
    parts: dict[str, NDArray[np.uint8]],
    *,
    fps: float,
    seconds: float | None,
    report: Report,
) -> int:
    """Until Ctrl-C, or for some seconds. Returns the exit code.

    Args:
        bundle: folder of a bundle.
        parts: name -> frames [N, H, W, C] of each stretch of the stream, played in a circle.
        report: takes lines for people.
    """
    with ExitStack() as closing:
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="edge-adapt-demo-")))
        stream = folder / "stream.npz"
        np.savez(stream, **parts)  # type: ignore[arg-type]
        broker = closing.enter_context(EmbeddedBroker())
        settings = AgentSettings(
            site="demo",
            device="digits",
            bundle=bundle,
            state_dir=folder / "state",
            mode="bounded_auto",
            method=MethodSettings(router="hdc"),
            source=SourceSettings(kind="archive", path=stream, fps=fps, loop=True),
            mqtt=MqttSettings(port=broker.port),
            page=PageSettings(port=PAGE_PORT if _is_free(PAGE_PORT) else 0),
            telemetry=TelemetrySettings(interval_s=2.0),
            snapshots=SnapshotSettings(every_s=10.0),
        )
        agent = Agent(settings)
        if seconds is not None:
            _stop_after(agent, seconds)
        length = len(next(iter(parts.values())))
        report(f"{fps:g} frames a second; the weather changes every {length / fps:.0f} s; Ctrl-C ends it")
        report("page:      its address follows when it is up")
        report(f"messages:  mosquitto_sub -V mqttv5 -p {broker.port} -v -t 'ea/v1/#'")
        return watched(agent)


def _stop_after(agent: Agent, seconds: float) -> None:
    import threading

    timer = threading.Timer(seconds, agent.stopping.set)
    timer.daemon = True
    timer.start()


def _is_free(port: int) -> bool:
    import socket

    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
