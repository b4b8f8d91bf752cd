"""The label shift adapter against plain re-statements, on streams with known priors, and behind its second signals."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from edge_adapt.adapters import label_shift as net_module
from edge_adapt.adapters.label_shift import LabelShiftNet, change, degree, inputs, is_balanced, load, save, shapes
from edge_adapt.bundle import Bundle
from edge_adapt.errors import ArtifactError, ConfigError
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.label_shift import LabelShift, LabelShiftState, Residual, unexplained
from edge_adapt.methods.protocol import Answered, Context
from edge_adapt.methods.source import Source
from edge_adapt.tail import Tail

CLASSES, WIDTH = 5, 16
UNIFORM = np.full(CLASSES, 1 / CLASSES)
LONG_TAILED = np.array([0.6, 0.24, 0.1, 0.04, 0.02])


@pytest.fixture
def bundle(device_bundle: Bundle) -> Bundle:
    """The tiny network, with a made-up source: classes at the corners of a simplex, in 16 features."""
    rng = np.random.default_rng(0)
    mean = np.zeros((CLASSES, WIDTH))
    mean[:, :CLASSES] = 3 * np.eye(CLASSES)
    facts = {"prior": UNIFORM, "class.mean": mean, "class.std": np.ones(WIDTH)}
    facts["head.weight"] = mean + 0.01 * rng.normal(size=mean.shape)
    source = device_bundle.source | {name: value.astype(np.float32) for name, value in facts.items()}
    return dataclasses.replace(device_bundle, source=source)


def method(bundle: Bundle, **settings: Any) -> LabelShift:
    return LabelShift(Context(bundle, lambda: Tail(bundle), settings=settings), Source(Context(bundle, lambda: None)))


def stream(prior: np.ndarray, count: int, seed: int = 0, offset: float = 0.0) -> tuple[np.ndarray, ...]:
    """Logits, features and labels of frames of the made-up source; `offset` moves features off all classes."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(CLASSES, count, p=prior)
    features = rng.normal(size=(count, WIDTH))
    features[np.arange(count), labels] += 3
    features[:, CLASSES:] += offset
    logits = 0.45 * features[:, :CLASSES] * 3  # as sure as is right: half the squared distance between means is 4.5
    return logits.astype(np.float32), features.astype(np.float32), labels


def play(wrapper: LabelShift, logits: np.ndarray, features: np.ndarray | None, size: int) -> tuple[np.ndarray, Any]:
    state, answers = wrapper.init(), []
    for start in range(0, len(logits), size):
        part = slice(start, start + size)
        step = wrapper.watch(state, Answered(logits[part], None if features is None else features[part]))
        assert step.logits is not None
        state = step.state
        answers.append(step.logits)
    return np.concatenate(answers), state


