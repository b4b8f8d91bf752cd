"""What a replay cost besides time: backward passes, state, energy, and the harness itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from math import isfinite
from statistics import median
from typing import Any

from numpy.typing import NDArray

from device_agents.host import read_host
from edge_adapt.engines.protocol import Engine
from edge_adapt.errors import StateError
from edge_adapt.methods.protocol import Method
from edge_adapt.runtime.state_io import pack

Array = NDArray[Any]

POWER_S = 0.1
"""Seconds between two readings of the board's power."""
Read = Callable[[], float | None]


class PlainInference:
    """The frozen network on one batch, timed at every call: what every other time is a multiple of."""

    def __init__(self, engine: Engine, frames: Array, *, rounds: int) -> None:
        self._engine, self._frames, self._rounds = engine, frames, rounds
        self._seconds: list[float] = []

    def __call__(self) -> None:
        self._engine.run(self._frames)  # the first one after others may have more to do
        for _ in range(self._rounds):
            started = time.perf_counter()
            self._engine.run(self._frames)
            self._seconds.append(time.perf_counter() - started)

    @property
    def ms(self) -> float:
        """Milliseconds a frame, the median."""
        return median(self._seconds) * 1e3 / len(self._frames)


class Kept:
    """A method that is the one inside in all it does, and remembers the state it left last."""

    def __init__(self, method: Method[Any]) -> None:
        self._method = method
        self.state: Any = None
        self._first: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def init(self) -> Any:
        self.state = self._first = self._method.init()
        return self.state

    def step(self, state: Any, seen: Any) -> Any:
        made = self._method.step(state, seen)
        self.state = made.state
        return made

    def watch(self, state: Any, answered: Any) -> Any:
        made = self._method.watch(state, answered)
        self.state = made.state
        return made

    @property
    def state_bytes(self) -> int | None:
        """Bytes of the numbers in its state, as a snapshot would keep them beside those that it began with.

        None if the state is no value.
        """
        try:
            tensors = pack(self.state, {"first": self._first})[1]
        except StateError:
            return None
        return sum(array.nbytes for array in tensors.values())


def board_power() -> float | None:
    """Watts of the whole board; None where it has no monitor."""
    return read_host().get("power_w")


class Energy:
    """Joules of the whole board from start to stop, where it reports its power. A context manager."""

    def __init__(self, read: Read = board_power) -> None:
        self._read = read
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._joules = 0.0
        self.joules: float | None = None
        """After it has ended; None where the board does not tell, or stopped telling."""

    def __enter__(self) -> Energy:
        if self._read() is not None:
            self._thread = threading.Thread(target=self._watch, name="energy", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self.joules = self._joules if isfinite(self._joules) else None

    def _watch(self) -> None:
        last = time.monotonic()
        while True:
            over = self._done.wait(POWER_S)
            watts, now = self._read(), time.monotonic()
            self._joules += (now - last) * (float("nan") if watts is None else watts)
            last = now
            if over:
                return
