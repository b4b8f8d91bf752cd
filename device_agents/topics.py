"""The topics of one device, in one table: building them, subscribing, and reading one that came in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from device_agents.settings import NAME
from edge_adapt.errors import ConfigError

GROUP, CONTROLLER = "_group", "_ctrl"
SINGLE = ("state", "birth", "reported", "desired")
NAMED = ("tele", "event", "alert", "cmd", "ack")


class Place(NamedTuple):
    """Where a message stands in the tree."""

    kind: str
    """state, birth, reported, desired, tele, event, alert, cmd, ack or xfer."""
    parts: tuple[str, ...] = ()
    """What follows: the group, kind, id or verb; id and number of a chunk."""
    group: str | None = None
    """The group that a broadcast command was sent to."""


@dataclass(frozen=True)
class Topics:
    """`{prefix}/{site}/{device}/...`. Every level is 1 to 64 letters, digits, `_`, `-` and `.`.

    Raises: ConfigError for a level that is not.
    """

    prefix: str
    site: str
    device: str
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for level in (*self.prefix.split("/"), self.site, self.device, *self.groups):
            _level(level)

    @property
    def root(self) -> str:
        return f"{self.prefix}/{self.site}/{self.device}"

    @property
    def state(self) -> str:
        return f"{self.root}/state"

    @property
    def birth(self) -> str:
        return f"{self.root}/birth"

    @property
    def reported(self) -> str:
        return f"{self.root}/reported"

    @property
    def desired(self) -> str:
        return f"{self.root}/desired"

    def tele(self, group: str) -> str:
        return f"{self.root}/tele/{_level(group)}"

    def event(self, kind: str) -> str:
        return f"{self.root}/event/{_level(kind)}"

    def alert(self, id: str) -> str:
        return f"{self.root}/alert/{_level(id)}"

    def cmd(self, verb: str) -> str:
        return f"{self.root}/cmd/{_level(verb)}"

    def ack(self, id: str) -> str:
        return f"{self.root}/ack/{_level(id)}"

    def xfer(self, id: str, n: int) -> str:
        return f"{self.root}/xfer/{_level(id)}/{n}"

    @property
    def subscriptions(self) -> list[str]:
        """Filters of everything that this device listens to."""
        filters = [self.desired, f"{self.root}/cmd/+", f"{self.root}/xfer/+/+"]
        filters += [f"{self.prefix}/{self.site}/{GROUP}/{group}/cmd/+" for group in self.groups]
        return filters

    def parse(self, topic: str) -> Place | None:
        """Where a topic stands, None if it is none of ours. A foreign device's topic is none of ours."""
        start = f"{self.prefix}/{self.site}/"
        if not topic.startswith(start):
            return None
        levels = topic[len(start) :].split("/")
        if not all(NAME.fullmatch(level) for level in levels[1:]):
            return None
        if levels[0] == self.device:
            return _of_device(levels[1:])
        if levels[0] == GROUP and len(levels) == 4 and levels[1] in self.groups and levels[2] == "cmd":
            return Place("cmd", (levels[3],), group=levels[1])
        return None


def _of_device(levels: list[str]) -> Place | None:
    kind, parts = (levels[0], tuple(levels[1:])) if levels else ("", ())
    if (kind in SINGLE and not parts) or (kind in NAMED and len(parts) == 1):
        return Place(kind, parts)
    if kind == "xfer" and len(parts) == 2 and parts[1].isdecimal():
        return Place(kind, parts)
    return None


def _level(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r:.80} cannot be a level of a topic",
            remedy="use 1 to 64 letters, digits, `_`, `-` and `.`, beginning with a letter or digit",
        )
    return name