def wrong(logits: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float((logits.argmax(1) != labels).mean())


def test_a_degree_says_how_much_a_prior_is_like_the_source():
    """Conformance 14: 1 for the source prior, 0 for the uniform one, negative for its inverse."""
    assert degree(LONG_TAILED, LONG_TAILED) == pytest.approx(1)
    assert degree(UNIFORM, LONG_TAILED) == pytest.approx(0)
    geometric = 0.5 ** np.arange(CLASSES) / (0.5 ** np.arange(CLASSES)).sum()
    assert degree(geometric[::-1], geometric) == pytest.approx(-1)
    assert degree(np.eye(CLASSES)[0], geometric) == 1.5


def test_a_balanced_source_is_told_all_of_the_prior_and_another_its_degree():
    assert is_balanced(UNIFORM)
    assert not is_balanced(LONG_TAILED)
    assert inputs(LONG_TAILED[None], LONG_TAILED).tolist() == [[pytest.approx(1)]]
    told = inputs(LONG_TAILED[None], UNIFORM)[0]
    assert told.sum() == pytest.approx(0)
    assert told[0] - told[4] == pytest.approx(math.log(30))


def random_values(source: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    told = CLASSES if is_balanced(source) else 1
    return {name: rng.normal(size=shape) / 4 for name, shape in shapes(CLASSES, WIDTH, told).items()}


@pytest.mark.parametrize("source", [UNIFORM, LONG_TAILED])
def test_the_hypernetwork_is_the_formula(source):
    """Golden: f(x; pi) = (W + dW) (gamma z + beta) + b + db, frame by frame, less what the source prior makes."""
    rng = np.random.default_rng(1)
    values, head, features = random_values(source), rng.normal(size=(CLASSES, WIDTH)), rng.normal(size=(3, WIDTH))
    prior = np.array([0.1, 0.5, 0.2, 0.1, 0.1])

    def outputs(pi: np.ndarray) -> np.ndarray:
        told = inputs(pi[None], source)[0]
        rows = zip(values["hidden.weight"], values["hidden.bias"], strict=True)
        hidden = [max(0.0, row @ told + bias) for row, bias in rows]
        return values["out.weight"] @ np.array(hidden) + values["out.bias"]

    made = outputs(prior) - outputs(source)
    gamma, beta = 1 + made[:WIDTH], made[WIDTH : 2 * WIDTH]
    bias, factors = made[2 * WIDTH : 2 * WIDTH + CLASSES], made[2 * WIDTH + CLASSES :]
    extra = sum(s * np.outer(u, v) for s, u, v in zip(factors, values["left"], values["right"], strict=True))
    expected = [(head + extra) @ (gamma * z + beta) + bias - head @ z for z in features]
    net = LabelShiftNet(values, head, source, 2.0)
    np.testing.assert_allclose(net.change(features, prior), expected, rtol=1e-9)
    np.testing.assert_allclose(net.change(features, source), 0, atol=1e-12)


def test_tensors_and_arrays_give_the_same():
    rng = np.random.default_rng(2)
    values, head, features = random_values(UNIFORM), rng.normal(size=(CLASSES, WIDTH)), rng.normal(size=(4, WIDTH))
    told, still = inputs(LONG_TAILED[None], UNIFORM), inputs(UNIFORM[None], UNIFORM)
    tensors = [torch.tensor(each) for each in (head, features, told, still)]
    made = change({name: torch.tensor(value) for name, value in values.items()}, *tensors)
    np.testing.assert_allclose(made.numpy(), change(values, head, features, told, still))


def test_a_hypernetwork_is_saved_and_read(bundle, tmp_path):
    here = dataclasses.replace(bundle, path=tmp_path)
    assert load(here) is None
    net = LabelShiftNet(random_values(UNIFORM), bundle.source["head.weight"], UNIFORM, 2.5)
    save(tmp_path, net)
    found = load(here)
    assert found is not None
    assert found.temperature == 2.5
    z = stream(UNIFORM, 4)[1]
    np.testing.assert_allclose(found.change(z, LONG_TAILED), net.change(z, LONG_TAILED), rtol=1e-4, atol=1e-4)
    assert method(here).net is not None
    assert method(here, hypernetwork=False).net is None


@pytest.mark.parametrize("damage", ["cut", "shape", "nan"])
def test_a_hypernetwork_that_is_damaged_or_of_another_network_is_refused(bundle, tmp_path, damage):
    values = random_values(UNIFORM)
    if damage == "shape":
        values["left"] = values["left"][:, :3]
    if damage == "nan":
        values["right"][0, 0] = np.nan
    file = save(tmp_path, LabelShiftNet(values, bundle.source["head.weight"], UNIFORM, 2.5))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=net_module.FILE):
        load(dataclasses.replace(bundle, path=tmp_path))


def published(logits: np.ndarray, wrapper: LabelShift) -> np.ndarray:
    """The estimate without features, frame by frame in groups of 16, in plain loops: the log-ratio at the end."""
    config = wrapper.config
    horizons, classes = config.horizons, logits.shape[1]
    counts = [np.zeros(classes) for _ in horizons]
    evidence = [0.0] * len(horizons)
    for start in range(0, len(logits), 16):
        group = logits[start : start + 16].astype(np.float64)
        for h, horizon in enumerate(horizons):
            share = counts[h] + config.prior_count / classes
            share = share / share.sum()
            gain, found = 0.0, np.zeros(classes)
            for row in group:
                p = np.exp(row / 3 - np.logaddexp.reduce(row / 3))
                weights = p * share * classes
                gain += math.log(weights.sum()) - config.indifference
                found += weights / weights.sum()
            counts[h] = counts[h] * (1 - 1 / horizon) ** len(group) + found
            evidence[h] = evidence[h] * (1 - 1 / config.memory) ** len(group) + gain
    beliefs = np.exp([0.0] + [nats - config.patience for nats in evidence])
    beliefs /= beliefs.sum()
    mixture = beliefs[0] / classes
    for h in range(len(horizons)):
        share = counts[h] + config.prior_count / classes
        mixture = mixture + beliefs[h + 1] * share / share.sum()
    return np.clip(np.log(mixture * classes), -config.cap, config.cap)


def test_the_estimate_is_bayes_over_horizons(bundle):
    """Golden."""
    wrapper = method(bundle)
    logits = stream(LONG_TAILED, 100)[0]
    answers, state = play(wrapper, logits, None, 50)
    first = play(wrapper, logits[:50], None, 50)[1].own.ratio
    np.testing.assert_allclose(first, published(logits[:50], wrapper), rtol=1e-9)
    np.testing.assert_allclose(answers[:50], logits[:50] + 3 * first, rtol=1e-4, atol=1e-5)
    assert state.own.ratio[0] > 0.5 > -0.5 > state.own.ratio[4]


def test_a_single_class_is_known_after_a_few_frames(bundle):
    wrapper = method(bundle)
    logits, features, _ = stream(np.eye(CLASSES)[3], 64)
    _, state = play(wrapper, logits, features, 8)
    assert state.own.ratio.argmax() == 3
    assert state.own.ratio[3] > 1.2
    assert state.own.shifted


@pytest.mark.parametrize("size", [1, 50])
def test_label_shift_is_corrected_and_its_absence_left_alone(bundle, size):
    wrapper = method(bundle, temperature=1.0)
    for prior, least in ((LONG_TAILED, 2.0), (UNIFORM, -0.2)):
        logits, features, labels = stream(prior, 1500)
        logits = logits * np.float32(0.6)  # less sure, so that the prior matters
        noise = np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)
        logits += noise
        answers, _ = play(wrapper, logits, features, size)
        assert wrong(answers, labels) <= wrong(logits, labels) - least


