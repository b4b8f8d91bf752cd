"""A recording: the raw frames that a device met, and what it decided when, in a ring of segments on disk.

A segment is two files: `<number>.frames`, the images one after the other, and `<number>.jsonl`, one line for each
answered batch or note, in order. A line is written after its images and holds their checksum, so that what a kill or a
power cut left half-written is seen, and ignored. When the cap is reached the oldest segment goes.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.errors import DataError, StateError
from edge_adapt.streams.data import Dataset

if TYPE_CHECKING:
    from edge_adapt.runtime.live import Reply
    from edge_adapt.streams.live.protocol import Frame

Array = NDArray[Any]

SCHEMA = 1
FRAMES, LINES = ".frames", ".jsonl"
SEGMENTS = 8
"""The cap is shared by so many segments: dropping the oldest one costs an eighth of what is kept."""
DTYPES = ("uint8", "uint16", "int16", "float32", "float64")
MB = 1_000_000


@dataclass(frozen=True, eq=False)
class Batch:
    """Frames that were answered together, and what was decided about them."""

    numbers: tuple[int, ...]
    """Of the frames; what lies between two batches was dropped, or not recorded."""
    images: tuple[Array, ...]
    """Raw."""
    names: tuple[str, ...]
    decided: Mapping[str, Any]
    """What was decided about them: fields of `Reply` without its arrays, such as `version`, `done` and `looked`."""
    answers: int = 0
    """CRC-32 of the logits."""


@dataclass(frozen=True)
class Note:
    """Something else that replay has to know: the start of a run, a reset, a change of settings."""

    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)


class Recorder:
    """Writes one recording. For one thread; the answering thread hands over to it."""

    def __init__(self, folder: Path, max_mb: float, *, facts: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            max_mb: most that the recording takes on disk, in millions of bytes.
            facts: about this run, for its first note.
        """
        self.folder, self._cap = folder, int(max_mb * MB)
        self._frames: IO[bytes] | None = None
        self._lines: IO[bytes] | None = None
        self._sizes: dict[int, int] = {}
        """Segment -> bytes, the oldest first."""
        self._begun = False
        self._facts = dict(facts or {})

    def answered(self, frames: Sequence[Frame], reply: Reply) -> None:
        """One batch, and what was decided; the answers follow from that, and only a checksum of them is kept.

        Raises: StateError if the disk refuses, DataError if a frame is too large or of another kind.
        """
        images = [np.ascontiguousarray(frame.image) for frame in frames]
        for frame, image in zip(frames, images, strict=True):
            if image.dtype.name not in DTYPES:
                raise DataError(
                    f"frame {frame.number} has dtype {image.dtype}, which is not recorded",
                    remedy=f"recorded are {', '.join(DTYPES)}",
                )
        self._write(
            {
                "is": "batch",
                "numbers": [frame.number for frame in frames],
                "names": [frame.name for frame in frames],
                "shapes": [list(image.shape) for image in images],
                "dtypes": [image.dtype.name for image in images],
                "decided": _plain(reply),
                "answers": zlib.crc32(np.ascontiguousarray(reply.logits).tobytes()),
            },
            b"".join(image.tobytes() for image in images),
        )

    def note(self, kind: str, **facts: Any) -> None:
        """Something else, in its place between the batches; `facts` must be JSON. Raises: StateError."""
        self._write({"is": "note", "kind": kind, "facts": facts}, b"")

    def close(self) -> None:
        """Sync and end; a later recorder goes on in a new segment. Never raises."""
        for file in (self._frames, self._lines):
            if file is not None:
                with suppress(OSError):
                    file.flush()
                    os.fsync(file.fileno())
                with suppress(OSError):
                    file.close()
        self._frames = self._lines = None

    def _write(self, line: dict[str, Any], images: bytes) -> None:
        try:
            if not self._begun:
                self._begin()
            self._append(line, images)
        except OSError as error:
            self.close()  # what is half-written ends its segment, and the next batch begins another one
            self._sizes = {number: _size(self.folder, number) for number in self._sizes}
            raise StateError(
                f"the recording in {self.folder} cannot be written: {error.strerror}",
                remedy="free some space, or switch the recording off",
            ) from error

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sizes = {number: _size(self.folder, number) for number in _segments(self.folder)}
        self._begun = True
        self._append({"is": "note", "kind": "begin", "facts": {"schema": SCHEMA, **self._facts}}, b"")

    def _append(self, line: dict[str, Any], images: bytes) -> None:
        line |= {"bytes": len(images), "crc": zlib.crc32(images)}
        text = json.dumps(line, allow_nan=False).encode()
        text = b"%08x %s\n" % (zlib.crc32(text), text)
        size = len(text) + len(images)
        if size > self._cap:
            raise DataError(
                f"a batch of {size} bytes is larger than the whole recording, {self._cap} bytes",
                remedy="raise record_mb",
            )
        if self._frames is None or self._sizes[self._newest] + size > self._cap // SEGMENTS:
            self._next()
        while sum(self._sizes.values()) + size > self._cap:
            self._drop_oldest()
        assert self._frames is not None
        assert self._lines is not None
        for file, data in ((self._frames, images), (self._lines, text)):
            file.write(data)
            file.flush()
        self._sizes[self._newest] += size

    @property
    def _newest(self) -> int:
        return next(reversed(self._sizes))

    def _next(self) -> None:
        """Begin another segment."""
        self.close()
        number = self._newest + 1 if self._sizes else 1
        self._frames = _file(self.folder, number, FRAMES).open("xb")
        self._lines = _file(self.folder, number, LINES).open("xb")
        self._sizes[number] = 0

    def _drop_oldest(self) -> None:
        number = next(iter(self._sizes))
        if number == self._newest:
            self._next()
        for suffix in (LINES, FRAMES):
            _file(self.folder, number, suffix).unlink(missing_ok=True)
        del self._sizes[number]


