"""The recording of a running agent: switched on and off, fed by the thread that answers, written by another one."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from device_agents.rerun import WISH
from device_agents.stages import AnswerStage
from edge_adapt.errors import ConfigError, EdgeAdaptError
from edge_adapt.runtime.live import Reply
from edge_adapt.streams.live.protocol import Frame
from edge_adapt.streams.recording import Recorder

WAITING = 64
"""Batches that may wait to be written; a disk that is slower loses some, and the recording says so."""
TICK_S = 0.25


class Recording:
    """Off until it is switched on, or from the start if a size was configured."""

    def __init__(self, folder: Path, max_mb: float | None, answering: AnswerStage) -> None:
        self._folder, self._max_mb = folder, max_mb
        self.lost = 0
        """Batches that did not reach the disk."""
        self.trouble: str | None = None
        self._queue: queue.Queue[Callable[[Recorder], None]] = queue.Queue(WAITING)
        self._until: float | None = None
        self._on = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        answering.listeners.append(self._heard)
        if max_mb is not None:
            self.switch(True, None)

    def switch(self, on: bool, seconds: float | None) -> dict[str, Any]:
        """Raises: ConfigError if no size was configured."""
        if on and self._max_mb is None:
            raise ConfigError("there is no room for a recording", remedy="set `record_mb` in the configuration")
        self._until = time.monotonic() + seconds if on and seconds is not None else None
        if on:
            self._on.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="recording", daemon=True)
                self._thread.start()
        else:
            self._on.clear()
        return {"on": on, "folder": str(self._folder), "lost": self.lost}

    def close(self) -> None:
        """Write what waits, and end."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(2.0)

    def _heard(self, frames: Sequence[Frame], reply: Reply) -> None:
        """In the thread that answers: never waits."""
        if not self._on.is_set():
            return
        if self._until is not None and time.monotonic() > self._until:
            self._on.clear()
            return
        self._put(lambda recorder: recorder.answered(frames, reply))

    def note(self, kind: str, **facts: Any) -> None:
        """Something else that a rerun has to know; nothing while the recording is off. Never waits."""
        if self._on.is_set():
            self._put(lambda recorder: recorder.note(kind, **facts))

    def wished(self, name: str, arguments: Mapping[str, Any], done: int) -> None:
        """A wish of `wishes.NAMED` that was granted as letter number `done`."""
        self.note(WISH, name=name, arguments=dict(arguments), done=done)

    def _put(self, write: Callable[[Recorder], None]) -> None:
        try:
            self._queue.put_nowait(write)
        except queue.Full:
            self.lost += 1

    def _run(self) -> None:
        assert self._max_mb is not None
        recorder = Recorder(self._folder, self._max_mb)
        try:
            while not (self._closing.is_set() and self._queue.empty()):
                try:
                    write = self._queue.get(timeout=TICK_S)
                except queue.Empty:
                    continue
                try:
                    write(recorder)
                    self.trouble = None
                except EdgeAdaptError as error:
                    self.lost += 1
                    self.trouble = error.what
        finally:
            recorder.close()
