"""NORM against float64 re-statements of its papers, at the ends of its range, and through lagging ports."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from edge_adapt.bundle import Bundle
from edge_adapt.delta import PORT_SCALE, PORT_SHIFT
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError
from edge_adapt.methods.moments import Moments
from edge_adapt.methods.norm import UNSETTLED, Norm, NormState, divergence, iabn, moments_of
from edge_adapt.methods.protocol import CHANGE, Context, Observation, Step
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import NormCall, Tail, batch_statistics

KINDS = ("batch", "mix", "count", "ema", "iabn", "mecta")


def norm(bundle: Bundle, **settings: Any) -> Norm:
    return Norm(Context(bundle, lambda: Tail(bundle), settings=settings))


def seen(frames: np.ndarray) -> Observation:
    return Observation(frames, None, frames)


def other(frames: np.ndarray) -> np.ndarray:
    return (0.5 * frames + 0.8).astype(np.float32)


def call(frames: int = 6, channels: int = 3, side: int = 4, seed: int = 0) -> NormCall:
    torch.manual_seed(seed)
    x = 1.5 * torch.randn(frames, channels, side, side) + torch.randn(channels, 1, 1) + 2
    ones = torch.rand(channels) + 0.5
    return NormCall("bn", x, ones, torch.randn(channels), torch.randn(channels), ones * 2, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_0_is_source_and_alpha_1_is_the_batch(reference_bundle, tiny_frames, kind):
    """Conformance 17, and what the two ends are of every kind."""
    frames = other(tiny_frames[:32])
    tail = Tail(reference_bundle)
    h = torch.from_numpy(frames)
    with torch.no_grad():
        source, batch = tail(h).numpy(), tail(h, norm=batch_statistics).numpy()
    ends = {
        "batch": ({}, None),
        "mix": ({"alpha": 1.0}, {"alpha": 0.0}),
        "count": ({"source_count": 0.0}, {"source_count": 1e12}),
        "ema": ({"momentum": 1.0}, {"momentum": 0.0}),
        "iabn": (None, {"k": 1e9}),
        "mecta": (None, None),
    }[kind]
    for settings, expected in zip(ends, (batch, source), strict=True):
        if settings is not None:
            method = norm(reference_bundle, kind=kind, **settings)
            found = method.step(method.init(), seen(frames)).logits
            # The variance of a batch is unbiased where it is mixed: 1 in 128 of it at the deepest norm.
            np.testing.assert_allclose(found, expected, atol=0.02 if expected is batch else 1e-4)
    assert np.abs(source - batch).max() > 0.5  # so that the two can be told apart


def test_divergence_is_that_of_two_gaussians():
    """Conformance 17: MECTA's beta goes to 0 for identical statistics."""
    rng = np.random.default_rng(0)
    mean, variance = rng.normal(size=5), rng.uniform(0.5, 2, 5)
    assert divergence(mean, variance, mean, variance) == pytest.approx(0, abs=1e-12)
    eps, m, v = 1e-3, 0.4, 1.7

    def kl(m1: float, v1: float, m2: float, v2: float) -> float:
        return math.log(math.sqrt(v2 / v1)) + (v1 + (m1 - m2) ** 2) / (2 * v2) - 0.5

    expected = kl(0.1, 0.6 + eps, m, v + eps) + kl(m, v + eps, 0.1, 0.6 + eps)
    assert float(divergence(*(torch.tensor(x) for x in (0.1, 0.6, m, v)))) == pytest.approx(expected, abs=1e-6)


def test_mecta_moves_as_far_as_the_batch_differs(reference_bundle, tiny_frames):
    method = norm(reference_bundle, kind="mecta")
    state = method.init()
    near, far = (method.step(state, seen(x)).state for x in (tiny_frames, other(tiny_frames)))
    assert np.abs(near.mean - state.mean).max() < 0.2 * np.abs(far.mean - state.mean).max()
    site = reference_bundle.manifest.sites[0]
    place = reference_bundle.slices[site.name]
    again = method.step(far, seen(other(tiny_frames))).state
    assert np.abs(again.mean - far.mean)[place].max() < np.abs(far.mean - state.mean)[place].max()


