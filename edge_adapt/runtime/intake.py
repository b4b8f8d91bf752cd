"""The thread that reads a source into a ring: at a pace, and again after every loss."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

from edge_adapt.errors import EdgeAdaptError
from edge_adapt.runtime.ring import Ring
from edge_adapt.streams.live.protocol import BrokenFrameError, Frame, FrameSource, SourceEnded

Happening = Literal["lost", "back", "broken", "ended"]
Tell = Callable[[Happening, str], None]
"""What happened and a sentence about it; called on the thread of the intake, must return at once."""

WAIT_S = 0.25
"""The thread shows life at least so often, as long as its source does not block it."""

log = logging.getLogger(__name__)


class Intake:
    """Reads until told to stop. A source that ended leaves the thread idle, and alive.

    Frames of a source without a pace of its own are read when they are due; of a camera every frame is read, so that
    none is stale, and those that come too early are thinned out.
    """

    def __init__(
        self,
        source: FrameSource,
        ring: Ring[Frame],
        *,
        fps: float | None = None,
        tell: Tell = lambda happening, text: None,
        retry_s: tuple[float, float] = (0.5, 10.0),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """retry_s: wait before a lost source is opened again, doubled up to the second number."""
        self.source, self.ring = source, ring
        self.frames = self.broken = self.thinned = self.losses = 0
        self.lost = self.ended = False
        self.beat = clock()
        """Monotonic time of the last sign of life."""
        self._period = 1 / fps if fps else 0.0
        self._tell, self._retry_s, self._clock = tell, retry_s, clock
        self._due = clock()
        self._attempts = 0
        """To open the source again, since it was lost."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> bool:
        """Ask the thread to end and wait for it; False if its source holds it longer than that."""
        self._stop.set()
        if self.alive:
            self._thread.join(timeout_s)
        return not self.alive

    def _run(self) -> None:
        try:
            while not self._stop.is_set() and not self.ended:
                try:
                    self._read_on()
                except SourceEnded:
                    self.ended = True
                    self._tell("ended", f"the source ended after {self.frames} frames")
                except Exception as error:  # whatever a driver does, the source is opened again and answering goes on
                    self._lose(error)
        finally:
            self.source.close()
        while not self._pause(WAIT_S):
            pass

    def _read_on(self) -> None:
        """Open the source, and read until something is raised."""
        self.beat = self._clock()
        self.source.open()
        while not self._stop.is_set():
            if not self.source.paced and self._pause(self._due - self._clock()):
                return
            self.beat = self._clock()
            try:
                frame = self.source.read(WAIT_S)
            except BrokenFrameError as error:
                self.broken += 1
                self._tell("broken", error.what)
                continue
            if frame is not None:
                self._arrived(frame)

    def _arrived(self, frame: Frame) -> None:
        if self.lost:
            self.lost = False
            self._tell("back", "the source is back")
        now = self._clock()
        if self.source.paced and now < self._due - self._period / 2:  # half a period of jitter is allowed
            self.thinned += 1
            return
        self._due = next_due(self._due, now, self._period)
        self.frames += 1
        while not self.ring.put(frame, WAIT_S) and self._may_wait():
            self.beat = self._clock()

    def _may_wait(self) -> bool:
        return self.ring.policy == "block" and not self.ring.closed and not self._stop.is_set()

    def _lose(self, error: Exception) -> None:
        """Tell of a loss once, then wait before the next attempt, longer after every one that failed."""
        if not self.lost:
            self.lost, self.losses = True, self.losses + 1
            self._attempts = 0
            if not isinstance(error, EdgeAdaptError):
                log.exception("the source failed")
            self._tell("lost", error.what if isinstance(error, EdgeAdaptError) else f"the source failed: {error!r}")
        self.source.close()
        first, most = self._retry_s
        self._pause(min(most, first * 2**self._attempts))
        self._attempts = min(self._attempts + 1, 32)

    def _pause(self, seconds: float) -> bool:
        """Wait, showing life; True if told to stop."""
        until = self._clock() + seconds
        while (left := until - self._clock()) > 0:
            self.beat = self._clock()
            if self._stop.wait(min(left, WAIT_S)):
                return True
        return self._stop.is_set()


def next_due(due: float, now: float, period: float) -> float:
    """When the next frame is due: a period after this one was, or after now if that is long past."""
    return due + period if now - due < period else now + period
