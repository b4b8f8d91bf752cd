"""YAML text -> plain values, with the line of each. Bounded in size, depth and number; no anchors, no tags."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

Loc: TypeAlias = "tuple[str | int, ...]"
"""Where a value stands: keys of mappings and indices of lists, from the top."""

MAX_BYTES, MAX_DEPTH, MAX_VALUES = 256 * 1024, 32, 10_000
MAX_NUMBER = 64
"""Characters of the longest number; what is longer is text."""
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml where PyYAML was built with it, ten times faster."""

NOTHING = ("", "~", "null", "Null", "NULL")
TRUTH = {word: value for value in (True, False) for word in (str(value), str(value).lower(), str(value).upper())}
WHOLE = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
"""Control characters, line ends that editors do not count, halves of surrogate pairs, byte order marks."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a text."""

    line: int
    """Counted from 1."""
    text: str


@dataclass
class Located:
    """What a text says."""

    value: Any = None
    """dict, list, str, int, float, bool or None, nested."""
    lines: dict[Loc, int] = field(default_factory=dict)
    """Line of every key and every item of a list."""
    problems: list[Problem] = field(default_factory=list)
    """What was refused; `value` is not whole then."""
    broken: bool = False
    """True if reading stopped at a problem: what stands behind it is not known."""

    def line(self, loc: Loc) -> int:
        """Line of a value, or of the nearest thing around it that the text has."""
        while loc and loc not in self.lines:
            loc = loc[:-1]
        return self.lines.get(loc, 1)


class _Refused(Exception):
    """Reading cannot go on."""

    def __init__(self, line: int, text: str) -> None:
        self.problem = Problem(line, text)


def read(data: str | bytes) -> Located:
    """Read a text. Never raises for what it holds: whatever is wrong is in `problems`.

    Plain words mean what YAML 1.2 says: `true`, `false` and `null` are special, `no`, `on` and `1:30` are text.
    """
    found = Located()
    try:
        text = _text(data)
        _Reader(found, yaml.parse(text, Loader=LOADER)).document()
    except _Refused as refused:
        found.problems.append(refused.problem)
        found.broken = True
    except yaml.YAMLError as error:
        found.problems.append(_syntax(error, text))
        found.broken = True
    return found


def _text(data: str | bytes) -> str:
    """Decoded, of bounded size, without characters that no text has."""
    size = len(data)
    if size > MAX_BYTES:
        raise _Refused(1, f"it is larger than {MAX_BYTES // 1024} KiB")
    if isinstance(data, bytes):
        try:
            data = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise _Refused(line, "it is not UTF-8 text") from None
    if (odd := NO_TEXT.search(data)) is not None:
        raise _Refused(data.count("\n", 0, odd.start()) + 1, _unwritten(odd.group()))
    return data


def _unwritten(character: str) -> str:
    return f"there is a character that no text has, U+{ord(character):04X}"


@dataclass
class _Reader:
    """Builds values from the events of the parser, which comes without recursion and stops when told to."""

    found: Located
    events: Iterator[Any]
    values: int = 0

    def document(self) -> None:
        """All there is. Raises: _Refused, yaml.YAMLError."""
        next(self.events)
        first = next(self.events)
        if isinstance(first, yaml.StreamEndEvent):
            raise _Refused(1, "it is empty")
        self.found.value = self._value(next(self.events), (), 0)
        next(self.events)
        behind = next(self.events)
        if not isinstance(behind, yaml.StreamEndEvent):
            raise _Refused(_line(behind), "a second document begins here, expected one")

    def _value(self, event: Any, loc: Loc, depth: int) -> Any:
        self.values += 1
        self._allow(event, depth)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(loc, depth + 1)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._items(loc, depth + 1)
        return self._scalar(event)

    def _allow(self, event: Any, depth: int) -> None:
        line = _line(event)
        if depth > MAX_DEPTH:
            raise _Refused(line, f"it is nested more than {MAX_DEPTH} levels deep")
        if self.values > MAX_VALUES:
            raise _Refused(line, f"it holds more than {MAX_VALUES} values")
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _Refused(line, "anchors and aliases (`&`, `*`) are not used here: write the value out, or quote it")
        if event.tag is not None:
            raise _Refused(line, "tags (`!`) are not used here: leave it out, or quote the text")

    def _mapping(self, loc: Loc, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            line = _line(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise _Refused(line, "a key is no plain word")
            self._allow(event, depth)
            key = self._checked(event)
            place = (*loc, key)
            value_of = self._value(next(self.events), place, depth)
            if key in made:
                first = self.found.lines[place]
                self.found.problems.append(Problem(line, f"{dotted(place)} is set twice, first on line {first}"))
                continue
            made[key] = value_of
            self.found.lines[place] = line
        return made

    def _items(self, loc: Loc, depth: int) -> list[Any]:
        made: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            place = (*loc, len(made))
            self.found.lines[place] = _line(event)
            made.append(self._value(event, place, depth))
        return made

    def _scalar(self, event: Any) -> Any:
        text = self._checked(event)
        if not event.implicit[0]:
            return text
        return plain(text)

    def _checked(self, event: Any) -> str:
        """The text of a scalar: escapes may have brought in what no text has."""
        text: str = event.value
        if (odd := NO_TEXT.search(text)) is not None:
            raise _Refused(_line(event), _unwritten(odd.group()))
        return text


def plain(text: str) -> Any:
    """What a word without quotes means, by the core schema of YAML 1.2; numbers that are not finite stay text."""
    if text in NOTHING:
        return None
    if text in TRUTH:
        return TRUTH[text]
    if len(text) > MAX_NUMBER:
        return text
    if WHOLE.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)
    if REAL.fullmatch(text) and math.isfinite(number := float(text)):
        return number
    return text


def dotted(loc: Loc) -> str:
    """(`mqtt`, `groups`, 0) -> `mqtt.groups[0]`; odd keys are shown quoted and short."""
    made = ""
    for part in loc:
        if isinstance(part, int):
            made += f"[{part}]"
        else:
            word = part if re.fullmatch(r"[\w-]{1,60}", part) else short(part)
            made += f".{word}" if made else word
    return made


def short(value: Any) -> str:
    """A value as it is shown in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _syntax(error: yaml.YAMLError, text: str) -> Problem:
    """What the parser complains about, and where."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line + 1 if mark is not None else 1
    lines = text.splitlines()
    for number in (line, line - 1):
        if 0 < number <= len(lines) and "\t" in re.match(r"\s*", lines[number - 1]).group():  # type: ignore[union-attr]
            return Problem(number, "the line is indented with a tab, expected spaces")
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "it is not valid YAML"
    context = getattr(error, "context", None)
    return Problem(min(line, max(1, len(lines))), f"{reason} ({context})" if context else str(reason))
