"""A disk that loses power: writing is recorded, and a cut leaves what was synced, and some of the rest."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Event = tuple[Any, ...]


class Recorder:
    """Everything that code does to the files of one folder, in order; the real files are written too."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.events, self._names = folder, [], {}  # type: Path, list[Event], dict[str, int]
        self._count = 0
        self._real = {"open": Path.open, "fsync": os.fsync, "unlink": Path.unlink}
        patch.setattr(Path, "open", self._patched_open())
        patch.setattr(os, "fsync", self._fsync)
        patch.setattr(Path, "unlink", self._patched_unlink())
        for name in ("replace", "rename"):
            patch.setattr(Path, name, self._patched_rename(getattr(Path, name)))

    def note(self, *event: Any) -> None:
        self.events.append(event)

    def _patched_open(self) -> Callable[..., Any]:
        def opened(path: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
            file = self._real["open"](path, mode, *more, **named)
            if path.parent != self.folder or "w" not in mode:
                return file
            self._count += 1
            self._names[path.name] = self._count
            self.note("link", path.name, self._count)
            return _Spy(file, self, self._count)

        return opened

    def _fsync(self, descriptor: int) -> None:
        self._real["fsync"](descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path == self.folder:
            self.note("sync folder")
        elif path.parent == self.folder:
            self.note("sync", self._names[path.name])

    def _patched_rename(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def renamed(path: Path, target: Path) -> Any:
            made = real(path, target)
            if path.parent == self.folder:
                self._names[target.name] = self._names.pop(path.name)
                self.note("rename", path.name, target.name)
            return made

        return renamed

    def _patched_unlink(self) -> Callable[..., Any]:
        def unlinked(path: Path, missing_ok: bool = False) -> None:
            existed = path.parent == self.folder and path.exists()
            self._real["unlink"](path, missing_ok=missing_ok)
            if existed:
                self._names.pop(path.name, None)
                self.note("unlink", path.name)

        return unlinked


class _Spy:
    def __init__(self, file: Any, recorder: Recorder, inode: int) -> None:
        self._file, self._recorder, self._inode = file, recorder, inode

    def write(self, data: bytes) -> int:
        self._recorder.note("write", self._inode, bytes(data))
        return int(self._file.write(data))

    def __enter__(self) -> _Spy:
        self._file.__enter__()
        return self

    def __exit__(self, *what: Any) -> None:
        self._file.__exit__(*what)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def after_cut(events: list[Event], rng: np.random.Generator) -> dict[str, bytes]:
    """Name -> content, one of the states that a disk may be in when power goes after these events."""
    contents: dict[int, bytes] = {}
    synced: dict[int, bytes] = {}
    durable: dict[str, int] = {}
    present: dict[str, int] = {}
    waiting: list[Event] = []
    for kind, *rest in events:
        if kind == "link":
            contents[rest[1]], present[rest[0]] = b"", rest[1]
            waiting.append(("link", *rest))
        elif kind == "write":
            contents[rest[0]] += rest[1]
        elif kind == "sync":
            synced[rest[0]] = contents[rest[0]]
        elif kind == "rename":
            present[rest[1]] = present.pop(rest[0])
            waiting.append(("rename", *rest, present[rest[1]]))
        elif kind == "unlink":
            present.pop(rest[0])
            waiting.append(("unlink", *rest))
        else:
            durable, waiting = dict(present), []
    for event in _survivors(waiting, rng):
        _apply(durable, event)
    return {name: _content(contents[inode], synced.get(inode), rng) for name, inode in durable.items()}


def _survivors(waiting: list[Event], rng: np.random.Generator) -> list[Event]:
    """A beginning of what waits, or any part of it: file systems differ in what they order."""
    if rng.random() < 0.5:
        return waiting[: int(rng.integers(len(waiting) + 1))]
    return [event for event in waiting if rng.random() < 0.5]


def _apply(entries: dict[str, int], event: Event) -> None:
    kind, name, *rest = event
    if kind == "link":
        entries[name] = rest[0]
    elif kind == "rename":
        entries.pop(name, None)
        entries[rest[0]] = rest[1]
    else:
        entries.pop(name, None)


def _content(written: bytes, synced: bytes | None, rng: np.random.Generator) -> bytes:
    """What was synced, or without that: all of it, nothing, a part, or a part and zeros."""
    if synced == written:
        return written
    size = int(rng.integers(len(written) + 1))
    choices = [written, b"", written[:size], written[:size] + bytes(len(written) - size)]
    return choices[int(rng.integers(len(choices)))]