def test_mixed_statistics_are_unbiased_and_those_of_the_batch_are_not():
    x = call().x
    for unbiased in (False, True):
        mean, variance = moments_of(x, unbiased=unbiased)
        flat = x.double().numpy().swapaxes(0, 1).reshape(3, -1)
        np.testing.assert_allclose(mean, flat.mean(1), atol=1e-5)
        np.testing.assert_allclose(variance, flat.var(1, ddof=int(unbiased)), atol=1e-5)
    assert moments_of(x[:1, :, :1, :1], unbiased=False) is None


def test_iabn_is_its_equations():
    """Golden: one frame and channel at a time, in float64."""
    given, k = call(side=3), 1.5
    found = iabn(given, given.mean, given.variance, k).numpy()
    corrected = 0
    for frame in range(len(given.x)):
        for channel in range(given.x.shape[1]):
            values = given.x[frame, channel].double().numpy().ravel()
            m, v, size = float(given.mean[channel]), float(given.variance[channel]), values.size
            d, t = values.mean() - m, k * math.sqrt(v / size)
            m += math.copysign(max(abs(d) - t, 0), d)
            d, t = values.var(ddof=1) - v, k * v * math.sqrt(2 / (size - 1))
            corrected += abs(d) > t
            v += math.copysign(max(abs(d) - t, 0), d)
            expected = (values - m) / math.sqrt(max(v, 0) + given.epsilon)
            expected = expected * float(given.weight[channel]) + float(given.bias[channel])
            np.testing.assert_allclose(found[frame, channel].ravel(), expected, atol=1e-4)
    assert corrected


def test_the_running_average_is_that_of_torch(reference_bundle, tiny_frames):
    """Golden: after one step at the first norm, before which nothing was adapted."""
    method = norm(reference_bundle, kind="ema")
    frames = other(tiny_frames[:40])
    state = method.step(method.init(), seen(frames)).state
    site = reference_bundle.manifest.sites[0].name
    inputs: list[torch.Tensor] = []

    def record(given: NormCall) -> torch.Tensor:
        if given.site == site:
            inputs.append(given.x)
        return batch_statistics(given)

    with torch.no_grad():
        method.tail(torch.from_numpy(frames), norm=record)
    layer = torch.nn.BatchNorm2d(inputs[0].shape[1])
    layer.running_mean.copy_(method.tail.buffers[f"{site}.running_mean"])
    layer.running_var.copy_(method.tail.buffers[f"{site}.running_var"])
    layer.train()(inputs[0])
    place = reference_bundle.slices[site]
    np.testing.assert_allclose(state.mean[place], layer.running_mean, atol=1e-5)
    np.testing.assert_allclose(state.variance[place], layer.running_var, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["one", "alike", "nan"])
def test_batches_that_break_statistics(reference_bundle, tiny_frames, kind, which):
    method = norm(reference_bundle, kind=kind)
    frames = tiny_frames[:1] if which == "one" else np.repeat(tiny_frames[:1], 4, axis=0)
    if which == "nan":
        frames[1, 0, 0, 0] = np.nan
    state = method.init()
    step = method.step(state, seen(frames))
    assert np.isfinite(step.state.mean).all() and np.isfinite(step.state.variance).all()
    if which == "nan":
        assert np.array_equal(step.state.mean, state.mean)
        if kind in ("ema", "iabn", "mecta"):
            assert step.events[0].startswith("refused")
    else:
        assert np.isfinite(step.logits).all()


