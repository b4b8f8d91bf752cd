"""Nothing that is not a number, or absurdly large, gets in, out, or in force."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from edge_adapt.delta import PORT_SCALE, Delta
from edge_adapt.guards.rows import sound_rows, step_on, watch_on
from edge_adapt.methods.protocol import LOGITS, Answered, Context, Method, Observation, Step
from edge_adapt.methods.wrapper import Wrapped, Wrapper

BAD_FRAMES, BAD_ANSWERS, BAD_DELTA = "guard: bad frames", "guard: bad answers", "guard: bad delta"

LIMIT = 1e6
"""No input, feature or logit of a sound network is as large."""


class Finite(Wrapper[int]):
    """Frames that are not finite, from the camera to the cut, are not learned from; a delta that is not, never used.

    Numbers beyond `LIMIT` count as not finite. Such an answer becomes the source's class frequencies, which is all that
    it knows of such a frame. Its own state counts the frames.
    """

    name: ClassVar[str] = "finite"
    adds: ClassVar[frozenset[str]] = frozenset({LOGITS})

    def __init__(self, context: Context, host: Method[Any]) -> None:
        super().__init__(context, host)
        outputs = context.bundle.manifest.outputs
        prior = context.bundle.source.get("prior", np.full(outputs, 1 / outputs))
        self.prior = np.log(np.maximum(prior, 1e-6)).astype(np.float32)

    def start(self) -> int:
        return 0

    def step(self, state: Wrapped[int], seen: Observation) -> Step[Wrapped[int]]:
        rows = sound_rows(seen.frames, seen.logits, seen.features, limit=LIMIT)
        rows &= sound_rows(seen.frames, seen.cut, *(seen.taps or ()), seen.cls)
        fallback = np.tile(self.prior, (len(rows), 1)) if seen.logits is None else seen.logits
        step = step_on(self.host, state.host, seen, rows, fallback)
        events, bad = step.events, int((~rows).sum())
        host = step.state
        delta = self.host.delta(host)
        if delta is not self.host.delta(state.host) and not _usable(delta):
            host, events = state.host, (*events, BAD_DELTA)
        if bad:
            events = (*events, BAD_FRAMES)
        return replace(step, state=Wrapped(host, state.own + bad), events=events)

    def watch(self, state: Wrapped[int], answered: Answered) -> Step[Wrapped[int]]:
        rows = sound_rows(answered.logits, limit=LIMIT)
        events: tuple[str, ...] = ()
        if not rows.all():
            answered = replace(answered, logits=np.where(rows[:, None], answered.logits, self.prior))
            events = (BAD_ANSWERS,)
        if self.host.watches:
            features = answered.features
            step = watch_on(self.host, state.host, answered, rows & sound_rows(answered.logits, features, limit=LIMIT))
            state, events = Wrapped(step.state, state.own), (*step.events, *events)
            if step.logits is not None:
                fine = sound_rows(step.logits, limit=LIMIT)
                answered = replace(answered, logits=np.where(fine[:, None], step.logits, answered.logits))
                events = events if fine.all() else (*events, BAD_ANSWERS)
        return Step(state, answered.logits, events)


def _usable(delta: Delta) -> bool:
    return delta.is_finite() and (PORT_SCALE not in delta or float(delta[PORT_SCALE].min(initial=1.0)) > 0)
