"""What a source of frames is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from edge_adapt.errors import EdgeAdaptError

Array = NDArray[Any]


@dataclass(frozen=True, eq=False, slots=True)
class Frame:
    """One frame, raw. Whoever gets it owns the image; the source never writes into it again."""

    number: int
    """Counts up from 0 for each source, over losses too."""
    captured: float
    """Monotonic clock, seconds."""
    image: Array
    """[H, W, 3] RGB or [H, W], uint8 or float; from an archive whatever it holds for one frame."""
    name: str
    """Where it is from: a file, or `shift/index`."""


class SourceEnded(Exception):
    """No error: the last frame was read, and there will be no other."""


class SourceLostError(EdgeAdaptError):
    """The source cannot be read now: unplugged, unreachable, not there. Open it again later."""


class BrokenFrameError(EdgeAdaptError):
    """One frame cannot be used; the next one may."""


class FrameSource(Protocol):
    """Used by one thread at a time, but for what a source says is safe."""

    paced: bool
    """True if frames come at a pace of their own, whether anybody reads or not: a camera."""

    def open(self) -> None:
        """Begin, or begin again after a loss. Raises: SourceLostError, DataError if what is there cannot be used."""
        ...

    def read(self, timeout_s: float) -> Frame | None:
        """The next frame, or None if none came in time.

        Raises: SourceEnded, SourceLostError, BrokenFrameError.
        """
        ...

    def close(self) -> None:
        """Let go of devices and files. May be called twice."""
        ...
