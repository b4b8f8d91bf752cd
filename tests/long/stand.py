"""The stand for the long checks: a small bundle, a stream, a broker, a controller, and an agent of its own process."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402
import paho.mqtt.client as paho  # noqa: E402
from paho.mqtt.enums import CallbackAPIVersion  # noqa: E402
from paho.mqtt.packettypes import PacketTypes  # noqa: E402
from paho.mqtt.properties import Properties  # noqa: E402

from device_agents.broker import EmbeddedBroker, free_port  # noqa: E402
from device_agents.topics import Topics  # noqa: E402

ROOT = HERE.parents[1]
RESULTS, CUTS = ROOT / "benchmarks" / "results" / "agent", ROOT / "runs" / "agent"
"""Where figures are kept: of whole runs, and of short cuts."""
TOPICS = Topics("ea/v1", "lab", "dev1")
REPLIES = "ea/v1/lab/_desk/reply"
START_S, STOP_S = 60.0, 20.0
BUNDLE = """
import sys, pathlib
from benchmarks.contract.tiny import made_tiny_net, tiny_bundle, tiny_images
tiny_bundle(made_tiny_net(), tiny_images(128), pathlib.Path(sys.argv[1]), "block")
"""
"""The tests' own network, exported in a process of its own: that needs PyTorch, unlike the agent."""


def arguments(about: str, full: int, short: int, what: str) -> argparse.ArgumentParser:
    """A parser with what every check takes."""
    parser = argparse.ArgumentParser(description=about.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--count", type=int, help=f"{what}; {full:,}, or {short:,} with --short")
    parser.add_argument("--short", action="store_true", help="the short cut, with wide margins for what takes time")
    parser.add_argument("--bundle", type=Path, help="of the agent; made first if there is none; else one is made apart")
    parser.add_argument("--json", type=Path, help="figures go there; else into benchmarks/results/agent, or runs/agent")
    parser.add_argument("--embedded", action="store_true", help="use the embedded broker although mosquitto is there")
    parser.set_defaults(full=full, cut=short)
    return parser


def count_of(asked: argparse.Namespace) -> int:
    return int(asked.count or (asked.cut if asked.short else asked.full))


@dataclass(frozen=True)
class Promise:
    """Something that has to hold."""

    text: str
    found: str
    kept: bool
    wide: bool | None = None
    """Of a matter of time: whether it holds within the wide margins that a short cut asks on a busy machine."""

    def passes(self, short: bool) -> bool:
        return self.kept or (short and bool(self.wide))


def finish(name: str, asked: argparse.Namespace, promises: Sequence[Promise], facts: Mapping[str, Any]) -> int:
    """Print the promises as a table, keep it and the figures beside it as JSON, return the exit code."""
    table = _table(promises, asked.short)
    print(table)
    target: Path = asked.json or (CUTS if asked.short or asked.count else RESULTS) / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = [{"promise": one.text, "found": one.found, "kept": one.kept} for one in promises]
    whole = {"schema": 1, "cores": os.cpu_count(), "short": asked.short, **facts, "promises": kept}
    target.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
    target.with_suffix(".md").write_text(f"# {name}\n\n{table}\n", "utf-8")
    return int(not all(one.passes(asked.short) for one in promises))


def _table(promises: Sequence[Promise], short: bool) -> str:
    """`wide` means: not kept, but within the margins of a short cut."""

    def told(one: Promise) -> str:
        return "yes" if one.kept else "wide" if one.passes(short) else "NO"

    rows = [f"| {'promise':<66} | {'found':<34} | kept |", f"|{'-' * 68}|{'-' * 36}|------|"]
    rows += [f"| {one.text:<66} | {one.found:<34} | {told(one):<4} |" for one in promises]
    return "\n".join(rows)


def percentiles(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """p50, p99 and the largest."""
    if not len(values):
        return {"p50": float("nan"), "p99": float("nan"), "max": float("nan")}
    p50, p99, most = np.percentile(values, (50, 99, 100))
    return {"p50": round(float(p50), digits), "p99": round(float(p99), digits), "max": round(float(most), digits)}


def mosquitto() -> str | None:
    """Its program, if it is installed."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


class Broker:
    """mosquitto with persistence where it is installed, else the embedded one, which keeps nothing over a restart."""

    def __init__(self, folder: Path, *, embedded: bool = False) -> None:
        self.port = free_port()
        self._folder = folder
        self._program = None if embedded else mosquitto()
        self.name = "embedded" if self._program is None else "mosquitto"
        if self._program is None and not embedded:
            print("mosquitto is not installed: the embedded broker takes its place")
        self._running: Any = None

    def start(self) -> Broker:
        if self._program is None:
            self._running = EmbeddedBroker(self.port).start()
            return self
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "mosquitto.conf"
        lines = ["user root"] * (not os.getuid()) + [
            *(f"listener {self.port} 127.0.0.1", "allow_anonymous true", "set_tcp_nodelay true"),
            *("persistence true", f"persistence_location {self._folder}/", "max_queued_messages 100000"),
            # A device may be back before the controller is; its telemetry at QoS 0 would be dropped.
            *("max_queued_bytes 0", "queue_qos0_messages true", f"log_dest file {self._folder}/log"),
        ]
        config.write_text("\n".join(lines) + "\n", "utf-8")
        self._running = subprocess.Popen([self._program, "-c", str(config)], stderr=subprocess.DEVNULL)
        wait_for(lambda: _listens(self.port), 10, "mosquitto does not listen")
        return self

    def stop(self) -> None:
        running, self._running = self._running, None
        if isinstance(running, subprocess.Popen):
            running.terminate()
            running.wait(10)
        elif running is not None:
            running.stop()


class Controller:
    """The other side: sees everything that a device tells, and commands it. Its session outlives the connection."""

    def __init__(self, port: int, on_message: Callable[[str, dict[str, Any], bool], None]) -> None:
        """on_message: gets topic, envelope and whether it was retained, on the network's thread."""
        self._on_message = on_message
        self._ready = threading.Event()
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id="controller", protocol=paho.MQTTv5)
        self.client.on_connect = lambda *_: self.client.subscribe([(f"{TOPICS.root}/#", 1), (REPLIES, 1)])
        self.client.on_subscribe = lambda *_: self._ready.set()
        self.client.on_message = self._came
        self.client.on_socket_open = lambda _c, _u, sock: sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client.reconnect_delay_set(1, 1)
        facts = Properties(PacketTypes.CONNECT)
        facts.SessionExpiryInterval, facts.ReceiveMaximum = 3600, 1000
        self.client.connect("127.0.0.1", port, clean_start=False, properties=facts)
        self.client.loop_start()
        if not self._ready.wait(10):
            raise RuntimeError("the controller did not reach the broker")

    def ask(self, verb: str, key: str, arguments: Mapping[str, Any], reason: str = "a long check") -> None:
        """Send a command; its answers come to `on_message`."""
        facts = Properties(PacketTypes.PUBLISH)
        facts.ResponseTopic, facts.CorrelationData, facts.MessageExpiryInterval = REPLIES, key.encode(), 120
        facts.UserProperty = [("idem", key), ("by", key), ("reason", reason)]
        self.client.publish(TOPICS.cmd(verb), json.dumps({"v": 1, "d": dict(arguments)}), qos=1, properties=facts)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def _came(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        if message.payload and not message.topic.startswith(f"{TOPICS.root}/cmd/"):
            self._on_message(message.topic, json.loads(message.payload), message.retain)


class Life:
    """An agent in a process of its own."""

    def __init__(self, config: Path, notes: Path, *flags: str) -> None:
        self.notes_path = notes
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed agent has its bytecode
        self.began = time.monotonic()
        command = [sys.executable, str(HERE / "life.py"), str(config), str(notes), *flags]
        with notes.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def notes(self, kind: str) -> list[dict[str, Any]]:
        """Notes of one kind so far."""
        if not self.notes_path.exists():
            return []
        lines = self.notes_path.read_bytes().split(b"\n")[:-1]
        start = f'{{"k": "{kind}"'.encode()
        return [json.loads(line) for line in lines if line.startswith(start)]

    def wait_first(self, timeout_s: float = START_S) -> dict[str, Any]:
        """Until the first answer. Raises: RuntimeError if there is none in time."""
        wait_for(lambda: self.notes("first") or self.process.poll() is not None, timeout_s, "there is no first answer")
        found = self.notes("first")
        if not found:
            raise RuntimeError(f"the agent ended: {self.notes_path.with_suffix('.log').read_text('utf-8')[-2000:]}")
        return found[0]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(STOP_S)

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)

    @property
    def rss_mb(self) -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text("ascii").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0

    @property
    def files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    @property
    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))


