"""Mutated copies of the example configuration: whatever they hold, reading gives settings or a ConfigError.

`make fuzz` runs it.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from device_agents.settings import AgentSettings
from edge_adapt.config import parse_config
from edge_adapt.errors import ConfigError

EXAMPLE = Path(__file__).resolve().parents[2] / "packaging" / "agent.example.yaml"
HOSTILE = [
    *(
        "",
        "~",
        "null",
        "true",
        "no",
        "-1",
        "0",
        "1e999",
        ".nan",
        ".inf",
        "0x7f",
        "1:30",
        "9" * 70,
        "3.1.1",
        "2024-02-30",
    ),
    *(
        "[",
        "]",
        "{",
        "}",
        "[[",
        "{a: {",
        ": :",
        "- - -",
        "? x",
        "&a b",
        "*a",
        "<<: *a",
        "!!python/object/apply:os.system [x]",
    ),
    *("!!binary aGk=", "|", ">-", "'", '"', '"\\0"', '"\\ud800"', "%YAML 9.9", "---", "...", "#", "\t", "@", "`"),
    *(
        "../../../../etc/passwd",
        "/dev/zero",
        "\u202e",
        "\u00e9\U0001f600",
        "x" * 5000,
        "[" * 500,
        "{a: " * 500,
        "- " * 500,
    ),
]
Mutation = Callable[[random.Random, bytes], bytes]


def mutated(seed: int, text: bytes) -> bytes:
    """The text after one to six mutations; the same for the same seed."""
    draw = random.Random(seed)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        text = draw.choice(MUTATIONS)(draw, text)
    return text


def cut(draw: random.Random, text: bytes) -> bytes:
    """Half written."""
    return text[: draw.randrange(len(text) + 1)]


def flipped(draw: random.Random, text: bytes) -> bytes:
    """A few bytes replaced by any others."""
    made = bytearray(text)
    for _ in range(draw.randint(1, 4) if made else 0):
        made[draw.randrange(len(made))] = draw.randrange(256)
    return bytes(made)


def inserted(draw: random.Random, text: bytes) -> bytes:
    """Something hostile anywhere."""
    place = draw.randrange(len(text) + 1)
    return text[:place] + draw.choice(HOSTILE).encode("utf-8", "surrogatepass") + text[place:]


def other_value(draw: random.Random, text: bytes) -> bytes:
    """Something hostile in place of a value."""
    lines = text.split(b"\n")
    place = draw.randrange(len(lines))
    key, colon, _ = lines[place].partition(b":")
    lines[place] = key + colon + b" " + draw.choice(HOSTILE).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def moved(draw: random.Random, text: bytes) -> bytes:
    """A line taken out, doubled, swapped with another or indented anew."""
    lines = text.split(b"\n")
    here, there = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.randrange(4)
    if kind == 0:
        del lines[here]
    elif kind == 1:
        lines.insert(there, lines[here])
    elif kind == 2:
        lines[here], lines[there] = lines[there], lines[here]
    else:
        lines[here] = draw.choice((b"", b" ", b"  ", b"\t", b"        ")) + lines[here].lstrip()
    return b"\n".join(lines)


def renamed(draw: random.Random, text: bytes) -> bytes:
    """A letter of a key lost."""
    lines = text.split(b"\n")
    place = draw.randrange(len(lines))
    if b":" in lines[place]:
        at = draw.randrange(lines[place].index(b":") + 1)
        lines[place] = lines[place][:at] + lines[place][at + 1 :]
    return b"\n".join(lines)


def repeated(draw: random.Random, text: bytes) -> bytes:
    """A part a great many times."""
    start = draw.randrange(len(text) + 1)
    part = text[start : start + draw.randint(1, 60)]
    return text[:start] + part * draw.choice((2, 50, 2000)) + text[start:]


MUTATIONS: tuple[Mutation, ...] = (cut, flipped, inserted, inserted, other_value, other_value, moved, renamed, repeated)


def outcome(text: bytes) -> str:
    """`accepted` or `refused`. Raises: whatever else comes out, and AssertionError for an error without a line."""
    try:
        settings = parse_config(text, AgentSettings, "fuzz.yaml", folder=Path("/configuration"))
    except ConfigError as error:
        told = str(error)
    else:
        assert type(settings) is AgentSettings
        return "accepted"
    told.encode()  # it can be printed
    assert "fuzz.yaml:" in told, told
    return "refused"


@dataclass
class Found:
    """What became of all copies."""

    outcomes: Counter[str] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def table(self) -> str:
        accepted, refused, crashed = (f"{self.outcomes[name]:,}" for name in ("accepted", "refused", "crashed"))
        count, slowest = f"{self.outcomes.total():,}", f"{1e3 * self.slowest_s:.0f}"
        return (
            "| configurations | accepted | refused, with a line | crashed | slowest, ms |\n"
            "|---------------:|---------:|---------------------:|--------:|------------:|\n"
            f"| {count:>14} | {accepted:>8} | {refused:>20} | {crashed:>7} | {slowest:>11} |"
        )


def fuzz(count: int, seed: int) -> Found:
    """So many mutated copies of the example; the same for the same seed."""
    example, found = EXAMPLE.read_bytes(), Found()
    for number in range(seed, seed + count):
        text = mutated(number, example)
        started = time.process_time()
        try:
            found.outcomes[outcome(text)] += 1
        except Exception as error:  # what this looks for
            found.outcomes["crashed"] += 1
            found.crashes.append(f"configuration {number}: {type(error).__name__}: {error}")
        found.slowest_s = max(found.slowest_s, time.process_time() - started)
    return found
