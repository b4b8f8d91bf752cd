"""A stretch of few classes teaches no statistics: what they are of one class is taken for the domain, and undone.

Statistics cannot tell a class from a domain, but what comes of them can: ports that fit the domain spread features as
wide as source frames lie, and answers are sure and of many kinds; ports that were set from one class leave features
close together and answers that are of many kinds and unsure. Heavy noise does the same to some networks. So where both
is so for a window of frames, and either windows of this domain were wide before or source itself tells few classes,
the host goes on in the shadow, begun anew, and what answers is its state as of then, or source; until that is over.
Where domains are mixed, features tell nothing: `near` judges by answers, and source answers while the host goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.guards.near import Near
from edge_adapt.methods.protocol import (
    CHANGE,
    FEATURES,
    TAPS,
    Answered,
    Context,
    Method,
    Observation,
    Step,
    compacted,
)
from edge_adapt.methods.wrapper import Wrapped, Wrapper
from edge_adapt.probabilities import entropy, perplexity, softmax

Array = NDArray[Any]

FEW, MANY = "guard: few classes", "guard: many classes again"

SETTLE, WINDOW, DOUBT = 32, 48, 16
"""Frames looked at after a change of domain before ports fit it, of one verdict, and of a first suspicion."""
SPREAD, TOLD = 0.5, 0.75
"""A window is narrow below this share of the variance of source's features, and this one of what answers can tell of
classes. Over all corruptions of CIFAR-10 these say so of 97 % of windows of one class on ResNet-20 and 81 % on
ResNet-56, and of 2 % of windows of all classes; of two classes, where statistics neither help nor harm, of 63 and
21 %."""
STRETCHED, KINDS = 2.0, 2.0
"""Ports of one class stretch: they leave features this many times as wide as source does on the same frames. Or source
itself tells less than so many classes, by the exponential of the entropy. On ResNet-8, where noise alone makes 20 % of
the windows of all classes narrow, neither is true of any. What that costs: of windows of one class 28 % are held where
no wide one came before, which is half of the harm on ResNet-20 and a quarter on ResNet-56."""

STORED = {"class.mean", "class.std", "taps.mean", "taps.frame_std"}
"""What a bundle must say of source."""


@dataclass(frozen=True)
class Window:
    """Sums over the frames of one verdict."""

    features: Array
    """[2, D], sum and sum of squares."""
    shares: Array
    """[K], sum of the softmax."""
    entropy: float = 0.0
    count: int = 0

    def after(self, features: Array, logits: Array) -> Window:
        """With N more frames, [N, D] and [N, K]; those that are not finite are left out."""
        fine = np.isfinite(features).all(axis=1) & np.isfinite(logits).all(axis=1)
        values, shares = features[fine].astype(np.float64), softmax(logits[fine])
        return Window(
            self.features + np.stack([values.sum(axis=0), np.square(values).sum(axis=0)]),
            self.shares + shares.sum(axis=0),
            self.entropy + float(entropy(shares).sum()),
            self.count + int(fine.sum()),
        )

    @property
    def spread(self) -> float:
        """Variance of the features, summed over them."""
        mean, second = self.features / self.count
        return float((second - np.square(mean)).sum())

    @property
    def told(self) -> float:
        """Mutual information of frames and answers, as a share of the most that it could be."""
        found = float(entropy(self.shares / self.count)) - self.entropy / self.count
        return found / float(np.log(min(len(self.shares), self.count)))

    @property
    def kinds(self) -> float:
        """Number of classes that the answers tell."""
        return perplexity(self.shares / self.count)

    def narrow(self, usual: float) -> bool:
        """usual: spread of source's own features."""
        return self.spread < SPREAD * usual and self.told < TOLD


@dataclass(frozen=True)
class Kept:
    """What the guard remembers."""

    window: Window
    near: Near
    skip: int = SETTLE
    """Frames yet to be looked at before the window begins."""
    held: bool = False
    """True while the host is in the shadow."""
    mixed: bool = False
    """True if that is for what `near` said, which then is what ends it."""
    plain: Window | None = None
    """The same frames as source has them, from a first suspicion on; None before, and where there were wide windows."""
    wide: Any = None
    """The host's state after the last wide window in this domain; None if there was none."""
    taught: bool = False
    """True once the host learned from labels: then nothing is held."""

    @property
    def of_few(self) -> bool:
        """True if what source makes of the frames of a narrow window says that they are of few classes."""
        if self.plain is None or not self.plain.count:
            return False
        return self.window.spread > STRETCHED * self.plain.spread or self.plain.kinds < KINDS


