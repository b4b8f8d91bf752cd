"""Nothing that is not a number, or absurdly large, gets in, out, or in force."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_adapt.delta import PORT_SCALE, Delta
from edge_adapt.guards.rows import sound_rows, step_on, watch_on
from edge_adapt.methods.protocol import LOGITS, Answered, Context, Method, Observation, Step
from edge_adapt.methods.wrapper import Wrapped, Wrapper

Array = NDArray[Any]

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
        answered, rows, events = self._cleaned(answered, answered.logits)
        if not self.host.watches:
            return Step(state, answered.logits, events)
        if answered.features is not None:
            rows = rows & sound_rows(answered.features, limit=LIMIT)
        step = watch_on(self.host, state.host, answered, rows)
        if step.logits is not None and step.logits is not answered.logits:
            answered, _, more = self._cleaned(replace(answered, logits=step.logits), answered.logits)
            events = (*more, *events)
        return Step(Wrapped(step.state, state.own), answered.logits, (*step.events, *events))

    def _cleaned(self, answered: Answered, before: Array) -> tuple[Answered, Array, tuple[str, ...]]:
        """Answers without what is no number: those of `before` the host's correction, or the source's frequencies."""
        logits = answered.logits
        if np.abs(logits).max(initial=0) < LIMIT:  # false for NaN
            return answered, np.ones(len(logits), bool), ()
        rows = sound_rows(logits, limit=LIMIT)
        instead = np.tile(self.prior, (len(rows), 1)) if before is logits else before
        return replace(answered, logits=np.where(rows[:, None], logits, instead)), rows, (BAD_ANSWERS,)


def _usable(delta: Delta) -> bool:
    return delta.is_finite() and (PORT_SCALE not in delta or float(delta[PORT_SCALE].min(initial=1.0)) > 0)
