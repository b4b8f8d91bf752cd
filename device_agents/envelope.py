"""The envelope around every payload: who counted it, when, how far the clock can be trusted; and the way back in."""

from __future__ import annotations

import ctypes
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal, Protocol

from edge_adapt.errors import ConfigError

Quality = Literal["sync", "rtc", "unsync"]
VERSION = 1
DEEPEST = 16
PLAUSIBLE_MS = 1_735_689_600_000  # the start of 2025: an earlier clock was never set
CLOCK_ERROR = 5  # adjtimex answers so while nobody disciplines the clock
CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
FRESH, HISTORIC = b'"hist":false', b'"hist":true'


class Clock(Protocol):
    """Time, as an argument. Timers and order use `mono_ms`; `wall_ms` is only ever told to people."""

    def wall_ms(self) -> int:
        """Unix time, milliseconds."""
        ...

    def mono_ms(self) -> int:
        """Milliseconds since some fixed moment; never goes back."""
        ...

    def quality(self) -> Quality:
        """`sync`: disciplined by a time server; `rtc`: plausible; `unsync`: certainly wrong."""
        ...


class SystemClock:
    """The clock of this machine."""

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def mono_ms(self) -> int:
        return time.monotonic_ns() // 1_000_000

    def quality(self) -> Quality:
        if self.wall_ms() < PLAUSIBLE_MS:
            return "unsync"
        return "sync" if _disciplined() else "rtc"


def _disciplined() -> bool:
    """True if the kernel says that a time server keeps the clock. Elsewhere than on Linux: False."""
    adjtimex = _adjtimex()
    if adjtimex is None:
        return False
    facts = ctypes.create_string_buffer(512)  # struct timex, 208 bytes; `modes` 0 only reads
    return 0 <= int(adjtimex(facts)) < CLOCK_ERROR


@lru_cache(maxsize=1)
def _adjtimex() -> Callable[..., int] | None:
    """The C function, looked up once: every envelope asks."""
    try:
        found: Callable[..., int] = ctypes.CDLL(None).adjtimex
    except (OSError, AttributeError):
        return None
    return found


def new_ulid(clock: Clock) -> str:
    """26 characters, Crockford base 32: 48 bits of wall clock, 80 of chance."""
    number = (clock.wall_ms() & (1 << 48) - 1) << 80 | int.from_bytes(os.urandom(10), "big")
    return "".join(CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


class Envelopes:
    """Wraps what leaves. Thread-safe.

    `seq` numbers the stream (telemetry, events, acknowledgements) from 1 without a gap. A retained value takes no
    number of its own but carries the latest: whoever reads it learns how far the stream has come.
    """

    def __init__(self, boot: str, clock: Clock) -> None:
        self.boot = boot
        self.not_finite = 0
        """Numbers that were NaN or infinite, and left as null."""
        self._clock = clock
        self._lock = threading.Lock()
        self._seq = 0

    def wrap(self, data: Mapping[str, Any], *, hist: bool = False, numbered: bool = True) -> bytes:
        """The payload for `data`, UTF-8 JSON. `numbered=False`: a retained value or a will, see above."""
        body = self._body(data)
        with self._lock:
            self._seq += numbered
            seq = self._seq
        head = {
            "v": VERSION,
            "id": new_ulid(self._clock),
            "seq": seq,
            "boot": self.boot,
            "ts": self._clock.wall_ms(),
            "mono": self._clock.mono_ms(),
            "clk": self._clock.quality(),
            "hist": hist,
        }
        return f'{_dumps(head)[:-1]},"d":{body}}}'.encode()

    def _body(self, data: Mapping[str, Any]) -> str:
        try:
            return _dumps(data)
        except ValueError:  # something is not finite
            finite, count = without_nan(data)
            with self._lock:
                self.not_finite += count
            return _dumps(finite)


def as_historic(payload: bytes) -> bytes:
    """A payload that `wrap` made, told late. The first `hist` is the envelope's: its head holds no foreign text."""
    return payload.replace(FRESH, HISTORIC, 1)


def plain_json(data: Any) -> bytes:
    """JSON without an envelope, for readers that know their own format."""
    return _dumps(without_nan(data)[0]).encode()


def _dumps(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"), default=_known)


def _known(value: Any) -> Any:
    """What JSON does not know: mappings, numpy scalars and arrays, sets; the rest by its text."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def without_nan(value: Any) -> tuple[Any, int]:
    """`value` with null for every NaN and infinity, and how many there were."""
    if isinstance(value, float):
        return (value, 0) if math.isfinite(value) else (None, 1)
    if isinstance(value, Mapping):
        pairs = {key: without_nan(item) for key, item in value.items()}
        return {key: item for key, (item, _) in pairs.items()}, sum(count for _, count in pairs.values())
    if isinstance(value, (list, tuple)):
        items = [without_nan(item) for item in value]
        return [item for item, _ in items], sum(count for _, count in items)
    if not isinstance(value, str) and hasattr(value, "tolist"):
        return without_nan(value.tolist())
    return value, 0


def unwrap(payload: bytes, *, limit: int) -> dict[str, Any]:
    """The envelope of a payload that came from outside; what was sent is under `d`.

    Args:
        limit: largest size in bytes.
    Raises: ConfigError for a payload that is too large, no JSON, nested deeper than 16, not an object, holds a
        number that is not finite or text that is no text, or has another `v` than 1.
    """
    if len(payload) > limit:
        raise ConfigError(f"the payload has {len(payload)} bytes, more than {limit}", remedy="send less, or in chunks")
    try:
        value = json.loads(payload.decode("utf-8"), parse_constant=_refuse)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise ConfigError(f"the payload is no JSON: {error}"[:200], remedy="send UTF-8 JSON") from None
    _check(value)
    if not isinstance(value, dict):
        raise ConfigError(f"the payload is a {type(value).__name__}, not an object", remedy='send {"v":1,"d":{...}}')
    version = value.get("v")
    if type(version) is not int or version != VERSION:
        raise ConfigError(f"the payload has v {version!r:.40}, this agent speaks v {VERSION}", remedy='send "v":1')
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _too_deep() -> ConfigError:
    return ConfigError(f"the payload is nested deeper than {DEEPEST}", remedy="send it flatter")


def _check(value: Any) -> None:
    """Depth, finite numbers, text that can be written. Walks without recursion."""
    todo: list[tuple[Any, int]] = [(value, 1)]
    while todo:
        item, depth = todo.pop()
        if isinstance(item, float) and not math.isfinite(item):
            raise ConfigError("the payload holds a number beyond what JSON readers agree on", remedy="send less digits")
        if isinstance(item, str) and not _writable(item):
            raise ConfigError("the payload holds half a character (a lone surrogate)", remedy="send UTF-8 text")
        if isinstance(item, (dict, list)):
            if depth > DEEPEST:
                raise _too_deep()
            children = [*item.keys(), *item.values()] if isinstance(item, dict) else item
            todo.extend((child, depth + 1) for child in children)


def _writable(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode("utf-8"))
    except UnicodeEncodeError:
        return False
