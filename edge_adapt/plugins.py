"""Parts that are found by name through entry points: methods, engines, commands. Loading is the first import."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from edge_adapt.errors import ConfigError, EngineError, did_you_mean

METHODS, WRAPPERS = "edge_adapt.methods", "edge_adapt.wrappers"
ENGINES, COMMANDS, CHECKS = "edge_adapt.engines", "edge_adapt.commands", "edge_adapt.checks"
DEMOS = "edge_adapt.demos"


def names(group: str) -> list[str]:
    """What is installed under a group."""
    return sorted({point.name for point in entry_points(group=group)})


def find(group: str, name: str) -> Any:
    """Load one. Raises: ConfigError if there is none of that name, EngineError if its library is missing."""
    for point in entry_points(group=group):
        if point.name == name:
            try:
                return point.load()
            except ImportError as error:
                raise EngineError(
                    f"{group.rpartition('.')[2].rstrip('s')} {name!r} needs a library that is missing: {error}",
                    remedy="install the extra that brings it, see the README",
                ) from error
    kind = group.rpartition(".")[2].rstrip("s")
    raise ConfigError(f"there is no {kind} {name!r}", remedy=did_you_mean(name, names(group)))
