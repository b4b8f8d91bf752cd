"""Every promise, for every part that a package brings. What breaks one part is told, and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, Final, Literal

from benchmarks import scenarios
from benchmarks.contract import methods, parts
from benchmarks.contract.stand import Broken, Inapplicable, Promise, Stand, stands
from edge_adapt.errors import EdgeAdaptError
from edge_adapt.plugins import (
    ENGINES,
    METHODS,
    ROUTERS,
    SCENARIOS,
    SOURCES,
    WRAPPERS,
    kind_of,
    loaded,
    of_package,
    package_of,
    points,
)

KEPT: Final = "kept"
BROKEN: Final = "broken"
SKIPPED: Final = "skipped"
LOADS = "can be loaded"
PROMISES: dict[str, tuple[Promise, ...]] = {
    METHODS: methods.PROMISES,
    WRAPPERS: methods.PROMISES,
    ROUTERS: methods.PROMISES,
    ENGINES: parts.ENGINE_PROMISES,
    SOURCES: parts.SOURCE_PROMISES,
    SCENARIOS: parts.SCENARIO_PROMISES,
}
BOTH_MODES = (METHODS, WRAPPERS, ROUTERS, ENGINES)
"""Groups that are tried on both bundles: on the device, and in reference mode."""
CHEAP: dict[str, dict[str, Any]] = {"cotta": {"views": 2}, "lae": {"reliable": 1.0}, "mos": {"reliable": 1.0}}
"""Settings of our methods that change how long they take (32 views of the paper are many for a contract), or that let
them learn at all: of answers from the tiny network, none is sure."""


@dataclass(frozen=True)
class Verdict:
    """How one part keeps one promise."""

    kind: str
    name: str
    promise: str
    status: Literal["kept", "broken", "skipped"]
    why: str | None = None


def subject_of(group: str, name: str) -> Any:
    """What the promises of a group are asked of."""
    if group in methods.GROUPS:
        return methods.MethodSubject(group, name, CHEAP.get(name, {}) if group == METHODS else {})
    return parts.Subject(group, name)


def judge(package: str, tell: Callable[[Verdict], None] = lambda verdict: None) -> list[Verdict]:
    """Every promise for every part of a package; `tell` hears each verdict as it is reached.

    Raises: ConfigError if no such package brings a part.
    """
    found = of_package(package)
    verdicts: list[Verdict] = []
    with stands() as both:
        for group, point in found:
            for verdict in _part(group, point, both):
                tell(verdict)
                verdicts.append(verdict)
    return verdicts


def _part(group: str, point: EntryPoint, both: Sequence[Stand]) -> Iterator[Verdict]:
    why = _unusable(group, point)
    yield Verdict(kind_of(group), point.name, LOADS, BROKEN if why else KEPT, why)
    if why is None:
        subject = subject_of(group, point.name)
        for promise in PROMISES[group]:
            yield _verdict(group, point.name, promise, subject, both if group in BOTH_MODES else both[:1])


def _unusable(group: str, point: EntryPoint) -> str | None:
    """Why nobody can use it: it cannot be loaded, or another package has a part of that name."""
    others = {package_of(other) for other in points(group) if other.name == point.name} - {package_of(point)}
    if group == SCENARIOS and point.name in scenarios.SCENARIOS:
        return "edge-adapt has a scenario of that name"
    if others:
        return f"the package {' and '.join(sorted(others))} has a {kind_of(group)} of that name"
    try:
        loaded(group, point)
        if group == SCENARIOS:
            scenarios.get(point.name)
    except EdgeAdaptError as error:
        return error.what
    return None


def _verdict(group: str, name: str, promise: Promise, subject: Any, tried: Sequence[Stand]) -> Verdict:
    """Broken if it is on one stand, skipped if it can be asked on none."""
    reasons: list[tuple[str, str]] = []
    for stand in tried:
        where = f"{stand.mode} mode: " if len(tried) > 1 else ""
        try:
            promise.check(stand, subject)
        except Inapplicable as error:
            reasons.append((str(error), where))
        except Broken as error:
            return Verdict(kind_of(group), name, promise.name, BROKEN, f"{where}{error}")
        except Exception as error:  # the code of strangers may raise anything, and that too is an answer
            return Verdict(kind_of(group), name, promise.name, BROKEN, f"{where}{_said(error)}")
    if len(reasons) == len(tried):
        modes = dict(reasons)  # a reason that holds in each has nothing to do with the mode
        why = "; ".join(where + reason if len(modes) > 1 else reason for reason, where in modes.items())
        return Verdict(kind_of(group), name, promise.name, SKIPPED, why)
    return Verdict(kind_of(group), name, promise.name, KEPT)


def _said(error: Exception) -> str:
    return error.what if isinstance(error, EdgeAdaptError) else f"{type(error).__name__}: {error}"
