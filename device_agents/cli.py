"""`edge-adapt run` and `rerun`: arguments, signals, and where the answers go."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from device_agents.agent import Agent
    from edge_adapt.runtime.live import Reply
    from edge_adapt.streams.live.protocol import Frame

FORCED = 130


def run(
    config: Annotated[Path, typer.Argument(help="configuration, see packaging/agent.example.yaml")],
    answers: Annotated[
        Path | None, typer.Option(help="file for one JSON line per answer; - for standard output")
    ] = None,
) -> None:
    """Run an agent: answer frames, learn, keep, tell. Ctrl-C stops it gracefully, SIGHUP reads CONFIG again."""
    from device_agents.agent import Agent
    from device_agents.settings import AgentSettings
    from edge_adapt.config import load_config
    from edge_adapt.threads import one_thread

    one_thread()
    agent = Agent(load_config(config, AgentSettings), config=config)
    code = watched(agent, answers)
    status = agent.board.status
    typer.echo(
        f"{status.answered} frames answered, {status.learn.get('steps', 0)} steps learned, "
        f"version {status.version} of {status.slot}",
        err=True,
    )
    raise typer.Exit(code)


def rerun(
    config: Annotated[Path, typer.Argument(help="configuration that the agent ran with")],
    recording: Annotated[Path, typer.Argument(help="folder of the recording, such as state/recording")],
) -> None:
    """Compute a recorded run once more, and compare every answer bit for bit. Exit code 2 if one differs."""
    from device_agents.rerun import rerun
    from device_agents.settings import AgentSettings
    from edge_adapt.config import load_config
    from edge_adapt.threads import one_thread

    one_thread()
    made = rerun(load_config(config, AgentSettings), recording)
    typer.echo(f"{made.frames} frames in {made.batches} batches, {made.version} changes of weights: all bit-equal")
    typer.echo(made.ended)


def watched(agent: Agent, answers: Path | None = None) -> int:
    """Run an agent under signals: the first one asks it to stop, the second one ends the process."""
    logging.getLogger().handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:  # by a signal: one that follows a drained source or a command forces nothing
            os._exit(FORCED)
        asked = True
        agent.stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.signal(signal.SIGHUP, lambda number, frame: agent.reload())
    if answers is None:
        return agent.run()
    if str(answers) == "-":
        agent.listen(_Lines(agent, sys.stdout))
        return agent.run()
    with answers.open("a", encoding="utf-8") as file:
        agent.listen(_Lines(agent, file))
        return agent.run()


class _Lines:
    """One JSON line per answer. A pipe that nobody reads any more is left alone: answering goes on."""

    def __init__(self, agent: Agent, file: TextIO) -> None:
        self._classes = agent.core.bundle.manifest.classes
        self._file: TextIO | None = file

    def __call__(self, frames: Sequence[Frame], reply: Reply) -> None:
        if self._file is None:
            return
        try:
            for frame, row in zip(frames, reply.logits, strict=True):
                self._file.write(json.dumps(self._line(frame, row, reply)) + "\n")
            self._file.flush()
        except (OSError, ValueError):
            self._file = None
            logging.getLogger(__name__).error("answers cannot be written any more")

    def _line(self, frame: Frame, row: Any, reply: Reply) -> dict[str, Any]:
        import numpy as np

        best = int(row.argmax())
        weights = np.exp(row - row.max())
        return {
            "frame": frame.number,
            "name": frame.name,
            "class": best,
            "label": self._classes[best] if self._classes else None,
            "confidence": round(float(weights.max() / weights.sum()), 5),
            "version": reply.version,
        }
