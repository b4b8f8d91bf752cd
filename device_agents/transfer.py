"""Files in chunks, for devices that reach nothing but the broker: in any order, twice, and over restarts.

On `xfer/<id>/0` comes the offer, JSON with size, sha256 and chunk size; on `xfer/<id>/<n>` the n-th chunk, from 1 on.
What came is kept in a part file, and what is missing beside it: after a restart only the rest has to be sent again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from device_agents.package import LARGEST
from device_agents.settings import NAME
from edge_adapt.delta import write_atomically
from edge_adapt.errors import ArtifactError, ConfigError, DataError, EdgeAdaptError, StateError

PART, OFFER, DONE, FIRST = ".part", ".offer", ".done", 0
"""Suffixes of what is kept, and the number of the message that holds the offer."""
MOST = 4
"""Transfers at a time, and complete ones that are kept."""
EXPIRY_S = 24 * 3600.0
"""A transfer that got no chunk for so long may be dropped for another one."""
SYNC = 64
"""After so many chunks what came is synced: at most so many are lost by a power cut, and asked for again."""
CHUNK = 12 << 10
"""Fits into the default limit of every broker."""
SHOWN = 64
"""Missing ranges that are told at once."""
RECORD = 4 << 20
"""Bytes that an `.offer` file has at most."""
Ranges = list[tuple[int, int]]
"""First and last number of each, both included."""


class Offer(BaseModel):
    """What is to come."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    size: Annotated[int, Field(ge=1, le=LARGEST)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    chunk: Annotated[int, Field(ge=512, le=1 << 20)]
    """Bytes of each chunk but the last."""

    @property
    def count(self) -> int:
        """Chunks; they are numbered from 1."""
        return -(-self.size // self.chunk)

    def place(self, number: int) -> tuple[int, int]:
        """Where a chunk begins, and its size. Raises: DataError if there is none of that number."""
        if not 1 <= number <= self.count:
            raise DataError(f"chunk {number} is none of 1 to {self.count}", remedy="send what is missing")
        start = (number - 1) * self.chunk
        return start, min(self.chunk, self.size - start)


@dataclass(frozen=True)
class Progress:
    """What a message came to, for whoever sends."""

    id: str
    have: int = 0
    count: int = 0
    missing: Ranges = field(default_factory=list)
    """The first of them."""
    problem: str | None = None


class Assembly:
    """One transfer: what is to come, what came, and the part file. Used under the lock of `Transfers`."""

    def __init__(self, folder: Path, id: str, offer: Offer, missing: Ranges | None = None) -> None:
        """`missing`: what is still to come; None for all of it."""
        self.folder, self.id, self.offer = folder, id, offer
        self._came = bytearray(b"\1" * offer.count)
        """[count], 1 where the chunk is there."""
        for first, last in [(1, offer.count)] if missing is None else missing:
            self._came[first - 1 : last] = bytes(last - first + 1)
        self.have = self._came.count(1)
        """Chunks that came."""
        self._unsynced = 0

    @property
    def part(self) -> Path:
        return self.folder / f"{self.id}{PART}"

    @property
    def is_full(self) -> bool:
        return self.have == self.offer.count

    @property
    def progress(self) -> Progress:
        return Progress(self.id, self.have, self.offer.count, self.missing(SHOWN))

    def missing(self, most: int | None = None) -> Ranges:
        """What is still to come, or the first of it."""
        found: Ranges = []
        start = self._came.find(0)
        while start >= 0 and (most is None or len(found) < most):
            end = self._came.find(1, start)
            end = self.offer.count if end < 0 else end
            found.append((start + 1, end))
            start = self._came.find(0, end)
        return found

    def begin(self) -> None:
        """Reserve the space, so that a full disk shows now. Raises: OSError."""
        with self.part.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.offer.size)
        self._keep()

    def chunk(self, number: int, data: bytes) -> bool:
        """Take one in; False if it came before. Raises: DataError if it does not fit, OSError."""
        start, size = self.offer.place(number)
        if len(data) != size:
            raise DataError(f"chunk {number} has {len(data)} bytes, expected {size}", remedy="send it again")
        if self._came[number - 1]:
            return False
        with self.part.open("r+b") as file:
            file.seek(start)
            file.write(data)
        self._came[number - 1] = 1
        self.have += 1
        self._unsynced += 1
        if self._unsynced >= SYNC or self.is_full:
            self.sync()
        return True

    def sync(self) -> None:
        """First the chunks, then which they are: no chunk counts that a power cut took. Raises: OSError."""
        with self.part.open("r+b") as file:
            os.fsync(file.fileno())
        self._keep()

    def finish(self) -> Path:
        """Check the whole, and give it its name. Raises: ArtifactError, after which all has to come again; OSError."""
        digest = hashlib.sha256()
        with self.part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != self.offer.sha256:
            self._came[:], self.have = bytes(self.offer.count), 0
            self._keep()
            raise ArtifactError(
                f"transfer {self.id} has sha256 {digest.hexdigest()[:12]}..., "
                f"the offer says {self.offer.sha256[:12]}...",
                remedy="send all chunks again",
            )
        done = done_path(self.folder, self.id)
        self.part.replace(done)
        return done

    def drop(self) -> None:
        """Forget what came. Raises: OSError."""
        for path in (self.part, self.folder / f"{self.id}{OFFER}"):
            path.unlink(missing_ok=True)

    def _keep(self) -> None:
        record = {"offer": self.offer.model_dump(), "missing": self.missing()}
        write_atomically(self.folder / f"{self.id}{OFFER}", json.dumps(record).encode())
        self._unsynced = 0


