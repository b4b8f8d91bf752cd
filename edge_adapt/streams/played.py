"""Whatever plays frames one after the other, read to its end: video files, and sources that packages bring."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import InputSpec
from edge_adapt.errors import DataError
from edge_adapt.plugins import SOURCES, find
from edge_adapt.preprocess import covering, size_for
from edge_adapt.streams.data import Dataset
from edge_adapt.streams.folders import check_size
from edge_adapt.streams.live.protocol import BrokenFrameError, FrameSource, SourceEnded, SourceLostError

Array = NDArray[Any]

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
PATIENCE_S = 5.0
"""A source that gives no frame for so long is taken to be at its end."""


def load_video(path: Path, *, spec: InputSpec | None = None, limit: int | None = None) -> Dataset:
    """All frames of a video file, in order, without labels.

    Args: as of `load_data`.
    Raises: ConfigError without OpenCV, DataError if no frame can be read or they are too many to hold.
    """
    from edge_adapt.streams.live.capture import VideoSource

    return _dataset(path.stem, VideoSource(path, channels=_channels(spec)), spec, limit)


def load_source(kind: str, place: str, *, spec: InputSpec | None = None, limit: int | None = None) -> Dataset:
    """All frames of a source that a package brings, in order, without labels.

    Args:
        kind: its name under `edge_adapt.sources`.
        place: handed to it as it is.
    Raises: as `load_video`, ConfigError and EngineError as `find`.
    """
    return _dataset(kind, find(SOURCES, kind)(place, channels=_channels(spec)), spec, limit)


def _channels(spec: InputSpec | None) -> int:
    return 1 if spec is not None and spec.channels == 1 else 3


def _dataset(name: str, source: FrameSource, spec: InputSpec | None, limit: int | None) -> Dataset:
    images: list[Array] = []
    gaps: list[int] = []
    try:
        source.open()
        for image in islice(_frames(source), limit):
            if image is None:
                gaps.append(len(images))
                continue
            images.append(_sized(image, spec))
            check_size(name, len(images), images[-1])
    except SourceLostError as error:
        if not images:
            raise DataError(error.what, remedy=error.remedy) from error
    finally:
        source.close()
    if not images:
        raise DataError(f"{name} gives no frame", remedy="check it with a player")
    kinds = {(image.shape, image.dtype.name) for image in images}
    if len(kinds) > 1:
        raise DataError(f"the frames of {name} are of {len(kinds)} kinds: {sorted(kinds)[:3]}", remedy="give one kind")
    inside = tuple(gap for gap in dict.fromkeys(gaps) if 0 < gap < len(images))
    return Dataset(name, np.stack(images), None, ordered=True, gaps=inside)


def _frames(source: FrameSource) -> Iterator[Array | None]:
    """Its images; None for one that is broken."""
    while True:
        try:
            frame = source.read(PATIENCE_S)
        except SourceEnded:
            return
        except BrokenFrameError:
            yield None
            continue
        if frame is None:
            return
        yield frame.image


def _sized(image: Array, spec: InputSpec | None) -> Array:
    """As the network takes it; a grey image gets its axis of channels."""
    if spec is None or image.dtype != np.uint8 or image.ndim not in (2, 3):
        return image
    image = image[..., None] if image.ndim == 2 else image
    return covering(image, size_for(image, spec))
