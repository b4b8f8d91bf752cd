"""Cameras, network streams and video files, through OpenCV. The only file that imports it.

A driver may hang for ever, so that a camera is only touched by a thread of its own, which is left behind if need be.
"""

from __future__ import annotations

import importlib
import queue
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from edge_adapt.errors import ConfigError
from edge_adapt.streams.live.protocol import BrokenFrameError, Frame, SourceEnded, SourceLostError

T = TypeVar("T")
PATIENCE_MS = 4000
"""A camera, or a stream over the network, that is silent for longer counts as lost."""
OPENING_S, CLOSING_S = 15.0, 1.0
"""A camera that takes longer to open counts as lost; one that takes longer to close is left to its thread."""


def opencv() -> Any:
    """The module. Raises: ConfigError naming the extra that brings it."""
    try:
        module = importlib.import_module("cv2")
    except ImportError as error:
        raise ConfigError(
            f"cameras and video files need OpenCV: {error}", remedy="pip install 'edge-adapt[video]'"
        ) from error
    module.setNumThreads(1)  # the other cores answer
    return module


class _Capture:
    """One cv2.VideoCapture, and frames in the colours of the network."""

    def __init__(self, target: int | str, name: str, channels: int, clock: Callable[[], float]) -> None:
        self._cv2 = opencv()
        self._target, self._channels, self._clock = target, channels, clock
        self.name = name
        self._numbers = count()
        self._device: Any = None

    def open(self) -> None:
        """Raises: SourceLostError."""
        self._begin()

    def close(self) -> None:
        self._release()

    def _begin(self) -> None:
        self._release()
        device = self._opened()
        if not device.isOpened():
            device.release()
            raise SourceLostError(f"{self.name} cannot be opened", remedy="check that it is there, and who else has it")
        self._device = device

    def _release(self) -> None:
        if self._device is not None:
            self._device.release()
            self._device = None

    def _opened(self) -> Any:
        if isinstance(self._target, str) and "://" in self._target:
            limits = (self._cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, self._cv2.CAP_PROP_READ_TIMEOUT_MSEC)
            options = [value for limit in limits for value in (limit, PATIENCE_MS)]
            return self._cv2.VideoCapture(self._target, self._cv2.CAP_FFMPEG, options)
        return self._cv2.VideoCapture(self._target)

    def _grabbed(self) -> Frame | None:
        """None if there is no frame. Raises: BrokenFrameError if there is one that has no pixels."""
        if self._device is None:
            raise self._not_open()
        try:
            there, image = self._device.read()
        except self._cv2.error as error:
            raise SourceLostError(f"{self.name} failed: {error}", remedy="open it again") from error
        if not there:
            return None
        captured, number = self._clock(), next(self._numbers)
        if image is None or image.ndim not in (2, 3) or not image.size:
            raise BrokenFrameError(f"{self.name}: frame {number} has no pixels", remedy="check the cable")
        return Frame(number, captured, self._coloured(image), f"{self.name}/{number}")

    def _not_open(self) -> SourceLostError:
        return SourceLostError(f"{self.name} is not open", remedy="open it first")

    def _coloured(self, image: Any) -> Any:
        """BGR, or one channel -> what the network takes; always an array of its own."""
        grey = image.ndim == 2 or image.shape[2] == 1
        if self._channels == 1:
            return (
                image.reshape(image.shape[:2]).copy() if grey else self._cv2.cvtColor(image, self._cv2.COLOR_BGR2GRAY)
            )
        return self._cv2.cvtColor(image, self._cv2.COLOR_GRAY2RGB if grey else self._cv2.COLOR_BGR2RGB)


class _Worker:
    """A thread for calls into a driver, one after the other; whoever asks need not wait for the end."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def ask(self, call: Callable[[], T]) -> Future[T]:
        asked: Future[T] = Future()
        self._calls.put((call, asked))
        return asked

    def end(self, timeout_s: float) -> bool:
        """End after what was asked; False if that takes longer."""
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (found := self._calls.get()) is not None:
            call, asked = found
            try:
                asked.set_result(call())
            except Exception as error:
                asked.set_exception(error)


class CameraSource(_Capture):
    """A camera by index or device file, or a stream by its address. It never ends: without frames it is lost."""

    paced = True

    def __init__(self, device: int | str, *, channels: int = 3, clock: Callable[[], float] = time.monotonic) -> None:
        target = int(device) if isinstance(device, str) and device.isdecimal() else device
        super().__init__(target, f"camera {_shown(device)}", channels, clock)
        self._worker: _Worker | None = None
        self._asked: Future[Frame | None] | None = None
        """For a frame that did not come in time."""
        self._asked_at = 0.0

    def open(self) -> None:
        self.close()
        if self._worker is not None:
            raise SourceLostError(f"{self.name} hangs in its driver", remedy="unplug it, or restart the agent")
        self._worker = _Worker(self.name)
        asked = self._worker.ask(self._begin)
        if not wait((asked,), OPENING_S).done:
            raise SourceLostError(f"{self.name} does not open", remedy="plug it in again")
        asked.result()

    def read(self, timeout_s: float) -> Frame | None:
        if self._worker is None:
            raise self._not_open()
        if self._asked is None:
            self._asked, self._asked_at = self._worker.ask(self._grabbed), time.monotonic()
        asked = self._asked
        if not wait((asked,), timeout_s).done:
            if time.monotonic() - self._asked_at < PATIENCE_MS / 1000:
                return None
            raise self._silent()
        self._asked = None
        frame = asked.result()
        if frame is None:
            raise self._silent()
        return frame

    def close(self) -> None:
        """A driver that hangs is not waited for: the device is released when it comes back."""
        self._asked = None
        if self._worker is not None:
            self._worker.ask(self._release)
            if self._worker.end(CLOSING_S):
                self._worker = None

    def _begin(self) -> None:
        super()._begin()
        self._device.set(self._cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest frame, where the driver obeys

    def _silent(self) -> SourceLostError:
        return SourceLostError(f"{self.name} gives no frames", remedy="plug it in again")


class VideoSource(_Capture):
    """A video file, played once or for ever, as fast as it is read."""

    paced = False

    def __init__(
        self, path: Path, *, loop: bool = False, channels: int = 3, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(str(path), f"video {path.name}", channels, clock)
        self._path, self._loop = path, loop
        self._played = 0
        """Frames since the file was opened."""

    def open(self) -> None:
        if not self._path.is_file():
            raise SourceLostError(f"the video {self._path} is not there", remedy="correct `source.path`")
        super().open()
        self._played = 0

    def read(self, timeout_s: float) -> Frame | None:
        frame = self._grabbed()
        if frame is None and not self._played:
            raise SourceLostError(f"{self.name} holds no readable frame", remedy="check it with a player")
        if frame is None and self._loop:
            self.open()
            return None
        if frame is None:
            raise SourceEnded
        self._played += 1
        return frame


def _shown(device: int | str) -> str:
    """`rtsp://user:secret@host/live` -> `rtsp://host/...`: names are logged, and passwords stand in paths too."""
    scheme, separator, rest = str(device).partition("://")
    if not separator:
        return str(device)
    authority, *behind = re.split(r"[/?#]", rest, maxsplit=1)
    host = authority.rpartition("@")[2]
    if host == authority and any("@" in part for part in behind):
        host = ""  # a password with a slash in it: nothing here is safe to show
    return f"{scheme}://{host}/..."
