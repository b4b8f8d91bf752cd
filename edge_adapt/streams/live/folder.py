"""A watched folder: the images in it in name order, then those that appear. A file counts once it stopped growing."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

from edge_adapt.streams.data import SUFFIXES
from edge_adapt.streams.live.images import MAX_BYTES, decode
from edge_adapt.streams.live.protocol import BrokenFrameError, Frame, SourceLostError

PATIENCE = 20
"""Looking takes one part in so many of the time, however large the folder is."""


class Stamp(NamedTuple):
    """What changes when a file is written."""

    size: int
    modified_ns: int


class FolderSource:
    """Looks every `poll_s`. A file is read when two looks found it alike; one that is written anew is read again."""

    paced = False

    def __init__(
        self, path: Path, *, channels: int = 3, poll_s: float = 0.2, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path, self.channels, self.poll_s, self._clock = path, channels, poll_s, clock
        self._numbers = count()
        self._seen: dict[str, Stamp] = {}
        """As the last look found them: no larger than the folder."""
        self._done: dict[str, Stamp] = {}
        """As they were when they were put in line."""
        self._line: deque[str] = deque()
        self._next_look = 0.0

    def open(self) -> None:
        """Raises: SourceLostError if there is no such folder. What was read before a loss is not read again."""
        if not self.path.is_dir():
            raise SourceLostError(f"the folder {self.path} is not there", remedy="make it, or mount it again")
        self._next_look = 0.0

    def read(self, timeout_s: float) -> Frame | None:
        """The next image; one that was deleted while it waited is left out."""
        deadline = self._clock() + timeout_s
        while not self._line:
            now = self._clock()
            if now >= self._next_look:
                self._look()
                ended = self._clock()
                self._next_look = ended + max(self.poll_s, PATIENCE * (ended - now))
            elif now >= deadline:
                return None
            else:
                time.sleep(max(0.0, min(self._next_look, deadline) - now))
        return self._frame(self._line.popleft())

    def close(self) -> None:
        self._line.clear()

    def _look(self) -> None:
        """Put in line what stopped growing since the last look."""
        found = self._stamps()
        ready = [name for name, stamp in found.items() if stamp.size and self._seen.get(name) == stamp]
        fresh = sorted(name for name in ready if self._done.get(name) != found[name])
        self._seen = found
        self._done = {name: stamp for name, stamp in self._done.items() if name in found}
        self._done.update((name, found[name]) for name in fresh)
        self._line.extend(fresh)

    def _stamps(self) -> dict[str, Stamp]:
        made = {}
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if entry.name.lower().endswith(SUFFIXES) and (stamp := _stamp(entry)) is not None:
                        made[entry.name] = stamp
        except OSError as error:
            raise SourceLostError(
                f"the folder {self.path} cannot be read: {error.strerror}", remedy="mount it again"
            ) from error
        return made

    def _frame(self, name: str) -> Frame | None:
        try:
            with (self.path / name).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BrokenFrameError(
                f"image {name} cannot be read: {error.strerror}", remedy="check its rights"
            ) from error
        captured = self._clock()
        return Frame(next(self._numbers), captured, decode(data, name, channels=self.channels), name)


def _stamp(entry: os.DirEntry[str]) -> Stamp | None:
    """None for what is no file, or no longer there."""
    try:
        if not entry.is_file():
            return None
        facts = entry.stat()
    except OSError:
        return None
    return Stamp(facts.st_size, facts.st_mtime_ns)
