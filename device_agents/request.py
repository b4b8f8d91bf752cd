"""A command as it arrives: read, bounded and checked, without doing anything. What is wrong with it gets a name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from device_agents.envelope import Clock, unwrap
from device_agents.settings import NAME
from device_agents.topics import GROUP, NAMED, SINGLE, Topics
from device_agents.verbs import Arguments, Verb, verb
from edge_adapt.errors import ConfigError

if TYPE_CHECKING:
    from device_agents.mqtt import Incoming

MOST_TOPIC, MOST_CORRELATION, MOST_PROPERTIES = 256, 256, 32
WHO, WHY = re.compile(r"[ -~]{1,64}"), re.compile(r"[^\x00-\x1f\x7f]{1,256}")
NOBODY = "unknown"
"""Who asked, if nobody says; and where a command without a usable id is answered."""
READ_PROPERTIES = ("idem", "by", "reason")
KINDS = frozenset({*SINGLE, *NAMED, "xfer"})


@dataclass(frozen=True)
class Limits:
    """What commands may cost."""

    payload: int = 16_384
    """Bytes of one."""
    rate: float = 10.0
    """Commands a second, in the long run; `burst` of them at once."""
    burst: float = 20.0
    expiry_s: float = 300.0
    """A command has to say when it is too late for it, and may not say later than that."""
    inbox: int = 64
    """Commands that wait to be looked at."""
    queue: int = 32
    """Commands that were accepted and wait to run."""
    result: int = 4096
    """Bytes of a result."""
    jitter_s: float = 5.0
    """A command to a group is answered after a random part of this."""
    local_s: float = 30.0
    """How long the caller of a local command waits for its end."""


@dataclass(frozen=True)
class Letter:
    """What is kept of a command until somebody looks at it; never more than the limits allow."""

    topic: str
    payload: bytes
    """Empty if it was too large."""
    size: int
    """Bytes that came."""
    came_ms: int
    """Monotonic."""
    expiry_s: float | None
    response_topic: str | None
    correlation: bytes | None
    properties: Mapping[str, str]
    too_long: str | None
    """Name of a property that is longer than it may be."""

    @classmethod
    def of(cls, incoming: Incoming, came_ms: int, limits: Limits) -> Letter:
        size = len(incoming.payload)
        held = {name: value for name, value in incoming.properties[:MOST_PROPERTIES] if name in READ_PROPERTIES}
        answer, correlation = incoming.response_topic, incoming.correlation
        lengths = {
            "response topic": (len(answer or ""), MOST_TOPIC),
            "correlation data": (len(correlation or b""), MOST_CORRELATION),
            **{f"user property `{name}`": (len(value), MOST_TOPIC) for name, value in held.items()},
        }
        too_long = next((name for name, (length, most) in lengths.items() if length > most), None)
        return cls(
            topic=incoming.topic[: 2 * MOST_TOPIC],
            payload=incoming.payload if size <= limits.payload else b"",
            size=size,
            came_ms=came_ms,
            expiry_s=incoming.expiry_s,
            response_topic=None if too_long else answer,
            correlation=None if too_long else correlation,
            properties={} if too_long else held,
            too_long=too_long,
        )


@dataclass(frozen=True)
class Address:
    """Where the answer goes."""

    topic: str
    """Empty: nowhere, the caller waits for it."""
    correlation: bytes | None = None
    in_group: bool = False
    """Many devices answer at once, each after a wait of its own."""


@dataclass(frozen=True)
class Request:
    """A command that may be carried out."""

    verb: Verb
    arguments: Arguments
    key: str
    by: str
    reason: str
    address: Address
    deadline_ms: float | None = None
    """Monotonic; it does not begin after that."""

    @property
    def risky(self) -> bool:
        """True for one that needs a reason, and is audited."""
        return self.verb.needs_reason(self.arguments)

    @property
    def lasting(self) -> bool:
        """True if a power cut shall not make anyone forget it; what does no harm twice need not wait for the disk."""
        return self.risky or not self.verb.repeatable

    @property
    def local(self) -> bool:
        return not self.address.topic

    @cached_property
    def written(self) -> str:
        """The arguments as JSON, always in the same order."""
        return json.dumps(self.arguments.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """Of verb and arguments."""
        return hashlib.sha256(f"{self.verb.name} {self.written}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Rejection:
    """A command that may not, and why. `code` is one of few, for programs; `text` is for people."""

    code: str
    text: str
    verb: str
    key: str | None
    address: Address


class Refused(Exception):
    """Internal: stops the reading of a command."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass
class _Head:
    """What is known of a command so far, so that even a bad one is answered where its sender listens."""

    topics: Topics
    address: Address
    verb: str
    key: str | None = None
    body: Mapping[str, Any] = field(default_factory=dict)


def read(letter: Letter, topics: Topics, limits: Limits, clock: Clock) -> Request | Rejection | None:
    """Check everything about a command that needs no memory of others. None: it was not for this device."""
    place = topics.parse(letter.topic)
    if place is None or place.kind != "cmd":
        return None
    address = Address(topics.ack(NOBODY), letter.correlation, place.group is not None)
    head = _Head(topics, address, place.parts[0])
    try:
        _read_head(head, letter, limits)
        return _request(head, letter, limits, clock)
    except Refused as refused:
        return Rejection(refused.code, str(refused), head.verb, head.key, head.address)