class Narrow(Wrapper[Kept]):
    """Innermost: of the frames that other guards leave out, it sees nothing."""

    name: ClassVar[str] = "narrow"

    def __init__(self, context: Context, host: Method[Any]) -> None:
        super().__init__(context, host)
        self.needs = host.needs | {FEATURES}
        self.source = Delta.source()
        stored = context.bundle.source
        self.usual = float(np.square(stored["class.std"]).sum() + stored["class.mean"].var(axis=0).sum())
        classes = context.bundle.manifest.outputs
        self.empty = Window(np.zeros((2, stored["class.mean"].shape[1])), np.zeros(classes))
        self.middle = stored["taps.mean"].astype(np.float64)
        self.variance = np.square(stored["taps.frame_std"].astype(np.float64)) + 1e-6
        self.none = Near.none(classes)

    @staticmethod
    def serves(host: Method[Any], bundle: Bundle) -> bool:
        """False around a host that sets no statistics or answers itself, and where source's spread is not known."""
        return TAPS in host.needs and not host.answers and bundle.source.keys() >= STORED

    def start(self) -> Kept:
        return Kept(self.empty, self.none)

    def delta(self, state: Wrapped[Kept]) -> Delta:
        if not state.own.held:
            return self.host.delta(state.host)
        return self.source if state.own.wide is None else self.host.delta(state.own.wide)

    def compact(self, state: Wrapped[Kept]) -> Wrapped[Kept]:
        """One state of the host, not two, unless it is held: that there were wide windows is what matters."""
        host, own = compacted(self.host, state.host), state.own
        wide = None if own.wide is None else compacted(self.host, own.wide) if own.held else host
        return Wrapped(host, replace(own, near=replace(own.near, last=self.none.last), wide=wide))

    def step(self, state: Wrapped[Kept], seen: Observation) -> Step[Wrapped[Kept]]:
        own, shown = state.own, seen
        if own.held:
            shown = _given(seen, self.host.delta(state.host))
        step = self.host.step(state.host, shown)
        if CHANGE in step.events:
            own = replace(own, window=self.empty, near=self.none, skip=SETTLE, plain=None, wide=None)
        elif shown.features is not None and shown.logits is not None and shown.taps is not None:
            if own.skip > 0:
                own = replace(own, skip=own.skip - len(seen.frames))
            else:
                own = replace(own, window=own.window.after(shown.features, shown.logits))
            own = self._asked(replace(own, near=own.near.after(shown.taps[0], self.variance)), seen, shown)
        host, own, event = self._judged(step.state, own)
        events = (*step.events, event) if event else step.events
        again = step.again and not own.held
        return replace(step, state=Wrapped(host, own), events=events, again=again)

    def watch(self, state: Wrapped[Kept], answered: Answered) -> Step[Wrapped[Kept]]:
        """While the host is in the shadow, these are answers of another network than the one it learns to correct."""
        return Step(state, answered.logits) if state.own.held else super().watch(state, answered)

    def _asked(self, own: Kept, seen: Observation, shown: Observation) -> Kept:
        """With the same frames as source has them, where those so far look narrow, or of mixed domains."""
        narrow = own.wide is None and own.window.count >= DOUBT and own.window.narrow(self.usual)
        if not (narrow or own.near.asks or own.mixed):
            return own
        plain = _given(seen, self.source)
        if plain.features is None or plain.logits is None or plain.taps is None or shown.logits is None:
            return own
        distance = (np.square(plain.taps[0] - self.middle) / self.variance).mean(axis=1)
        own = replace(own, near=own.near.compared(shown.logits, plain.logits, distance))
        if not narrow:
            return own
        return replace(own, plain=(own.plain or self.empty).after(plain.features, plain.logits))

    def _judged(self, host: Any, own: Kept) -> tuple[Any, Kept, str | None]:
        """The host's state and the guard's once there is a verdict, and what is to be told."""
        full = own.window.count >= WINDOW
        first = own.skip <= 0 and not own.window.count and not own.held
        if own.taught or not (full or first):
            return host, own, None
        mixed = own.near.of_few(still=own.mixed)
        if first and not mixed:
            return host, own, None
        narrow = full and own.window.narrow(self.usual)
        few = narrow and (own.wide is not None or own.of_few) and not (mixed and own.near.mixed)
        mixed, held = mixed and not few, mixed or few
        event = None if held == own.held else FEW if held else MANY
        near = own.near.begun_anew(still=mixed)
        own = replace(own, window=self.empty, near=near, held=held, mixed=mixed, plain=None)
        if few:
            return self.host.init() if own.wide is None else own.wide, replace(own, skip=SETTLE), event
        if mixed:
            return host, replace(own, wide=None), event
        return host, own if narrow else replace(own, wide=host), event


def taught(own: Kept) -> Kept:
    """Once the host learned from labels: nothing is held back any more."""
    return replace(own, taught=True, held=False, mixed=False, plain=None)


def _given(seen: Observation, delta: Delta) -> Observation:
    """The same frames as they look with that delta; as they are, where no other look can be had."""
    if seen.is_of(delta) or seen.rehearse is None:
        return seen
    return replace(seen.rehearse(seen.frames, delta), rehearse=seen.rehearse)
