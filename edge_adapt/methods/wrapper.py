"""Wrappers: a method around a method. What one does not say otherwise is the inner method's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

from numpy.typing import NDArray

from edge_adapt.delta import Delta
from edge_adapt.errors import ConfigError
from edge_adapt.methods.protocol import Answered, Context, Method, Observation, Step, compacted

Array = NDArray[Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Wrapped(Generic[T]):
    """State of a wrapper: the inner method's, and its own."""

    host: Any
    own: T


class Wrapper(Generic[T]):
    """Base of label-shift adapters, LAME, T3A and guards. Subclasses say `start`, and override what they change."""

    name: ClassVar[str]
    adds: ClassVar[frozenset[str]] = frozenset()
    """What it wants to see of every answer, beside what the host does."""
    demands: ClassVar[frozenset[str]] = frozenset()
    """What it requires of the bundle, beside what the host does."""

    def __init__(self, context: Context, host: Method[Any]) -> None:
        self.host = host
        self.requires = host.requires | self.demands
        self.needs, self.watches, self.answers = host.needs, host.watches | self.adds, host.answers

    def start(self) -> T:
        """Its own state before the first frame."""
        raise NotImplementedError

    def init(self) -> Wrapped[T]:
        return Wrapped(self.host.init(), self.start())

    def look(self, state: Wrapped[T], frames: int, passed: int) -> int:
        return self.host.look(state.host, frames, passed)

    def step(self, state: Wrapped[T], seen: Observation) -> Step[Wrapped[T]]:
        step = self.host.step(state.host, seen)
        return replace(step, state=Wrapped(step.state, state.own))

    def watch(self, state: Wrapped[T], answered: Answered) -> Step[Wrapped[T]]:
        """The host's last word; a subclass calls `watched_by_host` first and goes on from there."""
        state, answered, events = self.watched_by_host(state, answered)
        return Step(state, answered.logits, events)

    def watched_by_host(
        self, state: Wrapped[T], answered: Answered
    ) -> tuple[Wrapped[T], Answered, tuple[str, ...]]:
        """Let the host see the answer, if it wants to: the state and the answer after that."""
        if not self.host.watches:
            return state, answered, ()
        step = self.host.watch(state.host, answered)
        logits = answered.logits if step.logits is None else step.logits
        return Wrapped(step.state, state.own), Answered(logits, answered.features), step.events

    def delta(self, state: Wrapped[T]) -> Delta:
        return self.host.delta(state.host)

    def compact(self, state: Wrapped[T]) -> Wrapped[T]:
        return Wrapped(compacted(self.host, state.host), state.own)

    def features_of(self, answered: Answered) -> Array:
        """[N, D]. Raises: ConfigError if the host answers by itself and does not say what it gave the head."""
        if answered.features is None:
            raise ConfigError(
                f"{self.name} needs features, which {self.host.name} does not give when it answers by itself",
                remedy="use a bundle that was not cut at its input, or put it around source, moments or norm",
            )
        return answered.features
