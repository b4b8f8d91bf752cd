"""The threads of an agent: one answers, one learns, one keeps snapshots. Each shows life, and can be begun anew."""

from __future__ import annotations

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from device_agents.board import Board, Point
from device_agents.core import Core
from device_agents.decide import ANSWERING, LEARNING
from edge_adapt.errors import DataError, EdgeAdaptError
from edge_adapt.monitor.sensor import SensorCheck
from edge_adapt.runtime.live import Reply
from edge_adapt.runtime.ring import Ring
from edge_adapt.streams.live.protocol import Frame

Array = NDArray[Any]
log = logging.getLogger(__name__)
TICK_S = 0.25
"""A stage with nothing to do shows life so often."""
NOT_LEARNED = ("frozen", "constant")
"""Faults of a sensor whose frames can still be answered."""
OnAnswer = Callable[[Sequence[Frame], Reply], None]


class Stage(ABC):
    """A thread that is begun anew by leaving the old one to itself."""

    name: ClassVar[str]

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._beat = time.monotonic()

    def start(self) -> None:
        self._stopping.clear()
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """True if the thread ended in time."""
        self._stopping.set()
        thread = self._thread
        if thread is None:
            return True
        thread.join(timeout_s)
        return not thread.is_alive()

    def silent_s(self, now: float) -> float:
        """Seconds without a sign of life; infinity for a thread that ended without being told to."""
        if self._thread is None or self._stopping.is_set():
            return 0.0
        return now - self._beat if self._thread.is_alive() else math.inf

    def restart(self) -> None:
        self.start()

    def is_current(self) -> bool:
        """False in a thread that was left to itself: it has to end."""
        return threading.current_thread() is self._thread and not self._stopping.is_set()

    def _run(self) -> None:
        while self.is_current():
            self._beat = time.monotonic()
            self.turn()

    @abstractmethod
    def turn(self) -> None:
        """One round of work, which takes no longer than `TICK_S` if there is nothing to do."""


class AnswerStage(Stage):
    """Takes frames from the ring, checks them, answers them, tells the board. Waits for nothing else."""

    name: ClassVar[str] = ANSWERING

    def __init__(self, core: Core, ring: Ring[Frame], board: Board, wall_ms: Callable[[], int]) -> None:
        super().__init__()
        self.core, self.ring, self.board = core, ring, board
        self.sensor: str | None = None
        """Why the latest frame was not fit to learn from."""
        self.listeners: list[OnAnswer] = []
        """Told of every answered batch, in this thread: they may not block."""
        self.busy = False
        """True while frames are being answered."""
        self._check = SensorCheck(core.bundle.manifest.input, frozen_after=core.settings.source.frozen_after)
        self._wall_ms = wall_ms
        self._classes = core.bundle.manifest.classes

    def restart(self) -> None:
        self.core.rebuild()
        self.busy = False  # what the old thread had in hand is lost
        super().restart()

    def turn(self) -> None:
        frames = self.ring.take(self.core.settings.source.batch, TICK_S)
        if not frames:
            return
        self.busy = True
        taken = time.monotonic()
        sound, doubtful = self._sorted(frames)
        for group, learn in ((sound, True), (doubtful, False)):
            if group:
                self._answer(group, taken, learn=learn)
        self.busy = False

    def _sorted(self, frames: Sequence[Frame]) -> tuple[list[Frame], list[Frame]]:
        """Frames to answer and learn from, and frames to answer only; what cannot even be answered is counted."""
        sound: list[Frame] = []
        doubtful: list[Frame] = []
        for frame in frames:
            self.sensor = reason = self._check.reason(frame.image)
            if reason is None:
                sound.append(frame)
                continue
            self.board.count(reason)
            if reason in NOT_LEARNED:
                doubtful.append(frame)
        return sound, doubtful

    def _answer(self, frames: Sequence[Frame], taken: float, *, learn: bool) -> None:
        try:
            fed = self.core.preprocess(np.stack([frame.image for frame in frames]))
        except (DataError, ValueError) as error:  # frames of different sizes, or ones that only now turn out unfit
            self.board.count("shape", len(frames))
            log.debug("frames refused: %s", error)
            return
        try:
            reply = self.core.loop.answer(fed, learn=learn)
        except EdgeAdaptError as error:
            self.board.count("engine", len(frames))
            log.error("no answer: %s", error.what)
            return
        latency = 1000 * (time.monotonic() - taken)
        self._tell(frames, reply, latency)
        for listener in self.listeners:
            listener(frames, reply)

    def _tell(self, frames: Sequence[Frame], reply: Reply, latency_ms: float) -> None:
        top = reply.logits.max(axis=1, keepdims=True)
        weights = np.exp(reply.logits - top)
        total = weights.sum(axis=1)
        energy = -(top[:, 0] + np.log(total))
        best = reply.logits.argmax(axis=1)
        ts = self._wall_ms()
        for index, frame in enumerate(frames):
            label = self._classes[best[index]] if self._classes else str(int(best[index]))
            point = Point(ts, label, float(1 / total[index]), float(energy[index]), latency_ms, reply.version)
            self.board.answered(point, frame.image)
        self.board.count("answered", len(frames))


class LearnStage(Stage):
    """Deals with the letters of the live loop, one after the other."""

    name: ClassVar[str] = LEARNING

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core

    def restart(self) -> None:
        self.core.rebuild()
        super().restart()

    def turn(self) -> None:
        self.core.loop.work(TICK_S)
