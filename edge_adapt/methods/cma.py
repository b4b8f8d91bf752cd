"""CMA-ES as functions over a frozen state: ask for candidates, tell what they cost.

Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv 2016. Diagonal: Ros & Hansen, "A Simple Modification in CMA-ES
Achieving Linear Time and Space Complexity", PPSN 2008. Candidates that were not drawn from the state are let in as in
Hansen, "Injecting External Solutions Into CMA-ES", 2011. Negative weights are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class CmaState:
    """A normal distribution of candidates, and the two paths that its mean has taken."""

    mean: Array
    """[d]."""
    sigma: float
    covariance: Array
    """[d], the diagonal, or [d, d]; without sigma."""
    step_path: Array
    """[d], whitened: its length says whether sigma is too small."""
    shape_path: Array
    """[d]: the direction in which the covariance grows."""
    generation: int = 0

    @property
    def is_diagonal(self) -> bool:
        return self.covariance.ndim == 1


def start(mean: Array, sigma: float, *, diagonal: bool) -> CmaState:
    """N(mean, sigma^2 I)."""
    size = len(mean)
    zeros = np.zeros(size)
    return CmaState(mean.astype(np.float64), sigma, np.ones(size) if diagonal else np.eye(size), zeros, zeros)


def ask(state: CmaState, count: int, rng: np.random.Generator) -> Array:
    """Candidates [count, d]."""
    drawn = rng.standard_normal((count, len(state.mean)))
    if state.is_diagonal:
        return state.mean + state.sigma * drawn * np.sqrt(state.covariance)
    values, vectors = _eigen(state.covariance)
    made: Array = state.mean + state.sigma * (drawn * np.sqrt(values)) @ vectors.T
    return made


def tell(state: CmaState, candidates: Array, costs: Array) -> CmaState:
    """The state after one generation.

    Args:
        candidates: [count, d], from `ask`, or partly from elsewhere; four or more.
        costs: [count], smaller is better; what is not finite counts as worst.
    """
    size, count = len(state.mean), len(candidates)
    rates = _Rates.of(size, count, diagonal=state.is_diagonal)
    ranked = np.argsort(np.where(np.isfinite(costs), costs, np.inf), kind="stable")[: len(rates.weights)]
    whiten = _whitening(state.covariance)
    steps = _bounded((candidates[ranked] - state.mean) / state.sigma, whiten)
    step = rates.weights @ steps
    keep = 1 - rates.step_path
    step_path = keep * state.step_path + math.sqrt((1 - keep**2) * rates.effective) * whiten(step)
    length = float(np.linalg.norm(step_path))
    expected = math.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))
    # While sigma still grows fast, the shape path would take its growth for a direction.
    steady = length / math.sqrt(1 - keep ** (2 * (state.generation + 1))) < (1.4 + 2 / (size + 1)) * expected
    keep = 1 - rates.shape_path
    shape_path = keep * state.shape_path + steady * math.sqrt((1 - keep**2) * rates.effective) * step
    decay = 1 - rates.rank_one * (1 if steady else keep**2) - rates.rank_many
    if state.is_diagonal:
        one, many = np.square(shape_path), rates.weights @ np.square(steps)
    else:
        one, many = np.outer(shape_path, shape_path), (steps.T * rates.weights) @ steps
    return CmaState(
        state.mean + state.sigma * step,
        state.sigma * math.exp(min(1.0, rates.step_path / rates.damping * (length / expected - 1))),
        decay * state.covariance + rates.rank_one * one + rates.rank_many * many,
        step_path,
        shape_path,
        state.generation + 1,
    )


@dataclass(frozen=True)
class _Rates:
    """Strategy parameters of the tutorial, table 1."""

    weights: Array
    effective: float
    step_path: float
    damping: float
    shape_path: float
    rank_one: float
    rank_many: float

    @classmethod
    def of(cls, size: int, count: int, *, diagonal: bool) -> _Rates:
        weights = math.log((count + 1) / 2) - np.log(np.arange(1, count // 2 + 1))
        weights /= weights.sum()
        effective = 1 / float(np.square(weights).sum())
        step_path = (effective + 2) / (size + effective + 5)
        damping = 1 + 2 * max(0.0, math.sqrt((effective - 1) / (size + 1)) - 1) + step_path
        shape_path = (4 + effective / size) / (size + 4 + 2 * effective / size)
        faster = (size + 2) / 3 if diagonal else 1.0
        rank_one = min(1.0, faster * 2 / ((size + 1.3) ** 2 + effective))
        rank_many = faster * 2 * (effective - 2 + 1 / effective) / ((size + 2) ** 2 + effective)
        return cls(weights, effective, step_path, damping, shape_path, rank_one, min(1 - rank_one, rank_many))


def _bounded(steps: Array, whiten: Any) -> Array:
    """Steps no longer than drawn ones hardly ever are, so that one from elsewhere does not blow up the state."""
    size = steps.shape[1]
    longest = math.sqrt(size) + 2 * size / (size + 2)
    lengths = np.linalg.norm(whiten(steps), axis=1, keepdims=True)
    made: Array = steps * np.minimum(1.0, longest / np.maximum(lengths, 1e-300))
    return made


def _whitening(covariance: Array) -> Any:
    """The function x -> C^(-1/2) x, for one step [d] or several [n, d]."""
    if covariance.ndim == 1:
        return lambda steps: steps / np.sqrt(covariance)
    values, vectors = _eigen(covariance)
    root = (vectors / np.sqrt(values)) @ vectors.T
    return lambda steps: steps @ root


def _eigen(covariance: Array) -> tuple[Array, Array]:
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return np.maximum(values, 1e-20 * max(float(values[-1]), 1e-280)), vectors
