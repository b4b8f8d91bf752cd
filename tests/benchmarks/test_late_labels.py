"""Replay without labels, and with labels that come late: who is shown them, when, and what is reported."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import benchmarks.replay as module
from benchmarks.estimate import lines
from benchmarks.replay import Replay, replay
from edge_adapt.bundle import Bundle
from edge_adapt.cli import run
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.methods.protocol import Step
from edge_adapt.methods.source import Source
from edge_adapt.streams.data import Dataset
from exporters.export import export, from_module


@pytest.fixture(scope="module")
def fitted(tiny_net, tiny_data, device_bundle, tmp_path_factory) -> Bundle:
    """The tiny network with what its accuracy is estimated by."""
    images = np.concatenate([tiny_data.images, tiny_data.images[:, ::-1]])
    model = from_module(tiny_net, "tiny", device_bundle.manifest.input)
    folder = tmp_path_factory.mktemp("fitted") / "b"
    return Bundle.load(export(model, folder, calibration=images, cut="block", estimate=True))


@pytest.fixture(scope="module")
def unlabelled(tiny_data) -> Dataset:
    return dataclasses.replace(tiny_data, labels=None)


class Pupil(Source):
    """Learns nothing; remembers what it is shown, and how many batches it had looked at by then."""

    name = "pupil"

    def __init__(self, context) -> None:
        super().__init__(context)
        self.shown: list[tuple[int, np.ndarray, np.ndarray]] = []

    def init(self) -> int:
        return 0

    def look(self, state, frames, passed) -> int:
        return frames

    def step(self, state, seen) -> Step:
        return Step(state + 1)

    def learn_from(self, state, labelled) -> Step:
        self.shown.append((state, labelled.cut, labelled.labels))
        return Step(state, events=("taught",))

    def predict(self, state, cut):
        raise AssertionError("nobody asks")


@pytest.fixture
def pupils(monkeypatch) -> list[Pupil]:
    """Those that were made, in order; others are built as ever."""
    made: list[Pupil] = []
    known = module.build

    def build(name, context):
        if name != "pupil":
            return known(name, context)
        made.append(Pupil(context))
        return made[-1]

    monkeypatch.setattr(module, "build", build)
    return made


@pytest.mark.parametrize(("delay", "after"), [(0, 1), (16, 2), (20, 3)])
def test_labels_come_so_many_frames_after_the_answer(device_bundle, tiny_data, pupils, delay, after):
    plan = Replay(scenario="natural", methods=("pupil",), batch_size=16, label_delay=delay)
    results = replay(device_bundle, tiny_data, plan)
    [row] = results["rows"]
    assert results["settings"]["label_delay"] == delay
    [pupil] = pupils
    assert [looked for looked, _, _ in pupil.shown] == list(range(after, 8))
    labels = np.concatenate([labels for _, _, labels in pupil.shown])
    assert np.array_equal(labels, tiny_data.labels[: len(labels)])
    assert row["labelled"] == len(labels) == 16 * (8 - after)
    assert all(cut.shape[1:] == device_bundle.manifest.cut.shape for _, cut, _ in pupil.shown)
    assert [event["name"] for event in row["events"]] == ["taught"] * (8 - after)


def test_no_label_comes_without_a_delay_or_without_labels(device_bundle, tiny_data, unlabelled, pupils):
    replay(device_bundle, tiny_data, Replay(scenario="natural", methods=("pupil",), batch_size=16))
    [row] = replay(
        device_bundle, unlabelled, Replay(scenario="natural", methods=("pupil",), batch_size=16, label_delay=0)
    )["rows"]
    assert [pupil.shown for pupil in pupils] == [[], []]
    assert row["labelled"] == 0


def test_foreign_frames_have_no_label_that_could_come(device_bundle, tiny_data, pupils):
    plan = Replay(
        scenario="contaminated", corruptions=("fog",), methods=("pupil",), batch_size=16, limit=64, label_delay=0
    )
    replay(device_bundle, tiny_data, plan)
    labels = np.concatenate([labels for _, _, labels in pupils[0].shown])
    assert np.array_equal(labels, tiny_data.labels[: len(labels)])


def test_labels_on_their_way_are_lost_where_the_method_starts_anew(device_bundle, tiny_data, pupils):
    plan = Replay(
        scenario="reset_each_shift", corruptions=("fog", "contrast"), methods=("pupil",), batch_size=32, label_delay=64
    )
    [row] = replay(device_bundle, tiny_data, plan)["rows"]
    assert [looked for looked, _, _ in pupils[0].shown] == [3, 3]
    assert row["labelled"] == 64


def test_a_method_that_learns_from_labels_does(device_bundle, tiny_data):
    """Of labels that contradict the network, it errs less when they come early than when they never come."""
    data = dataclasses.replace(tiny_data, labels=(tiny_data.labels + 1) % 5)
    many = data[np.arange(512) % 128]
    settings = {"lae": {"reliable": 1.0}}

    def error(delay: int | None) -> float:
        plan = Replay(scenario="natural", methods=("lae",), batch_size=16, label_delay=delay, settings=settings)
        return replay(device_bundle, many, plan)["rows"][0]["error_mean"]

    assert error(0) < error(None) - 5


def test_the_error_is_estimated_where_nobody_labelled(fitted, unlabelled, tiny_data):
    many = unlabelled[np.arange(384) % 128]
    plan = Replay(scenario="natural", methods=("source", "moments"), batch_size=32)
    rows = replay(fitted, many, plan)["rows"]
    truth = replay(fitted, tiny_data, dataclasses.replace(plan, methods=("source",)))["rows"][0]
    assert "error_estimate" not in truth
    for row in rows:
        assert row["error_mean"] is None
        estimate = row["error_estimate"]
        assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 100
        assert row["passes"] <= 2 * row["frames"]  # what the estimate asks of the network is not the method's
    assert rows[0]["passes"] == 384
    assert [line.split(":")[0] for line in lines(rows)] == ["source", "moments"]


def test_late_labels_sharpen_the_estimate(fitted, tiny_data):
    data = tiny_data[np.arange(384) % 128]

    def width(delay: int | None) -> float:
        plan = Replay(scenario="natural", methods=("source",), batch_size=32, estimate=True, label_delay=delay)
        [row] = replay(fitted, data, plan)["rows"]
        assert row["error_mean"] is not None
        return row["error_estimate"]["high"] - row["error_estimate"]["low"]

    assert width(32) < 0.7 * width(None)


@pytest.mark.parametrize(
    ("frames", "bundle", "why"), [(128, "device_bundle", "--estimate"), (40, "fitted", "64 frames")]
)
def test_where_nothing_can_be_estimated_the_reason_is_told(request, unlabelled, frames, bundle, why):
    plan = Replay(scenario="natural", methods=("source",), batch_size=16)
    [row] = replay(request.getfixturevalue(bundle), unlabelled[:frames], plan)["rows"]
    assert row["error_estimate"] is None
    assert why in row["error_estimate_why"]
    assert why in lines([row, row])[0]
    assert len(lines([row, row])) == 1


def test_a_newcomers_folders_are_replayed_by_the_command(fitted, tiny_data, tmp_path, capsys):
    from PIL import Image

    for number, (image, label) in enumerate(zip(tiny_data.images, tiny_data.labels, strict=True)):
        for file in (tmp_path / "sorted" / str(label) / f"{number}.png", tmp_path / "flat" / f"frame_{number}.png"):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    for folder, scenario in (("sorted", "natural"), ("flat", "real")):
        place = tmp_path / f"{folder}.json"
        arguments = ["--data", str(tmp_path / folder), "--scenario", scenario, "--json", str(place)]
        assert run(["replay", str(fitted.path), *arguments, "--method", "source"]) == 0
    [row] = json.loads((tmp_path / "sorted.json").read_text())["rows"]
    assert row["error_mean"] == pytest.approx(20, abs=1)  # every fifth label is wrong
    [row] = json.loads((tmp_path / "flat.json").read_text())["rows"]
    assert row["error_mean"] is None and row["error_estimate"] is not None
    assert "estimated without labels" in capsys.readouterr().out
    assert run(["replay", str(fitted.path), "--data", str(tmp_path / "flat"), "--scenario", "burst"]) == 2
    assert "has no labels" in capsys.readouterr().err


def test_a_label_that_the_model_does_not_know_and_a_delay_below_zero_are_refused(device_bundle, tiny_data):
    with pytest.raises(DataError, match="labels go from 0 to 9, the model has 5 outputs"):
        replay(device_bundle, Dataset("ten", tiny_data.images, np.arange(128) % 10), Replay(scenario="natural"))
    with pytest.raises(ConfigError, match="label delay is -1"):
        Replay(label_delay=-1)
