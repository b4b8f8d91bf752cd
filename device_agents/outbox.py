"""What waits while the broker is away: a bounded queue on disk that outlives kills, damage and a full disk.

Each kind has its own table, filled at one end and emptied at the other, so pages come free whole and the cap on bytes
holds. Telemetry older than an hour moves to `thin`, one row a minute of each topic. Used by one thread at a time.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from zlib import crc32

from device_agents.envelope import Clock
from device_agents.rows import COLUMNS, STORES, STREAMS, Damage, Row, Store, salvage
from edge_adapt.errors import StateError

HOUR_MS = 3_600_000
TTL_MS: dict[Store, int] = {"ack": HOUR_MS, "event": 720 * HOUR_MS, "tele": 168 * HOUR_MS, "thin": 168 * HOUR_MS}
FINE_MS, COARSE_MS = HOUR_MS, 60_000
PAGE, STEP, BATCH, QUARANTINED = 4096, 500, 64, 100
RAM_BYTES, CACHE_KB = 4 << 20, 256
RETRY_MS = 1000


class Outbox:
    """A queue in one SQLite file.

    Args:
        path: the database; its folder is made.
        cap_bytes: most disk space, write-ahead log included.
    A disk that cannot be written is no error: rows stay in memory (at most 4 MB) and `trouble` says why.
    """

    def __init__(self, path: Path, cap_bytes: int, clock: Clock) -> None:
        self.trouble: str | None = None
        self.damage: Damage | None = None
        self.dropped: Counter[str] = Counter()
        """Rows given up for space or age, by kind."""
        self._path, self._clock = path, clock
        self._log_bytes = min(4 << 20, cap_bytes // 4)
        self._room = cap_bytes - self._log_bytes
        self._db: sqlite3.Connection | None = None
        self._ram: dict[int, Row] = {}
        self._gone: dict[int, Row] = {}
        self._counts: Counter[str] = Counter()
        self._minutes: dict[str, int] = {}
        self._last_id = self._session = self._ticks = 0
        self._mono = clock.mono_ms()
        self._retry_ms = 0
        self._closed = False
        self._try(self._open)

    # what the courier asks

    @property
    def waiting(self) -> int:
        """Messages that were not acknowledged by the broker yet."""
        return max(0, sum(self._counts[store] for store in STORES) + len(self._ram) - len(self._gone))

    @property
    def quarantined(self) -> int:
        return self._counts["bad"]

    @property
    def last_id(self) -> int:
        return self._last_id

    @property
    def in_memory(self) -> int:
        """Rows that are on no disk yet."""
        return len(self._ram)

    def add(self, store: Store, topic: str, payload: bytes, correlation: bytes | None = None) -> Row:
        """Take a message; it is on disk after the next `commit`."""
        self._last_id += 1
        row = Row(self._last_id, store, topic, payload, self._now(), correlation)
        self._ram[row.id] = row
        return row

    def commit(self, *, sync: bool) -> bool:
        """Write what was added and done. `sync`: it must outlive a power cut, not only a kill. False: disk trouble."""
        if self._closed or (self.trouble is not None and self._clock.mono_ms() < self._retry_ms):
            self._fit_memory()
            return False
        if self._db is None and not self._try(self._open):
            return False
        if not self._ram and not self._gone and self.trouble is None:
            return True
        written = self._try(lambda: self._write(sync))
        if written:
            self.trouble = None
        return written

    def next(self, most: int, skip: Collection[int] = ()) -> list[Row]:
        """The next rows to send, at most `most`: acknowledgements first, then all else in the order it came.

        Args:
            skip: ids that are on their way already.
        """
        rows: list[Row] = []
        if self._db is not None:
            self._try(lambda: rows.extend(self._select(most, skip)))
        if self.trouble is not None:
            rows += [row for row in self._ram.values() if row.id not in skip]
        return rows[:most]

    def done(self, row: Row) -> None:
        """The broker has it. Forgotten on disk with the next `commit`; a kill before that sends it twice."""
        if self._ram.pop(row.id, None) is None:
            self._gone[row.id] = row

    def quarantine(self, row: Row, why: str) -> None:
        """Put a message aside that can never be sent; the newest 100 are kept for people to look at."""
        self.done(row)
        self._try(lambda: self._put_aside(row, why))

    def next_session(self) -> int:
        """The number for the next session: larger than any before, also after a kill."""
        self._session = max(self._session + 1, 1)
        self._try(lambda: self._set("session", self._session))
        return self._session

    def remember(self, topic: str) -> None:
        """Note that a retained alert stands at the broker."""
        self._try(lambda: self._run("INSERT OR IGNORE INTO alerts VALUES (?)", (topic,)))

    def forget(self, topic: str) -> None:
        self._try(lambda: self._run("DELETE FROM alerts WHERE topic = ?", (topic,)))

    def remembered(self) -> list[str]:
        """Topics of alerts that may stand at the broker, also from before a restart."""
        found: list[str] = []
        self._try(lambda: found.extend(str(topic) for (topic,) in self._run("SELECT topic FROM alerts")))
        return found

    def tidy(self) -> None:
        """Drop what is too old, thin old telemetry, give free pages back. Call about once a minute."""
        if self._db is None:
            return

        def work() -> None:
            now = self._now()
            for store in STORES:
                self._drop(store, f"at < {now - TTL_MS[store]}")
            while self._thin(f"at < {now - FINE_MS}"):
                pass
            self._run("PRAGMA incremental_vacuum(256)").fetchall()

        self._try(work)

    def close(self) -> None:
        """Write what is left and close the file. Safe to call twice."""
        self._retry_ms = 0
        self.commit(sync=True)
        self._closed = True
        self._shut()

    # the database

    def _open(self) -> None:
        try:
            self._connect()
        except sqlite3.OperationalError:
            self._shut()
            raise
        except sqlite3.DatabaseError as error:
            self._replace(str(error))

    def _connect(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=0.2)
        pragmas = ("locking_mode=EXCLUSIVE", f"page_size={PAGE}", "auto_vacuum=INCREMENTAL", "journal_mode=WAL")
        pages = max(16, self._log_bytes // PAGE // 4)
        sizes = (f"wal_autocheckpoint={pages}", f"journal_size_limit={self._log_bytes}", f"cache_size=-{CACHE_KB}")
        for pragma in (*pragmas, *sizes):
            self._run(f"PRAGMA {pragma}").fetchall()
        verdict = str(self._run("PRAGMA quick_check(1)").fetchone()[0])
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        columns = "id INTEGER PRIMARY KEY, topic TEXT, payload BLOB, at INTEGER, correlation BLOB, crc INTEGER"
        for store in STORES:
            self._run(f"CREATE TABLE IF NOT EXISTS {store} ({columns})")
        self._run("CREATE TABLE IF NOT EXISTS bad (id INTEGER PRIMARY KEY, topic TEXT, payload BLOB, why TEXT)")
        self._run("CREATE TABLE IF NOT EXISTS alerts (topic TEXT PRIMARY KEY)")
        self._run("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER)")
        for table in (*STORES, "bad"):
            self._counts[table] = int(self._run(f"SELECT count(*) FROM {table}").fetchone()[0])
            highest = self._run(f"SELECT coalesce(max(id), 0) FROM {table}").fetchone()[0]
            self._last_id = max(self._last_id, int(highest))
        self._session = max(self._session, self._get("session"))
        self._last_id = max(self._last_id, self._get("last_id"))
        self._ticks, self._mono = max(self._now(), self._get("ticks")), self._clock.mono_ms()

    def _replace(self, why: str) -> None:
        """Rename a damaged file aside, begin a new one, and carry over every row that can still be read."""
        self._shut()
        aside = self._path.with_name(f"{self._path.name}.bad")
        for ending in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                self._path.with_name(self._path.name + ending).replace(aside.with_name(aside.name + ending))
        rows, facts = salvage(aside)
        self._session = max(self._session, facts.get("session", self._clock.wall_ms() // 1000))
        self._last_id = max([self._last_id, facts.get("last_id", 0), *(row.id for row in rows)])
        self._counts.clear()
        self._connect()
        self._ram = {row.id: row for row in rows if row.id not in self._gone} | self._ram
        self._gone.clear()
        lost = max(0, facts["rows"] - len(rows)) if "rows" in facts else None
        self.damage = Damage(why, len(rows), lost)
        self._write(True)

    def _write(self, sync: bool) -> None:
        """Rows of the memory to disk, in transactions that fit under the cap; the ones done, off it."""
        self._run(f"PRAGMA synchronous={'FULL' if sync else 'NORMAL'}")
        while True:
            batch = list(itertools.islice(self._ram.values(), BATCH))
            while len(batch) > 1 and _size(batch) > self._room // 20:
                del batch[len(batch) // 2 :]
            self._relieve(_size(batch))
            self._run("BEGIN IMMEDIATE")
            for row in batch:
                values = (row.id, row.topic, row.payload, row.at, row.correlation, crc32(row.payload))
                self._run(f"INSERT OR REPLACE INTO {row.store} VALUES (?, ?, ?, ?, ?, ?)", values)
            removed: Counter[str] = Counter()
            for row in self._gone.values():
                for store in ("tele", "thin") if row.store in ("tele", "thin") else (row.store,):
                    removed[store] += self._run(f"DELETE FROM {store} WHERE id = ?", (row.id,)).rowcount
            counts = self._counts + Counter(row.store for row in batch)
            counts.subtract(removed)
            self._set("last_id", self._last_id)
            self._set("ticks", self._now())
            self._set("rows", sum(counts[store] for store in STORES))
            self._run("COMMIT")
            self._counts = counts
            self._gone.clear()
            for row in batch:
                del self._ram[row.id]
            if not self._ram:
                return

    def _select(self, most: int, skip: Collection[int]) -> list[Row]:
        limit = most + len(skip) + len(self._gone)
        union = " UNION ALL ".join(f"SELECT {COLUMNS}, '{store}' AS store FROM {store}" for store in STREAMS)
        queries = (f"SELECT {COLUMNS}, 'ack' FROM ack ORDER BY id LIMIT ?", f"{union} ORDER BY id LIMIT ?")
        rows: list[Row] = []
        for query in queries:
            for id_, topic, payload, at, correlation, crc, store in self._run(query, (limit,)).fetchall():
                row = Row(id_, store, topic, payload, at, correlation)
                if id_ in skip or id_ in self._gone:
                    continue
                if crc32(payload) != crc:
                    self.quarantine(row, "damaged on disk")
                else:
                    rows.append(row)
        return rows

    def _relieve(self, need: int) -> None:
        """Make room for so many bytes: thin the oldest telemetry, then drop it, and only then what must be kept."""
        while self._used() + need > 0.9 * self._room:
            if self._thin("1"):
                continue
            for table in ("thin", "tele", "bad", "ack", "event"):
                if self._drop(table, "1"):
                    break
            else:
                return

    def _used(self) -> int:
        pages, free = (int(self._run(f"PRAGMA {name}").fetchone()[0]) for name in ("page_count", "freelist_count"))
        return (pages - free) * PAGE

    def _drop(self, table: str, which: str) -> int:
        oldest = f"SELECT id FROM {table} WHERE {which} ORDER BY id LIMIT {STEP}"
        count = self._run(f"DELETE FROM {table} WHERE id IN ({oldest})").rowcount
        self._counts[table] -= count
        self.dropped[table] += count
        return count

    def _thin(self, which: str) -> int:
        """Move the oldest rows of `tele` to `thin`, one a minute of each topic. Returns how many were looked at."""
        rows = self._run(f"SELECT id, topic, at FROM tele WHERE {which} ORDER BY id LIMIT {STEP}").fetchall()
        keep = []
        for id_, topic, at in rows:
            if self._minutes.get(topic) != at // COARSE_MS:
                self._minutes[topic] = at // COARSE_MS
                keep.append(id_)
        if rows:
            self._run("BEGIN IMMEDIATE")
            marks = ",".join(map(str, keep))
            self._run(f"INSERT OR REPLACE INTO thin SELECT * FROM tele WHERE id IN ({marks})")
            self._run(f"DELETE FROM tele WHERE id BETWEEN {rows[0][0]} AND {rows[-1][0]}")
            self._run("COMMIT")
            self._counts["tele"] -= len(rows)
            self._counts["thin"] += len(keep)
            self.dropped["thinned"] += len(rows) - len(keep)
        return len(rows)

    def _put_aside(self, row: Row, why: str) -> None:
        self._run("INSERT OR REPLACE INTO bad VALUES (?, ?, ?, ?)", (row.id, row.topic, row.payload, why))
        self._run(f"DELETE FROM bad WHERE id NOT IN (SELECT id FROM bad ORDER BY id DESC LIMIT {QUARANTINED})")
        self._counts["bad"] = int(self._run("SELECT count(*) FROM bad").fetchone()[0])

    def _try(self, work: Callable[[], object]) -> bool:
        """Do something with the database. A disk that refuses is noted, a damaged file replaced; neither raises."""
        try:
            work()
            return True
        except (sqlite3.OperationalError, OSError, StateError) as error:
            self._in_trouble(error)
        except sqlite3.DatabaseError as error:
            try:
                self._replace(str(error))
            except (sqlite3.Error, OSError) as again:
                self._shut()
                self._in_trouble(again)
        return False

    def _in_trouble(self, error: Exception) -> None:
        self.trouble = str(error) or type(error).__name__
        self._retry_ms = self._clock.mono_ms() + RETRY_MS
        if self._db is not None and self._db.in_transaction:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
        self._fit_memory()

    def _fit_memory(self) -> None:
        """While no disk helps: telemetry goes first, the oldest first; then events, counted."""
        over = sum(len(row.payload) for row in self._ram.values()) - RAM_BYTES
        for stores in (("tele", "thin"), STORES):
            for row in [row for row in self._ram.values() if row.store in stores]:
                if over <= 0:
                    return
                del self._ram[row.id]
                self.dropped[row.store] += 1
                over -= len(row.payload)

    def _run(self, sql: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        if self._db is None:
            raise StateError("the outbox is not open", remedy="see its folder: is the disk full, or read-only?")
        return self._db.execute(sql, values)

    def _get(self, name: str) -> int:
        found = self._run("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return int(found[0]) if found else 0

    def _set(self, name: str, value: int) -> None:
        self._run("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def _now(self) -> int:
        """Running time so far: goes on over restarts, does not count the time between, ignores the wall clock."""
        return self._ticks + max(0, self._clock.mono_ms() - self._mono)

    def _shut(self) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
            self._db = None


def _size(rows: Sequence[Row]) -> int:
    """Bytes that these rows will take on disk, roughly and rather too many."""
    return sum(len(row.payload) + len(row.topic) + 128 for row in rows)