@contextlib.contextmanager
def stand(asked: argparse.Namespace) -> Iterator[Path]:
    """A folder with `bundle` and `stream.npz`."""
    with tempfile.TemporaryDirectory(prefix="edge-adapt-long-") as name:
        folder = Path(name)
        bundle = (asked.bundle or folder / "bundle").resolve()
        if not (bundle / "manifest.json").exists():
            print("making a small bundle ...", flush=True)
            command = [sys.executable, "-c", BUNDLE, str(bundle)]
            done = subprocess.run(command, check=False, cwd=HERE.parent, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
        if bundle != folder / "bundle":
            (folder / "bundle").symlink_to(bundle)
        _stream(folder)
        yield folder


def _stream(folder: Path) -> None:
    """Smooth coloured patterns at the size of the network; then the same, darker."""
    shape = json.loads((folder / "bundle" / "manifest.json").read_text("utf-8"))["input"]["shape"]
    rng = np.random.default_rng(0)
    fine = rng.uniform(0, 255, (128, 4, 4, shape[0])).repeat(shape[1] // 4, 1).repeat(shape[2] // 4, 2)
    images = np.clip(fine + rng.normal(0, 12, fine.shape), 0, 255).astype(np.uint8)
    np.savez(folder / "stream.npz", clean=images, dark=(images * 0.4).astype(np.uint8))


def written(folder: Path, port: int | None, **facts: Any) -> Path:
    """A configuration, as JSON, which is YAML. facts: replace whole parts, but `source` and `mqtt` key by key."""
    source = {"kind": "archive", "path": "stream.npz", "loop": True, "policy": "block", **facts.pop("source", {})}
    mqtt = {"port": port, "keepalive_s": 5, **facts.pop("mqtt", {})}
    base = {
        "site": TOPICS.site, "device": TOPICS.device, "bundle": "bundle", "state_dir": "state",
        "mode": "bounded_auto", "method": {"name": "moments"}, "log_level": "error", "source": source,
        **({"mqtt": mqtt} if port else {}),
    }
    path = folder / "agent.yaml"
    path.write_text(json.dumps({**base, **facts}) + "\n", "utf-8")
    return path


def wait_for(reached: Callable[[], Any], timeout_s: float, why: str) -> None:
    """Raises: RuntimeError if it does not happen in time."""
    end = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > end:
            raise RuntimeError(f"{why} within {timeout_s:g} s")
        time.sleep(0.005)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
        return True
    return False
