"""Cells that were made before, kept by everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.plans.identity import code_of
from benchmarks.plans.locks import alone
from benchmarks.plans.tasks import OK, SKIPPED, Cell, Task
from edge_adapt.delta import write_atomically
from edge_adapt.errors import ArtifactError

KEPT = (OK, SKIPPED)
"""What failed or took too long is tried again the next time."""


class CellCache:
    """A folder with one file for each cell. It may be deleted at any time."""

    def __init__(self, folder: Path, processor: str) -> None:
        """`processor` is part of every key: times of another machine are not those of this one."""
        self.folder, self.processor = folder, processor
        self.damaged: list[Path] = []
        """Files that could not be believed; their cells are made again."""

    def key(self, task: Task) -> str:
        """Digest of the bundle, the data, all settings, and the code. Names that the plan gives are no part of it."""
        asked = asdict(task.combination)
        for name in ("bundle", "data", "timeout_s"):
            del asked[name]
        facts = {
            **asked,
            "bundle_id": task.bundle_id,
            "data_digest": task.data_digest,
            "foreign_digest": task.foreign_digest,
            "code": code_of("replay"),
            "processor": self.processor,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def find(self, task: Task) -> Cell | None:
        """What was made for this task before, under the plan's own names; None if it has to be made."""
        key = self.key(task)
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError:
            data = b""
        digest, _, body = data.partition(b"\n")
        try:
            read = json.loads(body) if digest.decode("latin-1") == _digest(key, body) else None
        except ValueError:
            read = None
        if not isinstance(read, dict):
            self.damaged.append(path)
            return None
        return read | {"bundle": task.combination.bundle, "data": task.combination.data}

    def keep(self, task: Task, cell: Cell) -> None:
        """Keep a cell, if it is one to be kept. Raises: ArtifactError if the folder cannot be written."""
        if cell["status"] not in KEPT:
            return
        key = self.key(task)
        body = json.dumps(cell).encode()
        try:
            with alone(self.folder / "cells"):
                self._path(key).parent.mkdir(exist_ok=True)
                write_atomically(self._path(key), f"{_digest(key, body)}\n".encode() + body)
        except OSError as error:
            raise ArtifactError(
                f"{self.folder} cannot keep results: {error.strerror}",
                remedy="free some space or choose another --cache; what is done is kept",
            ) from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.cell"


def _digest(key: str, body: bytes) -> str:
    return hashlib.sha256(key.encode() + body).hexdigest()
