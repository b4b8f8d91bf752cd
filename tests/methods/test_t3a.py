"""T3A against a plain re-statement that keeps every support, at its start, and when a domain changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edge_adapt.bundle import Bundle
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError
from edge_adapt.methods.moments import Moments
from edge_adapt.methods.protocol import Answered, Context
from edge_adapt.methods.t3a import T3A, T3AAlone, unit
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail


def context(bundle: Bundle, **settings: Any) -> Context:
    return Context(bundle, lambda: Tail(bundle), settings=settings)


def answers(bundle: Bundle, count: int, seed: int = 0) -> Answered:
    """Features, and the logits that the head makes of them."""
    weight, bias = bundle.source["head.weight"], bundle.source["head.bias"]
    features = np.random.default_rng(seed).normal(size=(count, weight.shape[1])).astype(np.float32) * 0.3
    return Answered(features @ weight.T + bias, features)


def published(bundle: Bundle, batches: list[Answered], most: int) -> np.ndarray:
    """Section 2.13 of the specification, with a list of everything ever seen; the answer to the last batch."""
    weight, bias = (bundle.source[name].astype(float) for name in ("head.weight", "head.bias"))
    supports: list[tuple[float, int, np.ndarray]] = []

    def append(z: np.ndarray, logits: np.ndarray) -> None:
        p = np.exp(logits - logits.max())
        p /= p.sum()
        supports.append((float(-(p * np.log(p)).sum()), int(logits.argmax()), z / np.linalg.norm(z)))

    for row in weight:
        append(row, weight @ row + bias)
    for batch in batches:
        for z, logits in zip(batch.features, batch.logits, strict=True):
            append(z.astype(float), logits.astype(float))
    prototypes = []
    for label in range(len(weight)):
        best = sorted((s for s in supports if s[1] == label), key=lambda s: s[0])[:most]
        total = np.sum([s[2] for s in best], axis=0) if best else np.zeros(weight.shape[1])
        prototypes.append(total / max(np.linalg.norm(total), 1e-12))
    return batches[-1].features.astype(float) @ np.array(prototypes).T


@pytest.mark.parametrize("most", [1, 5, 100])
def test_it_is_t3a_as_published(reference_bundle, most):
    """Golden, and conformance 2: the answer depends on the batch that it is given for."""
    method = T3AAlone(context(reference_bundle, supports=most))
    state = method.init()
    batches = [answers(reference_bundle, 20, seed) for seed in range(4)]
    for number, batch in enumerate(batches, 1):
        step = method.watch(state, batch)
        before = batch.features @ state.own.prototypes.T
        state = step.state
        np.testing.assert_allclose(step.logits, published(reference_bundle, batches[:number], most), atol=1e-5)
    assert most == 1 or np.abs(before - step.logits).max() > 1e-3


def test_before_any_frame_it_is_the_head_by_angle(device_bundle):
    """Conformance 11: rows of the head are the prototypes, where the head puts each into its own class."""
    method = T3AAlone(context(device_bundle))
    rows, bias = device_bundle.source["head.weight"], device_bundle.source["head.bias"]
    own = (rows @ rows.T + bias).argmax(1)
    assert np.array_equal(own, np.arange(len(rows)))
    np.testing.assert_allclose(method.start().prototypes, unit(rows), atol=1e-6)


def test_a_row_that_the_head_puts_elsewhere_leaves_its_class_empty(device_bundle):
    rows, bias = device_bundle.source["head.weight"], device_bundle.source["head.bias"].copy()
    bias[2] = -1e3
    bundle = replace(device_bundle, source={**device_bundle.source, "head.bias": bias})
    method = T3AAlone(context(bundle))
    prototypes = method.start().prototypes
    assert not prototypes[2].any()
    batch = Answered(rows @ rows.T + bias, rows)
    assert np.isfinite(method.watch(method.init(), batch).logits).all()


def test_no_class_ever_has_more_than_its_supports(device_bundle):
    """Conformance 11: M cap; the most certain stay, and the arrays do not grow."""
    method = T3AAlone(context(device_bundle, supports=3))
    state = method.init()
    shapes = state.own.features.shape, state.own.entropies.shape
    worst: list[float] = []
    for seed in range(20):
        state = method.watch(state, answers(device_bundle, 40, seed)).state
        worst.append(float(state.own.entropies.max()))
        assert (state.own.entropies[:, 1:] >= state.own.entropies[:, :-1]).all()
    assert (state.own.features.shape, state.own.entropies.shape) == shapes
    assert shapes[0][:2] == (5, 3)
    assert worst == sorted(worst, reverse=True)


def test_frames_that_are_alike_and_frames_one_by_one(device_bundle):
    method = T3AAlone(context(device_bundle))
    one = answers(device_bundle, 1)
    many = Answered(np.repeat(one.logits, 30, 0), np.repeat(one.features, 30, 0))
    step = method.watch(method.init(), many)
    assert np.isfinite(step.logits).all()
    assert np.array_equal(step.logits, np.repeat(step.logits[:1], 30, 0))
    assert method.watch(step.state, one).logits.shape == (1, 5)
    silent = Answered(one.logits, np.zeros_like(one.features))
    assert np.isfinite(method.watch(step.state, silent).logits).all()


def test_broken_answers_leave_no_mark_and_states_are_values(device_bundle):
    method = T3AAlone(context(device_bundle))
    state = method.watch(method.init(), answers(device_bundle, 9)).state
    kept = state.own.features.copy()
    broken = answers(device_bundle, 4)
    broken.features[2, 3] = np.inf
    step = method.watch(state, broken)
    assert step.state.own is state.own
    assert step.events[0].startswith("refused")
    first, again = (method.watch(state, answers(device_bundle, 9, 5)) for _ in range(2))
    assert np.array_equal(first.logits, again.logits)
    assert np.array_equal(state.own.features, kept)


def test_a_change_of_domain_empties_the_supports(device_bundle, tiny_frames, monkeypatch):
    method = T3A(context(device_bundle), Moments(context(device_bundle)))
    look = Predictor(device_bundle, OnnxRuntimeEngine(device_bundle)).look(tiny_frames[:4], method.needs)
    state = method.watch(method.init(), answers(device_bundle, 40)).state
    assert method.step(state, look).state.own is state.own
    plain = Moments.step
    monkeypatch.setattr(
        Moments, "step", lambda self, *given: replace(plain(self, *given), events=("domain change",))
    )
    after = method.step(state, look).state.own
    assert np.array_equal(after.features, method.start().features)


def test_what_cannot_be_is_refused(device_bundle):
    with pytest.raises(ConfigError, match="supports is 0"):
        T3AAlone(context(device_bundle, supports=0))


def test_the_gate_leaves_the_head_what_it_is_sure_of(device_bundle):
    """Prototypes answer unsure frames only, and none while they disagree with the head on frames that it is sure of."""
    method = T3AAlone(context(device_bundle, agree=0.0))
    doubtful = answers(device_bundle, 40)
    sure = Answered(doubtful.logits * 100, doubtful.features)
    closed = method.watch(method.init(), doubtful)
    assert np.array_equal(closed.logits, doubtful.logits)
    opened = closed.state
    for _ in range(2):
        step = method.watch(opened, sure)
        assert np.array_equal(step.logits, sure.logits)
        opened = step.state
    after = method.watch(opened, doubtful).logits
    certain = np.exp(doubtful.logits - doubtful.logits.max(1, keepdims=True)).sum(1) <= 2
    assert np.array_equal(after[certain], doubtful.logits[certain])
    assert not certain.all()
    assert (after[~certain] != doubtful.logits[~certain]).any(axis=1).all()

    wrong = Answered(-sure.logits, sure.features)
    strict = T3AAlone(context(device_bundle))
    state = strict.init()
    for _ in range(4):
        state = strict.watch(state, wrong).state
    assert state.own.agreed < 0.9 * state.own.sure
    assert np.array_equal(strict.watch(state, doubtful).logits, doubtful.logits)
