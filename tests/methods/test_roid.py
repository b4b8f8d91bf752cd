"""ROID against a plain float64 one, and the prior on the answers."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from edge_adapt.bundle import Bundle
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError
from edge_adapt.methods.protocol import Answered, Context, Observation
from edge_adapt.methods.roid import PRIOR, ROID, running, smoothed, weighted
from edge_adapt.runtime.loop import adapt
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail

Array = NDArray[Any]


def context(bundle: Bundle, **settings: Any) -> Context:
    return Context(bundle, lambda: Tail(bundle), seed=3, settings=settings)


def seen(batch: Array) -> Observation:
    """What the loop shows in reference mode."""
    return Observation(batch, None, batch)


def batches(frames: Array, count: int = 4, size: int = 24) -> list[Array]:
    shifted = (frames * np.float32(0.6) + np.float32(0.4)).astype(np.float32)
    return [shifted[at * size : (at + 1) * size] for at in range(count)]


def rolled(x: Tensor, generator: Generator | None = None) -> Tensor:
    """A view without chance: moved by a pixel, and dimmed."""
    return x.roll(1, -1) * 0.8


def published(net: nn.Module, stream: list[Array], lr: float = 1e-3) -> list[Array]:
    """ROID step by step, frame by frame, with nothing of the package: the logits before each step."""
    model = copy.deepcopy(net).double().train()
    affine = []
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.track_running_stats, part.running_mean, part.running_var = False, None, None
            affine += [part.weight, part.bias]
    source = [value.detach().clone() for value in affine]
    optimiser = torch.optim.Adam(affine, lr=lr)
    mean, answers = torch.full((5,), 0.2).double(), []
    for batch in stream:
        x = torch.from_numpy(batch).double()
        logits = model(x)
        p = logits.softmax(1)
        fixed = p.detach()
        d = [1 - float(mean @ row / mean.norm() / row.norm()) for row in fixed]
        c = [float((row * row.log()).sum()) for row in fixed]
        d = [(value - min(d)) / (max(d) - min(d)) for value in d]
        c = [(value - min(c)) / (max(c) - min(c)) for value in c]
        kept = [i for i in range(len(x)) if d[i] >= sum(d) / len(d)]
        views = model(rolled(x[kept])).softmax(1)
        loss = torch.zeros(()).double()
        for place, i in enumerate(kept):
            weight = math.exp(d[i] * c[i] * 3)
            q = p[i].clamp(0, 0.99)
            loss = loss - weight * (q * (q / (1 - q) + 1e-5).log()).sum()
            one, other = views[place], p[i]
            loss = loss - weight * 0.5 * ((other * one.log()).sum() + (one * other.log()).sum())
        optimiser.zero_grad()
        (loss / len(x)).backward()
        optimiser.step()
        with torch.no_grad():
            for value, old in zip(affine, source, strict=True):
                value.copy_(0.99 * value + 0.01 * old)
        prior = fixed.mean(0)
        mean = 0.9 * mean + 0.1 * prior
        delta = max(1 / len(x), 1 / 5) / float(prior.max())
        answers.append((logits.detach() + ((prior + delta) / (1 + 5 * delta)).log()).numpy())
    return answers


def test_reference_mode_is_roid_as_published(reference_bundle, tiny_net, tiny_frames):
    method = ROID(context(reference_bundle), augment=rolled)
    stream, state = batches(tiny_frames), method.init()
    expected = published(tiny_net, stream)
    for batch, logits in zip(stream, expected, strict=True):
        step = method.step(state, seen(batch))
        # Float32 against float64, and Adam enlarges the rounding of small gradients.
        np.testing.assert_allclose(step.logits, logits, atol=1e-4, rtol=0)
        state = step.state
    assert np.abs(published(tiny_net, stream, lr=0.0)[-1] - expected[-1]).max() > 1e-3  # it can fail


def test_the_published_code_multiplies_logits(reference_bundle, tiny_frames):
    batch = seen(batches(tiny_frames)[0])
    answers = {}
    for correction in ("none", "log", "compat"):
        method = ROID(context(reference_bundle, correction=correction), augment=rolled)
        answers[correction] = torch.from_numpy(method.step(method.init(), batch).logits)
    prior = smoothed(answers["none"].softmax(1).mean(0), 24)
    torch.testing.assert_close(answers["compat"], answers["none"] * prior)
    torch.testing.assert_close(answers["log"], answers["none"] + prior.log())
    with pytest.raises(ConfigError, match="known: log, compat, none"):
        ROID(context(reference_bundle, correction="logits"))


def test_the_answer_does_not_depend_on_the_step_that_follows_it(reference_bundle, tiny_frames):
    """Conformance 1."""
    slow, fast = (ROID(context(reference_bundle, lr=lr)) for lr in (1e-3, 1e3))
    batch = seen(batches(tiny_frames)[0])
    one, other = slow.step(slow.init(), batch), fast.step(fast.init(), batch)
    np.testing.assert_array_equal(one.logits, other.logits)
    assert not torch.equal(one.state.student["alone.weight"], other.state.student["alone.weight"])


@pytest.mark.parametrize("frames", [1, 10, 1000])
def test_a_prior_sums_to_one_and_is_the_nearer_to_uniform_the_fewer_frames(frames):
    """Conformance 9."""
    mean = torch.tensor([0.7, 0.2, 0.1, 0.0])
    prior = smoothed(mean, frames)
    assert float(prior.sum()) == pytest.approx(1.0)
    delta = max(1 / frames, 0.25) / 0.7
    np.testing.assert_allclose(prior, [(value + delta) / (1 + 4 * delta) for value in mean.tolist()], rtol=1e-6)
    torch.testing.assert_close(smoothed(torch.full((4,), 0.25), frames), torch.full((4,), 0.25))
    assert (smoothed(mean, 1) - 0.25).abs().max() < (smoothed(mean, 1000) - 0.25).abs().max()


@pytest.mark.parametrize("count", [1, 6])
def test_frames_that_are_all_the_same_are_no_nan(reference_bundle, tiny_frames, count):
    """Conformance 9: nothing to stretch to 0..1."""
    same = np.repeat(tiny_frames[:1], count, axis=0)
    answers = torch.full((count, 5), 0.1) + torch.eye(5)[:1] * 0.5
    assert weighted(answers, torch.ones(count), torch.full((5,), 0.2)).tolist() == [1.0] * count
    step = (method := ROID(context(reference_bundle))).step(method.init(), seen(same))
    assert not step.events
    assert np.isfinite(step.logits).all()
    assert all(torch.isfinite(value).all() for value in step.state.student.values())


def test_a_running_mean_is_the_one_before_each_row():
    values, start = torch.rand(7, 3), torch.rand(3)
    found = running(values, start, 0.2)
    mean = start
    for row, expected in zip(values, found[:-1], strict=True):
        torch.testing.assert_close(mean, expected)
        mean = 0.8 * mean + 0.2 * row
    torch.testing.assert_close(mean, found[-1])


def test_on_the_device_the_prior_does_not_depend_on_how_frames_are_batched(device_bundle):
    method = ROID(context(device_bundle))
    logits = np.random.default_rng(0).normal(0, 2, (40, 5)).astype(np.float32)

    def answers(size: int) -> Array:
        state, made = method.init(), []
        for at in range(0, 40, size):
            step = method.watch(state, Answered(logits[at : at + size]))
            state = step.state
            made.append(step.logits)
        return np.concatenate(made)

    np.testing.assert_allclose(answers(40), answers(1), atol=1e-5)
    np.testing.assert_allclose(answers(40), answers(8), atol=1e-5)
    shift = answers(40) - logits
    np.testing.assert_allclose(shift[0], math.log(0.2), atol=1e-6)  # nothing is known before the first answer
    assert np.ptp(shift[-1]) > 0.05


def test_on_the_device_a_class_that_comes_again_and_again_is_favoured(device_bundle):
    method = ROID(context(device_bundle))
    state = method.init()
    sure = Answered(np.repeat(10 * np.eye(5, dtype=np.float32)[2:3], 40, axis=0))
    state = method.watch(state, sure).state
    assert method.delta(state) is method.delta(method.init()) or not method.delta(state)
    doubtful = Answered(np.array([[0.0, 0.3, 0.0, 0.0, 0.0]], np.float32))
    assert method.watch(state, doubtful).logits.argmax() == 2
    assert method.watch(method.init(), doubtful).logits.argmax() == 1
    broken = method.watch(state, Answered(np.full((2, 5), np.nan, np.float32)))
    assert broken.state is state
    assert broken.logits is None


def test_without_a_prior_the_device_watches_nothing(device_bundle):
    assert ROID(context(device_bundle)).watches
    assert not ROID(context(device_bundle, correction="none")).watches


@pytest.mark.parametrize("views", [False, True])
def test_the_device_learns_and_remembers_the_prior(device_bundle, tiny_frames, views):
    predictor = Predictor(device_bundle, OnnxRuntimeEngine(device_bundle))
    method = ROID(context(device_bundle, views=views, window=16))
    stream = batches(tiny_frames)
    answers = list(adapt(predictor, method, stream))
    assert not [event for answer in answers for event in answer.events if event.startswith("refused")]
    assert set(predictor.delta.tail) == set(method.source)
    state = replace(method.init(), own={PRIOR: torch.full((5,), 0.2)})
    look = predictor.look(stream[0], method.needs)
    before = predictor.passes
    learned = method.step(state, look).state
    assert learned.updates == 1
    assert torch.equal(learned.own[PRIOR], state.own[PRIOR])
    assert (predictor.passes > before) == views
