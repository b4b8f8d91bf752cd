"""Scores of strangeness against plain formulas and, where they import, the pytorch-ood and torch-hd packages."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from edge_adapt.bundle import Bundle
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.routing import scores

CLASSES, WIDTH = 5, 24


def source(frames: int = 400, seed: int = 0):
    """Logits and features of five Gaussian classes under a linear head."""
    centres = np.random.default_rng(99).normal(0, 2, (CLASSES, WIDTH))
    rng = np.random.default_rng(seed)
    features = centres[rng.integers(0, CLASSES, frames)] + rng.normal(0, 0.6, (frames, WIDTH))
    return (features @ centres.T / 4).astype(np.float32), features.astype(np.float32)


def strangers(frames: int = 400):
    centres = np.random.default_rng(99).normal(0, 2, (CLASSES, WIDTH))
    features = np.random.default_rng(5).normal(0, 1.5, (frames, WIDTH))
    return (features @ centres.T / 4).astype(np.float32), features.astype(np.float32)


def kept_as(name: str, kept):
    return {key.split(".", 2)[2]: value for key, value in kept.items() if key.startswith(f"ood.{name}.")}


@pytest.fixture(scope="module")
def kept():
    return scores.fit(*source())


@pytest.fixture(scope="module")
def bundle(kept, device_bundle) -> Bundle:
    """A bundle whose file holds what was fitted, as 32-bit floats."""
    stored = {name: value if value.dtype == np.uint8 else value.astype(np.float32) for name, value in kept.items()}
    others = {name: value for name, value in device_bundle.source.items() if not name.startswith("ood.")}
    return replace(device_bundle, source=others | stored)


def package(name: str):
    try:
        return importlib.import_module(name)
    except Exception as error:  # torchvision breaks at import in many ways
        pytest.skip(f"{name} does not import: {type(error).__name__}: {error}")


@pytest.mark.parametrize("name", scores.SCORES)
def test_strangers_score_higher_and_one_in_twenty_is_above_the_threshold(bundle, name):
    judge = scores.load(bundle, name)
    usual, strange = judge(*source(1000, 1)), judge(*strangers())
    assert (strange[:, None] > usual[None]).mean() > 0.85
    assert judge.strange(*source(1000, 1)).mean() == pytest.approx(0.05, abs=0.04)


@pytest.mark.parametrize("name", scores.SCORES)
def test_what_is_not_finite_is_strange_and_changes_no_other_frame(bundle, name):
    judge = scores.load(bundle, name)
    logits, features = source(6, 2)
    broken = logits.copy(), features.copy()
    broken[0][2], broken[1][2] = np.nan, np.nan
    with np.errstate(invalid="ignore"):
        assert judge.strange(*broken)[2]
        assert np.delete(judge(*broken), 2) == pytest.approx(np.delete(judge(logits, features), 2))


def test_energy_and_max_logit_by_their_formulas(kept):
    logits, _ = source(50, 3)
    expected = -torch.logsumexp(torch.from_numpy(logits), 1).numpy()
    assert scores.Energy({})(logits, None) == pytest.approx(expected, rel=1e-5)
    assert scores.MaxLogit({})(logits, None) == pytest.approx(-logits.max(axis=1))
    assert np.isfinite(scores.Energy({})(logits * 1e4, None)).all()


def test_mahalanobis_by_solving_for_every_frame_and_class(bundle, kept):
    part = kept_as("mahalanobis", kept)
    logits, features = source(20, 3)
    covariance = np.linalg.inv(part["precision"])
    expected = [
        min((row - mean) @ np.linalg.solve(covariance, row - mean) for mean in part["means"])
        for row in features.astype(np.float64)
    ]
    assert scores.load(bundle, "mahalanobis")(logits, features) == pytest.approx(expected, rel=1e-3)


def test_neighbours_one_by_one_and_at_most_256_of_them(bundle):
    many = scores.fit(*source(2000))
    references = many["ood.knn.references"]
    assert references.shape == (scores.REFERENCES, WIDTH)
    logits, features = source(20, 3)
    expected = [
        -sorted(float(row @ other) / np.linalg.norm(row) / np.linalg.norm(other) for other in references)[-5]
        for row in features.astype(np.float64)
    ]
    assert scores.Neighbours({"references": references})(logits, features) == pytest.approx(expected, rel=1e-6)


def test_hyperdimensional_sign_by_sign(kept):
    part = kept_as("hyperdimensional", kept)
    logits, features = source(20, 3)
    signs = np.sign(features @ scores.projection(WIDTH, 0))
    classes = np.unpackbits(part["classes"], axis=1)[:, : scores.WIDTH] * 2.0 - 1
    far = 1 - (signs @ classes.T / scores.WIDTH).max(axis=1)
    energy = -np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    (energy_mean, far_mean), (energy_std, far_std) = part["scale"]
    expected = (energy - energy_mean) / energy_std + 0.5 * (far - far_mean) / far_std
    assert scores.Hyperdimensional(part)(logits, features) == pytest.approx(expected, abs=1e-4)


def test_the_seed_says_everything():
    first, again, other = (scores.fit(*source(), seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["ood.hyperdimensional.classes"], other["ood.hyperdimensional.classes"])


def test_without_features_only_the_scores_of_logits_are_kept():
    found = {name.split(".")[1] for name in scores.fit(source()[0], None)}
    assert found == {"energy", "max-logit"}


def test_an_export_keeps_scores_that_load(device_bundle, tiny_frames):
    from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine

    engine = OnnxRuntimeEngine(device_bundle)
    seen = engine.observe(tiny_frames, features=True)
    engine.close()
    judge = scores.load(device_bundle)
    assert judge.score.name == scores.DEFAULT
    assert judge.strange(seen.logits, seen.features).mean() < 0.2
    assert device_bundle.source["ood.hyperdimensional.classes"].dtype == np.uint8


def test_bad_input_is_refused_with_the_way_out(bundle):
    with pytest.raises(ConfigError, match="no score 'energi'"):
        scores.load(bundle, "energi")
    empty = replace(bundle, source={})
    with pytest.raises(ConfigError, match="--calibration"):
        scores.load(empty)
    logits, features = source(3)
    with pytest.raises(DataError, match="got none"):
        scores.load(bundle)(logits)
    with pytest.raises(DataError, match="got 7"):
        scores.load(bundle, "knn")(logits, features[:, :7])
    with pytest.raises(DataError, match="3 frames"):
        scores.fit(*source(3))


def test_as_pytorch_ood():
    detectors = package("pytorch_ood.detector")
    logits, _ = source(50, 3)
    given = torch.from_numpy(logits)
    assert scores.Energy({})(logits, None) == pytest.approx(detectors.EnergyBased.score(given).numpy(), rel=1e-5)
    assert scores.MaxLogit({})(logits, None) == pytest.approx(detectors.MaxLogit.score(given).numpy(), rel=1e-5)


def test_as_torch_hd():
    torchhd = package("torchhd")
    from edge_adapt.routing.codes import packed, similarity

    rng = np.random.default_rng(0)
    first, second = rng.choice([-1.0, 1.0], (4, 512)), rng.choice([-1.0, 1.0], (3, 512))
    maps = [torchhd.MAPTensor(torch.from_numpy(part)) for part in (first, second)]
    expected = torchhd.cosine_similarity(*maps).numpy()
    assert similarity(packed(first), packed(second), 512) == pytest.approx(expected, abs=1e-5)
