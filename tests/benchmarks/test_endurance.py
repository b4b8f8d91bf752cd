"""Long streams: what collapses without guards ends no worse than source with them, and no state grows."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from benchmarks.endurance import Endurance, endurance, print_endurance, size_of
from edge_adapt.cli import run
from edge_adapt.delta import Delta
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.plugins import METHODS, names
from edge_adapt.streams.data import Dataset

RECKLESS = {"lr": 0.05, "pull": 0.0, "keep": 1.0}
"""For TENT: steps a hundred times the usual, and nothing that brings it back."""


@pytest.fixture(scope="module")
def domains(tiny_data: Dataset) -> Dataset:
    """Two domains of 128 frames."""
    dark = (tiny_data.images * 0.8).astype(np.uint8)
    hazy = np.minimum(255, tiny_data.images * 0.7 + 60).astype(np.uint8)
    return Dataset("domains", None, tiny_data.labels, {"dark": dark, "hazy": hazy})


def reckless(bundle, data, frames: int, *, guards: bool) -> dict:
    plan = Endurance(
        methods=("tent",), frames=frames, batch_size=32, settings={"tent": {**RECKLESS, "guards": guards}}
    )
    return endurance(bundle, data, plan)["rows"][0]


def test_a_reckless_method_is_caught(device_bundle, domains):
    free, guarded = (reckless(device_bundle, domains, 1536, guards=guards) for guards in (False, True))
    assert not free["held"]["no_worse"]
    assert all(guarded["held"].values())
    assert any(event.startswith("guard:") for event in guarded["events"])
    assert not any(event.startswith("guard:") for event in free["events"])


@pytest.mark.slow
def test_a_reckless_method_is_caught_over_and_over(device_bundle, domains):
    free, guarded = (reckless(device_bundle, domains, 20_000, guards=guards) for guards in (False, True))
    assert not free["held"]["no_worse"]
    assert all(guarded["held"].values())
    assert guarded["error_mean"] < free["error_mean"] - 5


@pytest.mark.slow
@pytest.mark.parametrize("method", names(METHODS))
def test_no_method_ends_worse_than_source(device_bundle, domains, method):
    try:
        row = endurance(device_bundle, domains, Endurance(methods=(method,), frames=20_000, batch_size=32))["rows"][0]
    except ConfigError as error:
        pytest.skip(error.what)
    assert row["held"] == {"no_worse": True, "state_constant": True, "finite": True}, row


def test_the_form_of_the_results(device_bundle, domains, capsys):
    plan = Endurance(methods=("source", "moments"), frames=300, batch_size=50, limit=100)
    results = endurance(device_bundle, domains, plan)
    assert results["settings"]["frames"] == 400
    assert results["settings"]["rounds"] == 2
    source, moments = results["rows"]
    assert source["errors"] == [results["source_error"]] * 2
    assert source["state_bytes"] == [0, 0]
    assert moments["state_bytes"][0] > 0
    json.dumps(results)
    print_endurance(results)
    assert "moments" in capsys.readouterr().out


def test_the_command(device_bundle, domains, tmp_path, capsys):
    np.savez(tmp_path / "domains.npz", labels=domains.labels, **domains.shifts)
    file = tmp_path / "figures.json"
    place = ["--data", str(tmp_path / "domains.npz"), "--method", "moments", "--frames", "200", "--json", str(file)]
    assert run(["bench", "endurance", str(device_bundle.path), *place]) == 0
    assert json.loads(file.read_text())["rows"][0]["method"] == "moments"
    capsys.readouterr()


def test_what_cannot_be_scored_is_refused(device_bundle, domains):
    with pytest.raises(DataError, match="no labels"):
        endurance(device_bundle, dataclasses.replace(domains, labels=None), Endurance(frames=10))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        Endurance(batch_size=0)


def test_a_size_counts_every_array_once():
    shared = np.zeros(100, np.float32)

    @dataclasses.dataclass(frozen=True)
    class State:
        one: np.ndarray
        other: np.ndarray
        delta: Delta

    state = State(shared, shared, Delta({"tail/a": np.zeros(10, np.float32)}))
    assert size_of(state) == 400 + 40
    assert size_of((state, [shared], 3)) == 440
