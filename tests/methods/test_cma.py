"""CMA-ES: it finds minima, learns shapes, repeats itself by seed, and takes candidates from elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edge_adapt.methods.cma import CmaState, ask, start, tell

SIZE, COUNT = 6, 10
AXES = 10.0 ** (4 * np.arange(SIZE) / (SIZE - 1))


def sphere(x: np.ndarray) -> np.ndarray:
    return np.square(x).sum(1)


def ellipsoid(x: np.ndarray) -> np.ndarray:
    return (AXES * np.square(x)).sum(1)


def rotated(x: np.ndarray) -> np.ndarray:
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((SIZE, SIZE)))
    return ellipsoid(x @ basis)


def search(cost: Callable[[np.ndarray], np.ndarray], *, diagonal: bool, generations: int, seed: int = 0) -> CmaState:
    state = start(np.full(SIZE, 3.0), 1.0, diagonal=diagonal)
    for number in range(generations):
        candidates = ask(state, COUNT, np.random.default_rng([seed, number]))
        state = tell(state, candidates, cost(candidates))
    return state


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("cost", [sphere, ellipsoid])
def test_it_finds_the_minimum(diagonal, cost):
    state = search(cost, diagonal=diagonal, generations=500)
    assert cost(state.mean[None]) < 1e-8
    assert state.sigma < 1e-2
    assert state.generation == 500


def test_only_the_full_covariance_learns_a_rotated_shape():
    full, diagonal = (search(rotated, diagonal=kind, generations=400) for kind in (False, True))
    assert rotated(full.mean[None]) < 1e-8 < 1e-3 * rotated(diagonal.mean[None])


def test_the_diagonal_learns_the_shape_of_an_ellipsoid():
    scale = search(ellipsoid, diagonal=True, generations=150).covariance * AXES
    assert scale.max() / scale.min() < 100 < AXES.max() / AXES.min()


def test_the_same_seed_is_the_same_search():
    one, same, other = (search(sphere, diagonal=True, generations=5, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.mean, same.mean) and one.sigma == same.sigma
    assert not np.array_equal(one.mean, other.mean)


def test_a_candidate_from_elsewhere_draws_the_mean_but_does_not_blow_up_the_state():
    state = start(np.zeros(SIZE), 1.0, diagonal=True)
    candidates = ask(state, COUNT, np.random.default_rng(0))
    candidates[-1] = 1e6
    costs = np.arange(COUNT, 0, -1.0)  # the one from elsewhere is the best
    after = tell(state, candidates, costs)
    assert after.mean.min() > 0
    assert np.linalg.norm(after.mean) < 2 * np.sqrt(SIZE)
    assert after.sigma < 3 and after.covariance.max() < 10


def test_costs_that_are_not_finite_count_as_worst():
    state = start(np.zeros(SIZE), 1.0, diagonal=True)
    candidates = ask(state, COUNT, np.random.default_rng(0))
    costs = sphere(candidates)
    worst = costs.argsort()[COUNT // 2 :]
    spoilt = costs.copy()
    spoilt[worst] = [np.nan, np.inf, np.nan, np.inf, np.nan]
    assert np.array_equal(tell(state, candidates, spoilt).mean, tell(state, candidates, costs).mean)


def test_a_state_is_a_value():
    state = search(sphere, diagonal=False, generations=3)
    before = state.mean.copy(), state.covariance.copy()
    candidates = ask(state, COUNT, np.random.default_rng(0))
    tell(state, candidates, sphere(candidates))
    assert np.array_equal(state.mean, before[0]) and np.array_equal(state.covariance, before[1])
