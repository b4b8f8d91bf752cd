"""A source: frames that are drawn rather than met, a bright square that drifts over noise."""

from __future__ import annotations

import time
from itertools import count
from typing import ClassVar

import numpy as np

from edge_adapt.errors import ConfigError
from edge_adapt.streams.live.protocol import Frame, SourceEnded

SIDE, SQUARE = 32, 8


class DriftingSquare:
    """`--data drifting_square:200` plays 200 frames of it."""

    example: ClassVar[str] = "40"
    """A place that can be played anywhere: the contract tries it."""
    paced = False

    def __init__(self, place: str, *, channels: int = 3, loop: bool = False) -> None:
        """
        Args:
            place: what stands behind the colon: how many frames there are.
            channels: 1 or 3, what the network takes.
            loop: begin again at the end.
        """
        if not place.isdecimal() or not int(place):
            raise ConfigError(
                f"drifting_square:{place} is no number of frames", remedy="use a number above 0, such as 200"
            )
        self.frames, self.channels, self.loop = int(place), channels, loop
        self._numbers = count()
        self._played = 0

    def open(self) -> None:
        self._played = 0

    def read(self, timeout_s: float) -> Frame | None:
        if self._played >= self.frames:
            if not self.loop:
                raise SourceEnded
            self._played = 0
        number, self._played = self._played, self._played + 1
        image = np.random.default_rng(number).integers(0, 128, (SIDE, SIDE, 3), np.uint8)
        place = number % (SIDE - SQUARE)
        image[place : place + SQUARE, place : place + SQUARE] = 255
        image = image[..., 0].copy() if self.channels == 1 else image
        return Frame(next(self._numbers), time.monotonic(), image, f"drifting_square/{number}")

    def close(self) -> None:
        self._played = self.frames
