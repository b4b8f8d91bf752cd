"""A child that is killed: it is sent the same commands at every start, and writes down whatever it carries out."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from device_agents.answers import Reply
from device_agents.commands import Commands
from device_agents.envelope import SystemClock
from device_agents.ledger import Ledger
from device_agents.mqtt import Incoming
from device_agents.request import Limits
from device_agents.topics import Topics

TOPICS = Topics("ea/v1", "hall", "cam1")


class Lines:
    """An append-only file; a line that `append` wrote survives a kill."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def append(self, line: str) -> None:
        os.write(self._file, f"{line}\n".encode())


class Effects:
    """A control whose only effect is a line: the frame number that came with the command."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines

    def execute(self, verb: str, arguments: Mapping[str, Any], *, by: str) -> dict[str, Any]:
        self._lines.append(str(arguments["labels"][0][0]))
        time.sleep(0.0005)  # as if it did something: a kill may hit the middle of it
        return {}


def main(folder: Path, count: int, ready: Event) -> None:
    clock, told, finished = SystemClock(), Lines(folder / "told"), threading.Event()
    left = {f"k{number}" for number in range(count)}

    def reply(one: Reply) -> None:
        told.append(f"{one.data['id']} {one.data['status']} {one.data['code']}")
        if ready.is_set() and one.data["status"] != "accepted":
            left.discard(one.data["id"])
            if not left:
                finished.set()

    ledger = Ledger(folder / "commands.db", clock=clock)
    limits = Limits(rate=1e9, burst=1e9, inbox=count + 1, queue=count + 1)
    commands = Commands(Effects(Lines(folder / "effects")), ledger, TOPICS, reply, clock=clock, limits=limits)
    commands.start()
    ready.set()
    for number in range(count):
        body = json.dumps({"v": 1, "d": {"labels": [[number, 0]]}}).encode()
        properties = (("idem", f"k{number}"),)
        commands.receive(Incoming(TOPICS.cmd("label-reveal"), body, expiry_s=60, properties=properties))
    finished.wait(60)
    commands.stop(5)
    ledger.close()
