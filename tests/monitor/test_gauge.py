"""The gauge: what looks tell about strangeness and accuracy, and that it changes no answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import Context
from edge_adapt.monitor.accuracy import WEIGHTS, WORTH
from edge_adapt.monitor.gauge import ENOUGH, EVERY, RECENT, Gauge
from edge_adapt.runtime.budget import Budget, Limits
from edge_adapt.runtime.live import Learned, LiveLoop
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail


@pytest.fixture(scope="module")
def bundle(device_bundle):
    """With weights that follow the confidence, and are worth 40 labels at most."""
    signals = 6 if "class.mean" in device_bundle.source else 4
    weights = np.zeros((2, signals + 1), np.float32)
    weights[:, 0] = 1.0
    worth = np.array([[np.log(40), 0.0]] * 2, np.float32)
    return replace(device_bundle, source={**device_bundle.source, WEIGHTS: weights, WORTH: worth})


@pytest.fixture
def made(bundle):
    """A loop with a gauge or without, and a budget without limits."""
    engines = []

    def loop(name="moments", *, gauge=True, frozen=False, rate=1e9):
        engines.append(OnnxRuntimeEngine(bundle))
        method = build(name, Context(bundle, lambda: Tail(bundle)))
        built = LiveLoop(
            Predictor(bundle, engines[-1]),
            method,
            Budget(Limits(learn_ms_per_s=rate), lambda: 0.0),
            begin=Learned(method.init(), frozen=frozen),
            gauge=Gauge(bundle) if gauge else None,
        )
        built.events = []
        built._tell = built.events.append
        return built

    yield loop
    for engine in engines:
        engine.close()


def fed(loop, frames, batch=1):
    """What was answered; learning keeps up."""
    replies = []
    for first in range(0, len(frames), batch):
        replies.append(loop.answer(frames[first : first + batch]).logits)
        while loop.work():
            pass
    return np.concatenate(replies)


def test_frames_unlike_any_of_the_source_are_strange_and_its_own_are_not(made, tiny_frames):
    own, strange = made("source"), made("source")
    fed(own, tiny_frames, 1)
    assert own.gauge.strange is None  # one frame in 16 is too few yet
    for _ in range(5):
        fed(own, tiny_frames, 1)
        fed(strange, tiny_frames * 0.1, 1)
    assert own.gauge.strange < 0.3
    assert strange.gauge.strange > 0.7


def test_answers_are_the_same_with_and_without_a_gauge(made, tiny_frames):
    frames = np.concatenate([tiny_frames, tiny_frames * 0.4 - 0.5])
    assert np.array_equal(fed(made(), frames, 4), fed(made(gauge=False), frames, 4))


def test_the_estimate_is_an_interval_and_follows_the_confidence(made, tiny_frames):
    loop = made()
    assert loop.gauge.estimate is None
    fed(loop, tiny_frames, 4)
    told = loop.gauge.estimate
    assert 0 <= told["low"] < told["value"] < told["high"] <= 100


def test_late_labels_move_the_estimate_and_tighten_it(made, tiny_frames):
    loop = made()
    fed(loop, tiny_frames, 4)
    before = loop.gauge.estimate
    loop.gauge.labelled(0, 200)
    after = loop.gauge.estimate
    assert after["value"] < before["value"] / 2
    assert after["high"] - after["low"] < before["high"] - before["low"]


def test_labels_alone_give_one_where_the_bundle_holds_no_estimate(device_bundle):
    gauge = Gauge(device_bundle)
    assert gauge.estimate is None
    gauge.labelled(30, 40)
    assert gauge.estimate["value"] == 75.0


def test_a_frozen_agent_is_gauged_all_the_same(made, tiny_frames):
    loop = made(frozen=True)
    for _ in range(2 * ENOUGH * EVERY // len(tiny_frames)):
        fed(loop, tiny_frames)
    assert loop.gauge.strange is not None and loop.counts["steps"] == 0 and loop.learned.done == 0


def test_without_budget_nothing_is_read_and_everything_answered(made, tiny_frames):
    loop = made(frozen=True, rate=1e-9)
    loop.budget.spend(1.0)
    assert len(fed(loop, tiny_frames)) == len(tiny_frames)
    assert loop.waiting == 0 and loop.learn_s < 1e-3 and loop.gauge.strange is None


def test_frames_that_are_not_finite_leave_no_trace(made, tiny_frames):
    loop = made(frozen=True)
    fed(loop, np.full((64, *tiny_frames.shape[1:]), np.nan, np.float32))
    assert loop.gauge.strange is None and loop.gauge.estimate is None and loop.events == []


def test_a_gauge_that_fails_is_told_and_learning_goes_on(made, tiny_frames, monkeypatch):
    loop = made()
    monkeypatch.setattr(loop.gauge, "after", lambda *_: 1 / 0)
    fed(loop, tiny_frames[:32], 4)
    assert loop.events[0].startswith("gauge failed: ZeroDivisionError")
    assert loop.counts["steps"] > 0 and loop.counts["failed"] == 0


def test_it_remembers_so_many_frames_and_no_more(made, tiny_frames):
    gauge, predictor = Gauge(made().predictor.bundle), made().predictor
    for _ in range(6):
        seen = predictor.look(tiny_frames, gauge.needs)
        gauge.after(seen, seen.logits)
    assert len(gauge._strange) == RECENT


def test_a_score_that_needs_no_features_asks_for_none(device_bundle, made, tiny_frames):
    source = {name: part for name, part in device_bundle.source.items() if not name.startswith("ood.hyperdimensional")}
    gauge, predictor = Gauge(replace(device_bundle, source=source)), made().predictor
    assert gauge.reads and not gauge.needs
    seen = predictor.look(tiny_frames * 0.1, gauge.needs)
    assert seen.features is None
    gauge.after(seen, seen.logits)
    assert gauge.strange is not None


def test_a_bundle_without_any_score_is_not_read(device_bundle, made):
    loop = made()
    bare = {name: part for name, part in device_bundle.source.items() if not name.startswith("ood.")}
    gauge = Gauge(replace(device_bundle, source=bare))
    assert not gauge.reads
    assert LiveLoop(loop.predictor, loop.method, loop.budget, gauge=gauge).gauge is None