def averaged(bundle: Bundle, method: Norm, frames: np.ndarray) -> NormState:
    predictor, state = Predictor(bundle, OnnxRuntimeEngine(bundle)), method.init()
    for start in range(0, len(frames), 8):
        state = method.step(state, predictor.look(frames[start : start + 8], method.needs)).state
    return state


@pytest.mark.parametrize(("kind", "share"), [("batch", 1.0), ("mix", 0.1), ("count", UNSETTLED / (UNSETTLED + 16))])
def test_ports_say_the_statistics_of_the_stream(device_bundle, tiny_frames, kind, share):
    """Golden: taps taken at source; the port of a site makes its input what source has, as far as the mix goes."""
    frames = other(tiny_frames[:UNSETTLED])
    method = norm(device_bundle, kind=kind)
    delta = averaged(device_bundle, method, frames).delta
    means, seconds = Predictor(device_bundle, OnnxRuntimeEngine(device_bundle)).look(frames, method.needs).taps
    mean = means.mean(0)
    variance = 1 + share * (seconds.mean(0) - mean**2 - 1)
    np.testing.assert_allclose(delta[PORT_SCALE], variance**-0.5, rtol=1e-4)
    np.testing.assert_allclose(delta[PORT_SHIFT], -share * mean * variance**-0.5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ema", "mecta"])
def test_an_average_goes_to_where_the_stream_is(device_bundle, tiny_frames, kind):
    method = norm(device_bundle, kind=kind, memory=16)
    frames = np.concatenate([other(tiny_frames)] * 3)
    state = averaged(device_bundle, method, frames)
    means, _ = Predictor(device_bundle, OnnxRuntimeEngine(device_bundle)).look(frames[:128], method.needs).taps
    assert np.abs(state.mean - means.mean(0)).mean() < 0.5 * np.abs(means.mean(0)).mean()


def test_the_first_half_of_a_domain_is_forgotten_as_ports_moved_since(device_bundle, tiny_frames):
    method = norm(device_bundle)
    state = averaged(device_bundle, method, tiny_frames[: 3 * UNSETTLED])
    assert state.count == 3 * UNSETTLED // 2 and state.watch.seen == 3 * UNSETTLED


def test_a_change_of_domain_begins_the_average_anew(device_bundle, tiny_frames, monkeypatch):
    method = norm(device_bundle)
    state, fresh = averaged(device_bundle, method, tiny_frames[:64]), method.moments.init()
    known = replace(fresh, mean=np.full_like(fresh.mean, 0.5), second=np.full_like(fresh.second, 4.25), count=8, seen=8)
    monkeypatch.setattr(Moments, "step", lambda self, *given: Step(known, events=(CHANGE,), again=True))
    look = Predictor(device_bundle, OnnxRuntimeEngine(device_bundle)).look(other(tiny_frames[:8]), method.needs)
    step = method.step(state, look)
    assert step.events == (CHANGE,) and step.again and step.state.count == 8
    np.testing.assert_allclose(step.state.mean, 0.5)
    np.testing.assert_allclose(step.state.variance, 4.0)


def test_broken_taps_leave_no_mark(device_bundle, tiny_frames):
    method = norm(device_bundle)
    state = averaged(device_bundle, method, tiny_frames[:16])
    taps = (np.full((2, device_bundle.channels), np.nan),) * 2
    step = method.step(state, Observation(tiny_frames[:2], np.zeros((2, 5)), taps=taps))
    assert step.state is state
    assert step.events[0].startswith("refused")


def test_what_cannot_be_is_refused(device_bundle):
    with pytest.raises(ConfigError, match="before a frame is seen"):
        norm(device_bundle, kind="iabn")
    with pytest.raises(ConfigError, match="kind is 'adabn'"):
        norm(device_bundle, kind="adabn")
    with pytest.raises(ConfigError, match="alpha is 2"):
        norm(device_bundle, alpha=2)
    with pytest.raises(ConfigError, match="memory is 0"):
        norm(device_bundle, memory=0)
