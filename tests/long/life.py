"""One agent in a process of its own, as `edge-adapt run` has it, that writes down what the long checks count.

Usage: life.py CONFIG NOTES [--events 5] [--latencies] [--trace]. NOTES gets one JSON line per note; a line is written
in one call, so that a kill loses none that was written.
"""

from __future__ import annotations

import time

BORN = time.monotonic()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from device_agents.agent import Agent
    from device_agents.outbox import Outbox

Note = Callable[..., None]
CHUNK = 100
"""Latencies of one note."""
SHOWN = 25
"""Places in the program that a trace names."""


def noting(path: Path) -> Note:
    """What writes a note: its kind, when, and facts."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(kind: str, at: float | None = None, **facts: Any) -> None:
        line = {"k": kind, "t": time.monotonic() if at is None else at, **facts}
        os.write(file, json.dumps(line).encode() + b"\n")

    return note


def watch_start(note: Note, also: Callable[[Agent], None]) -> None:
    """Note when the agent begins to be built, and its first answer. also: done with every agent that started."""
    from device_agents.agent import Agent

    build, start = Agent.__init__, Agent.start

    def built(self: Agent, *args: Any, **facts: Any) -> None:
        note("imported", torch="torch" in sys.modules)
        build(self, *args, **facts)
        waiting = [note]

        def answered(frames: Any, reply: Any) -> None:
            if waiting:
                waiting.pop()("first", cpu=time.process_time(), version=reply.version)

        self.listen(answered)

    def started(self: Agent) -> None:
        start(self)
        also(self)

    Agent.__init__, Agent.start = built, started  # type: ignore[method-assign]


def watch_commands(note: Note) -> None:
    """Note every command before it is carried out, with who asked."""
    from device_agents.acting import Acting

    real = Acting.execute

    def execute(self: Acting, verb: str, arguments: Any, *, by: str) -> dict[str, Any]:
        note("ran", verb=verb, by=by)
        return real(self, verb, arguments, by=by)

    Acting.execute = execute  # type: ignore[method-assign]


def watch_outbox(note: Note) -> None:
    """Note the events and replies that are safely on disk."""
    from device_agents.outbox import Outbox

    real = Outbox.commit

    def commit(self: Outbox, *, sync: bool) -> bool:
        rows = [row for row in self._ram.values() if row.store in ("event", "ack")]
        written = real(self, sync=sync)
        for store in ("event", "ack"):
            ids = [json.loads(row.payload)["id"] for row in rows if row.store == store]
            if written and ids:
                note("kept", store=store, ids=ids)
        return written

    Outbox.commit = commit  # type: ignore[method-assign]


def watch_latencies(agent: Agent, note: Note) -> None:
    """Note when each answer left, and how long it took."""
    real, taken = agent.board.answered, []

    def answered(point: Any, frame: Any = None) -> None:
        real(point, frame)
        taken.append((round(time.monotonic(), 4), round(point.latency_ms, 4)))
        if len(taken) == CHUNK:
            note("latencies", taken=taken)
            taken.clear()

    agent.board.answered = answered  # type: ignore[method-assign]


def tell_events(agent: Agent, rate: float) -> None:
    """Have something happen, so often a second."""

    def run() -> None:
        number = 0
        while not agent.stopping.wait(1 / rate):
            number += 1
            agent.tell("guard", f"something happened, {number}", "warning", number=number)

    threading.Thread(target=run, name="events", daemon=True).start()


def trace(note: Note) -> None:
    """At the first SIGUSR1 begin to compare; at each further one note what grew most."""
    import tracemalloc

    tracemalloc.start(8)
    before: list[tracemalloc.Snapshot] = []

    def look(number: int, frame: Any) -> None:
        now = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, tracemalloc.__file__)])
        if before:
            grown = now.compare_to(before[0], "traceback")[:SHOWN]
            note("grown", lines=[f"{one.size_diff:+} B in {one.count_diff:+}: {one.traceback}" for one in grown])
        else:
            before.append(now)
            note("traced")

    signal.signal(signal.SIGUSR1, look)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("notes", type=Path)
    parser.add_argument("--events", type=float, default=0.0)
    parser.add_argument("--latencies", action="store_true")
    parser.add_argument("--trace", action="store_true")
    asked = parser.parse_args()
    note = noting(asked.notes)
    note("born", at=BORN)
    if asked.trace:
        trace(note)

    def also(agent: Agent) -> None:
        if asked.events:
            tell_events(agent, asked.events)
        if asked.latencies:
            watch_latencies(agent, note)

    watch_start(note, also)
    watch_commands(note)
    watch_outbox(note)
    from edge_adapt import cli

    sys.argv = ["edge-adapt", "run", str(asked.config)]
    cli.main()


if __name__ == "__main__":
    main()
