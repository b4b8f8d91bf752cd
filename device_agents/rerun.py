"""`edge-adapt rerun`: what an agent recorded, computed once more, and every answer compared bit for bit."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from device_agents.core import Core
from device_agents.settings import AgentSettings
from device_agents.wishes import NAMED
from edge_adapt.errors import StateError
from edge_adapt.runtime.live import Reply
from edge_adapt.runtime.scripted import ScriptedLoop, Wishes
from edge_adapt.streams.recording import Batch, Note, read_recording

BEGIN, WISH, OUTSIDE = "agent", "wish", "outside"
"""Kinds of notes: the start of an agent, a wish by name, and something that a record cannot redo."""


@dataclass(frozen=True)
class Rerun:
    """What came of it."""

    batches: int
    frames: int
    version: int
    """Changes of weights on the way."""
    ended: str
    """Why it ended."""


def rerun(settings: AgentSettings, recording: Path) -> Rerun:
    """The first run of a recording again.

    Raises: StateError at the first answer that differs, or if the recording does not begin with an agent of this
    bundle and method from source; DataError if there is no recording.
    """
    core = Core(settings, lambda event: None)
    events = list(read_recording(recording))
    run, ended = _first_run(events, core)
    wishes: Wishes = {
        int(note.facts["done"]): NAMED[note.facts["name"]](core.method, **note.facts["arguments"])
        for note in run
        if isinstance(note, Note) and note.kind == WISH
    }
    loop: ScriptedLoop[Any] = ScriptedLoop(
        core.loop.predictor, core.method, core.budget, begin=core.loop.learned, gauge=core.gauge, wishes=wishes
    )
    batches = [event for event in run if isinstance(event, Batch)]
    frames = 0
    for batch in batches:
        recorded = Reply(np.zeros(0), **batch.decided)
        reply = loop.play(core.preprocess(np.stack(batch.images)), recorded)
        if zlib.crc32(reply.logits.tobytes()) != batch.answers:
            raise StateError(
                f"frame {batch.numbers[0]} was answered otherwise than now",
                remedy="compare the versions of ONNX Runtime and the processors: the last bits depend on both",
            )
        frames += len(batch.numbers)
    return Rerun(len(batches), frames, loop.predictor.version, ended)


def _first_run(events: list[Batch | Note], core: Core) -> tuple[list[Batch | Note], str]:
    """Events of the first agent, up to where the record cannot be followed. Raises: StateError."""
    starts = [event for event in events if isinstance(event, Note) and event.kind == BEGIN]
    if not starts:
        raise StateError(
            "the recording does not begin with its agent: its oldest part was dropped, or it was switched on later",
            remedy="set `record_mb` larger; `edge-adapt replay --data FOLDER` plays the frames all the same",
        )
    facts = starts[0].facts
    mine = {"bundle": core.bundle.id, "method": core.settings.method.model_dump(mode="json")}
    for name, value in mine.items():
        if facts[name] != value:
            raise StateError(f"it was recorded with {name} {facts[name]}, this is {value}", remedy="use the same")
    if not facts["from_source"]:
        raise StateError("the agent began from a snapshot, which is not recorded", remedy="record from a fresh state")
    run: list[Batch | Note] = []
    for event in events[events.index(starts[0]) + 1 :]:
        if isinstance(event, Note) and event.kind in (BEGIN, OUTSIDE):
            return run, f"the record goes on with {event.facts.get('what', 'another agent')}"
        run.append(event)
    return run, "the record ends"
