"""Moments' estimate: how fast it moves, whatever the number of frames in a look."""

from __future__ import annotations

import numpy as np
import pytest

from edge_adapt.bundle import Bundle
from edge_adapt.methods.moments import Moments
from edge_adapt.methods.protocol import Context, Observation
from edge_adapt.tail import Tail


def look(bundle: Bundle, frames: int, offset: float, seed: int) -> Observation:
    """Taps around a mean that differs from source by `offset` standard deviations."""
    means = np.random.default_rng(seed).normal(offset, 2.0, size=(frames, bundle.channels))
    return Observation(np.zeros((frames, 1), np.float32), None, taps=(means, np.square(means) + 1.0))


@pytest.mark.parametrize("frames", [1, 8, 32])
def test_one_look_moves_a_settled_estimate_by_half_of_its_distance_at_most(device_bundle, frames):
    """A pool shorter than two looks would be the newest look, and swing with the ports that it sets."""
    method = Moments(Context(device_bundle, lambda: Tail(device_bundle)))
    state = method.init()
    for seed in range(3):
        state = method.step(state, look(device_bundle, frames, 0.0, seed)).state
    newest = look(device_bundle, frames, 0.3, 9)
    away = newest.taps[0].mean(axis=0) - state.mean
    moved = method.step(state, newest).state.mean - state.mean
    np.testing.assert_array_less(np.abs(moved), np.abs(away) * 0.51)
    assert np.abs(moved).max() > 0
