"""The router: tells domains apart by what frames look like to the source network, and gives each its own host state.

Where the domain changed, some frames are run once more with source weights and encoded. A window that lies near a known
domain brings that domain's state back at once; one that stays unknown founds an entry, with the state that the host has
reached there by then. What a window was not surely of a domain is kept in nobody's entry.

A window of several known domains is split: each of its frames is answered by the entry that it is nearest to, and
nobody learns from it.

Single strangers found no domain. A frame unlike the others of its time is left out by the guard inside, and here too;
one that looks like them, but whose answer is far stranger than this domain's usually are, shows something that the
model does not know: it is told, and says nothing of the domain. Where half of a window is strange, that is the domain.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_adapt.delta import Delta
from edge_adapt.errors import ConfigError
from edge_adapt.guards.rows import picked
from edge_adapt.methods.protocol import (
    CHANGE,
    FEATURES,
    LOGITS,
    TAPS,
    Answered,
    Context,
    Method,
    Observation,
    Step,
    compacted,
    configured,
)
from edge_adapt.methods.wrapper import Wrapped, Wrapper
from edge_adapt.routing import mixed, scores
from edge_adapt.routing.bank import NO_SCORES, Bank, Cap
from edge_adapt.routing.encoder import Encoder

Array = NDArray[Any]

ROUTE = "route: "
"""What an event begins with that says which entry answers from now on."""
MIXED = f"{ROUTE}mixed"
"""What is told where frames of several domains begin to come together."""
NEW_DOMAIN, BAD_TAPS, NOVEL = "new domain", "refused: taps are not finite", "novel frame"

FAR = 3.0
"""Standard deviations above the domain's usual score from which a frame is novel."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Defaults from trials on CIFAR-10-C, ResNet-20."""

    entries: int = 8
    """At most so many domains beside source are kept."""
    bytes: int = 64_000_000
    """At most so many bytes are kept in them."""
    window: int = 16
    """Frames that are routed together."""
    near: float = 2.0
    """Distance, in units of its expectation, up to which a window is of a known domain; 99 in 100 of its own are."""
    mixed: float = 0.25
    """A window is of several domains if so much of its squared distance goes when each frame chooses its own entry;
    99 in 100 windows of one domain stay below 0.18, those of two and more lie at 0.4 to 0.8."""
    patience: int = 2
    """Windows in a row that must be unknown before a domain is new."""
    every: int = 4
    """In quiet times, one look in so many is checked."""
    idle: int = 32
    """While the host looks at nothing, such as one that rests, one frame in so many is looked at."""
    group: int = 8
    """Frames looked at in one go while the domain is in doubt."""

    def __post_init__(self) -> None:
        for name in ("entries", "bytes", "window", "patience", "every", "idle", "group"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"router.{name} is {getattr(self, name)}, expected 1 or more", remedy="use the default"
                )
        for name in ("near", "mixed"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"router.{name} is {getattr(self, name)}, expected more than 0", remedy="use the default"
                )


@dataclass(frozen=True)
class Routing:
    """What the router remembers, beside the state of the host that is at work."""

    bank: Bank
    active: int = 0
    """Place of the entry that answers."""
    in_doubt: bool = True
    mixed: bool = False
    """Frames of several domains come together: each is answered by its own entry, and nobody learns."""
    window: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """[n, width], encodings of the newest frames, not yet routed."""
    scores: Array = field(default_factory=lambda: np.zeros(0))
    """[n], how strange each of them is; empty where the bundle has no fitted score."""
    unknown: int = 0
    """Windows in a row that were near to no entry."""
    quiet: int = 0
    """Looks since the last that was checked."""
    frames: int = 0
    """Frames answered so far."""


