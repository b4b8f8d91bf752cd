"""Parts that are found by name through entry points: methods, engines, scenarios. Loading is the first import.

Any installed package may bring parts. One that is broken is a sentence for whoever asks for it, and nothing to others.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from edge_adapt.errors import ConfigError, EngineError, did_you_mean

METHODS, WRAPPERS, ENGINES = "edge_adapt.methods", "edge_adapt.wrappers", "edge_adapt.engines"
ROUTERS, SOURCES, SCENARIOS = "edge_adapt.routers", "edge_adapt.sources", "edge_adapt.scenarios"
COMMANDS, CHECKS, DEMOS = "edge_adapt.commands", "edge_adapt.checks", "edge_adapt.demos"
OWN = "edge-adapt"
"""The package whose names nobody else can take."""

_WRAPS = ("name", "adds", "demands", "start", "init", "look", "step", "watch", "delta")
MEMBERS: dict[str, tuple[str, ...]] = {
    METHODS: ("name", "requires", "needs", "watches", "answers", "init", "look", "step", "watch", "delta"),
    WRAPPERS: _WRAPS,
    ENGINES: ("name", "probe", "run", "observe", "rehearse", "apply", "description", "close"),
    ROUTERS: _WRAPS,
    SOURCES: ("paced", "open", "read", "close"),
    SCENARIOS: ("name", "summary", "shifts", "play"),
}
"""Group -> what each of its parts has at least."""
MADE = frozenset({"needs", "watches", "answers", "paced"})
"""Those that a constructor may set, and that a class need not have."""

_log = logging.getLogger(__name__)


def names(group: str) -> list[str]:
    """What is installed under a group."""
    return sorted({point.name for point in points(group)})


def points(group: str) -> list[EntryPoint]:
    """Everything that claims a name in a group, loaded or not."""
    return list(entry_points(group=group))


def find(group: str, name: str) -> Any:
    """Load one.

    Raises: ConfigError if there is none of that name, if two packages claim the name, or if it is something else than
    the group holds; EngineError if it cannot be imported.
    """
    claims = [point for point in points(group) if point.name == name]
    if not claims:
        raise ConfigError(f"there is no {kind_of(group)} {name!r}", remedy=did_you_mean(name, names(group)))
    own = [point for point in claims if package_of(point) == OWN]
    for stranger in claims if own and len(claims) > 1 else ():
        if package_of(stranger) != OWN:
            _tell_once(f"{_called(group, stranger)} is not used: {OWN} has a {kind_of(group)} of that name")
    if not own and len(claims) > 1:
        packages = " and ".join(sorted(package_of(point) for point in claims))
        raise ConfigError(
            f"{kind_of(group)} {name!r} is claimed by the packages {packages}", remedy="uninstall all but one of them"
        )
    return loaded(group, (own or claims)[0])


def loaded(group: str, point: EntryPoint) -> Any:
    """What one entry point gives. Raises: as `find`."""
    try:
        found = point.load()
    except ImportError as error:
        raise EngineError(
            f"{_called(group, point)} needs a library that is missing: {error}",
            remedy="install the extra that brings it, see the README"
            if package_of(point) == OWN
            else f"install what {package_of(point)} needs, or uninstall it",
        ) from error
    except Exception as error:  # the code of strangers may raise anything while it is imported
        raise EngineError(
            f"{_called(group, point)} cannot be loaded: {type(error).__name__}: {error}",
            remedy=f"correct {point.value}, or uninstall {package_of(point)}",
        ) from error
    if reason := misfit(group, point.name, found):
        raise ConfigError(f"{_called(group, point)} {reason}", remedy=f"correct {point.value}; see CONTRIBUTING.md")
    return found


def misfit(group: str, name: str, found: Any) -> str | None:
    """Why this is no part of that group under that name; None if it is one, or if the group holds no parts."""
    if group not in MEMBERS:
        return None
    is_class = isinstance(found, type)
    if is_class is (group == SCENARIOS):
        wanted = "a scenario, not a class" if group == SCENARIOS else "a class"
        return f"is {found!r:.80}, expected {wanted}"
    missing = [member for member in MEMBERS[group] if member not in MADE and not hasattr(found, member)]
    if missing:
        return f"has no {', '.join(missing)}"
    if group not in (ROUTERS, SOURCES) and found.name != name:
        return f"calls itself {found.name!r}"
    return None


def sound(group: str) -> dict[str, Any]:
    """All that can be loaded, by name. What cannot is told once in the log, and left out."""
    made = {}
    for name in names(group):
        try:
            made[name] = find(group, name)
        except (ConfigError, EngineError) as error:
            _tell_once(error.what)
    return made


def of_package(package: str) -> list[tuple[str, EntryPoint]]:
    """(group, entry point) of each part that a package brings, in the order of the groups.

    Raises: ConfigError if there is no such package, or it brings none.
    """
    every = [(group, point) for group in MEMBERS for point in points(group)]
    found = [(group, point) for group, point in every if package_of(point) == normalised(package)]
    if not found:
        bringing = {package_of(point) for _, point in every}
        raise ConfigError(
            f"no installed package {package!r} brings a method, engine, router, source or scenario",
            remedy=did_you_mean(normalised(package), bringing),
        )
    return sorted(found, key=lambda item: (list(MEMBERS).index(item[0]), item[1].name))


def package_of(point: EntryPoint) -> str:
    """Normalised name of the package that registers it."""
    return normalised(point.dist.name) if point.dist is not None else "(unknown)"


def normalised(package: str) -> str:
    """As package indexes compare names: lower case, one dash for dashes, dots and underscores."""
    return re.sub(r"[-_.]+", "-", package).lower()


def kind_of(group: str) -> str:
    """What a part of a group is called: `edge_adapt.methods` -> `method`."""
    return group.rpartition(".")[2].rstrip("s")


def _called(group: str, point: EntryPoint) -> str:
    stranger = "" if package_of(point) == OWN else f" of package {package_of(point)}"
    return f"{kind_of(group)} {point.name!r}{stranger}"


@cache
def _tell_once(text: str) -> None:
    _log.warning(text)