def test_frames_that_no_mixture_of_classes_explains_are_no_label_shift(bundle):
    """A network that is damaged says one class all the time; with its features in order that would be believed."""
    wrapper = method(bundle)
    logits, features, _ = stream(LONG_TAILED, 400)
    order = np.random.default_rng(0).permutation(400)
    logits, features = logits[order], features[order]
    assert np.abs(play(wrapper, logits, features, 20)[1].own.ratio).max() > 0.5
    damaged, state = play(wrapper, logits, features + np.float32(2) * (np.arange(WIDTH) >= CLASSES), 20)
    assert state.own.residual.damage > 1
    np.testing.assert_allclose(damaged, logits, atol=0.2)


def test_runs_are_believed_even_with_damage(bundle):
    """What fluctuates is the labels: a network that is damaged is so for all frames alike."""
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), 4))
    parts = [stream(np.eye(CLASSES)[label], 40, seed, offset=2.0) for seed, label in enumerate(order)]
    logits, features, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    logits = logits + 1.5 * np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)
    gains = []
    for correlated in (0.15, 2.0):
        answers, state = play(method(bundle, temperature=1.0, correlated=correlated), logits, features, 40)
        assert state.own.damage > 1
        gains.append(wrong(logits, labels) - wrong(answers, labels))
    assert gains[0] > 3
    assert gains[1] == pytest.approx(0, abs=0.2)


