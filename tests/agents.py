"""Whole agents for tests: settings, agents in this process and in a child, and faults to put into them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_agents import courier, looking
from device_agents.agent import Agent
from device_agents.host import read_host
from device_agents.sender import Pace
from device_agents.settings import AgentSettings
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.preprocess import Preprocess
from edge_adapt.runtime.predictor import Predictor

WAIT_S = 20.0
QUICK = Pace(backoff_s=(0.1, 0.4), stable_s=5.0, latest_gap_s=0.05, drain_per_s=2000)
ROOT = "ea/v1/lab/dev1"
"""Of the topics of an agent with `mqtt_to`."""


def until(reached: Callable[[], Any], why: str = "", timeout_s: float = WAIT_S, every_s: float = 0.01) -> Any:
    """Wait for something that will come soon; returns it."""
    deadline = time.monotonic() + timeout_s
    while not (found := reached()):
        assert time.monotonic() < deadline, why or "it did not happen in time"
        time.sleep(every_s)
    return found


def answered(agent: Agent) -> int:
    """Frames answered so far."""
    return agent.board.counts.get("answered", 0)


def goes_on(agent: Agent, frames: int = 50) -> None:
    """R1: it answers so many more frames."""
    count = answered(agent)
    until(lambda: answered(agent) >= count + frames, "it answers no more")


def degraded(agent: Agent, reason: str, within_s: float = 5.0) -> None:
    """R7: it says so within 5 s."""
    until(lambda: any(reason in why for why in agent.board.status.why), f"never degraded by {reason}", within_s)
    assert agent.board.status.state in ("degraded", "safe")


def ready(agent: Agent, within_s: float = 10.0) -> None:
    """Whatever it was is over."""
    until(lambda: agent.board.status.state == "ready", "never ready again", within_s)


def told(agent: Agent, text: str) -> bool:
    """Whether an event on its board says so."""
    return any(text in event.text for event in agent.board.events())


def command(agent: Agent, verb: str, **arguments: Any) -> dict[str, Any]:
    """As a button of the page would."""
    return agent.commands.submit_local(verb, arguments, "test")


def mqtt_to(broker: Any, **facts: Any) -> dict[str, Any]:
    """Settings of an agent with a broker."""
    return {
        "site": "lab",
        "device": "dev1",
        "telemetry": {"interval_s": 0.5, "minimum_s": 0.25},
        "mqtt": {"port": broker.port, "keepalive_s": 2, **facts},
    }


class Saboteur:
    """A method that does something else where it is told to: `step` or `watch`, given the real one."""

    def __init__(self, method: Any, **instead: Callable[..., Any]) -> None:
        self._method, self._instead = method, instead

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._method, name)
        if name not in self._instead:
            return real
        return lambda *args: self._instead[name](real, *args)


class Child:
    """`edge-adapt run` in a process of its own, and its log."""

    def __init__(self, settings: AgentSettings, folder: Path, *options: str, before: tuple[str, ...] = ()) -> None:
        """before: words in front of the command line, such as `faketime`."""
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "agent.yaml"
        config.write_text(json.dumps(settings.model_dump(mode="json", exclude_unset=True)) + "\n")
        self.log = folder / "log"
        words = [*before, str(Path(sys.executable).with_name("edge-adapt")), "run", str(config), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)

    @property
    def text(self) -> str:
        return self.log.read_text()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float = WAIT_S) -> int:
        """Exit code; fails the test if it does not end."""
        return self._process.wait(timeout_s)

    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        if self.running():
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(WAIT_S)


def learned(agent: Agent, versions: int = 2) -> None:
    """It goes on learning, and what it learns takes force."""
    version = agent.board.status.version
    until(lambda: agent.board.status.version >= version + versions, "it learns no more")


def check_source_answers(agent: Agent, data, bundle) -> None:
    """The next answers are those of the model as exported, to the last bit that matters."""
    taken = []
    agent.listen(lambda frames, reply: taken.append((frames[0].image, reply.logits[0])))
    until(lambda: len(taken) >= 30)
    images = np.stack([image for image, _ in taken[:30]])
    with closing(OnnxRuntimeEngine(bundle)) as engine:
        expected = Predictor(bundle, engine).answer(Preprocess(bundle.manifest.input)(images)).logits
    np.testing.assert_allclose(np.stack([logits for _, logits in taken[:30]]), expected, atol=1e-4)


# fixtures: import them where they are needed


@pytest.fixture
def stream(tmp_path, tiny_data):
    """The images, then the same much darker."""
    path = tmp_path / "stream.npz"
    images = tiny_data.images
    np.savez(path, clean=images, dark=(images * 0.4).astype(np.uint8))
    return path


@pytest.fixture
def settings(tmp_path, device_bundle, stream):
    """Of an agent that plays the stream in a circle, as fast as it can."""

    def made(**facts) -> AgentSettings:
        source = {"kind": "archive", "path": stream, "loop": True, "policy": "block", **facts.pop("source", {})}
        base = {
            "bundle": device_bundle.path,
            "state_dir": tmp_path / "state",
            "mode": "bounded_auto",
            "source": source,
            "method": {"name": "moments"},
            "log_level": "error",
        }
        return AgentSettings.model_validate({**base, **facts})

    return made


@pytest.fixture
def running(settings, monkeypatch) -> Iterator[Callable[..., Agent]]:
    """A factory of started agents, each with its main thread; stopped at the end."""
    monkeypatch.setattr(courier, "Pace", lambda: QUICK)
    agents = []

    def made(*, wait: bool = True, before: Callable[[Agent], Any] = lambda agent: None, **facts) -> Agent:
        agent = Agent(settings(**facts))
        before(agent)
        thread = threading.Thread(target=agent.run, daemon=True)
        thread.start()
        agents.append((agent, thread))
        if wait:
            until(lambda: agent.board.status.state in ("ready", "degraded"))
        return agent

    yield made
    for agent, thread in agents:
        agent.stopping.set()
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert agent.board.status.state == "offline"


@pytest.fixture
def sabotaged(monkeypatch) -> Callable[..., None]:
    """Have every method built from now on do something else instead: see `Saboteur`."""
    from device_agents import core

    real = core.build

    def made(**instead: Callable[..., Any]) -> None:
        monkeypatch.setattr(core, "build", lambda name, context: Saboteur(real(name, context), **instead))

    return made


@pytest.fixture
def child(settings, tmp_path) -> Iterator[Callable[..., Child]]:
    """A factory of agents in processes of their own, killed at the end."""
    made: list[Child] = []

    def start(*options: str, folder: str = "child", before: tuple[str, ...] = (), **facts) -> Child:
        made.append(Child(settings(**facts), tmp_path / folder, *options, before=before))
        return made[-1]

    yield start
    for each in made:
        each.kill()


@pytest.fixture
def calm_board(monkeypatch):
    """A board that is neither hot nor short of power, whatever this machine measures; returns what it tells."""
    facts: dict[str, float] = {"temperature_c": 40.0}
    monkeypatch.setattr(looking, "read_host", lambda: {**read_host(), **facts})
    return facts
