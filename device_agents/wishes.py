"""What may be wished of the learner by name: pure changes of what is learned, so that a record can be redone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from edge_adapt.methods.protocol import Method
from edge_adapt.runtime.live import GIVEN, OWN, SOURCE, Learned

Wish = Callable[[Learned[Any]], Learned[Any]]


def reset(method: Method[Any]) -> Wish:
    """Source, and nothing remembered."""
    return lambda learned: replace(
        learned, state=method.init(), slot=OWN, given=None, probation=None, frozen=False, failures=0
    )


def freeze(method: Method[Any], on: bool) -> Wish:
    """Learn nothing, or go on."""
    return lambda learned: replace(learned, frozen=on, failures=0)


def source(method: Method[Any]) -> Wish:
    """Answer from source; what was learned stays."""
    return lambda learned: replace(learned, slot=SOURCE, probation=None, given=None)


def own(method: Method[Any]) -> Wish:
    """Drop an adapter from outside."""
    return lambda learned: replace(learned, slot=OWN, given=None, probation=None)


def mode(method: Method[Any], name: str) -> Wish:
    """Let the slots answer that a mode allows."""
    return lambda learned: replace(learned, may_answer=may_answer(name))


def may_answer(mode: str) -> tuple[str, ...]:
    """Slots that may answer in a mode: none; what somebody approved; also what the device learned by itself."""
    return {"shadow": (), "recommend": (GIVEN,)}.get(mode, (OWN, GIVEN))


NAMED: Mapping[str, Callable[..., Wish]] = {
    "reset": reset,
    "freeze": freeze,
    "source": source,
    "own": own,
    "mode": mode,
}
