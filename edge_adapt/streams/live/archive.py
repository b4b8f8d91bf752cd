"""A NumPy archive played back: its images, or its shifts one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edge_adapt.errors import DataError
from edge_adapt.streams.data import archive
from edge_adapt.streams.live.protocol import Frame, SourceEnded, SourceLostError

Array = NDArray[Any]


class ArchiveSource:
    """Frames of an .npz in stored order, as fast as they are read."""

    paced = False

    def __init__(self, path: Path, *, loop: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.loop, self._clock = path, loop, clock
        self._numbers = count()
        self._left: Iterator[tuple[str, Array]] = iter(())

    def open(self) -> None:
        """Read the whole archive into memory, and begin at its first frame."""
        if not self.path.is_file():
            raise SourceLostError(f"the archive {self.path} is not there", remedy="correct `source.path`")
        data = archive(self.path)
        if not len(data):
            raise DataError(f"{self.path} holds no frames", remedy="store the frames as [N, H, W, C] uint8")
        parts = data.shifts if data.images is None else {self.path.stem: data.images}
        self._left = _played(parts, loop=self.loop)

    def read(self, timeout_s: float) -> Frame | None:
        for name, image in self._left:
            return Frame(next(self._numbers), self._clock(), image, name)
        raise SourceEnded

    def close(self) -> None:
        self._left = iter(())


def _played(parts: dict[str, Array], *, loop: bool) -> Iterator[tuple[str, Array]]:
    while True:
        for name, images in parts.items():
            for index, image in enumerate(images):
                yield f"{name}/{index}", image.copy()
        if not loop:
            return
