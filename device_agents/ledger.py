"""The ledger: which commands were seen and what became of them, on disk, so that none runs twice."""

from __future__ import annotations

import json
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from device_agents.envelope import Clock
from edge_adapt.errors import StateError

State = Literal["accepted", "running", "done", "failed", "rejected"]
SCHEMA = 1
KEEP, KEEP_DANGEROUS, KEEP_MS = 8_192, 4_096, 7 * 86_400_000
"""Most commands kept, dangerous ones apart for the audit; others are forgotten after a week ..."""
KEEP_ALWAYS = 4_096
"""... but never the latest: whatever the clock says, they may be delivered again."""
PRUNE_EVERY = 256
BUSY_S, CACHE_KB = 2.0, 64
CREATE = """
CREATE TABLE IF NOT EXISTS commands (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    verb TEXT NOT NULL,
    digest TEXT NOT NULL,
    arguments TEXT NOT NULL,
    by TEXT NOT NULL,
    reason TEXT NOT NULL,
    danger INTEGER NOT NULL,
    at_ms INTEGER NOT NULL,
    reply_to TEXT NOT NULL,
    correlation BLOB,
    state TEXT NOT NULL,
    reply TEXT,
    checksum INTEGER NOT NULL
)
"""
FIELDS = "key, verb, digest, arguments, by, reason, danger, at_ms, reply_to, correlation, state, reply"
OPEN = "state IN ('accepted', 'running')"
Row = tuple[Any, ...]


@dataclass(frozen=True)
class Entry:
    """One command as the ledger knows it."""

    key: str
    verb: str
    digest: str
    """Of verb and arguments: the same key with another digest is another command."""
    arguments: str
    """What to show of them in the audit."""
    by: str
    reason: str
    danger: bool
    at_ms: int
    """Wall clock at acceptance, milliseconds."""
    reply_to: str
    correlation: bytes | None = None
    state: State = "accepted"
    reply: Mapping[str, Any] | None = None
    """What was answered in the end; none as long as that is not decided."""


class Ledger:
    """SQLite, write-ahead log: what `accept` and `finish` wrote is on disk when they return. Thread-safe.

    Opening it closes what a restart interrupted: such a command is reported as failed, and never runs again. A disk
    that fails is a StateError of the single call, and is tried again with the next one. Every row has a checksum, and
    a damaged file is set aside for an empty one.
    """

    def __init__(self, path: Path, *, clock: Clock) -> None:
        self._path, self._clock = path, clock
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._closed = False
        self._accepted = 0
        self._interrupted: list[Entry] = []
        self.set_aside: Path | None = None
        """Where a damaged ledger was put: what it knew is lost to this process."""
        self.set_aside_ms = 0
        """When, monotonic."""
        self.trouble: str | None = None
        """Why the latest call failed; none: it did not."""
        try:
            with self._transaction():
                pass
        except StateError:
            pass  # told in `trouble`; an agent with a full disk starts all the same

    def find(self, key: str) -> Entry | None:
        """The command with this key, None if it was never seen. Raises: StateError if the disk fails."""
        with self._transaction() as db:
            row = db.execute(f"SELECT {FIELDS} FROM commands WHERE key = ?", (key,)).fetchone()
            return None if row is None else _entry(row)

    def accept(self, entry: Entry, *, durable: bool = True) -> None:
        """Write a new command down. `durable`: a power cut must not make anyone forget it.

        Raises: StateError if it cannot be, or if its key is known.
        """
        row = _row(entry)
        with self._transaction(durable=durable) as db:
            marks = ", ".join("?" * (len(row) + 1))
            db.execute(f"INSERT INTO commands ({FIELDS}, checksum) VALUES ({marks})", (*row, _checksum(row)))
            self._accepted += 1
            if self._accepted % PRUNE_EVERY == 0:
                _prune(db, self._clock.wall_ms())

    def begin(self, key: str) -> None:
        """It runs now. Survives a kill, perhaps no power cut: it only says more about an interruption."""
        with self._transaction(durable=False) as db:
            _update(db, key, "running", None)

    def finish(self, key: str, state: State, reply: Mapping[str, Any], *, durable: bool = True) -> None:
        """Its outcome and what was answered. `durable`: a power cut must not turn it into an interruption.

        Raises: StateError if it cannot be written.
        """
        with self._transaction(durable=durable) as db:
            _update(db, key, state, reply)

    def audit(self, most: int = 100) -> list[Entry]:
        """The latest dangerous commands, the newest first: who asked, why, when, and what came of it."""
        with self._transaction() as db:
            query = f"SELECT {FIELDS} FROM commands WHERE danger ORDER BY number DESC LIMIT ?"
            return [_entry(row) for row in db.execute(query, (most,))]

    def interrupted(self) -> list[Entry]:
        """What the last process left open, now failed, with the reply to give. Each is told once."""
        with self._lock:
            told, self._interrupted = self._interrupted, []
            return told

    def __len__(self) -> int:
        with self._transaction() as db:
            return int(db.execute("SELECT count(*) FROM commands").fetchone()[0])

    def close(self) -> None:
        """The end: every later call is a StateError."""
        with self._lock:
            self._closed = True
            self._disconnect()

    @contextmanager
    def _transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """All or nothing. Whatever SQLite refuses becomes a StateError, and a damaged file is set aside."""
        with self._lock:
            if self._closed:
                raise StateError("the command ledger is closed", remedy="start the agent again")
            try:
                db = self._db = self._db or self._opened()
                db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                with _all_or_nothing(db):
                    yield db
                self.trouble = None
            except (sqlite3.Error, OSError) as error:
                if self._db is not None and _is_damage(error):
                    self._disconnect()
                    self._put_aside()
                self.trouble = f"the command ledger {self._path} cannot be used: {error}"
                raise StateError(self.trouble, remedy="is the disk full, or read-only?") from error

    def _opened(self) -> sqlite3.Connection:
        """The database, sound, with nothing left open; a damaged one is set aside first."""
        try:
            db = _connected(self._path)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            self._put_aside()
            db = _connected(self._path)
        try:
            with _all_or_nothing(db):
                self._interrupted += _close_open(db)
                _prune(db, self._clock.wall_ms())
        except BaseException:
            db.close()
            raise
        return db

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _put_aside(self) -> None:
        """Rename the damaged file and its log, so that somebody may look at them."""
        target = self._path.with_name(f"{self._path.name}.bad")
        for end in ("", "-wal", "-shm"):
            part = self._path.with_name(self._path.name + end)
            if part.exists():
                part.replace(target.with_name(target.name + end))
        self.set_aside, self.set_aside_ms = target, self._clock.mono_ms()


