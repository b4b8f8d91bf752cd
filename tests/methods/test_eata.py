"""EATA against a plain float64 one, and what its filters keep."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_adapt.bundle import Bundle
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError
from edge_adapt.methods.eata import EATA, MEAN
from edge_adapt.methods.protocol import Context, Observation
from edge_adapt.runtime.loop import adapt
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail

Array = NDArray[Any]
CHOICE = {"reliable": 0.985, "redundant": 0.985}
"""Of the answers of the tiny network, which is not sure of much, some but not all."""
ALL = {"reliable": 1.0, "redundant": 2.0}


def context(bundle: Bundle, **settings: Any) -> Context:
    return Context(bundle, lambda: Tail(bundle), seed=3, settings=settings)


def seen(batch: Array) -> Observation:
    """What the loop shows in reference mode."""
    return Observation(batch, None, batch)


def batches(frames: Array, count: int = 4, size: int = 24) -> list[Array]:
    shifted = (frames * np.float32(0.6) + np.float32(0.4)).astype(np.float32)
    return [shifted[at * size : (at + 1) * size] for at in range(count)]


def with_fisher(bundle: Bundle, size: float) -> Bundle:
    rng = np.random.default_rng(0)
    norms = Tail(bundle).norm_parameters
    made = {f"fisher/{name}": rng.uniform(0, size, value.shape).astype(np.float32) for name, value in norms.items()}
    return replace(bundle, source={**bundle.source, **made})


def published(net: nn.Module, stream: list[Array], fisher: dict[str, Tensor]) -> tuple[list[Array], list[int]]:
    """EATA step by step, with nothing of the package: the logits before each step, and how many were learned from."""
    model = copy.deepcopy(net).double().train()
    affine = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.BatchNorm2d):
            part.track_running_stats, part.running_mean, part.running_var = False, None, None
            affine |= {f"{name}.weight": part.weight, f"{name}.bias": part.bias}
    source = {name: value.detach().clone() for name, value in affine.items()}
    optimiser = torch.optim.Adam(affine.values(), lr=1e-3)
    margin, mean, answers, counts = CHOICE["reliable"] * math.log(5), None, [], []
    for batch in stream:
        logits = model(torch.from_numpy(batch).double())
        answers.append(logits.detach().numpy())
        terms, taken = [], []
        for row in logits:
            p = row.softmax(0)
            h = -(p * p.log()).sum()
            alike = 0 if mean is None else float(mean @ p.detach() / mean.norm() / p.detach().norm())
            if h < margin and abs(alike) < CHOICE["redundant"]:
                terms.append(h * math.exp(margin - float(h.detach())))
                taken.append(p.detach())
        counts.append(len(taken))
        if not taken:
            continue
        newest = torch.stack(taken).mean(0)
        mean = newest if mean is None else 0.9 * mean + 0.1 * newest
        loss = torch.stack(terms).mean()
        for name, value in affine.items():
            if name in fisher:
                loss = loss + 50.0 * (fisher[name].double() * (value - source[name]) ** 2).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return answers, counts


@pytest.mark.parametrize("fisher", [0.0, 2.0])
def test_reference_mode_is_eata_as_published(reference_bundle, tiny_net, tiny_frames, fisher):
    bundle = with_fisher(reference_bundle, fisher) if fisher else reference_bundle
    method = EATA(context(bundle, alpha=50.0, **CHOICE))
    stream, state = batches(tiny_frames), method.init()
    expected, counts = published(tiny_net, stream, dict(method.fisher))
    assert all(0 < count < 24 for count in counts[1:]), counts
    for batch, logits in zip(stream, expected, strict=True):
        step = method.step(state, seen(batch))
        # Float32 against float64: 1e-6 of logits of size 10, and Adam enlarges the rounding of small gradients.
        np.testing.assert_allclose(step.logits, logits, atol=1e-4, rtol=0)
        state = step.state
    plain, _ = published(tiny_net, stream, {})
    if fisher:  # so that the comparison can fail
        assert np.abs(plain[-1] - expected[-1]).max() > 1e-3


def test_the_answer_does_not_depend_on_the_step_that_follows_it(reference_bundle, tiny_frames):
    """Conformance 1."""
    slow, fast = (EATA(context(reference_bundle, lr=lr, **CHOICE)) for lr in (1e-3, 1e3))
    batch = seen(batches(tiny_frames)[0])
    one, other = slow.step(slow.init(), batch), fast.step(fast.init(), batch)
    np.testing.assert_array_equal(one.logits, other.logits)
    assert not torch.equal(one.state.student["alone.weight"], other.state.student["alone.weight"])


@pytest.mark.parametrize("none", [{"reliable": 0.0}, {"redundant": 0.0}])
def test_where_nothing_is_left_nothing_changes(reference_bundle, tiny_frames, none):
    """Conformance 6: neither the parameters nor the mean answer."""
    first, *rest = batches(tiny_frames)
    every = EATA(context(reference_bundle, **CHOICE))
    state = every.step(every.init(), seen(first)).state
    step = EATA(context(reference_bundle, **{**CHOICE, **none})).step(state, seen(rest[0]))
    assert step.state is state
    assert step.logits.shape == (24, 5)
    assert float(state.own[MEAN].sum()) == pytest.approx(1.0)


def test_it_says_once_that_there_is_no_fisher_information(reference_bundle, tiny_frames):
    def told(bundle: Bundle, **settings: Any) -> list[str]:
        method = EATA(context(bundle, **CHOICE, **settings))
        state, events = method.init(), []
        for batch in batches(tiny_frames):
            step = method.step(state, seen(batch))
            state, events = step.state, [*events, *step.events]
        return events

    assert told(reference_bundle) == ["the bundle has no Fisher information: this is ETA"]
    assert told(reference_bundle, alpha=0.0) == []
    assert told(with_fisher(reference_bundle, 1.0)) == []


def test_the_fisher_term_holds_the_device_back(device_bundle, tiny_frames):
    def moved(bundle: Bundle, alpha: float) -> float:
        predictor = Predictor(bundle, OnnxRuntimeEngine(bundle))
        method = EATA(context(bundle, alpha=alpha, lr=0.01, pull=0.0, window=16, **ALL))
        for _ in adapt(predictor, method, batches(tiny_frames)):
            pass
        tail = predictor.delta.tail
        assert tail
        return sum(float(np.abs(value - method.source[name].numpy()).sum()) for name, value in tail.items())

    bundle = with_fisher(device_bundle, 1.0)
    assert moved(bundle, 1e3) < 0.8 * moved(bundle, 0.0)


def test_settings_that_make_no_sense_are_refused(reference_bundle):
    with pytest.raises(ConfigError, match=r"eata\.alpha is -1"):
        EATA(context(reference_bundle, alpha=-1))
