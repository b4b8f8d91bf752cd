"""Some of the frames of a look: what guards share that keep frames from a method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.methods.protocol import Answered, Method, Observation, Step

Array = NDArray[Any]


def picked(seen: Observation, rows: Array) -> Observation:
    """What the look gave for the frames where `rows` [N] is True."""

    def part(value: Array | None) -> Array | None:
        return None if value is None else value[rows]

    return replace(
        seen,
        frames=seen.frames[rows],
        logits=part(seen.logits),
        cut=part(seen.cut),
        taps=None if seen.taps is None else (seen.taps[0][rows], seen.taps[1][rows]),
        features=part(seen.features),
        cls=part(seen.cls),
    )


def step_on(host: Method[Any], state: Any, seen: Observation, rows: Array, fallback: Array) -> Step[Any]:
    """A step of the host on some of the frames.

    Args:
        rows: [N] bool, the frames that it may see; with none of them it takes no step.
        fallback: [N, K], the answers to the others, from a host that answers itself.
    """
    if rows.all():
        return host.step(state, seen)
    step: Step[Any] = host.step(state, picked(seen, rows)) if rows.any() else Step(state)
    if step.aside is not None:
        step = replace(step, aside=scattered(step.aside, rows, 0.0))
    if step.stands is not None:
        step = replace(step, stands=scattered(step.stands, rows, 0.0))
    if step.logits is None:
        return replace(step, logits=fallback) if host.answers else step
    return replace(
        step,
        logits=scattered(step.logits, rows, fallback),
        features=None if step.features is None else scattered(step.features, rows, 0.0),
    )


def watch_on(host: Method[Any], state: Any, answered: Answered, rows: Array) -> Step[Any]:
    """Show the host some of the answers; the others stay as they are."""
    if rows.all():
        return host.watch(state, answered)
    if not rows.any():
        return Step(state)
    features = None if answered.features is None else answered.features[rows]
    step = host.watch(state, Answered(answered.logits[rows], features))
    if step.logits is None:
        return step
    return replace(step, logits=scattered(step.logits, rows, answered.logits))


def sound_rows(*values: Array | None, limit: float | None = None) -> Array:
    """[N] bool, True where every number of the frame is finite, and no larger than `limit`."""
    given = [value for value in values if value is not None]
    rows = np.ones(len(given[0]), bool)
    for value in given:
        fine = np.isfinite(value) if limit is None else np.abs(value) < limit
        if not fine.all():
            rows &= fine.reshape(len(value), -1).all(axis=1)
    return rows


def scattered(values: Array, rows: Array, fallback: Array | float) -> Array:
    """[N, ...]: `values` in order where `rows` is True, `fallback` elsewhere."""
    made: Array = np.empty((len(rows), *values.shape[1:]), values.dtype)
    made[:] = fallback
    made[rows] = values
    return made