class Router(Wrapper[Routing]):
    """Outermost around a method: every entry has its own state of all that is inside, guards too."""

    name: ClassVar[str] = "router"
    adds: ClassVar[frozenset[str]] = frozenset({LOGITS})

    def __init__(self, context: Context, host: Method[Any], config: RouterConfig | None = None) -> None:
        super().__init__(context, host)
        self.config: RouterConfig = configured(config or RouterConfig(), context.settings)
        if TAPS not in host.needs:
            raise ConfigError(
                f"{host.name} looks at no taps, by which domains are told apart",
                remedy="use a method that does, such as moments, or router: none",
            )
        self.encoder = Encoder.of(context.bundle)
        self.source = Delta.source()
        self.judge = scores.best(context.bundle)
        if self.judge is not None and self.judge.score.name == scores.DEFAULT:
            self.needs = self.needs | {FEATURES}
        self.cap = Cap(self.config.entries, self.config.bytes)
        self.cap.check(host.init())

    def start(self) -> Routing:
        return Routing(Bank.of(self.encoder.source, self.encoder.frames, self.host.init()))

    @property
    def _nothing(self) -> Array:
        return np.zeros((0, self.encoder.width), np.float32)

    def route(self, state: Wrapped[Routing]) -> str:
        """Name of the entry that answers, or `mixed` where each frame has its own."""
        return MIXED.removeprefix(ROUTE) if state.own.mixed else state.own.bank.entries[state.own.active].name

    def look(self, state: Wrapped[Routing], frames: int, passed: int) -> int:
        if state.own.mixed:
            return min(4 * self.config.window, frames)
        if state.own.in_doubt:
            return min(self.config.group, frames)
        return super().look(state, frames, passed) or min(int(passed >= self.config.idle), frames)

    def delta(self, state: Wrapped[Routing]) -> Delta:
        return self.source if state.own.mixed else super().delta(state)

    def step(self, state: Wrapped[Routing], seen: Observation) -> Step[Wrapped[Routing]]:
        if state.own.mixed:
            return self._split(state, seen)
        step = self.host.step(state.host, seen)
        own, events = state.own, step.events
        if CHANGE in step.events:
            own = replace(own, in_doubt=True, window=self._nothing, scores=NO_SCORES, unknown=0)
        own = replace(own, quiet=own.quiet + 1)
        if not own.in_doubt and own.quiet < self.config.every:
            return replace(step, state=Wrapped(step.state, own))
        kept = np.ones(len(seen.frames), bool) if step.aside is None else ~step.aside
        if not kept.any():
            return replace(step, state=Wrapped(step.state, own))
        looked = self._with_source(picked(seen, kept))
        if looked is None:
            return replace(step, state=Wrapped(step.state, own), events=(*events, BAD_TAPS))
        own, novel = self._noticed(own, looked)
        made, told = self._routed(Wrapped(step.state, own))
        events = (*events, *(NOVEL,) * novel, *told)
        return replace(step, state=made, events=events, again=step.again or own.in_doubt)

    def _split(self, state: Wrapped[Routing], seen: Observation) -> Step[Wrapped[Routing]]:
        """Answer each frame by its own entry, until a window is of one domain again."""
        own, looked = state.own, self._with_source(seen)
        if looked is None:
            return Step(state, events=(BAD_TAPS,))
        assert looked.taps is not None
        encodings = self.encoder(looked.taps)
        step = mixed.answered(self.host, own.bank, looked, mixed.places(own.bank, encodings, self.config.near))
        window = np.concatenate([own.window, encodings])[-self.config.window :]
        own = replace(own, window=window)
        if len(window) == self.config.window and mixed.gain(own.bank, window, self.config.near) < self.config.mixed:
            own = replace(own, mixed=False, in_doubt=True, window=self._nothing, scores=NO_SCORES, unknown=0)
        return replace(step, state=Wrapped(state.host, own))

    def _noticed(self, own: Routing, looked: Observation) -> tuple[Routing, int]:
        """With the encodings of some more frames, and how many were novel: those are left out."""
        assert looked.taps is not None
        encodings, found = self.encoder(looked.taps), self._scores(looked)
        entry = own.bank.entries[own.active]
        novel = np.zeros(len(encodings), bool)
        if not own.in_doubt and len(found):
            novel = entry.usual.above(found) > FAR
            if 2 * int(novel.sum()) >= len(novel) > 1:
                novel[:] = False
        known = own.window if own.window.size else self._nothing
        last = -2 * self.config.window
        window = np.concatenate([known, encodings[~novel]])[last:]
        strange = np.concatenate([own.scores, found[~novel]])[last:] if len(found) else own.scores
        return replace(own, quiet=0, window=window, scores=strange), int(novel.sum())

    def _scores(self, looked: Observation) -> Array:
        """[N] with source weights, larger is stranger; [0] where it cannot be told."""
        if self.judge is None or looked.logits is None:
            return NO_SCORES
        found = self.judge(looked.logits, looked.features)
        return found if np.isfinite(found).all() else NO_SCORES

    def watch(self, state: Wrapped[Routing], answered: Answered) -> Step[Wrapped[Routing]]:
        state, final, events = self.watched_by_host(state, answered)
        own = replace(state.own, frames=state.own.frames + len(answered.logits))
        return Step(Wrapped(state.host, own), final.logits, events)

    def _with_source(self, seen: Observation) -> Observation | None:
        """The same frames with source weights; None if their taps are not finite."""
        if not seen.is_of(self.source):
            assert seen.rehearse is not None
            seen = seen.rehearse(seen.frames, self.source)
        assert seen.taps is not None
        if not all(np.isfinite(part).all() for part in seen.taps):
            return None
        return seen

    def _routed(self, state: Wrapped[Routing]) -> tuple[Wrapped[Routing], tuple[str, ...]]:
        """After a window is full: stay, go to a known domain, doubt, or found a new one."""
        own, config = state.own, self.config
        window, found = own.window[-config.window :], own.scores[-config.window :]
        if len(window) < config.window:
            return state, ()
        if mixed.gain(own.bank, window, config.near) >= config.mixed:
            own = replace(own, mixed=True, in_doubt=False, window=window, scores=NO_SCORES, unknown=0)
            return Wrapped(state.host, own), (MIXED,)
        place, distance = own.bank.nearest(window)
        if distance > config.near:
            return self._unknown(state, window)
        if place == own.active:
            # A false alarm: what the host forgot because of it comes back.
            host = own.bank.entries[place].state if own.in_doubt else state.host
            kept = compacted(self.host, host)
            bank = own.bank.with_entry(place, own.bank.entries[place].met(window, kept, own.frames, found))
            own = replace(own, bank=bank, in_doubt=False, window=self._nothing, scores=NO_SCORES, unknown=0)
            return Wrapped(host, own), ()
        return self._moved(state, window, place)

    def _moved(self, state: Wrapped[Routing], window: Array, place: int) -> tuple[Wrapped[Routing], tuple[str, ...]]:
        """To a domain that was met before: its state is back at once."""
        entry = state.own.bank.entries[place]
        host = entry.state
        found = state.own.scores[-self.config.window :]
        entry = replace(entry.met(window, host, state.own.frames, found), visits=entry.visits + 1)
        own = replace(
            state.own,
            bank=state.own.bank.with_entry(place, entry),
            active=place,
            in_doubt=False,
            window=self._nothing,
            scores=NO_SCORES,
            unknown=0,
        )
        return Wrapped(host, own), (ROUTE + entry.name,)

    def _unknown(self, state: Wrapped[Routing], window: Array) -> tuple[Wrapped[Routing], tuple[str, ...]]:
        """One window may be chance, or half of one domain and half of another."""
        found, half = state.own.scores[-len(window) :], len(window) // 2
        own = replace(
            state.own, in_doubt=True, unknown=state.own.unknown + 1, window=window[half:], scores=found[half:]
        )
        if own.unknown < self.config.patience:
            return Wrapped(state.host, own), ()
        kept = compacted(self.host, state.host)
        bank, told = own.bank.grown(window, kept, own.frames, found), [NEW_DOMAIN]
        while self.cap.exceeded(bank) and len(bank.entries) > 2:
            bank, what = bank.shrunk(len(bank.entries) - 1, own.frames)
            told.append(what)
        name = bank.entries[-1].name
        own = replace(own, bank=bank, active=len(bank.entries) - 1, in_doubt=False, window=self._nothing, unknown=0)
        own = replace(own, scores=NO_SCORES)
        return Wrapped(state.host, own), (*told, ROUTE + name)
