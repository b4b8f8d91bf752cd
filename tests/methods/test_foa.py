"""FOA: the shift against its equation, the search against a plain re-statement, and what each costs and refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from edge_adapt.bundle import Bundle, InputSpec
from edge_adapt.delta import PROMPTS, Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.foa import Foa, FoaShift, FoaShiftAlone, block_ends
from edge_adapt.methods.moments import Moments
from edge_adapt.methods.protocol import Answered, Context
from edge_adapt.runtime.loop import adapt
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail
from exporters.export import export, from_module
from exporters.zoo.vit import VisionTransformer

WIDTH, DEPTH, CANDIDATES = 16, 2, 28


def context(bundle: Bundle, **settings: Any) -> Context:
    return Context(bundle, lambda: Tail(bundle), seed=3, settings=settings)


def images(count: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).uniform(0, 1, (count, 4, 4, 3))
    return coarse.repeat(4, axis=1).repeat(4, axis=2).astype(np.float32)


def frames(count: int, seed: int = 1) -> np.ndarray:
    """Another domain than `images`."""
    return np.ascontiguousarray(0.4 * images(count, seed).transpose(0, 3, 1, 2) + 0.5)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = VisionTransformer(image=16, patch=4, dim=WIDTH, depth=DEPTH, heads=2, classes=5).eval()
        torch.nn.init.normal_(net.head.weight)
    model = from_module(net, "vit", InputSpec(shape=(3, 16, 16)), cut="blocks.0", prompt_width=WIDTH)
    return Bundle.load(export(model, tmp_path_factory.mktemp("foa") / "vit", calibration=images(64)))


@pytest.fixture(scope="module")
def engine(transformer: Bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(transformer)


# The shift --------------------------------------------------------------------------------------


def answers(bundle: Bundle, count: int, seed: int) -> Answered:
    weight, bias = bundle.source["head.weight"], bundle.source["head.bias"]
    features = np.random.default_rng(seed).normal(0.2 * seed, 0.3, (count, weight.shape[1])).astype(np.float32)
    return Answered(features @ weight.T + bias, features)


def test_the_shift_is_that_of_the_paper(reference_bundle):
    """Golden, and conformance 12: the first batch is unshifted, later ones by the mean of those before."""
    method = FoaShiftAlone(context(reference_bundle))
    weight, bias = (reference_bundle.source[name].astype(float) for name in ("head.weight", "head.bias"))
    source, history, state = reference_bundle.source["features.mean"].astype(float), None, method.init()
    for seed in range(4):
        batch = answers(reference_bundle, 10, seed)
        step = method.watch(state, batch)
        shifted = batch.features.astype(float) + (0 if history is None else source - history)
        np.testing.assert_allclose(step.logits, shifted @ weight.T + bias, atol=1e-4)
        mean = batch.features.mean(0)
        history = mean if history is None else 0.9 * history + 0.1 * mean
        state = step.state
    assert np.abs(step.logits - batch.logits).max() > 0.1  # so that the comparison can fail


def test_what_calibration_measured_is_the_mean_of_the_features(device_bundle, tiny_frames):
    engine = OnnxRuntimeEngine(device_bundle)
    features = engine.observe(tiny_frames, features=True).features
    np.testing.assert_allclose(device_bundle.source["features.mean"], features.mean(0), atol=1e-5)
    np.testing.assert_allclose(device_bundle.source["features.std"], features.std(0), atol=1e-5)


def test_on_the_device_few_frames_shift_little_and_batches_do_not_matter(device_bundle):
    method = FoaShiftAlone(context(device_bundle))
    many = answers(device_bundle, 64, 3)
    whole = method.watch(method.init(), many).state.own
    parts = method.init()
    for row in range(64):
        parts = method.watch(parts, Answered(many.logits[row : row + 1], many.features[row : row + 1])).state
    np.testing.assert_allclose(parts.own.mean, whole.mean, atol=1e-6)
    full = method.shift.rows @ (method.shift.expected(whole) - whole.mean)
    np.testing.assert_allclose(method.shift.offset(whole), full / 2, atol=1e-6)  # 64 frames against 64 of source
    first = method.watch(method.init(), Answered(many.logits[:1], many.features[:1])).state.own
    assert np.abs(method.shift.offset(first)).max() < 0.1 * np.abs(method.shift.offset(whole)).max()


def test_source_frames_are_hardly_shifted(device_bundle, tiny_frames):
    seen = OnnxRuntimeEngine(device_bundle).observe(tiny_frames, features=True)
    method = FoaShiftAlone(context(device_bundle))
    state = method.watch(method.init(), Answered(seen.logits, seen.features)).state
    assert np.abs(method.shift.offset(state.own)).max() < 3e-3


def test_one_class_is_compared_with_that_class_and_many_with_all(device_bundle):
    """Otherwise a burst of one class is shifted until it looks like all of them: 52 % error instead of 42."""
    method = FoaShiftAlone(context(device_bundle))
    means, source = device_bundle.source["class.mean"].astype(float), method.shift.source_mean
    apart = means[2] - source

    def after(classes):
        logits = (20 * np.eye(5)[classes]).astype(np.float32)
        return method.watch(method.init(), Answered(logits, means[classes].astype(np.float32))).state.own

    many, one = after(np.random.default_rng(0).integers(0, 5, 200)), after(np.full(200, 2))
    np.testing.assert_allclose(method.shift.expected(many), source, atol=0.1 * np.abs(apart).max())
    np.testing.assert_allclose(method.shift.expected(one), means[2], atol=0.1 * np.abs(apart).max())
    assert np.abs(method.shift.offset(one)).max() < 0.1 * np.abs(method.shift.rows @ apart).max()


def test_published_and_without_class_statistics_all_are_compared_with_all(reference_bundle, device_bundle):
    bare = {name: value for name, value in device_bundle.source.items() if not name.startswith("class.")}
    for bundle in (reference_bundle, replace(device_bundle, source=bare)):
        method = FoaShiftAlone(context(bundle))
        state = method.watch(method.init(), answers(bundle, 64, 3)).state.own
        assert method.shift.expected(state) is method.shift.source_mean


def test_broken_features_leave_no_mark_and_frames_may_be_alike(device_bundle):
    method = FoaShiftAlone(context(device_bundle))
    state = method.watch(method.init(), answers(device_bundle, 5, 1)).state
    broken = answers(device_bundle, 3, 2)
    broken.features[0, 0] = np.nan
    step = method.watch(state, broken)
    assert step.state.own is state.own
    assert step.events[0].startswith("refused")
    one = answers(device_bundle, 1, 2)
    alike = method.watch(state, Answered(np.repeat(one.logits, 9, 0), np.repeat(one.features, 9, 0)))
    assert np.isfinite(alike.logits).all() and np.isfinite(alike.state.own.mean).all()


def test_a_change_of_domain_starts_the_shift_anew(device_bundle, tiny_frames, monkeypatch):
    method = FoaShift(context(device_bundle), Moments(context(device_bundle)))
    look = Predictor(device_bundle, OnnxRuntimeEngine(device_bundle)).look(tiny_frames[:4], method.needs)
    state = method.watch(method.init(), answers(device_bundle, 40, 1)).state
    assert method.step(state, look).state.own.count == 40
    plain = Moments.step
    monkeypatch.setattr(
        Moments, "step", lambda self, *given: replace(plain(self, *given), events=("domain change",))
    )
    assert not method.step(state, look).state.own.count


def test_an_old_bundle_loads_and_is_told_to_be_exported_again(device_bundle):
    old = {name: value for name, value in device_bundle.source.items() if not name.startswith("features.")}
    with pytest.raises(ConfigError, match=r"(?s)holds no features\.mean.*--calibration"):
        FoaShiftAlone(context(replace(device_bundle, source=old)))


# The search -------------------------------------------------------------------------------------


def played(
    bundle: Bundle, engine: OnnxRuntimeEngine, stream: np.ndarray, size: int, seed: int = 3, **settings: Any
) -> tuple[np.ndarray, int]:
    """Answers, and passes through the engine for each frame."""
    predictor = Predictor(bundle, engine)
    engine.apply(predictor._merge(Delta.source()))
    method = Foa(replace(context(bundle, **settings), seed=seed))
    batches = [stream[at : at + size] for at in range(0, len(stream), size)]
    return np.concatenate([one.logits for one in adapt(predictor, method, batches)]), predictor.passes // len(stream)


def test_twenty_eight_evaluations_and_the_first_batch_is_unshifted(transformer, engine):
    """Conformance 12; what is in force counts as evaluated, except for source, which is none of the candidates."""
    predictor, method = Predictor(transformer, engine), Foa(context(transformer))
    engine.apply(predictor._merge(Delta.source()))
    state, batch = method.init(), frames(20)
    for number in range(3):
        predictor.apply(method.delta(state))
        seen = predictor.look(batch, method.needs)
        before = predictor.passes
        step = method.step(state, seen)
        evaluated = (predictor.passes - before) // len(batch) + (number > 0)
        assert evaluated == CANDIDATES == len(state.trial.candidates)
        if not number:
            best = engine_answer(predictor, batch, step.state.delta[PROMPTS])
            np.testing.assert_allclose(step.logits, best, atol=1e-5)
        else:
            rows, source = transformer.source["head.weight"], transformer.source["features.mean"]
            best = engine_answer(predictor, batch, step.state.delta[PROMPTS])
            np.testing.assert_allclose(step.logits, best + (source - state.history.mean) @ rows.T, atol=1e-4)
        state = step.state
    assert state.search.generation == 3
    predictor.apply(Delta.source())


def engine_answer(predictor: Predictor, batch: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    return predictor.rehearse(batch, Delta({PROMPTS: prompts}), frozenset()).logits


def test_the_best_candidate_is_the_one_of_least_cost(transformer, engine):
    """Golden: entropy of the unshifted answers, and moments of the class token, candidate by candidate."""
    predictor, method = Predictor(transformer, engine), Foa(context(transformer))
    state, batch = method.init(), frames(20)
    engine.apply(predictor._merge(Delta.source()))
    costs = []
    ends = [*range(2 * WIDTH, 3 * WIDTH), *range(4 * WIDTH, 5 * WIDTH)]
    for candidate in state.trial.candidates:
        delta = Delta({PROMPTS: candidate.reshape(3, WIDTH)})
        seen = predictor.rehearse(batch, delta, method.needs)
        p = np.exp(seen.logits.astype(float))
        p /= p.sum(1, keepdims=True)
        cls = seen.cls.astype(float)[:, ends]
        mean, std = (transformer.source[name][ends].astype(float) for name in ("cls.mean", "cls.std"))
        apart = ((cls.mean(0) - mean) ** 2).sum() + ((cls.std(0, ddof=1) - std) ** 2).sum()
        costs.append(-(p * np.log(p)).sum() + 0.4 * apart * 20 / 64)
    found = method.step(state, predictor.look(batch, method.needs)).state.delta[PROMPTS]
    np.testing.assert_allclose(found.ravel(), state.trial.candidates[int(np.argmin(costs))], rtol=1e-6)
    assert block_ends(transformer).tolist() == ends


def test_the_answer_depends_on_the_step(transformer, engine):
    """Conformance 2."""
    one, _ = played(transformer, engine, frames(20), 20)
    other, _ = played(transformer, engine, frames(20), 20, discrepancy=0.0, sigma=3.0)
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_it_is_the_same_by_seed_and_another_by_another(transformer, engine, covariance):
    """Conformance 12."""
    stream = frames(48)
    (one, passes), (same, _), (other, _) = (
        played(transformer, engine, stream, 16, seed=seed, covariance=covariance) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert passes == 28  # and the look of the first batch, shared among three


def test_the_search_lowers_the_cost(transformer, engine):
    predictor, method = Predictor(transformer, engine), Foa(context(transformer))
    state, batch, costs = method.init(), frames(20), []
    engine.apply(predictor._merge(Delta.source()))
    for _ in range(12):
        predictor.apply(method.delta(state))
        seen = predictor.look(batch, method.needs)
        cls = method._added(method._trial(state.search, state.trial.candidates[-1]), [seen] * CANDIDATES)
        costs.append(method._costs(cls)[0])
        state = method.step(state, seen).state
    predictor.apply(Delta.source())
    assert costs[-1] < 0.8 * costs[0]


def test_single_frames_are_gathered_until_they_are_an_interval(transformer, engine):
    predictor, method = Predictor(transformer, engine), Foa(context(transformer, interval=4))
    engine.apply(predictor._merge(Delta.source()))
    batch, state = frames(8), method.init()
    for row in range(8):
        predictor.apply(method.delta(state))
        step = method.step(state, predictor.look(batch[row : row + 1], method.needs))
        assert np.isfinite(step.logits).all()
        assert step.state.search.generation == (row + 1) // 4
        assert (method.delta(step.state) is method.delta(state)) or (row + 1) % 4 == 0
        state = step.state
    single = state.search.mean
    state = method.init()
    for start in (0, 4):
        predictor.apply(method.delta(state))
        state = method.step(state, predictor.look(batch[start : start + 4], method.needs)).state
    np.testing.assert_allclose(single, state.search.mean, atol=1e-3)  # as if they had come together
    predictor.apply(Delta.source())


def test_what_a_guard_holds_back_is_still_the_best_so_far(transformer, engine):
    """A look with source in force is no evaluation of the best candidate: that takes a pass of its own."""
    predictor, method = Predictor(transformer, engine), Foa(context(transformer))
    engine.apply(predictor._merge(Delta.source()))
    batch = frames(20)
    state = method.step(method.init(), predictor.look(batch, method.needs)).state
    held = method.step(state, predictor.look(batch, method.needs))
    predictor.apply(method.delta(state))
    free = method.step(state, predictor.look(batch, method.needs))
    predictor.apply(Delta.source())
    np.testing.assert_allclose(held.logits, free.logits, atol=1e-4)
    np.testing.assert_allclose(held.state.search.mean, free.state.search.mean, atol=1e-4)


@pytest.mark.parametrize("kind", ["one", "alike", "nan"])
def test_batches_that_break_statistics(transformer, engine, kind):
    stream = frames(48)
    if kind == "one":
        made, _ = played(transformer, engine, stream[:20], 1)
    elif kind == "alike":
        made, _ = played(transformer, engine, np.repeat(stream[:1], 48, 0), 16)
    else:
        stream[16:18] = np.nan
        made, _ = played(transformer, engine, stream, 16)
        made = np.delete(made, [16, 17], axis=0)
    assert np.isfinite(made).all()


def test_a_step_is_pure_and_states_do_not_grow(transformer, engine):
    predictor, method = Predictor(transformer, engine), Foa(context(transformer))
    engine.apply(predictor._merge(Delta.source()))
    state = method.init()
    assert method.delta(state).same_as(Delta.source())
    seen = predictor.look(frames(20), method.needs)
    first, again = method.step(state, seen), method.step(state, seen)
    assert np.array_equal(first.logits, again.logits)
    assert first.state.delta.same_as(again.state.delta)
    assert np.array_equal(first.state.trial.candidates, again.state.trial.candidates)
    assert not state.trial.frames and not state.trial.entropies.any()
    assert first.state.trial.candidates.shape == state.trial.candidates.shape


def test_a_network_without_prompts_is_refused_by_the_catalogue(device_bundle):
    with pytest.raises(ConfigError, match=r"(?s)foa cannot run on bundle 'tiny', which takes no prompts.*foa_shift"):
        build("foa", context(device_bundle))


def test_what_cannot_be_is_refused(transformer):
    with pytest.raises(ConfigError, match="covariance is 'low-rank'"):
        Foa(context(transformer, covariance="low-rank"))
    with pytest.raises(ConfigError, match="interval is 1"):
        Foa(context(transformer, interval=1))
    old = {name: value for name, value in transformer.source.items() if not name.startswith("cls.")}
    with pytest.raises(ConfigError, match=r"holds no cls\.mean"):
        Foa(context(replace(transformer, source=old)))
