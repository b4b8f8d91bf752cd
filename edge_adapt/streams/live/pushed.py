"""Encoded images that somebody hands in, such as those that a camera publishes over MQTT."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

from edge_adapt.streams.live.images import decode
from edge_adapt.streams.live.protocol import BrokenFrameError, Frame, SourceEnded

MAX_BYTES = 4 * 1024 * 1024


class _Handed(NamedTuple):
    captured: float
    name: str
    data: bytes | None
    """None: it was too large, and not kept."""
    size: int


class PushedSource:
    """`push` never waits and never raises; images are decoded by whoever reads. The newest few are kept."""

    paced = True

    def __init__(
        self,
        name: str,
        *,
        channels: int = 3,
        waiting: int = 4,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.channels, self.max_bytes, self._clock = name, channels, max_bytes, clock
        self._numbers = count()
        self._handed: deque[_Handed] = deque(maxlen=waiting)
        self._changed = threading.Condition()
        self._closed = False
        self.dropped = 0
        """Images that newer ones pushed out before they were read."""

    def push(self, data: bytes, name: str = "") -> None:
        """Hand in one JPEG or PNG; from any thread."""
        size = len(data)
        handed = _Handed(self._clock(), name or self.name, data if size <= self.max_bytes else None, size)
        with self._changed:
            self.dropped += len(self._handed) == self._handed.maxlen
            self._handed.append(handed)
            self._changed.notify()

    def open(self) -> None:
        with self._changed:
            self._closed = False

    def read(self, timeout_s: float) -> Frame | None:
        with self._changed:
            self._changed.wait_for(lambda: self._handed or self._closed, timeout_s)
            if self._closed:
                raise SourceEnded
            if not self._handed:
                return None
            handed = self._handed.popleft()
        if handed.data is None:
            raise BrokenFrameError(
                f"image {handed.name} has {handed.size} bytes, at most {self.max_bytes} are taken",
                remedy="send smaller images",
            )
        image = decode(handed.data, handed.name, channels=self.channels, max_bytes=self.max_bytes)
        return Frame(next(self._numbers), handed.captured, image, handed.name)

    def close(self) -> None:
        """Forget what waits, and let a reader go."""
        with self._changed:
            self._closed = True
            self._handed.clear()
            self._changed.notify_all()
