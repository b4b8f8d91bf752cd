"""The rows of the outbox, and reading as many as possible from a database that is damaged."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zlib import crc32

Store = Literal["ack", "event", "tele", "thin"]
STREAMS: tuple[Store, ...] = ("event", "tele", "thin")
STORES: tuple[Store, ...] = ("ack", *STREAMS)
COLUMNS = "id, topic, payload, at, correlation, crc"


@dataclass(frozen=True)
class Row:
    """One waiting message."""

    id: int
    """Rises over all kinds, for ever."""
    store: Store
    topic: str
    payload: bytes
    at: int
    """When it was put here, in milliseconds of running time of this outbox."""
    correlation: bytes | None = None


@dataclass(frozen=True)
class Damage:
    """A database that had to be put aside."""

    why: str
    saved: int
    lost: int | None
    """At most so many messages; None: cannot be told."""


def salvage(path: Path) -> tuple[list[Row], dict[str, int]]:
    """Rows and numbers of a damaged database that can still be read, from both ends of each table."""
    rows: dict[int, Row] = {}
    facts: dict[str, int] = {}
    with suppress(sqlite3.Error):
        database = sqlite3.connect(path, isolation_level=None)
        try:
            with suppress(sqlite3.Error):
                facts.update((str(name), int(value)) for name, value in database.execute("SELECT * FROM meta"))
            for store, way in itertools.product(STORES, ("ASC", "DESC")):
                with suppress(sqlite3.Error):
                    cursor = database.execute(f"SELECT {COLUMNS} FROM {store} ORDER BY id {way}")
                    rows.update((row.id, row) for row in _sound(cursor, store))
        finally:
            database.close()
    return [rows[id_] for id_ in sorted(rows)], facts


def _sound(cursor: Iterable[tuple[object, ...]], store: Store) -> Iterable[Row]:
    for id_, topic, payload, at, correlation, crc in cursor:
        if isinstance(id_, int) and isinstance(topic, str) and isinstance(payload, bytes) and isinstance(at, int):
            whole = correlation if isinstance(correlation, bytes) else None
            if crc32(payload) == crc:
                yield Row(id_, store, topic, payload, at, whole)
