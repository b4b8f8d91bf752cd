"""Warm-up at export: it learns, repeats itself, goes on where it stopped, and what is merged is what was trained."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edge_adapt.adapters.storage import load
from edge_adapt.bundle import Bundle, InputSpec
from edge_adapt.cli import run
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.preprocess import Preprocess
from edge_adapt.streams.corruptions import CORRUPTIONS
from edge_adapt.streams.data import Dataset
from edge_adapt.tail import Tail
from exporters.adapters import ADAPTERS, VIDA, limit_rank
from exporters.augmix import AugMix
from exporters.export import Model, export, from_module
from exporters.trainee import Trainee
from exporters.training_state import TrainingState, place_of
from exporters.warm_up import Warmed, WarmUpPlan, WarmUpSettings, divergence, warm_up

INPUT = InputSpec(shape=(3, 16, 16), scale=255.0, mean=(0.5, 0.4, 0.6), std=(0.25, 0.2, 0.3))
SETTINGS = WarmUpSettings(epochs=3, batch=32, high=4)


@pytest.fixture(scope="module")
def model(tiny_net) -> Model:
    return from_module(tiny_net, "tiny", INPUT)


@pytest.fixture(scope="module")
def warmed_bundle(model, tiny_data, tmp_path_factory) -> Bundle:
    out = tmp_path_factory.mktemp("warm") / "bundle"
    plan = WarmUpPlan(tiny_data, SETTINGS)
    return Bundle.load(export(model, out, calibration=tiny_data.images, cut="block", warm_up=plan))


def trained(model: Model, data: Dataset, checkpoint, **settings) -> Warmed:
    plan = WarmUpPlan(data, replace(SETTINGS, **settings))
    return warm_up(model.network, model.input, plan, checkpoint=checkpoint)


def loss_of(network, data: Dataset) -> float:
    """Cross-entropy under AugMix, with the statistics of the batch."""
    trainee = Trainee(network)
    plain = torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 255
    shown = AugMix()(plain, torch.Generator().manual_seed(9)) * 255
    frames = torch.from_numpy(Preprocess(INPUT)(shown.permute(0, 2, 3, 1).numpy()))
    with torch.no_grad(), trainee.batch_statistics():
        return float(F.cross_entropy(trainee.logits(frames), torch.from_numpy(data.labels)))


def test_the_loss_falls(model, tiny_data, tmp_path):
    made = trained(model, tiny_data, tmp_path / "state", epochs=16, rate=0.1, consistency=1.0)
    assert loss_of(made.network, tiny_data) < 0.9 * loss_of(model.network, tiny_data)


def test_the_same_seed_gives_the_same_network_and_another_seed_another(model, tiny_data, tmp_path):
    first, second, other = (
        trained(model, tiny_data, tmp_path / str(place), epochs=1, seed=seed) for place, seed in enumerate((1, 1, 2))
    )
    assert first.network == second.network
    assert first.record == second.record
    assert first.network != other.network


def test_a_resumed_warm_up_equals_one_that_was_not_interrupted(model, tiny_data, tmp_path):
    whole = trained(model, tiny_data, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if done > total * 0.6:
            raise Stopped

    said: list[str] = []
    checkpoint, plan = tmp_path / "state", WarmUpPlan(tiny_data, SETTINGS)
    with pytest.raises(Stopped):
        warm_up(model.network, model.input, plan, checkpoint=checkpoint, progress=stop)
    again = warm_up(model.network, model.input, plan, checkpoint=checkpoint, report=said.append)
    assert said == ["the warm-up goes on after epoch 1"]
    assert again.network == whole.network
    assert again.record == whole.record


@pytest.mark.parametrize("change", ["seed", "data", "damaged"])
def test_a_state_of_another_run_is_not_gone_on_from(model, tiny_data, tmp_path, change):
    checkpoint, said = tmp_path / "state", []
    trained(model, tiny_data, checkpoint, epochs=1)
    settings, data = replace(SETTINGS, epochs=1), tiny_data
    if change == "seed":
        settings = replace(settings, seed=4)
    elif change == "data":
        data = replace(tiny_data, images=255 - tiny_data.images)
    else:
        checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    made = warm_up(model.network, INPUT, WarmUpPlan(data, settings), checkpoint=checkpoint, report=said.append)
    assert len(said) == 1 and said[0].startswith("the warm-up starts anew")
    fresh = warm_up(model.network, INPUT, WarmUpPlan(data, settings), checkpoint=tmp_path / "other")
    assert made.network == fresh.network


def test_centring_changes_statistics_but_no_answer(model, tiny_frames):
    trainee, frames = Trainee(model.network), torch.from_numpy(tiny_frames)
    with torch.no_grad():
        before = trainee.logits(frames)
        with trainee.batch_statistics():
            apart = (trainee.logits(frames) - before).abs().max()
        trainee.centre(frames)
        after = trainee.logits(frames)
        with trainee.batch_statistics():
            close = (trainee.logits(frames) - before).abs().max()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert close < 1e-3 < apart


def test_divergence_equals_the_definition():
    answers = [torch.randn(7, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    p = np.stack([torch.softmax(part.double(), 1).numpy() for part in answers])
    middle = p.mean(0)
    expected = np.mean([(part * np.log(part / middle)).sum(1).mean() for part in p])
    assert float(divergence(answers)) == pytest.approx(expected, rel=1e-5)
    assert float(divergence([answers[0]] * 3)) == pytest.approx(0, abs=1e-6)


def test_a_change_of_too_high_a_rank_loses_its_smallest_parts_alone():
    frozen = {"w": torch.randn(6, 2, 3, 3), "b": torch.zeros(6)}
    weights = {"w": frozen["w"] + torch.randn(6, 2, 3, 3), "b": torch.ones(6)}
    before = torch.linalg.svdvals((weights["w"] - frozen["w"]).flatten(1))
    limit_rank(weights, frozen, 4)
    after = torch.linalg.svdvals((weights["w"] - frozen["w"]).flatten(1))
    torch.testing.assert_close(after[:4], before[:4])
    assert after[4:].max() < 1e-5
    assert bool((weights["b"] == 1).all())


def test_the_bundle_answers_as_frozen_weights_plus_pairs(model, warmed_bundle, tiny_frames):
    """Conformance 15: ViDA merged equals unmerged."""
    tail = Tail(warmed_bundle)
    adapter, values = load(warmed_bundle.path / ADAPTERS / VIDA, tail)
    change = adapter.weights(values, {name: torch.zeros_like(value) for name, value in tail.parameters.items()})
    frozen = {name: tail.parameters[name] - value for name, value in change.items()}
    original = dict(model.module.named_parameters())
    for name, value in frozen.items():
        torch.testing.assert_close(value, original[name].detach(), rtol=1e-4, atol=1e-5)
        assert not torch.equal(tail.parameters[name], original[name])
    engine = OnnxRuntimeEngine(warmed_bundle)
    seen = engine.observe(tiny_frames, cut=True, taps=False)
    with torch.no_grad():
        answers = tail(torch.from_numpy(seen.cut), adapter.weights(values, tail.parameters | frozen))
    np.testing.assert_allclose(answers.numpy(), seen.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(engine.run(tiny_frames), seen.logits, rtol=1e-4, atol=1e-4)


def test_the_manifest_says_what_was_done(warmed_bundle, tiny_data):
    found = warmed_bundle.manifest.warm_up
    assert found.family == "AugMix"
    assert not set(found.operations) & set(CORRUPTIONS)
    assert (found.images, found.held_out) == (116, 12)
    assert found.settings["epochs"] == 3 and found.settings["seed"] == 0
    assert tiny_data.name in found.data
    assert all(0 <= error <= 100 for error in (*found.clean_error, *found.augmented_error))
    assert f"{ADAPTERS}/{VIDA}" in warmed_bundle.manifest.files


def test_the_bundle_holds_fisher_information_and_a_threshold(warmed_bundle):
    tail = Tail(warmed_bundle)
    for name in tail.norm_parameters:
        value = warmed_bundle.source[f"fisher/{name}"]
        assert value.shape == tail.parameters[name].shape
        assert (value >= 0).all() and value.any()
    assert 0.2 < float(warmed_bundle.source["threshold/confidence"][0]) <= 1


def test_the_state_is_removed_with_the_bundle_written_and_kept_if_it_is_not(model, tiny_data, tmp_path):
    plan, out = WarmUpPlan(tiny_data, replace(SETTINGS, epochs=1)), tmp_path / "bundle"
    with pytest.raises(ConfigError, match="nowhere"):
        export(model, out, warm_up=plan, cut="nowhere")
    assert place_of(out).exists() and not out.exists()
    export(model, out, warm_up=plan)
    assert not place_of(out).exists()


def test_the_command_line_warms_up_and_goes_on(tmp_path, tiny_data, model, monkeypatch, capsys):
    data, out = tmp_path / "images.npz", tmp_path / "bundle"
    np.savez(data, images=tiny_data.images, labels=tiny_data.labels)
    monkeypatch.setattr("exporters.export.from_spec", lambda *_, **__: model)
    assert run(["export", "zoo:tiny", "--out", str(out), "--warm-up", str(data), "--warm-up-epochs", "1"]) == 0
    assert "warm-up" in capsys.readouterr().err
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["warm_up"]["settings"]["epochs"] == 1
    assert manifest["calibration_samples"] == len(tiny_data)
    assert run(["export", "zoo:tiny", "--out", str(tmp_path / "b"), "--warm-up-epochs", "1"]) == 2
    assert "--warm-up DATA" in capsys.readouterr().err


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": None}, "no labels"),
        ({"images": np.zeros((128, 16, 16, 3), np.float32)}, "8-bit"),
        ({"labels": np.full(128, 5)}, "labels from 5 to 5"),
        ({"images": np.zeros((9, 16, 16, 3), np.uint8), "labels": np.zeros(9, np.int64)}, "holds 9 images"),
        ({"images": np.zeros((128, 8, 8, 3), np.uint8)}, "frames have shape"),
    ],
)
def test_data_that_does_not_serve_is_refused(model, tiny_data, tmp_path, change, said):
    with pytest.raises(DataError, match=said):
        trained(model, replace(tiny_data, **change), tmp_path / "state")


def test_a_model_that_is_no_classifier_of_images_is_refused(tiny_data, tmp_path):
    layers = [nn.Sequential(nn.Flatten(), nn.Linear(*sizes)).eval() for sizes in ((40, 3), (768, 1))]
    signal = from_module(layers[0], "signal", InputSpec(shape=(4, 10), layout="NCW"))
    number = from_module(layers[1], "number", INPUT)
    for model, said in ((signal, "no image"), (number, "one logit for each class")):
        with pytest.raises(ConfigError, match=said):
            trained(model, tiny_data, tmp_path / "state")


def test_no_epochs_are_refused():
    with pytest.raises(ConfigError, match="--warm-up-epochs is 0"):
        WarmUpSettings(epochs=0)


def test_a_state_that_cannot_be_written_says_so(model, tiny_data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Exception, match="cannot be written"):
        TrainingState.start(Trainee(model.network).parameters).save(tmp_path / "file" / "state", {})
