"""The forecasting bench: what it trains on, what it scores, and that the truth comes late."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.forecast import Forecast, Series, _filled, forecast, load_series
from edge_adapt.cli import run
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.methods.adcsd import ADCSDConfig

PLAN = Forecast(epochs=4, width=16, adcsd=ADCSDConfig(lr=2e-3, width=16))


def waves(steps: int = 900, jump: float = 0.0) -> Series:
    """Three noisy waves; from step 450 on, their level is another."""
    time = np.arange(steps)[:, None]
    noise = np.random.default_rng(0).normal(0, 0.1, (steps, 3))
    values = np.sin(time / 12 * np.pi + np.arange(3)) + noise + jump * (time >= 450)
    return Series("waves", values.astype(np.float32), past=12, ahead=6, train=400)


@pytest.fixture(scope="module")
def results() -> dict:
    return forecast(waves(jump=3.0), PLAN)


def rows(results) -> dict:
    return {row["method"]: row for row in results["rows"]}


def test_results_have_the_documented_form(results):
    found = json.loads(json.dumps(results))
    assert found.keys() == {"schema", "data", "settings", "environment", "forecasts", "updates", "rows"}
    assert found["forecasts"] == 900 - 400 - 12 - 6 + 1
    assert found["updates"] == found["forecasts"] - 6  # the first truth comes when six forecasts wait
    assert [row["method"] for row in found["rows"]] == ["frozen", "adcsd"]
    for row in found["rows"]:
        assert row.keys() == {"method", "mae", "rmse", "ms", "timeline"}
        assert row["mae"] <= row["rmse"]


def test_the_same_seed_gives_the_same_figures(results):
    again = forecast(waves(jump=3.0), PLAN)
    for name, row in rows(again).items():
        assert (row["mae"], row["rmse"]) == (rows(results)[name]["mae"], rows(results)[name]["rmse"])


def test_a_changed_level_is_corrected(results):
    found = rows(results)
    assert found["adcsd"]["mae"] < found["frozen"]["mae"]


def test_a_rate_of_zero_changes_nothing():
    plan = Forecast(epochs=1, width=8, limit=40, adcsd=ADCSDConfig(lr=0.0, width=8))
    found = rows(forecast(waves(), plan))
    assert found["adcsd"]["mae"] == found["frozen"]["mae"]


def test_missing_readings_do_not_count():
    series = waves()
    holes = series.values.copy()
    holes[420:440] = np.nan
    holes[500:, 1] = np.nan
    plan = Forecast(epochs=1, width=8, limit=200)
    found = rows(forecast(Series("holes", holes, 12, 6, 400), plan))
    assert all(np.isfinite([row["mae"], row["rmse"]]).all() for row in found.values())
    assert all(np.isfinite(row["timeline"]).all() for row in found.values())


def test_gaps_take_the_last_reading_and_nothing_from_the_future():
    values = np.array([[np.nan, 1], [2, np.nan], [np.nan, np.nan], [5, 6]], np.float32)
    assert _filled(values, np.array([9.0, 9.0])).tolist() == [[9, 1], [2, 1], [2, 1], [5, 6]]


def test_archives_are_read(tmp_path):
    speed = np.array([[60, 0], [61, 62]], np.float32)
    np.savez(tmp_path / "metr.npz", speed=speed, missing=speed == 0)
    np.savez(tmp_path / "ett.npz", values=np.ones((5, 7), np.float32))
    np.savez(tmp_path / "other.npz", images=speed)
    assert np.isnan(load_series(tmp_path / "metr.npz").values).tolist() == [[False, True], [False, False]]
    assert load_series(tmp_path / "ett.npz").values.shape == (5, 7)
    with pytest.raises(DataError, match="neither"):
        load_series(tmp_path / "other.npz")
    with pytest.raises(DataError, match="too few"):
        forecast(load_series(tmp_path / "ett.npz"), PLAN)
    with pytest.raises(ConfigError, match="epochs"):
        Forecast(epochs=0)


def test_the_command_prints_and_writes(tmp_path, capsys):
    values = np.random.default_rng(0).normal(size=(20 * 7 * 24 + 200, 2)).astype(np.float32)
    np.savez(tmp_path / "ett.npz", values=values)
    arguments = ["--data", str(tmp_path / "ett.npz"), "--limit", "3", "--json", str(tmp_path / "out.json")]
    assert run(["bench", "forecast", *arguments]) == 0
    assert "adcsd" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["series"][0]["forecasts"] == 3