def checked(name: str, arguments: Mapping[str, Any], reason: str) -> tuple[Verb, Arguments]:
    """The verb and its arguments. Raises: Refused if there is none, they are wrong, or it needs a reason."""
    try:
        found = verb(name)
    except ConfigError as error:
        raise Refused("unknown-verb", _line(error)) from error
    try:
        parsed = found.parse(arguments)
    except ConfigError as error:
        raise Refused("bad-arguments", _line(error)) from error
    if found.needs_reason(parsed) and not reason:
        raise Refused("no-reason", f"{name} is dangerous here: give a `reason`, it is kept in the audit")
    return found, parsed


def may_answer(topic: str, topics: Topics, *, below: str) -> bool:
    """Whether an answer may go there: below `below`, and nowhere that somebody obeys, or believes a device.

    below: the prefix, or our own root.
    """
    if len(topic) > MOST_TOPIC or not topic.startswith(f"{below}/"):
        return False
    if topic.startswith(f"{topics.root}/ack/"):
        return all(map(NAME.fullmatch, topic[len(topics.root) + 5 :].split("/")))
    levels = topic[len(topics.prefix) + 1 :].split("/")
    plain = all(NAME.fullmatch(level.removeprefix("_")) for level in levels)
    return plain and levels[1:2] != [GROUP] and KINDS.isdisjoint(levels[2:])


def _read_head(head: _Head, letter: Letter, limits: Limits) -> None:
    """Fill in key and address, first from the properties, then from the body. Raises: Refused."""
    if letter.too_long is not None:
        raise Refused("bad-header", f"the {letter.too_long} is longer than it may be")
    _set_key(head, letter.properties.get("idem"))
    if letter.response_topic is not None:
        _answer_to(head, letter.response_topic, "response topic", below=head.topics.prefix)
    if letter.size > limits.payload:
        raise Refused("too-large", f"the command has {letter.size} bytes, more than {limits.payload}")
    try:
        head.body = unwrap(letter.payload, limit=limits.payload)
    except ConfigError as error:
        raise Refused("malformed", _line(error)) from error
    if head.key is None:
        _set_key(head, head.body.get("id"))
    if letter.response_topic is None and head.body.get("reply_to") is not None:
        _answer_to(head, head.body["reply_to"], "`reply_to`", below=head.topics.root)


def _set_key(head: _Head, key: Any) -> None:
    if key is None:
        return
    if not isinstance(key, str) or not NAME.fullmatch(key):
        raise Refused("bad-key", "the id of the command is not 1 to 64 letters, digits, `_`, `-` and `.`")
    head.key = key
    head.address = Address(head.topics.ack(key), head.address.correlation, head.address.in_group)


def _answer_to(head: _Head, topic: Any, name: str, *, below: str) -> None:
    if not isinstance(topic, str) or not may_answer(topic, head.topics, below=below):
        raise Refused(
            "reply-topic", f"the {name} is not one that this device may answer on: it has to be below {below}"
        )
    head.address = Address(topic, head.address.correlation, head.address.in_group)


def _request(head: _Head, letter: Letter, limits: Limits, clock: Clock) -> Request:
    """Raises: Refused."""
    body = head.body
    by = _text(letter, body, "by", WHO, "1 to 64 printable ASCII characters") or NOBODY
    reason = _text(letter, body, "reason", WHY, "1 to 256 characters on one line").strip()
    arguments = body.get("d", {})
    if not isinstance(arguments, dict):
        raise Refused("bad-arguments", f"`d` is a {type(arguments).__name__}; arguments are an object")
    found, parsed = checked(head.verb, arguments, reason)
    if head.key is None:
        raise Refused("no-key", "give the command an id: the user property `idem`, or `id` in the body")
    deadline = _deadline_ms(letter, body.get("expires_ms"), limits, clock)
    return Request(found, parsed, head.key, by, reason, head.address, deadline)


def _text(letter: Letter, body: Mapping[str, Any], name: str, form: re.Pattern[str], expected: str) -> str:
    """A property, else a field of the body; empty if there is neither. Raises: Refused."""
    value = letter.properties.get(name, body.get(name))
    if value is None:
        return ""
    if not isinstance(value, str) or not form.fullmatch(value):
        raise Refused("bad-header", f"`{name}` is not {expected}")
    return value


def _deadline_ms(letter: Letter, expires_ms: Any, limits: Limits, clock: Clock) -> float:
    """When it is too late, monotonic. Raises: Refused if that is not said, or too far away. It may have passed."""
    if letter.expiry_s is not None:
        left_s = letter.expiry_s
    elif expires_ms is None:
        raise Refused("no-expiry", "say when it is too late: message expiry, or `expires_ms` (Unix time) in the body")
    elif type(expires_ms) is not int:
        raise Refused("bad-header", "`expires_ms` is no whole number of milliseconds")
    elif clock.quality() == "unsync":
        raise Refused("clock", "the clock of this device is not set, so `expires_ms` says nothing: use message expiry")
    else:
        left_s = (expires_ms - clock.wall_ms()) / 1000
    if left_s > limits.expiry_s:
        raise Refused("far-expiry", f"it expires in more than {limits.expiry_s:g} s")
    return letter.came_ms + 1000 * left_s


def _line(error: ConfigError) -> str:
    """What is wrong and the way out, on one line."""
    return f"{error.what}; {error.remedy}"
