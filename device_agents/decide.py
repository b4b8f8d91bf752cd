"""What state the agent is in, decided from facts alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from device_agents.board import State

ANSWERING, LEARNING = "answering", "learning"
"""Names of the stages whose loss makes the agent `safe`."""


@dataclass(frozen=True)
class Facts:
    """What is known at one moment."""

    warm: bool = False
    """The first answer was given, or the engine has shown that it can."""
    draining: bool = False
    stopped: bool = False
    given_up: tuple[str, ...] = ()
    """Stages that the supervisor does not start any more."""
    over_budget: frozenset[str] = frozenset()
    """`memory`, `thermal`, `power`."""
    sensor: str | None = None
    """Why the latest frames were not fit to learn from, such as `frozen`."""
    source: str | None = None
    """Why there are no frames."""
    learning_off: bool = False
    """Steps failed until learning was switched off."""
    troubles: frozenset[str] = frozenset()
    """What else is wrong: `disk`, `snapshots`, `link`, `certificate`."""


def state_of(facts: Facts) -> tuple[State, tuple[str, ...]]:
    """The state, and why it is not `ready`. The gravest one wins; all reasons are told."""
    why = tuple(_reasons(facts))
    if facts.stopped:
        return "offline", why
    if facts.draining:
        return "draining", why
    if set(facts.given_up) & {ANSWERING, LEARNING}:
        return "safe", why
    if not facts.warm:
        return "init", why
    return ("degraded" if why else "ready"), why


def _reasons(facts: Facts) -> Iterable[str]:
    for stage in facts.given_up:
        yield f"{stage} was given up"
    yield from sorted(facts.over_budget)
    if facts.sensor:
        yield f"sensor: {facts.sensor}"
    if facts.source:
        yield f"source: {facts.source}"
    if facts.learning_off:
        yield "learning is off"
    yield from sorted(facts.troubles)