@contextmanager
def _all_or_nothing(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _connected(path: Path) -> sqlite3.Connection:
    """Open and check. Raises: sqlite3.DatabaseError itself if it is damaged, or made by a later version."""
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    db.text_factory = lambda data: data.decode("utf-8", "backslashreplace")  # damage shall show in a checksum
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA cache_size = -{CACHE_KB}")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA):
            raise sqlite3.DatabaseError(f"its schema is {version}, not {SCHEMA}")
        db.execute(CREATE)
        db.execute(f"PRAGMA user_version = {SCHEMA}")
        columns = ", ".join(row[1] for row in db.execute("PRAGMA table_info(commands)"))
        if columns != f"number, {FIELDS}, checksum":
            raise sqlite3.DatabaseError(f"its columns are {columns}")
        found = db.execute("PRAGMA integrity_check").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        for *row, checksum in db.execute(f"SELECT {FIELDS}, checksum FROM commands"):
            if _checksum(tuple(row)) != checksum:
                raise sqlite3.DatabaseError("a row does not match its checksum")
    except BaseException:
        db.close()
        raise
    return db


def _is_damage(error: Exception) -> bool:
    """Whether the file itself is broken. A full or read-only disk, and a lock, are an OperationalError instead."""
    return type(error) is sqlite3.DatabaseError


def _update(db: sqlite3.Connection, key: str, state: State, reply: Mapping[str, Any] | None) -> None:
    found = db.execute(f"SELECT {FIELDS} FROM commands WHERE key = ?", (key,)).fetchone()
    if found is not None:
        row = _row(replace(_entry(found), state=state, reply=reply))
        query = "UPDATE commands SET state = ?, reply = ?, checksum = ? WHERE key = ?"
        db.execute(query, (*row[-2:], _checksum(row), key))


def _close_open(db: sqlite3.Connection) -> list[Entry]:
    """Mark what the last process left open as failed; returns it, with the reply to give."""
    closed = []
    for row in db.execute(f"SELECT {FIELDS} FROM commands WHERE {OPEN} ORDER BY number").fetchall():
        found = _entry(row)
        begun = "it had begun, and may have taken effect" if found.state == "running" else "it had not begun"
        reply = {
            "id": found.key,
            "verb": found.verb,
            "status": "failed",
            "code": "interrupted",
            "text": f"interrupted by a restart: {begun}; it does not run again",
        }
        _update(db, found.key, "failed", reply)
        closed.append(replace(found, state="failed", reply=reply))
    return closed


def _prune(db: sqlite3.Connection, now_ms: int) -> None:
    """Forget the oldest, and never what is open."""
    ranked = f"SELECT number FROM commands WHERE danger = ? AND NOT {OPEN} ORDER BY number DESC LIMIT -1 OFFSET ?"
    forget = f"DELETE FROM commands WHERE number IN ({ranked})"
    db.execute(forget, (0, KEEP))
    db.execute(forget, (1, KEEP_DANGEROUS))
    db.execute(f"{forget} AND at_ms < ?", (0, KEEP_ALWAYS, now_ms - KEEP_MS))


def _row(entry: Entry) -> Row:
    reply = None if entry.reply is None else json.dumps(entry.reply, separators=(",", ":"))
    head = (entry.key, entry.verb, entry.digest, entry.arguments, entry.by, entry.reason, int(entry.danger))
    return *head, entry.at_ms, entry.reply_to, entry.correlation, entry.state, reply


def _entry(row: Row) -> Entry:
    key, verb, digest, arguments, by, reason, danger, at_ms, reply_to, correlation, state, reply = row
    told = None if reply is None else json.loads(reply)
    return Entry(key, verb, digest, arguments, by, reason, bool(danger), at_ms, reply_to, correlation, state, told)


def _checksum(row: Row) -> int:
    return zlib.crc32(repr(row).encode("utf-8", "backslashreplace"))
