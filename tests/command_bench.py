"""A bench for commands: a clock that is turned by hand, a control that only writes down, and answers that are kept."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from device_agents.answers import Reply
from device_agents.commands import Commands
from device_agents.ledger import Ledger
from device_agents.mqtt import Incoming
from device_agents.request import Limits
from device_agents.topics import Topics

TOPICS = Topics("ea/v1", "hall", "cam1", groups=("line4",))
GROUP = "ea/v1/hall/_group/line4/cmd/"
SHA = "0" * 64
ARGUMENTS: Mapping[str, dict[str, Any]] = {
    "ping": {},
    "rebirth": {},
    "snapshot": {},
    "restore": {"slot": "own"},
    "rollback": {},
    "reset": {},
    "freeze": {"on": True},
    "set-mode": {"mode": "recommend"},
    "set-config": {"config": {"budget.learn_ms_per_s": 100.0}, "dry_run": False},
    "load-adapter": {"url": None, "file": "night.tar", "transfer": None, "sha256": SHA},
    "commit-adapter": {},
    "drain": {},
    "record": {"on": True, "seconds": 30.0},
    "label-reveal": {"labels": [[12, 3], [13, 0]]},
    "log-level": {"level": "debug"},
}
"""Arguments that each verb takes, all of them given."""


@dataclass
class HandClock:
    """Stands still until it is turned."""

    wall: int = 1_800_000_000_000
    mono: int = 5_000_000
    kept: str = "sync"

    def wall_ms(self) -> int:
        return self.wall

    def mono_ms(self) -> int:
        return self.mono

    def quality(self) -> Any:
        return self.kept

    def turn(self, seconds: float) -> None:
        self.wall += int(1000 * seconds)
        self.mono += int(1000 * seconds)


@dataclass
class RecordingControl:
    """Carries nothing out; keeps what it was asked. `does` may raise or return a result."""

    asked: list[tuple[str, Mapping[str, Any], str]] = field(default_factory=list)
    does: Callable[[str, Mapping[str, Any]], dict[str, Any]] = lambda verb, arguments: {}

    def execute(self, verb: str, arguments: Mapping[str, Any], *, by: str) -> dict[str, Any]:
        self.asked.append((verb, dict(arguments), by))
        return self.does(verb, arguments)

    @property
    def verbs(self) -> list[str]:
        return [verb for verb, _, _ in self.asked]

    @property
    def state_hash(self) -> str:
        """Changes with everything that was carried out."""
        return hashlib.sha256(repr(self.asked).encode()).hexdigest()


class Bench:
    """Commands that run in the test's own thread, when it says `pump`."""

    def __init__(self, folder: Path, *, limits: Limits | None = None) -> None:
        self.clock, self.control, self.replies = HandClock(), RecordingControl(), list[Reply]()
        self.path, self.limits = folder / "commands.db", limits or Limits(rate=1e9, burst=1e9, local_s=0)
        self.ledger = Ledger(self.path, clock=self.clock)
        self.commands = self._commands()
        self._numbers = itertools.count()

    def _commands(self) -> Commands:
        return Commands(self.control, self.ledger, TOPICS, self.replies.append, clock=self.clock, limits=self.limits)

    def restart(self) -> None:
        """As after a kill: nothing is told to the old one."""
        self.ledger.close()
        self.ledger = Ledger(self.path, clock=self.clock)
        self.commands = self._commands()

    def key(self) -> str:
        return f"k{next(self._numbers)}"

    def incoming(self, verb: str, arguments: Any = None, **changed: Any) -> Incoming:
        """A sound MQTT 5 command for `verb`, with the fields of `changed` in place of its own."""
        body = json.dumps({"v": 1, "d": ARGUMENTS[verb] if arguments is None else arguments}).encode()
        sound = Incoming(
            topic=TOPICS.cmd(verb),
            payload=body,
            expiry_s=30,
            response_topic=None,
            correlation=b"\x01\x02",
            properties=(("idem", self.key()), ("by", "alice"), ("reason", "a test")),
        )
        return replace(sound, **changed)

    def send(self, verb: str, arguments: Any = None, **changed: Any) -> list[Reply]:
        """Send one, do all that waits, and return the answers to it."""
        return self.deliver(self.incoming(verb, arguments, **changed))

    def deliver(self, incoming: Incoming) -> list[Reply]:
        before = len(self.replies)
        self.commands.receive(incoming)
        self.commands.pump()
        return self.replies[before:]

    def close(self) -> None:
        self.ledger.close()


def statuses(replies: list[Reply]) -> list[str]:
    return [reply.data["status"] for reply in replies]


def code(replies: list[Reply]) -> str:
    """The code of the only answer, which is a rejection."""
    (reply,) = replies
    assert reply.data["status"] == "rejected", reply
    assert reply.data["text"], "a rejection says why"
    return str(reply.data["code"])


def fails_with(error: BaseException) -> Callable[..., dict[str, Any]]:
    """What a control does that cannot."""

    def does(verb: str, arguments: Any) -> dict[str, Any]:
        raise error

    return does
