"""ADCSD: the equations against plain float64, what lambda = 0 means, and a gain where a series drifts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edge_adapt.errors import ConfigError, DataError
from edge_adapt.methods.adcsd import ADCSD, ADCSDConfig

SHAPE = (6, 3, 1)


def forecasts(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(50, 10, (count, *SHAPE)).astype(np.float32)


def test_lambda_zero_is_the_base_model():
    """Conformance 18."""
    method = ADCSD(SHAPE, mean=50.0, std=10.0)
    state = method.init()
    for forecast in forecasts(5):
        step = method.step(state, forecast)
        assert np.array_equal(step.forecast, forecast)
        state = step.state


def plain(values: dict[str, np.ndarray], forecast: np.ndarray, mean: float, std: float) -> np.ndarray:
    """The equations, one value after the other, in float64."""
    scaled = (forecast.astype(np.float64) - mean) / std
    steps = len(scaled)
    places = [[min(max(t + d, 0), steps - 1) for d in (-2, -1, 0, 1, 2)] for t in range(steps)]
    trend = np.stack([sum(scaled[place] for place in row) / 5 for row in places])
    made = scaled.copy()
    erf = np.vectorize(math.erf)
    for part, given in (("season", scaled - trend), ("trend", trend)):
        hidden = given @ values[f"{part}.in.weight"].T + values[f"{part}.in.bias"]
        hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5)
        hidden = hidden * values[f"{part}.norm.weight"] + values[f"{part}.norm.bias"]
        hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
        made = made + values[f"{part}.lambda"] * (hidden @ values[f"{part}.out.weight"].T + values[f"{part}.out.bias"])
    return made * std + mean


def test_golden_against_plain_float64():
    """float32 against float64 over two linear layers: 1e-5 of values near 50."""
    method = ADCSD(SHAPE, mean=50.0, std=10.0, config=ADCSDConfig(width=8))
    state = method.init()
    rng = np.random.default_rng(1)
    for value in state.values.values():
        value.copy_(torch.from_numpy(rng.normal(0, 0.5, value.shape)))
    values = {name: value.double().numpy() for name, value in state.values.items()}
    for forecast in forecasts(3):
        expected = plain(values, forecast, 50.0, 10.0)
        assert np.abs(expected - forecast).max() > 1
        np.testing.assert_allclose(method.correct(state, forecast), expected, rtol=1e-5)


def test_the_answer_is_from_before_the_step():
    """An absurd rate changes the next answer, not this one."""
    calm, wild = (ADCSD(SHAPE, config=ADCSDConfig(lr=lr)) for lr in (0.0, 10.0))
    first, second = forecasts(2)
    state = calm.step(calm.init(), first).state
    answers = [method.step(state, second, first + 5) for method in (calm, wild)]
    assert np.array_equal(answers[0].forecast, answers[1].forecast)
    assert answers[1].state.updates == 1
    assert not np.array_equal(wild.correct(answers[1].state, second), second)


def test_the_first_gradients_reach_lambda_only():
    method = ADCSD(SHAPE)
    old = method.step(method.init(), forecasts(1)[0]).state
    new = method.step(old, forecasts(2)[1], forecasts(1)[0] + 3).state
    moved = {name for name in old.values if not torch.equal(old.values[name], new.values[name])}
    assert moved == {"season.lambda", "trend.lambda"}


def test_missing_readings_do_not_count():
    """NaN in the truth neither teaches nor spreads; a truth without any reading is no step."""
    method = ADCSD(SHAPE, config=ADCSDConfig(lr=0.1))
    forecast, second = forecasts(2)
    state = method.step(method.init(), forecast).state
    truth = forecast + 3
    truth[:, 1] = np.nan
    changed = truth.copy()
    learned = method.step(state, second, changed).state
    assert all(bool(torch.isfinite(value).all()) for value in learned.values.values())
    assert float(learned.values["trend.lambda"][1].abs()) == 0
    assert float(learned.values["trend.lambda"][0].abs()) > 0
    nothing = method.step(state, second, np.full(SHAPE, np.nan))
    assert nothing.state.updates == 0
    assert len(nothing.state.waiting) == 1


def drifting(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """A daily wave whose level climbs, and the forecasts of a model that knows the wave and not the climb."""
    time = np.arange(steps + SHAPE[0])
    rng = np.random.default_rng(0)
    wave = np.sin(time / 24 * 2 * np.pi)[:, None] * np.array([3.0, 2.0, 4.0])
    noise = rng.normal(0, 0.2, (len(time), 3))
    climb = np.minimum(time / 300, 3.0)[:, None]
    windows = np.stack([time[start : start + SHAPE[0]] for start in range(steps)])
    return (wave + climb + noise)[windows][..., None].astype(np.float32), wave[windows][..., None].astype(np.float32)


def test_it_gains_on_a_drifting_series():
    truth, forecast = drifting(1200)
    method = ADCSD(SHAPE, std=3.0, config=ADCSDConfig(lr=1e-3, width=32))
    state, errors = method.init(), []
    horizon = SHAPE[0]
    for now in range(len(forecast)):
        step = method.step(state, forecast[now], truth[now - horizon] if now >= horizon else None)
        errors.append(np.abs(step.forecast - truth[now]).mean())
        state = step.state
        assert len(state.waiting) <= horizon
    frozen = np.abs(forecast - truth).mean(axis=(1, 2, 3))
    assert np.mean(errors[-300:]) < 0.5 * frozen[-300:].mean()
    assert np.mean(errors[:50]) < 1.1 * frozen[:50].mean()


def test_the_same_seed_gives_the_same_and_the_old_state_stays():
    method = ADCSD(SHAPE, config=ADCSDConfig(lr=0.01))
    state = method.step(method.init(), forecasts(1)[0]).state
    kept = {name: value.clone() for name, value in state.values.items()}
    one, two = (method.step(state, forecasts(2)[1], forecasts(1)[0] - 1).state for _ in range(2))
    for name, value in one.values.items():
        assert torch.equal(value, two.values[name])
        assert torch.equal(state.values[name], kept[name])


def test_a_step_that_is_not_finite_is_refused():
    method = ADCSD(SHAPE, config=ADCSDConfig(lr=float("inf")))
    state = method.step(method.init(), forecasts(1)[0]).state
    step = method.step(state, forecasts(2)[1], forecasts(1)[0] + 1)
    assert step.events == ("refused: the step is not finite",)
    assert step.state.values is state.values


def test_wrong_input_is_named():
    method = ADCSD(SHAPE)
    with pytest.raises(DataError, match=r"\(2, 3, 1\)"):
        method.step(method.init(), np.zeros((2, 3, 1), np.float32))
    with pytest.raises(DataError, match="NaN"):
        method.step(method.init(), np.full(SHAPE, np.nan, np.float32))
    with pytest.raises(DataError, match="waits"):
        method.step(method.init(), np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.float32))
    with pytest.raises(ConfigError, match="odd"):
        ADCSDConfig(window=4)
    with pytest.raises(ConfigError, match="std"):
        ADCSD(SHAPE, std=0.0)
