"""From settings to a source."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from edge_adapt.errors import ConfigError, did_you_mean
from edge_adapt.plugins import SOURCES, find, names
from edge_adapt.streams.live.archive import ArchiveSource
from edge_adapt.streams.live.capture import CameraSource, VideoSource
from edge_adapt.streams.live.folder import FolderSource
from edge_adapt.streams.live.protocol import FrameSource
from edge_adapt.streams.live.pushed import PushedSource

T = TypeVar("T")
KINDS = ("archive", "folder", "camera", "video", "mqtt")


def open_source(
    kind: str,
    *,
    path: Path | None = None,
    device: int | str = 0,
    topic: str | None = None,
    place: str | None = None,
    loop: bool = False,
    channels: int = 3,
) -> FrameSource:
    """A source, not yet opened.

    Args:
        kind: one of `KINDS`, or the name of a source that an installed package brings; for `mqtt` it is a
            PushedSource, and whoever has the broker pushes.
        path: of the archive, the folder or the video.
        device: of the camera.
        topic: whose images are pushed.
        place: what a package's source is built from.
        loop: archive and video begin again at their end.
        channels: 1 or 3, what the network takes; images are converted, archives are not.
    Raises: ConfigError if something is missing, a library among them; EngineError for a source that cannot be loaded.
    """
    if kind == "camera":
        return CameraSource(device, channels=channels)
    if kind == "mqtt":
        return PushedSource(_given(topic, "topic", kind), channels=channels)
    if kind == "archive":
        return ArchiveSource(_given(path, "path", kind), loop=loop)
    if kind == "folder":
        return FolderSource(_given(path, "path", kind), channels=channels)
    if kind == "video":
        return VideoSource(_given(path, "path", kind), loop=loop, channels=channels)
    if kind in (brought := names(SOURCES)):
        source: FrameSource = find(SOURCES, kind)(_given(place, "place", kind), channels=channels, loop=loop)
        return source
    raise ConfigError(f"there is no source of kind {kind!r}", remedy=did_you_mean(kind, (*KINDS, *brought)))


def _given(value: T | None, name: str, kind: str) -> T:
    if value is None:
        raise ConfigError(f"a source of kind {kind} needs `{name}`", remedy=f"set `source.{name}`")
    return value