def read_recording(folder: Path) -> Iterator[Batch | Note]:
    """What was recorded, in order; a note `begin` stands before each run. What is not whole ends its segment.

    Raises: DataError if there is no recording, or it is newer than this version.
    """
    segments = _segments(folder)
    if not segments:
        raise DataError(f"{folder} holds no recording", remedy="set `record_mb`, or switch the recording on")
    for number in segments:
        yield from _segment(folder, number)


def is_recording(folder: Path) -> bool:
    """True if something was recorded into that folder."""
    return bool(_segments(folder))


def load_recording(folder: Path) -> Dataset:
    """All frames of a recording, without labels, for replay, with a gap where a run began anew.

    Raises: DataError, also if frames differ in shape.
    """
    images: list[Array] = []
    gaps: list[int] = []
    for event in read_recording(folder):
        if isinstance(event, Batch):
            images += event.images
        elif event.kind == "begin" and images:
            gaps.append(len(images))
    if not images:
        raise DataError(f"{folder} holds no whole frame", remedy="record for longer")
    kinds = {(image.shape, image.dtype.name) for image in images}
    if len(kinds) > 1:
        raise DataError(f"the frames in {folder} are of {len(kinds)} kinds: {sorted(kinds)[:3]}", remedy=_ONE_KIND)
    inside = tuple(gap for gap in dict.fromkeys(gaps) if gap < len(images))
    return Dataset(folder.name, np.stack(images), None, ordered=True, gaps=inside)


_ONE_KIND = "record a source whose frames all have one shape"


def _segment(folder: Path, number: int) -> Iterator[Batch | Note]:
    try:
        with _file(folder, number, LINES).open("rb") as lines, _file(folder, number, FRAMES).open("rb") as frames:
            for text in lines:
                line = _line(text)
                if line is None:
                    return
                images = frames.read(line["bytes"])
                if len(images) != line["bytes"] or zlib.crc32(images) != line["crc"]:
                    return
                yield _event(folder, line, images)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}", remedy="check the disk") from error


def _line(text: bytes) -> dict[str, Any] | None:
    """A line that was written whole, else None."""
    checksum, _, rest = text.rstrip(b"\n").partition(b" ")
    if not text.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(rest):
        return None
    made: dict[str, Any] = json.loads(rest)
    return made


def _event(folder: Path, line: dict[str, Any], data: bytes) -> Batch | Note:
    if line["is"] == "note":
        if line["kind"] == "begin" and line["facts"]["schema"] > SCHEMA:
            raise DataError(f"{folder} was recorded by a newer version", remedy="upgrade edge-adapt")
        return Note(line["kind"], line["facts"])
    images, start = [], 0
    for shape, dtype in zip(line["shapes"], line["dtypes"], strict=True):
        count = int(np.prod(shape))
        image = np.frombuffer(data, np.dtype(dtype), count, start).reshape(shape)
        images.append(image)
        start += image.nbytes
    return Batch(
        tuple(line["numbers"]),
        tuple(images),
        tuple(line["names"]),
        {name: tuple(value) if isinstance(value, list) else value for name, value in line["decided"].items()},
        line["answers"],
    )


def _plain(reply: Reply) -> dict[str, Any]:
    """Fields that are no arrays."""
    held = {item.name: getattr(reply, item.name) for item in fields(reply)}
    return {name: value for name, value in held.items() if not isinstance(value, np.ndarray)}


def _segments(folder: Path) -> list[int]:
    """Numbers of the segments, the oldest first."""
    return sorted({int(path.stem) for path in folder.glob(f"*{LINES}") if path.stem.isdecimal()})


def _file(folder: Path, number: int, suffix: str) -> Path:
    return folder / f"{number:08d}{suffix}"


def _size(folder: Path, number: int) -> int:
    total = 0
    for suffix in (FRAMES, LINES):
        with suppress(OSError):
            total += _file(folder, number, suffix).stat().st_size
    return total
