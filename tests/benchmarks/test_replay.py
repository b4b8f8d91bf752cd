"""Replay: the form of its results, what a scenario means, and that no label ever reaches a method."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import benchmarks.replay as module
from benchmarks.latency import CASES, latency
from benchmarks.replay import Replay, replay
from edge_adapt.cli import run
from edge_adapt.delta import Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError
from edge_adapt.methods.protocol import TAPS, Step
from edge_adapt.preprocess import Preprocess
from edge_adapt.streams.data import Dataset

KEYS = {"schema", "scenario", "data", "bundle", "settings", "environment", "shifts", "rows"}
ROW_KEYS = {
    *("method", "error_mean", "errors", "answer_ms", "learn_ms", "extra_mb", "frames", "looked", "passes"),
    *("backward_passes", "state_bytes", "energy_j", "overhead", "plain_ms", "time"),
    *("seconds", "timeline", "visits", "events", "entries"),
}
TWO = ("gaussian_noise", "brightness")


class Spy:
    """A method that learns nothing and writes down everything it is shown."""

    name = "spy"
    watches: frozenset[str] = frozenset()
    needs = frozenset({TAPS})
    answers = False

    def __init__(self, context) -> None:
        self.context, self.inits, self.seen, self.states = context, 0, [], []

    def init(self) -> int:
        self.inits += 1
        return 0

    def look(self, state: int, frames: int, passed: int) -> int:
        return frames

    def step(self, state: int, seen) -> Step[int]:
        self.seen.append(seen)
        self.states.append(state)
        return Step(state + 1)

    def delta(self, state: int) -> Delta:
        return SOURCE


SOURCE = Delta.source()


@pytest.fixture
def spies(monkeypatch) -> list[Spy]:
    """Replays of the method `spy` leave it here."""
    made: list[Spy] = []

    def build(context) -> Spy:
        made.append(Spy(context))
        return made[-1]

    known = module.build

    def known_or_spy(name: str, context):
        return build(context) if name == "spy" else known(name, context)

    monkeypatch.setattr(module, "build", known_or_spy)
    return made


@pytest.fixture
def data(tiny_data) -> Dataset:
    return tiny_data[:64]


def errors(results) -> dict[str, dict[str, float]]:
    return {row["method"]: row["errors"] for row in results["rows"]}


def test_results_have_the_documented_form(device_bundle, data):
    results = json.loads(json.dumps(replay(device_bundle, data, Replay(corruptions=TWO, batch_size=16))))
    assert results.keys() == KEYS
    assert (results["schema"], results["scenario"], results["data"]) == (1, "continual", "tiny")
    assert results["bundle"] == {"name": "tiny", "id": device_bundle.id}
    expected = {"batch_size": 16, "severity": 5, "seed": 0, "limit": None, "mode": "device"}
    assert expected.items() <= results["settings"].items()
    assert results["shifts"] == [
        {"name": "gaussian_noise", "start": 0, "frames": 64},
        {"name": "brightness", "start": 64, "frames": 64},
    ]
    assert [row["method"] for row in results["rows"]] == ["source", "moments"]
    for row in results["rows"]:
        assert row.keys() == ROW_KEYS
        assert list(row["errors"]) == list(TWO)
        assert row["error_mean"] == pytest.approx(np.mean(list(row["errors"].values())), abs=1e-3)
        assert row["answer_ms"].keys() == row["learn_ms"].keys() == {"p50", "p99", "mean"}
        assert row["frames"] == 128
        assert row["timeline"]["frames"][-1] == 128
        assert len(row["timeline"]["frames"]) == len(row["timeline"]["error"])
    source, moments = results["rows"]
    assert source["looked"] == 0
    assert source["passes"] == 128 <= moments["passes"]  # trials, and frames answered again, are passes too
    assert 0 < moments["looked"] <= 128
    assert {"engine", "threads", "processor", "onnxruntime", "torch", "date"} <= results["environment"].keys()


def test_the_error_of_source_is_what_a_plain_loop_counts(device_bundle, data):
    row = replay(device_bundle, data, Replay(scenario="natural", methods=("source",)))["rows"][0]
    frames = Preprocess(device_bundle.manifest.input)(data.images)
    wrong = OnnxRuntimeEngine(device_bundle).run(frames).argmax(1) != data.labels
    assert row["errors"] == {"tiny": round(float(wrong.mean()) * 100, 3)}
    assert row["error_mean"] == pytest.approx(100 * 13 / 64, abs=2)  # every fifth label is wrong


@pytest.mark.parametrize("methods", [("source",), ("moments",)])
def test_the_same_seed_gives_the_same_errors(device_bundle, data, methods):
    def once(seed: int):
        return replay(device_bundle, data, Replay(methods=methods, corruptions=TWO, batch_size=8, seed=seed))

    first, again, other = once(0), once(0), once(1)
    for key in ("errors", "error_mean", "looked", "events", "timeline"):
        assert first["rows"][0][key] == again["rows"][0][key]
    assert first["shifts"] == other["shifts"]


def test_frames_one_by_one_and_in_batches_are_the_same_to_source(device_bundle, data):
    def at(size: int):
        return errors(replay(device_bundle, data, Replay(methods=("source",), corruptions=TWO, batch_size=size)))

    assert at(1) == at(7) == at(64)


def test_continual_never_starts_anew_and_reset_does_at_each_shift(device_bundle, data, spies):
    for scenario, inits in (("continual", 1), ("reset_each_shift", 2)):
        replay(device_bundle, data, Replay(scenario=scenario, methods=("spy",), corruptions=TWO, batch_size=16))
        assert spies[-1].inits == inits
    assert spies[0].states == [0, 1, 2, 3, 4, 5, 6, 7]
    assert spies[1].states == [0, 1, 2, 3, 0, 1, 2, 3]
    for one, other in zip(spies[0].seen, spies[1].seen, strict=True):
        assert np.array_equal(one.frames, other.frames)


def test_the_first_shift_is_the_same_with_and_without_reset(device_bundle, data):
    def first(scenario: str):
        plan = Replay(scenario=scenario, methods=("moments",), corruptions=TWO, batch_size=8)
        return errors(replay(device_bundle, data, plan))["moments"][TWO[0]]

    assert first("continual") == first("reset_each_shift")


def test_natural_adds_nothing(device_bundle, data, spies):
    results = replay(device_bundle, data, Replay(scenario="natural", methods=("spy",), batch_size=20))
    assert results["settings"]["severity"] is None
    assert results["shifts"] == [{"name": "tiny", "start": 0, "frames": 64}]
    assert [len(seen.frames) for seen in spies[0].seen] == [20, 20, 20, 4]
    shown = np.concatenate([seen.frames for seen in spies[0].seen])
    assert np.array_equal(shown, Preprocess(device_bundle.manifest.input)(data.images))


def test_ready_made_shifts_are_played_as_they_are_stored(device_bundle, data, spies):
    shifts = {"gaussian_noise": data.images, "dusk": data.images // 2, "fog": data.images // 3}
    ready = Dataset("ready", None, data.labels, shifts)
    results = replay(device_bundle, ready, Replay(methods=("spy",), corruptions=TWO, batch_size=16, limit=32))
    assert [shift["name"] for shift in results["shifts"]] == ["gaussian_noise", "dusk"]  # fog was not asked for
    assert [shift["frames"] for shift in results["shifts"]] == [32, 32]
    assert results["settings"]["severity"] is None
    shown = np.concatenate([seen.frames for seen in spies[0].seen])
    expected = np.concatenate([data.images[:32], data.images[:32] // 2])
    assert np.array_equal(shown, Preprocess(device_bundle.manifest.input)(expected))


def test_no_label_reaches_a_method(device_bundle, data, spies):
    """The method sees the same, bit for bit, whatever the labels are, and nothing it is given can hold them."""
    other = dataclasses.replace(data, labels=(data.labels + 1) % 5)
    none = dataclasses.replace(data, labels=None)
    for each in (data, other, none):
        replay(device_bundle, each, Replay(scenario="natural", methods=("spy",), batch_size=16))
    for spy in spies:
        assert {item.name for item in dataclasses.fields(spy.context)} == {"bundle", "tail", "seed", "settings"}
        for seen, first in zip(spy.seen, spies[0].seen, strict=True):
            names = {item.name for item in dataclasses.fields(seen)}
            arrays, calls = {"frames", "logits", "cut", "taps", "features", "cls"}, {"trunk", "rehearse"}
            assert names == arrays | calls | {"delta", "version"}
            assert np.array_equal(seen.frames, first.frames)
            assert np.array_equal(seen.logits, first.logits)
            assert all(np.array_equal(a, b) for a, b in zip(seen.taps, first.taps, strict=True))


def test_without_labels_there_are_times_and_no_errors(device_bundle, data):
    row = replay(device_bundle, dataclasses.replace(data, labels=None), Replay(corruptions=TWO))["rows"][0]
    assert row["errors"] == {}
    assert row["error_mean"] is None
    assert row["timeline"] == {"frames": [], "error": []}
    assert row["frames"] == 128


def test_a_method_starts_from_source_whatever_ran_before(device_bundle, data):
    plan = Replay(scenario="natural", methods=("moments", "source"), batch_size=8)
    alone = Replay(scenario="natural", methods=("source",), batch_size=8)
    assert errors(replay(device_bundle, data, plan))["source"] == errors(replay(device_bundle, data, alone))["source"]


def test_a_reference_bundle_is_replayed_as_published(reference_bundle, data):
    results = replay(reference_bundle, data, Replay(methods=("source", "tent"), corruptions=TWO, batch_size=32))
    assert results["settings"]["mode"] == "reference"
    assert [row["looked"] for row in results["rows"]] == [0, 128]


def test_the_torch_engine_gives_the_same_errors(device_bundle, data):
    plans = [Replay(methods=("source",), corruptions=TWO, engine=engine) for engine in ("onnxruntime", "torch")]
    first, second = (errors(replay(device_bundle, data, plan)) for plan in plans)
    assert first == second


def test_the_command_writes_what_the_function_returns(device_bundle, data, tmp_path, capsys):
    np.savez(tmp_path / "tiny.npz", images=data.images, labels=data.labels)
    file = tmp_path / "deep" / "results.json"
    arguments = ["--data", str(tmp_path / "tiny.npz"), "--corruption", ",".join(TWO), "--json", str(file)]
    assert run(["replay", str(device_bundle.path), *arguments, "--batch-size", "16"]) == 0
    written = json.loads(file.read_text())
    assert errors(written) == errors(replay(device_bundle, data, Replay(corruptions=TWO, batch_size=16)))
    assert "moments" in capsys.readouterr().out


def test_latency_times_every_case(device_bundle):
    figures = latency(device_bundle, rounds=3, batch_size=2)
    assert figures.keys() == {"schema", "bundle", "settings", "median_ms", "ratios", "environment"}
    assert tuple(figures["median_ms"]) == tuple(figures["ratios"]) == CASES
    assert all(value > 0 for value in figures["median_ms"].values())
    assert figures["ratios"]["bare"] == 1
    assert {"batch_size": 2, "rounds": 3, "threads": 1}.items() <= figures["settings"].items()
    json.dumps(figures)


def test_foreign_frames_are_answered_and_not_scored(device_bundle, data, spies):
    foreign = Dataset("letters", np.full((3, 20, 20), 255, np.uint8), None)
    plan = Replay(scenario="contaminated_30", methods=("spy",), corruptions=TWO, batch_size=16)
    results = replay(device_bundle, data, plan, foreign=foreign)
    assert results["settings"]["foreign"] == "letters"
    assert [(shift["frames"], shift["genuine"]) for shift in results["shifts"]] == [(91, 64), (91, 64)]
    shown = np.concatenate([seen.frames for seen in spies[0].seen])
    white = Preprocess(device_bundle.manifest.input)(np.full_like(data.images[:1], 255))
    assert (shown == white).all(axis=(1, 2, 3)).sum() == 54
    genuine = shown[~(shown == white).all(axis=(1, 2, 3))]
    replay(device_bundle, data, Replay(methods=("spy",), corruptions=TWO, batch_size=16))
    assert np.array_equal(genuine, np.concatenate([seen.frames for seen in spies[1].seen]))


def test_contaminated_source_has_the_error_of_the_plain_stream(device_bundle, data):
    def of(scenario: str):
        results = replay(device_bundle, data, Replay(scenario=scenario, methods=("source",), corruptions=TWO))
        assert results["settings"].get("foreign") == ("noise" if scenario != "continual" else None)
        return errors(results)["source"]

    assert of("contaminated_10") == of("contaminated_30") == of("continual")


def test_a_scenario_that_mixes_nothing_in_refuses_foreign_frames(device_bundle, data):
    with pytest.raises(ConfigError, match="mixes no foreign frames in"):
        replay(device_bundle, data, Replay(corruptions=TWO), foreign=data)


def test_recurring_counts_visits_and_a_domain_has_one_error(device_bundle, data):
    row = replay(device_bundle, data, Replay(scenario="recurring", methods=("source",), corruptions=TWO))["rows"][0]
    assert list(row["errors"]) == list(TWO)
    assert [visit["name"] for visit in row["visits"]] == [*TWO] * 6
    first = {name: [visit["error"] for visit in row["visits"] if visit["name"] == name] for name in TWO}
    for name in TWO:  # 64 frames a visit, the same ones each time: source errs alike
        assert len({tuple(error) for error in first[name]}) == 1
        assert first[name][0] == [pytest.approx(row["errors"][name], abs=1e-3)]


def test_mixed_domains_are_told_frame_by_frame(device_bundle, data):
    results = replay(device_bundle, data, Replay(scenario="mixed_domains", methods=("source",), corruptions=TWO))
    [shift] = results["shifts"]
    assert shift["domains"] == list(TWO)
    assert sorted(shift["domain"]) == [0] * 64 + [1] * 64
    plain = replay(device_bundle, data, Replay(methods=("source",), corruptions=TWO))
    assert errors(results) == errors(plain)
    json.dumps(results)


def test_the_router_is_asked_for_around_every_method_but_the_baseline(device_bundle, data, spies, monkeypatch):
    asked = {}
    known = module.build

    def note(name: str, context):
        asked[name] = context.settings
        return known(name, dataclasses.replace(context, settings={}))

    monkeypatch.setattr(module, "build", note)
    plan = Replay(methods=("source", "spy"), corruptions=TWO, router="hdc", settings={"spy": {"guards": False}})
    results = replay(device_bundle, data, plan)
    assert asked == {"source": {}, "spy": {"router": "hdc", "guards": False}}
    assert results["settings"]["router"] == "hdc"
    with pytest.raises(ConfigError, match="there is no router 'hcd'"):
        Replay(router="hcd")


def test_scenarios_name_their_corruptions_unless_some_are_given(device_bundle, data):
    plan = Replay(scenario="burst", methods=("source",), limit=32)
    names = [shift["name"] for shift in replay(device_bundle, data, plan)["shifts"]]
    assert names[::3] == ["gaussian_noise", "fog", "contrast"]
    assert names[1::3] == ["gaussian_noise burst", "fog burst", "contrast burst"]


def test_the_command_takes_foreign_frames(device_bundle, data, tmp_path):
    np.savez(tmp_path / "tiny.npz", images=data.images, labels=data.labels)
    np.savez(tmp_path / "digits.npz", usps_images=np.zeros((5, 16, 16), np.uint8))
    arguments = ["--data", str(tmp_path / "tiny.npz"), "--foreign", str(tmp_path / "digits.npz"), "--method", "source"]
    arguments += ["--scenario", "contaminated_10", "--corruption", "fog", "--out", str(tmp_path)]
    assert run(["replay", str(device_bundle.path), *arguments]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["foreign"] == "digits"
    assert "errors of genuine frames only" in (tmp_path / "report.html").read_text()