def test_directions_that_no_mixture_of_classes_moves_in():
    rng = np.random.default_rng(3)
    mean, std = rng.normal(size=(CLASSES, WIDTH)), rng.uniform(0.5, 2, WIDTH)
    centre, directions = unexplained(mean, std)
    assert directions.shape == (WIDTH - CLASSES + 1, WIDTH)
    np.testing.assert_allclose((LONG_TAILED @ mean - centre) @ directions.T, 0, atol=1e-9)
    noise = rng.normal(size=(4000, WIDTH)) * np.sqrt(std**2 + 0.05 * np.mean(std**2))
    np.testing.assert_allclose((noise @ directions.T).var(axis=0), 1, atol=0.15)
    assert unexplained(None, None)[1].shape == (0, 0)


def test_damage_is_free_of_the_noise_of_few_frames():
    rng = np.random.default_rng(4)
    found = []
    for _ in range(200):
        residual = Residual(np.zeros(8))
        for _ in range(6):
            residual = residual.after(rng.normal(size=(4, 8)) + 0.5, 128)
        found.append(residual.damage)
    assert np.mean(found) == pytest.approx(0.25, abs=0.02)
    assert Residual(np.zeros(8)).after(np.ones((1, 8)), 128).damage == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_answers_that_are_not_finite_leave_no_mark(bundle, bad):
    wrapper = method(bundle)
    logits, features, _ = stream(LONG_TAILED, 32)
    state = play(wrapper, logits, features, 8)[1]
    broken = logits.copy()
    broken[3, 1] = bad
    step = wrapper.watch(state, Answered(broken, features))
    assert step.state.own is state.own
    assert any(event.startswith("refused") for event in step.events)


def test_watching_changes_neither_the_state_nor_the_answer_it_is_given(bundle):
    wrapper = method(bundle)
    logits, features, _ = stream(LONG_TAILED, 64)
    state = play(wrapper, logits, features, 8)[1]
    before = {item.name: np.copy(getattr(state.own, item.name)) for item in dataclasses.fields(LabelShiftState)[:3]}
    shown = logits.copy()
    first = wrapper.watch(state, Answered(shown, features)).logits
    assert np.array_equal(shown, logits)
    assert all(np.array_equal(getattr(state.own, name), value) for name, value in before.items())
    assert np.array_equal(first, wrapper.watch(state, Answered(shown, features)).logits)


@pytest.mark.parametrize("host", ["moments", "tent"])
def test_the_host_never_sees_an_adjusted_answer(device_bundle, tiny_frames, host):
    """Its state after a stream is the same, bit for bit, as without the adapter."""
    from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
    from edge_adapt.runtime.loop import adapt
    from edge_adapt.runtime.predictor import Predictor

    tail = Tail(device_bundle)
    left, answers = [], []
    for name in (host, f"{host}+label_shift"):
        predictor = Predictor(device_bundle, OnnxRuntimeEngine(device_bundle))
        believed: dict[str, Any] = {} if name == host else {"label_shift": {"patience": -100.0}}
        settings = {"guards": False, **believed}
        made = build(name, Context(device_bundle, lambda: tail, settings=settings))
        frames = np.repeat(tiny_frames[:4], 32, axis=0) * np.float32(0.7)
        batches = [frames[start : start + 16] for start in range(0, 128, 16)]
        answers.append(np.concatenate([answer.logits for answer in adapt(predictor, made, batches)]))
        left.append(predictor.delta)
    assert left[0].same_as(left[1])
    assert len(left[0])
    assert not np.array_equal(*answers)


def test_without_class_statistics_only_hosts_that_correct_statistics_are_believed(bundle):
    bare = {name: value for name, value in bundle.source.items() if not name.startswith("class.")}
    blind = dataclasses.replace(bundle, source=bare)
    with pytest.raises(ConfigError, match="no class statistics"):
        method(blind)
    assert build("moments+label_shift", Context(blind, lambda: Tail(blind))).watches


@pytest.mark.parametrize(
    "settings",
    [{"horizons": ()}, {"horizons": (1,)}, {"temperature": 0.5}, {"memory": 0}, {"cap": 0.0}, {"damage": -1.0}],
)
def test_settings_that_make_no_sense_are_refused(bundle, settings):
    with pytest.raises(ConfigError, match=f"label_shift.{next(iter(settings))}"):
        method(bundle, **settings)
