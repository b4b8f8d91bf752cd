"""Costs of a replay: what is counted, and what is told where it cannot be known."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from benchmarks.costs import Energy, Kept, PlainInference
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.optim import gradients_of, leaves, tallied
from edge_adapt.methods.protocol import Context, Step


def test_energy_is_power_over_time():
    started = time.monotonic()
    with Energy(lambda: 2.0) as energy:
        time.sleep(0.25)
    assert energy.joules is not None
    assert 0.4 < energy.joules <= 2.0 * (time.monotonic() - started)


def test_a_board_that_does_not_tell_its_power_has_no_energy():
    with Energy(lambda: None) as energy:
        pass
    assert energy.joules is None
    readings = iter([2.0])
    with Energy(lambda: next(readings, None)) as energy:
        pass
    assert energy.joules is None


def test_backward_passes_are_counted_where_somebody_counts():
    values = leaves({"a": torch.ones(3)})
    gradients_of(values["a"].sum(), values)
    with tallied() as tally:
        gradients_of((values["a"] ** 2).sum(), values)
        with tallied() as inner:
            gradients_of((values["a"] ** 2).sum(), values)
    gradients_of(values["a"].sum(), values)
    assert (tally.backward, inner.backward) == (1, 1)


class Grows:
    """A method whose state is an array that grows by a number at every step."""

    name = "grows"

    def init(self) -> np.ndarray:
        return np.zeros(2)

    def step(self, state: np.ndarray, seen: object) -> Step[np.ndarray]:
        return Step(np.zeros(len(state) + 1))


def test_the_state_that_a_method_left_is_weighed():
    kept = Kept(Grows())
    assert kept.name == "grows"
    state = kept.init()
    assert kept.state_bytes == 0  # nothing beside what it began with
    kept.step(state, None)
    assert kept.state_bytes == 24


def test_what_a_method_began_with_is_no_part_of_its_state(device_bundle):
    from edge_adapt.tail import Tail

    kept = Kept(build("tent", Context(device_bundle, lambda: Tail(device_bundle))))
    kept.init()
    assert kept.state_bytes == 0


def test_plain_inference_is_milliseconds_a_frame():
    class Slow:
        def run(self, frames: np.ndarray) -> None:
            time.sleep(0.01)

    plain = PlainInference(Slow(), np.zeros((4, 1)), rounds=3)
    plain()
    plain()
    assert plain.ms >= 2.5
    with pytest.raises(AttributeError):
        Kept(Grows()).nothing  # noqa: B018