class Transfers:
    """All transfers of a device, in one folder. Thread-safe."""

    def __init__(
        self,
        folder: Path,
        *,
        most: int = MOST,
        expiry_s: float = EXPIRY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Goes on with what a restart interrupted. `clock` is monotonic: after a restart, expiry is counted anew."""
        self.folder, self._most, self._expiry_s, self._clock = folder, most, expiry_s, clock
        self._lock = threading.Lock()
        self._open: dict[str, Assembly] = {}
        self._touched: dict[str, float] = {}
        self._done = sorted(path.name for path in folder.glob(f"*{DONE}"))
        for path in folder.glob(f"*{OFFER}"):
            assembly = _resumed(folder, path)
            if assembly is None:
                with contextlib.suppress(OSError):
                    path.unlink()
                    path.with_suffix(PART).unlink(missing_ok=True)
            else:
                self._open[assembly.id], self._touched[assembly.id] = assembly, clock()

    def receive(self, id: str, number: int, payload: bytes) -> Progress:
        """One message of a transfer, the offer or a chunk. Never raises for what is in it, or for the disk."""
        try:
            if number == FIRST:
                self.offer(id, payload)
            else:
                self.chunk(id, number, payload)
            with self._lock:
                assembly = self._open.get(id)
            return Progress(id) if assembly is None else assembly.progress
        except EdgeAdaptError as error:
            return Progress(id[:64], problem=error.what)

    def offer(self, id: str, payload: bytes) -> Ranges:
        """Begin a transfer, or go on with it: what is missing of it.

        Raises: ConfigError if the offer is wrong, StateError if there are too many or the disk refuses.
        """
        if not NAME.fullmatch(id):
            raise ConfigError(f"{id[:64]!r} is no id of a transfer", remedy="use letters, digits, `_`, `-` and `.`")
        offer = _read_offer(payload)
        with self._lock, _disk(self.folder):
            known = self._open.get(id)
            if known is None or known.offer != offer:
                self._make_room(id)
                self.folder.mkdir(parents=True, exist_ok=True)
                known = Assembly(self.folder, id, offer)
                known.begin()
                self._open[id] = known
            self._touched[id] = self._clock()
            return known.missing()

    def chunk(self, id: str, number: int, data: bytes) -> bool:
        """Take a chunk in; False if it came before. Raises: StateError, DataError."""
        with self._lock, _disk(self.folder):
            assembly = self._known(id)
            new = assembly.chunk(number, data)
            self._touched[id] = self._clock()
            return new

    def complete(self, id: str) -> Path:
        """The whole file, checked. Raises: StateError if some of it is missing, ArtifactError if it is another one."""
        with self._lock, _disk(self.folder):
            if id not in self._open and NAME.fullmatch(id) and done_path(self.folder, id).is_file():
                return done_path(self.folder, id)
            assembly = self._known(id)
            if not assembly.is_full:
                raise StateError(
                    f"transfer {id} has {assembly.have} of {assembly.offer.count} chunks; "
                    f"missing are {assembly.missing(3)}",
                    remedy="send what is missing",
                )
            done = assembly.finish()
            self._drop(id)
            self._done = [name for name in self._done if name != done.name] + [done.name]
            while len(self._done) > self._most:
                (self.folder / self._done.pop(0)).unlink(missing_ok=True)
            return done

    def forget(self, id: str) -> None:
        """Remove all of a transfer. Raises: StateError if the disk refuses."""
        with self._lock, _disk(self.folder):
            if id in self._open:
                self._drop(id)
            if NAME.fullmatch(id):
                done_path(self.folder, id).unlink(missing_ok=True)

    def _known(self, id: str) -> Assembly:
        if id not in self._open:
            raise StateError(f"there is no transfer {id[:64]!r}", remedy=f"offer it first, as message {FIRST}")
        return self._open[id]

    def _make_room(self, id: str) -> None:
        """Drop an older offer of the same id, and those that expired if there are too many."""
        if id in self._open:
            self._drop(id)
        now = self._clock()
        for other in sorted(self._open, key=lambda name: self._touched[name]):
            if len(self._open) >= self._most and now - self._touched[other] >= self._expiry_s:
                self._drop(other)
        if len(self._open) >= self._most:
            raise StateError(f"{self._most} transfers are open: {', '.join(self._open)}", remedy="end one of them")

    def _drop(self, id: str) -> None:
        self._open.pop(id).drop()
        self._touched.pop(id)


def done_path(folder: Path, id: str) -> Path:
    """Where a complete transfer is."""
    return folder / f"{id}{DONE}"


def offer_of(data: bytes, chunk: int = CHUNK) -> Offer:
    """What a sender says first."""
    return Offer(size=len(data), sha256=hashlib.sha256(data).hexdigest(), chunk=chunk)


def chunks(data: bytes, offer: Offer, missing: Ranges | None = None) -> Iterator[tuple[int, bytes]]:
    """What a sender sends then: numbers and chunks, all or those that are missing."""
    for first, last in [(1, offer.count)] if missing is None else missing:
        for number in range(first, last + 1):
            start, size = offer.place(number)
            yield number, data[start : start + size]


def _read_offer(payload: bytes) -> Offer:
    try:
        return Offer.model_validate_json(payload[:1024])
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"the offer is wrong: {'.'.join(str(part) for part in first['loc'])} {first['msg']}",
            remedy='send {"size": bytes, "sha256": hexadecimal, "chunk": bytes}',
        ) from error


def _resumed(folder: Path, path: Path) -> Assembly | None:
    """What was kept of a transfer; None if it is damaged."""
    id = path.name.removesuffix(OFFER)
    try:
        if path.stat().st_size > RECORD:
            return None
        record = json.loads(path.read_bytes())
        offer, missing = Offer.model_validate(record["offer"]), [(int(a), int(b)) for a, b in record["missing"]]
        fits = all(1 <= first <= last <= offer.count for first, last in missing)
        whole = (folder / f"{id}{PART}").stat().st_size == offer.size
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return Assembly(folder, id, offer, missing) if whole and fits else None


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateError(
            f"a transfer cannot be kept in {folder}: {error.strerror}", remedy="free some space on the device"
        ) from error
