"""SAR against a plain float64 one, SGD against torch's, and the way back from a collapse."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edge_adapt.bundle import Bundle
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError
from edge_adapt.methods.optim import AdamState, sgd
from edge_adapt.methods.protocol import Context, Observation
from edge_adapt.methods.sar import RUNNING, SAR, uphill
from edge_adapt.runtime.loop import adapt
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail

Array = NDArray[Any]
SURE = 0.985
"""Of the answers of the tiny network, which is not sure of much, some but not all."""
LEARNED = {f"{site}.{role}" for site in ("stem.1", "block.bn", "alone") for role in ("weight", "bias")}
"""Of five norms, the last quarter of which, rounded up, is two."""


def context(bundle: Bundle, **settings: Any) -> Context:
    return Context(bundle, lambda: Tail(bundle), seed=3, settings=settings)


def seen(batch: Array) -> Observation:
    """What the loop shows in reference mode."""
    return Observation(batch, None, batch)


def batches(frames: Array, count: int = 4, size: int = 24) -> list[Array]:
    shifted = (frames * np.float32(0.6) + np.float32(0.4)).astype(np.float32)
    return [shifted[at * size : (at + 1) * size] for at in range(count)]


def published(net: nn.Module, stream: list[Array], lr: float, reliable: float) -> list[Array]:
    """SAR step by step, with nothing of the package: the logits before each step."""
    model = copy.deepcopy(net).double().train()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.track_running_stats, part.running_mean, part.running_var = False, None, None
    affine = [value for name, value in model.named_parameters() if name in LEARNED]
    margin, answers = reliable * math.log(5), []
    optimiser = torch.optim.SGD(affine, lr=lr, momentum=0.9)

    def entropies(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(x)
        p = logits.softmax(1)
        return logits, -(p * p.log()).sum(1)

    for batch in stream:
        x = torch.from_numpy(batch).double()
        logits, first = entropies(x)
        answers.append(logits.detach().numpy())
        sure = (first < margin).nonzero().flatten()
        optimiser.zero_grad()
        first[sure].mean().backward()
        there = [value.detach().clone() for value in affine]
        length = math.sqrt(sum(float((value.grad**2).sum()) for value in affine))
        with torch.no_grad():
            for value in affine:
                value.add_(0.05 * value.grad / length)
        second = entropies(x)[1][sure]
        optimiser.zero_grad()
        second[second < margin].mean().backward()
        with torch.no_grad():
            for value, old in zip(affine, there, strict=True):
                value.copy_(old)
        optimiser.step()
    return answers


def test_reference_mode_is_sar_as_published(reference_bundle, tiny_net, tiny_frames):
    """Conformance 7: the step is made from where the parameters were."""
    settings = {"lr": 0.5, "reliable": SURE, "collapsed": 0.0}
    method = SAR(context(reference_bundle, **settings))
    stream, state = batches(tiny_frames), method.init()
    expected = published(tiny_net, stream, settings["lr"], settings["reliable"])
    for batch, logits in zip(stream, expected, strict=True):
        step = method.step(state, seen(batch))
        np.testing.assert_allclose(step.logits, logits, atol=1e-4, rtol=0)  # float32 against float64
        state = step.state
    assert np.abs(published(tiny_net, stream, 0.0, SURE)[-1] - expected[-1]).max() > 1e-2  # it can fail


def test_the_last_quarter_of_the_norms_stays(reference_bundle, device_bundle):
    assert set(SAR(context(reference_bundle)).source) == LEARNED
    assert set(SAR(context(device_bundle)).source) == {
        f"{site}.{role}" for site in ("alone", "depthwise_bn") for role in ("weight", "bias")
    }
    assert len(SAR(context(device_bundle, fixed=0.99)).source) == 2  # one norm is always learned
    with pytest.raises(ConfigError, match=r"sar\.fixed is 1"):
        SAR(context(device_bundle, fixed=1.0))


def test_the_way_uphill_is_as_long_as_the_radius():
    """Conformance 7: one norm over all tensors."""
    values = {"a": torch.randn(4, 3), "b": torch.randn(5)}
    gradients = {"a": torch.randn(4, 3), "b": 10 * torch.randn(5)}
    above = uphill(values, gradients, 0.05)
    away = torch.cat([(above[name] - values[name]).flatten() for name in values])
    assert float(away.norm()) == pytest.approx(0.05, rel=1e-4)
    along = torch.cat([gradients[name].flatten() for name in values])
    assert float(torch.cosine_similarity(away, along, dim=0)) == pytest.approx(1.0, abs=1e-5)
    still = uphill(values, {name: torch.zeros_like(value) for name, value in values.items()}, 0.05)
    assert all(torch.equal(still[name], values[name]) for name in values)


def test_the_answer_does_not_depend_on_the_step_that_follows_it(reference_bundle, tiny_frames):
    """Conformance 1."""
    slow, fast = (SAR(context(reference_bundle, lr=lr, reliable=SURE, collapsed=0.0)) for lr in (1e-3, 1e3))
    batch = seen(batches(tiny_frames)[0])
    one, other = slow.step(slow.init(), batch), fast.step(fast.init(), batch)
    np.testing.assert_array_equal(one.logits, other.logits)
    assert not torch.equal(one.state.student["alone.weight"], other.state.student["alone.weight"])


def test_where_nothing_is_sure_nothing_changes(reference_bundle, tiny_frames):
    """Conformance 7: the mean of nothing is no NaN here."""
    method = SAR(context(reference_bundle, reliable=0.0))
    state = method.init()
    step = method.step(state, seen(batches(tiny_frames)[0]))
    assert step.state is state
    assert not step.events
    assert np.isfinite(step.logits).all()


def test_a_collapse_starts_anew_without_the_running_entropy(reference_bundle, tiny_frames):
    """Conformance 7: the entropy that called for the restart does not call for the next one."""
    first, second, third, _ = batches(tiny_frames)
    learning = SAR(context(reference_bundle, reliable=SURE, collapsed=0.0))
    state = learning.step(learning.init(), seen(first)).state
    assert float(state.own[RUNNING]) > 0
    assert not torch.equal(state.student["alone.weight"], learning.source["alone.weight"])
    # So high that every entropy is a collapse.
    collapsed = SAR(context(reference_bundle, reliable=SURE, collapsed=100.0)).step(state, seen(second)).state
    assert RUNNING not in collapsed.own
    assert not collapsed.adam.first
    assert all(torch.equal(value, learning.source[name]) for name, value in collapsed.student.items())
    after = learning.step(collapsed, seen(third)).state
    assert not torch.equal(after.student["alone.weight"], learning.source["alone.weight"])


def test_what_is_a_collapse_is_in_proportion_to_the_number_of_classes(reference_bundle, tiny_frames):
    batch = seen(batches(tiny_frames)[0])
    watched = SAR(context(reference_bundle, reliable=SURE, collapsed=0.0))
    share = float(watched.step(watched.init(), batch).state.own[RUNNING]) / math.log(5) * math.log(1000)
    for collapsed, restarts in ((0.99 * share, False), (1.01 * share, True)):
        method = SAR(context(reference_bundle, reliable=SURE, collapsed=collapsed))
        assert (RUNNING not in method.step(method.init(), batch).state.own) == restarts


def test_the_device_learns_the_earlier_norms_of_the_tail(device_bundle, tiny_frames):
    predictor = Predictor(device_bundle, OnnxRuntimeEngine(device_bundle))
    method = SAR(context(device_bundle, lr=0.01, window=16, reliable=1.0, collapsed=0.0))
    events = [event for answer in adapt(predictor, method, batches(tiny_frames)) for event in answer.events]
    assert not any(event.startswith("refused") for event in events)
    assert set(predictor.delta.tail) == set(method.source)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_that_of_torch(momentum):
    generator = torch.Generator().manual_seed(0)
    values = {"a": torch.randn(4, 3, generator=generator), "b": torch.randn(5, generator=generator)}
    start = {name: value.clone() for name, value in values.items()}
    theirs = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    optimiser = torch.optim.SGD(theirs.values(), lr=0.01, momentum=momentum)
    ours: Any = values
    state = AdamState()
    for _ in range(20):
        gradients = {name: torch.randn(value.shape, generator=generator) for name, value in values.items()}
        for name, value in theirs.items():
            value.grad = gradients[name].clone()
        optimiser.step()
        ours, state = sgd(ours, gradients, state, lr=0.01, momentum=momentum)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.detach(), atol=1e-6, rtol=0)
        assert torch.equal(values[name], start[name])
    assert state.steps == 20
