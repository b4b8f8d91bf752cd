"""The ranks of the score against those of training: the figures on a tiny network, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.choice import Choice, choice, judged, table
from edge_adapt.cli import run
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.streams.data import Dataset

PLAN = Choice(corruptions=("contrast", "fog"), train=32, test=48, steps=2, batch_size=8, rates=(1e-3,), limit=3)


@pytest.fixture(scope="module")
def results(device_bundle, tiny_data) -> dict:
    return choice(device_bundle, tiny_data, PLAN)


def test_every_candidate_is_scored_and_trained_on_every_corruption(results):
    json.dumps(results, allow_nan=False)
    assert [domain["name"] for domain in results["domains"]] == ["contrast", "fog"]
    for domain in results["domains"]:
        assert len(domain["candidates"]) == 3
        assert set(domain["ways"]) == {"gradients", "forward", "spectrum alone", "most parameters", "most bytes"}
        trained = [row["accuracy"] for row in domain["candidates"]]
        for way in domain["ways"].values():
            assert way["best"] == max(trained)
            assert way["accuracy"] in trained
    text = table(results)
    assert text.count("most bytes") == 2


def test_the_same_plan_gives_the_same_figures(device_bundle, tiny_data, results):
    again = choice(device_bundle, tiny_data, PLAN)
    assert again["domains"] == results["domains"]


def test_a_score_that_is_right_or_wrong_is_told_apart():
    trained = {"a": 10.0, "b": 20.0, "c": 30.0}
    right, wrong = ({name: sign * value for name, value in trained.items()} for sign in (1, -1))
    assert (judged(right, trained)["spearman"], judged(wrong, trained)["kendall"]) == pytest.approx((1, -1))
    assert (judged(right, trained)["accuracy"], judged(wrong, trained)["accuracy"]) == (30.0, 10.0)
    assert judged(dict.fromkeys(trained, 0.0), trained)["spearman"] is None


@pytest.mark.parametrize("settings", [{"train": 1}, {"under": "tent"}, {"rates": ()}, {"rates": (0.0,)}])
def test_a_plan_that_cannot_be_is_refused(settings):
    with pytest.raises(ConfigError):
        Choice(**settings)


def test_too_few_frames_no_labels_and_a_bundle_without_a_trunk_are_refused(device_bundle, reference_bundle, tiny_data):
    with pytest.raises(DataError, match="128 frames"):
        choice(device_bundle, tiny_data, Choice())
    with pytest.raises(DataError, match="no labels"):
        choice(device_bundle, Dataset("bare", tiny_data.images, None), PLAN)
    with pytest.raises(DataError, match="has none of"):
        choice(device_bundle, Dataset("made", None, tiny_data.labels, {"snow": tiny_data.images}), PLAN)
    with pytest.raises(ConfigError, match="cut at its input"):
        choice(reference_bundle, tiny_data, PLAN)


def test_the_command_prints_the_table_and_writes_the_figures(device_bundle, tiny_data, tmp_path, capsys):
    np.savez(tmp_path / "tiny.npz", images=tiny_data.images, labels=tiny_data.labels)
    asked = ["bench", "choice", str(device_bundle.path), "--data", str(tmp_path / "tiny.npz"), "--corruption", "fog"]
    sizes = ["--train", "32", "--test", "48", "--steps", "2", "--limit", "2", "--json", str(tmp_path / "out.json")]
    assert run([*asked, *sizes]) == 0
    assert "spearman" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())["domains"]) == 1
