"""What is fitted at export to tell accuracy by."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from edge_adapt.bundle import Bundle
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.monitor.accuracy import WEIGHTS, WORTH, Accuracy, bounds, offered
from exporters import accuracy
from exporters.accuracy import RARE, USUAL, Cases, fitted, regression
from exporters.export import Model, export, from_module


@pytest.fixture(scope="module")
def images(tiny_data) -> np.ndarray:
    """As few as are enough."""
    made = np.concatenate([tiny_data.images, tiny_data.images[:, ::-1]])
    assert len(made) == accuracy.ENOUGH
    return made


@pytest.fixture(scope="module")
def model(tiny_net, device_bundle) -> Model:
    return from_module(tiny_net, "tiny", device_bundle.manifest.input)


@pytest.fixture(scope="module")
def fitted_bundle(model, images, tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("fitted") / "b"
    return Bundle.load(export(model, folder, calibration=images, cut="block", estimate=True))


def made(seed: int = 0, noise: float = 0.0) -> Cases:
    """Accuracy that follows signals, in 40 domains of 5 windows."""
    rng = np.random.default_rng(seed)
    domain = np.repeat(np.arange(40), 5)
    signals = rng.normal(0, 1, (200, 4))
    signals[:, 2] = rng.random(200) * 0.3
    truth = expit(signals @ [1.0, -0.5, -2.0, 0.3] + 0.7 + noise * rng.normal(0, 1, 40)[domain])
    weight = np.tile([USUAL, RARE, RARE, RARE, RARE], 40)
    return Cases(signals, rng.binomial(256, truth) / 256, weight, domain)


def test_the_regression_finds_what_made_the_shares():
    assert regression(made()) == pytest.approx([1.0, -0.5, -2.0, 0.3, 0.7], abs=0.35)


def test_a_signal_that_never_changes_has_no_weight():
    cases = made()
    cases.signals[:, 1] = 3.0
    assert regression(cases)[1] == 0


def test_noise_between_domains_makes_an_estimate_worth_less():
    calm, noisy = (fitted(made(noise=noise))[WORTH][0, 0] for noise in (0.0, 1.0))
    assert np.exp(noisy) < 0.5 * np.exp(calm)


def test_intervals_hold_the_truth_of_domains_that_were_never_fitted_to():
    entries = fitted(made(noise=0.5))
    other = made(seed=1, noise=0.5)
    value = expit(other.signals @ entries[WEIGHTS][0, :-1] + entries[WEIGHTS][0, -1])
    usual = other.weight == USUAL
    worth = np.exp(entries[WORTH][0, 0])
    low, high = bounds(value * worth, (1 - value) * worth)
    assert ((low <= other.accuracy) & (other.accuracy <= high))[usual].mean() >= 0.8


def test_export_stores_it_and_the_device_can_use_it(fitted_bundle, tiny_frames):
    estimator = Accuracy(fitted_bundle)
    engine = OnnxRuntimeEngine(fitted_bundle)
    try:
        seen = engine.observe(tiny_frames, features=True, taps=False)
    finally:
        engine.close()
    found = estimator.estimate(estimator.after(estimator.init(), seen.logits, seen.features, seen.logits))
    assert found.value > 0.7  # the truth at export is what source answers to plain frames
    assert found.high > 0.9


def test_the_same_frames_give_the_same_entries(fitted_bundle, model, images, tmp_path):
    again = Bundle.load(export(model, tmp_path / "b", calibration=images, cut="block", estimate=True))
    for name in (WEIGHTS, WORTH):
        assert (again.source[name] == fitted_bundle.source[name]).all()


def test_what_is_kept_of_a_domain_keeps_none_of_its_frames_alive(fitted_bundle, images):
    engine = OnnxRuntimeEngine(fitted_bundle)
    found = next(accuracy.domains(fitted_bundle, engine, images, lambda done, total: None))
    engine.close()
    assert all(len(seen.frames) == 0 and seen.frames.base is None for seen in (found.source, found.adapted))


def test_too_few_frames_or_frames_that_are_no_images_give_none(device_bundle):
    assert not offered(device_bundle)
    assert not accuracy.can_be_fitted(device_bundle, np.zeros((accuracy.ENOUGH, 3, 16, 16), np.float32))
