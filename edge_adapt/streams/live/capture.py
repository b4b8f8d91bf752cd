"""Cameras, network streams and video files, through OpenCV. The only file that imports it."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from edge_adapt.errors import ConfigError
from edge_adapt.streams.live.protocol import BrokenFrameError, Frame, SourceEnded, SourceLostError

PATIENCE_MS = 5000
"""A stream over the network that is silent for longer counts as lost."""


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
        self.close()
        device = self._opened()
        if not device.isOpened():
            device.release()
            raise SourceLostError(f"{self.name} cannot be opened", remedy="check that it is there, and who else has it")
        self._device = device

    def close(self) -> None:
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
            raise SourceLostError(f"{self.name} is not open", remedy="open it first")
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

    def _coloured(self, image: Any) -> Any:
        """BGR, or one channel -> what the network takes; always an array of its own."""
        grey = image.ndim == 2 or image.shape[2] == 1
        if self._channels == 1:
            return (
                image.reshape(image.shape[:2]).copy() if grey else self._cv2.cvtColor(image, self._cv2.COLOR_BGR2GRAY)
            )
        return self._cv2.cvtColor(image, self._cv2.COLOR_GRAY2RGB if grey else self._cv2.COLOR_BGR2RGB)


class CameraSource(_Capture):
    """A camera by index or device file, or a stream by its address. It never ends: without frames it is lost."""

    paced = True

    def __init__(self, device: int | str, *, channels: int = 3, clock: Callable[[], float] = time.monotonic) -> None:
        target = int(device) if isinstance(device, str) and device.isdecimal() else device
        super().__init__(target, f"camera {_shown(device)}", channels, clock)

    def open(self) -> None:
        super().open()
        self._device.set(self._cv2.CAP_PROP_BUFFERSIZE, 1)  # the newest frame, where the driver obeys

    def read(self, timeout_s: float) -> Frame | None:
        """Waits for the driver, whatever `timeout_s` says."""
        frame = self._grabbed()
        if frame is None:
            raise SourceLostError(f"{self.name} gives no frames", remedy="plug it in again")
        return frame


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
