"""What survives a power cut: two slots that are written in turn, an adapter on probation, and source, which is no file.

The slot in force is never written: a snapshot goes to the other one, and then a small pointer file says so. Whatever
happens in between leaves the old snapshot or the new one. Bad files are moved aside, and never trusted.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta, write_atomically
from edge_adapt.errors import ArtifactError, EdgeAdaptError, StateError
from edge_adapt.methods.protocol import Method
from edge_adapt.runtime.snapshot_file import LARGEST, Facts, Snapshot, decode, encode

SLOTS = ("A", "B")
SOURCE, ADAPTER = "source", "adapter"
POINTER, TRIALS = "current.json", "trial.json"
SUFFIX = ".safetensors"
KEPT_BAD = 4
ATTEMPTS = 3
"""So many times a probation may begin; an adapter that is not trusted then, such as one that crashes, is dropped."""
SMALL = 4096
"""Bytes that a pointer file has at most."""


class SnapshotStore:
    """The snapshots of one device, in one folder. Thread-safe; one process writes slots, any may put an adapter."""

    def __init__(self, folder: Path, bundle_id: str, check: Callable[[Delta], None] | None = None) -> None:
        """`check` refuses a delta that does not fit, by StateError; nothing is read or written yet."""
        self.folder, self.bundle_id = folder, bundle_id
        self._check = check
        self._lock = threading.RLock()
        self._reports: list[str] = []

    @classmethod
    def of(cls, folder: Path, bundle: Bundle) -> SnapshotStore:
        """A store for what fits that bundle."""
        return cls(folder, bundle.id, bundle.check_delta)

    def take_reports(self) -> list[str]:
        """What went wrong since this was asked last, one sentence each."""
        with self._lock:
            told, self._reports = self._reports, []
            return told

    @property
    def current(self) -> str:
        """The slot in force: `A`, `B` or `source`."""
        return self._current()[0] or SOURCE

    @property
    def pending(self) -> bool:
        """True if an adapter waits for its probation, or is on it."""
        try:
            return self._path(ADAPTER).exists()
        except OSError:
            return False

    def save(self, delta: Delta, facts: Facts, *, method: Method[Any] | None = None, state: Any = None) -> Snapshot:
        """Keep a delta, and the state of its method, in the slot that is not in force; then it is.

        Raises: StateError if it does not fit, or the disk refuses; what was kept before is still there then.
        """
        with self._lock:
            slot, generation = self._current()
            target = SLOTS[1] if slot == SLOTS[0] else SLOTS[0]
            self._write(target, generation + 1, delta, facts, method, state)
            self._point(target, generation + 1)
            return Snapshot(target, generation + 1, delta, facts)

    def load_latest(self) -> Snapshot | None:
        """The snapshot in force, else the other slot, else None, which means source. Never raises for what it finds."""
        with self._lock:
            self._tidy()
            slot, generation = self._current()
            for candidate in sorted(SLOTS, key=lambda name: name != slot):
                found = self._good(candidate)
                if found is None:
                    continue
                if candidate != slot:
                    self._report(f"slot {candidate} is used in place of {slot or SOURCE}")
                    self._try(partial(self._point, candidate, generation))
                return found
            return None

    def load(self, slot: str) -> Snapshot:
        """One slot by name: `A`, `B`, `source` or `adapter`. Raises: StateError or ArtifactError if it is not good."""
        if slot == SOURCE:
            return Snapshot(SOURCE, 0, Delta.source(), Facts(note="the model as exported"))
        if slot not in (*SLOTS, ADAPTER):
            raise StateError(f"there is no slot {slot!r}", remedy=f"known: {', '.join((*SLOTS, ADAPTER, SOURCE))}")
        data = self._bytes(slot)
        snapshot = decode(data, self.bundle_id, slot)
        try:
            if self._check is not None:
                self._check(snapshot.delta)
        except StateError as error:
            raise StateError(f"snapshot {slot} does not fit: {error.what}", remedy=error.remedy) from error
        return snapshot

    def put_adapter(self, delta: Delta, facts: Facts) -> None:
        """Keep an adapter from outside beside the slots until `commit` or `rollback`. Raises: StateError."""
        with self._lock:
            self._write(ADAPTER, 0, delta, facts)

    def begin_trial(self) -> Snapshot | None:
        """The adapter that waits, for another try; None if there is none, it is bad, or it was tried too often."""
        with self._lock:
            found = self._good(ADAPTER)
            if found is None:
                return None
            told = self._json(TRIALS)
            tried = told.get("attempts") if told.get("adapter") == found.sha256 else 0
            if not isinstance(tried, int) or tried >= ATTEMPTS:
                self._report(f"the adapter was tried {ATTEMPTS} times without a verdict and is dropped")
                self._try(self.rollback)
                return None
            counted = {"adapter": found.sha256, "attempts": tried + 1}
            if not self._try(partial(self._write_json, TRIALS, counted)):
                return None  # tries that cannot be counted could go on for ever
            return found

    def commit(self) -> Snapshot:
        """The adapter passed, and is the snapshot in force. Raises: StateError if there is none or the disk refuses.

        What it learned on probation is not in it: save that afterwards.
        """
        with self._lock:
            adapter = self.load(ADAPTER)
            made = self.save(adapter.delta, adapter.facts)
            self._drop_adapter()
            return made

    def rollback(self) -> None:
        """The adapter failed: it is moved aside. Raises: StateError if there is none, or the disk refuses."""
        with self._lock:
            if not self.pending:
                raise StateError("there is no adapter on probation", remedy="apply one first")
            self._aside(self._path(ADAPTER))
            self._drop_adapter()

    def _path(self, slot: str) -> Path:
        return self.folder / f"{slot}{SUFFIX}"

    def _current(self) -> tuple[str | None, int]:
        """Slot in force and its generation: as the pointer says, else the newest good slot, else none and 0."""
        told = self._json(POINTER)
        slot, generation = told.get("slot"), told.get("generation")
        if slot in SLOTS and isinstance(generation, int):
            return slot, generation
        found = [snapshot for name in SLOTS if (snapshot := self._readable(name)) is not None]
        newest = max(found, key=lambda snapshot: snapshot.generation, default=None)
        return (None, 0) if newest is None else (newest.slot, newest.generation)

    def _readable(self, slot: str) -> Snapshot | None:
        try:
            return self.load(slot)
        except EdgeAdaptError:
            return None

    def _good(self, slot: str) -> Snapshot | None:
        """A slot if it is good; a bad one is reported, and moved aside unless it is the disk that fails."""
        try:
            return self.load(slot)
        except EdgeAdaptError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                self._report(error.what)
            if not isinstance(error.__cause__, OSError):
                self._try(partial(self._aside, self._path(slot)))
            return None

    def _bytes(self, slot: str) -> bytes:
        path = self._path(slot)
        try:
            if path.stat().st_size > LARGEST:
                raise ArtifactError(f"{path} is larger than {LARGEST} bytes", remedy="use an older snapshot, or source")
            return path.read_bytes()
        except FileNotFoundError as error:
            raise StateError(f"slot {slot} is empty", remedy="use another slot, or source") from error
        except OSError as error:
            raise ArtifactError(
                f"{path} cannot be read: {error.strerror}", remedy="check the disk; until then use source"
            ) from error

    def _write(
        self,
        slot: str,
        generation: int,
        delta: Delta,
        facts: Facts,
        method: Method[Any] | None = None,
        state: Any = None,
    ) -> None:
        if self._check is not None:
            self._check(delta)
        data = encode(self.bundle_id, generation, delta, facts, method, state)
        self._keep(self._path(slot), data)

    def _point(self, slot: str, generation: int) -> None:
        self._write_json(POINTER, {"slot": slot, "generation": generation})

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        self._keep(self.folder / name, json.dumps(value).encode())

    def _keep(self, path: Path, data: bytes) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)
        except OSError as error:
            raise StateError(
                f"{path} cannot be written: {error.strerror}; what was kept before is untouched",
                remedy="free some space, or make the folder writable; learning goes on in memory",
            ) from error

    def _json(self, name: str) -> dict[str, Any]:
        """A small file of ours; empty if there is none. One that is damaged is reported and moved aside."""
        path = self.folder / name
        try:
            with path.open("rb") as file:
                made = json.loads(file.read(SMALL))
            if isinstance(made, dict):
                return made
            problem = "it holds no object"
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._report(f"{path} cannot be read: {error.strerror}")
            return {}
        except (ValueError, RecursionError) as error:
            problem = str(error)
        self._report(f"{path} is damaged: {problem}")
        self._try(partial(self._aside, path))
        return {}

    def _aside(self, path: Path) -> None:
        """Rename to `<name>.<number>.bad`, and forget the oldest of those."""
        try:
            old = sorted(self.folder.glob("*.bad"), key=_number)
            number = _number(old[-1]) + 1 if old else 1
            path.rename(self.folder / f"{path.name}.{number}.bad")
            for spare in old[: max(0, len(old) + 1 - KEPT_BAD)]:
                spare.unlink()
        except OSError as error:
            raise StateError(f"{path} cannot be moved aside: {error.strerror}", remedy="check the disk") from error

    def _drop_adapter(self) -> None:
        try:
            for path in (self._path(ADAPTER), self.folder / TRIALS):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise StateError(f"{path} cannot be removed: {error.strerror}", remedy="check the disk") from error

    def _tidy(self) -> None:
        """Remove what a kill left half-written."""
        for name in (*(f"{slot}{SUFFIX}" for slot in (*SLOTS, ADAPTER)), POINTER, TRIALS):
            try:
                (self.folder / f"{name}.tmp").unlink(missing_ok=True)
            except OSError as error:
                self._report(f"{name}.tmp cannot be removed: {error.strerror}")

    def _try(self, act: Callable[[], None]) -> bool:
        """Do what would be good but is not needed; False, and a report, if it fails."""
        try:
            act()
        except EdgeAdaptError as error:
            self._report(error.what)
            return False
        return True

    def _report(self, text: str) -> None:
        if text not in self._reports:
            self._reports.append(text)


def _number(path: Path) -> int:
    part = path.name.split(".")[-2]
    return int(part) if part.isdigit() else 0
