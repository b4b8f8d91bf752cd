"""ViDA against a plain float64 one, its homeostatic scales, and the device mode against the engine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from edge_adapt.adapters.lora import LoRA
from edge_adapt.adapters.protocol import places
from edge_adapt.adapters.storage import save
from edge_adapt.adapters.vida import VidaPair
from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ArtifactError, ConfigError
from edge_adapt.methods.learner import LearnerState
from edge_adapt.methods.protocol import Context, Observation
from edge_adapt.methods.vida import (
    SCALES,
    UNCERTAINTY,
    ViDA,
    allotment,
    consistency,
    dropped,
    split,
    uncertainty,
)
from edge_adapt.runtime.loop import adapt
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail, batch_statistics

EPSILON = 1e-5
"""Of every norm in the tiny network."""


@pytest.fixture(scope="module")
def reference(reference_bundle) -> tuple[Bundle, Tail]:
    return reference_bundle, Tail(reference_bundle)


@pytest.fixture(scope="module")
def device(device_bundle) -> tuple[Bundle, Tail]:
    return device_bundle, Tail(device_bundle)


class Rolled:
    """Views without chance: the frames moved by one, two, three... pixels and dimmed as much."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, generator=None) -> Tensor:
        self.calls += 1
        move = 1 + (self.calls - 1) % 3
        return x.roll(move, -1) * (1 - 0.2 * move)


def made(where: tuple[Bundle, Tail], seed: int = 0, **settings: Any) -> ViDA:
    bundle, tail = where
    return ViDA(Context(bundle, lambda: tail, seed, {"rank_high": 4, "views": 2, **settings}))


def shifted(frames) -> np.ndarray:
    return (frames * np.float32(0.5) + np.float32(0.8)).astype(np.float32)


def seen(frames) -> Observation:
    """What the loop shows in reference mode."""
    return Observation(frames, None, frames)


def apart(method: ViDA, size: float = 0.05) -> LearnerState:
    """A state as it is well under way: student and teacher differ, and no adapter is zero."""
    draw = torch.Generator().manual_seed(4)

    def moved() -> dict[str, Tensor]:
        return {
            name: value + size * torch.randn(value.shape, generator=draw) for name, value in method.source.items()
        }

    return replace(method.init(), student=moved(), teacher=moved())


def plain(values: dict[str, Tensor], low: float, high: float, x: Tensor) -> Tensor:
    """The tiny network, batch norms by the batch, every pair beside its layer."""

    def beside(name: str, x: Tensor, **how: Any) -> Tensor:
        y = functional.conv2d(x, values[f"{name}.weight"], values.get(f"{name}.bias"), **how)
        for role, scale in (("low", low), ("high", high)):
            down, up = (values[f"adapter/{name}/{half}_{role}"] for half in ("down", "up"))
            y = y + scale * functional.conv2d(functional.conv2d(x, down, **how), up[:, :, None, None])
        return y

    def norm(name: str, x: Tensor) -> Tensor:
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        weight, bias = (values[f"{name}.{role}"][:, None, None] for role in ("weight", "bias"))
        return (x - mean) / (variance + EPSILON).sqrt() * weight + bias

    x = norm("stem.1", beside("stem.0", x, padding=1)).relu()
    x = x + norm("block.bn", beside("block.conv", x, padding=1)).relu()
    x = norm("alone", x).relu()
    x = functional.conv2d(x, values["depthwise.weight"], values["depthwise.bias"], 2, 1, groups=8)
    x = norm("depthwise_bn", x).relu()
    z = norm("point_bn", beside("point", x)).relu().mean((2, 3))
    y = z @ values["head.weight"].T + values["head.bias"]
    for role, scale in (("low", low), ("high", high)):
        y = y + scale * z @ values[f"adapter/head/down_{role}"].T @ values[f"adapter/head/up_{role}"].T
    return y


@pytest.mark.parametrize("threshold", [0.0, 1e9])
@pytest.mark.parametrize("loss", ["one_sided", "symmetric"])
def test_a_reference_step_is_that_of_the_published_method(reference, tiny_frames, threshold, loss):
    """Golden: allotment over views, the teacher's answer, both gradients, two learning rates, two averages."""
    bundle, tail = reference
    rates = {"lr": 2e-3, "lr_backbone": 1e-3, "momentum": 0.9, "momentum_adapters": 0.8}
    settings = {"rank_high": 4, "views": 3, "restore": 0.0, "threshold": threshold, "loss": loss, **rates}
    method = ViDA(Context(bundle, lambda: tail, 0, settings), augment=Rolled())
    state, frames = apart(method), shifted(tiny_frames[:16])
    step = method.step(state, seen(frames))

    teacher = {name: value.double() for name, value in state.teacher.items()}
    student = {name: value.double().requires_grad_() for name, value in state.student.items()}
    x, augment = torch.from_numpy(frames).double(), Rolled()
    views = torch.stack([plain(teacher, 1.0, 1.0, augment(x)) for _ in range(3)])
    u = 0.1 * float(((views - views.mean(0)) ** 2).sum(0).mean() / 2)
    low, high = (1 - u, 1 + u) if u >= threshold else (1 + u, 1 - u)
    target = plain(teacher, low, high, x)
    logits = plain(student, low, high, x)
    p, q = target.softmax(1), logits.softmax(1)
    value = -(p * q.log()).sum(1).mean()
    if loss == "symmetric":
        value = (value - (q * p.log()).sum(1).mean()) / 2
    gradients = dict(zip(student, torch.autograd.grad(value, list(student.values())), strict=True))

    assert 0.001 < u < 1
    assert float(step.state.own[UNCERTAINTY]) == pytest.approx(u, rel=1e-4)
    assert step.state.own[SCALES].tolist() == pytest.approx([low, high], rel=1e-5)
    assert step.logits is not None
    size = float(target.abs().max())
    np.testing.assert_allclose(step.logits, target.detach().numpy(), atol=1e-5 * size, rtol=0)
    for name, gradient in gradients.items():
        adapter = name.startswith("adapter/")
        rate, keep = (2e-3, 0.8) if adapter else (1e-3, 0.9)
        expected = student[name].detach() - rate * gradient / (gradient.abs() + 1e-8)
        averaged = keep * teacher[name] + (1 - keep) * expected
        clear = gradient.abs() > 1e-5  # Adam makes a full step of the sign of rounding
        for found, wanted, moved in (
            (step.state.student[name], expected, rate),
            (step.state.teacher[name], averaged, rate * (1 - keep)),
        ):
            assert float(((found - wanted) * clear).abs().max()) < 0.02 * moved + 1e-6, name


def test_the_answer_does_not_depend_on_the_step_that_follows_it(reference, tiny_frames):
    """Conformance 1: with lr = 1e3 the same logits."""
    methods = [made(reference, lr=lr, lr_backbone=lr, restore=0.0) for lr in (1e-5, 1e3)]
    one, other = (method.step(apart(method), seen(shifted(tiny_frames[:12]))) for method in methods)
    np.testing.assert_array_equal(one.logits, other.logits)
    assert not torch.equal(one.state.student["head.weight"], other.state.student["head.weight"])
    assert not torch.equal(one.state.student["adapter/head/up_low"], other.state.student["adapter/head/up_low"])


def test_zero_ups_are_the_identity_for_any_scales(reference, device, tiny_frames):
    """Conformance 4: U = 0 is the identity whatever the scales."""
    for where in (reference, device):
        method = made(where)
        h = torch.randn(4, *where[0].manifest.cut.shape, generator=torch.Generator().manual_seed(0))
        source = method.tail(h)
        for scales in ([1.0, 1.0], [0.2, 1.8], [2.0, 0.0]):
            assert torch.equal(method.tail(h, method._weights(method.source, torch.tensor(scales))), source)


@pytest.mark.parametrize("u", [0.01, 0.05, 0.3, 7.0])
def test_the_scales_are_allotted_by_uncertainty(u):
    """Conformance 4: both scales move, their sum is 2, and the high one is larger from the threshold on."""
    low, high = allotment(torch.tensor(u), 0.05).tolist()
    assert low + high == pytest.approx(2)
    assert (high > low) == (u >= 0.05)
    assert abs(high - 1) == pytest.approx(min(u, 1))
    official = allotment(torch.tensor(u), 0.05, both=False).tolist()
    assert official == pytest.approx([low, 1.0])


def test_official_compatibility_moves_the_low_scale_only(reference, tiny_frames):
    """Conformance 4, through a step."""
    for compat, still in (("paper", False), ("official", True)):
        method = made(reference, hka_compat=compat)
        scales = method.step(method.init(), seen(shifted(tiny_frames[:12]))).state.own[SCALES]
        assert float(scales[0]) != 1
        assert (float(scales[1]) == 1) == still


def test_uncertainty_is_a_tenth_of_the_unbiased_variance_of_logits():
    passes = np.random.default_rng(0).normal(size=(4, 6, 5))
    expected = 0.1 * np.var(passes, axis=0, ddof=1).mean()
    assert float(uncertainty(torch.from_numpy(passes))) == pytest.approx(expected)


def test_where_both_agree_only_the_symmetric_loss_has_a_gradient():
    target = torch.tensor([[2.0, 0.5, -1.0]])
    for symmetric in (False, True):
        logits = target.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(consistency(logits, target, symmetric=symmetric), logits)
        assert (float(gradient.abs().max()) > 1e-3) == symmetric
    assert float(gradient[0, 0]) < 0  # the likeliest becomes likelier


def test_noise_drops_its_share_and_keeps_the_mean():
    h = torch.ones(100, 1000)
    noisy = dropped(h, 0.2, torch.Generator().manual_seed(0))
    assert float((noisy == 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(noisy.mean()) == pytest.approx(1, abs=0.01)


def test_the_published_settings_are_the_defaults_of_reference_mode(reference, device):
    bundle, tail = reference
    method = ViDA(Context(bundle, lambda: tail))
    mode, config = method.mode, method.config
    assert (mode.rank_high, mode.views, mode.loss, mode.restore) == (128, 10, "one_sided", 0.1)
    assert (config.momentum, mode.momentum_adapters, config.lr_backbone, method.lr) == (0.999, 0.999, 1e-4, 1e-5)
    assert (config.rank_low, config.threshold, config.hka_compat) == (1, 0.05, "paper")
    backbone, adapters = split(method.source)
    assert set(backbone) == set(tail.parameters)
    assert {name.split("/")[1] for name in adapters} == {"stem.0", "block.conv", "point", "head"}
    assert not split(made(device).source)[0]


def test_cold_adapters_learn_up_first_and_down_from_the_second_step(device, tiny_frames):
    """U = 0 gives D no gradient on the first step; Adam moves U by its full rate."""
    predictor = Predictor(device[0], OnnxRuntimeEngine(device[0]))
    method = made(device, lr=1e-2, pull=0.0, moments={"alarm": 1e9})
    state, history = method.init(), []
    for at in range(0, 128, 8):
        state = method.step(state, predictor.look(shifted(tiny_frames)[at : at + 8], method.needs)).state
        predictor.apply(method.delta(state))
        if state.updates > len(history):
            history.append(state.student)
    assert len(history) >= 3

    def moves(role: str, before, after) -> list[bool]:
        return [not torch.equal(after[name], before[name]) for name in after if f"/{role}_" in name]

    assert all(moves("up", method.source, history[0]))
    assert not any(moves("down", method.source, history[0]))
    assert all(moves("down", history[0], history[1]))


def test_on_the_device_the_engine_answers_as_the_teacher(device, tiny_frames):
    bundle, tail = device
    predictor = Predictor(bundle, OnnxRuntimeEngine(bundle))
    method = made(device, lr=2e-2, momentum_adapters=0.5, moments={"alarm": 1e9})
    assert not method.answers
    frames, state = shifted(tiny_frames), method.init()
    for at in range(0, 128, 8):
        state = method.step(state, predictor.look(frames[at : at + 8], method.needs)).state
        predictor.apply(method.delta(state))
    assert state.updates >= 3
    delta = method.delta(state)
    assert set(delta.tail) == {"point.weight", "head.weight"}
    h = torch.from_numpy(predictor.trunk(frames[:16]).copy())
    engine = predictor.answer(frames[:16]).logits
    close = 1e-4 * np.abs(engine).max()
    for values, alike in ((state.teacher, True), (state.student, False), (method.source, False)):
        found = tail(h, method._weights(values, state.own[SCALES]), ports=delta).detach().numpy()
        assert (np.abs(found - engine).max() < close) == alike


@pytest.mark.parametrize("where", ["reference", "device"])
def test_the_same_seed_gives_the_same_answers(request, tiny_frames, where):
    place = request.getfixturevalue(where)
    bundle, frames = place[0], shifted(tiny_frames)

    def play(seed: int) -> np.ndarray:
        predictor = Predictor(bundle, OnnxRuntimeEngine(bundle))
        settings = {"lr": 2e-2, "momentum_adapters": 0.5, "momentum": 0.9}
        batches = (frames[at : at + 32] for at in range(0, 128, 32))
        return np.concatenate([answer.logits for answer in adapt(predictor, made(place, seed, **settings), batches)])

    first = play(0)
    assert np.array_equal(first, play(0))
    assert not np.array_equal(first, play(1))


def test_frames_that_are_not_finite_are_refused(reference, tiny_frames):
    method = made(reference)
    state = method.step(method.init(), seen(shifted(tiny_frames[:12]))).state
    broken = shifted(tiny_frames[:12])
    broken[3, 0, 0, 0] = np.nan
    refused = method.step(state, seen(broken))
    assert refused.state is state
    assert refused.events[0].startswith("refused")


@pytest.fixture
def warm(device_bundle, tmp_path):
    """Puts an adapter into a copy of a bundle."""

    def put(adapter, values) -> tuple[Bundle, Tail]:
        folder = tmp_path / "warm"
        shutil.copytree(device_bundle.path, folder)
        (folder / "adapters").mkdir()
        bundle = Bundle.load(folder)
        save(folder / "adapters" / "vida.safetensors", adapter, values, bundle)
        return bundle, Tail(bundle)

    return put


def drawn(adapter) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {name: 0.1 * torch.randn(value.shape, generator=draw) for name, value in adapter.init(draw).items()}


def test_a_bundle_brings_its_own_adapters(warm, device, tiny_frames):
    """The tail's weights hold them at scale 1, so that the first answers are those of source; other scales are not."""
    adapter = VidaPair(tuple(place for place in places(device[1]) if place.name == "point"), low=2, high=3)
    values = drawn(adapter)
    bundle, tail = warm(adapter, values)
    method = made((bundle, tail))
    assert method.adapter == adapter
    assert all(torch.equal(method.source[name], values[name]) for name in values)
    assert method.delta(method.init()).same_as(Delta.source())
    h = torch.randn(4, *bundle.manifest.cut.shape, generator=torch.Generator().manual_seed(0))
    ones, others = (method._weights(method.source, torch.tensor(scales)) for scales in ([1.0, 1.0], [0.5, 1.5]))
    torch.testing.assert_close(tail(h, ones), tail(h), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tail(h, others), tail(h), atol=1e-3)
    up, down = values["adapter/point/up_low"], values["adapter/point/down_low"]
    expected = -0.5 * (up @ down.flatten(1)).reshape(16, 8, 1, 1)
    more = 0.5 * (values["adapter/point/up_high"] @ values["adapter/point/down_high"].flatten(1)).reshape(16, 8, 1, 1)
    torch.testing.assert_close(others["point.weight"], tail.parameters["point.weight"] + expected + more)


def test_adapters_of_another_kind_or_damaged_are_refused(warm, device):
    adapter = LoRA(places(device[1]))
    bundle, tail = warm(adapter, drawn(adapter))
    with pytest.raises(ArtifactError, match="kind 'lora', expected 'vida'"):
        made((bundle, tail))
    Path(bundle.path / "adapters" / "vida.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=r"vida\.safetensors cannot be read"):
        made((bundle, tail))


@pytest.mark.parametrize(
    "wrong", [{"hka_compat": "x"}, {"loss": "x"}, {"views": 1}, {"noise": 1.0}, {"layers": ("nowhere",)}]
)
def test_wrong_settings_are_refused(device, wrong):
    with pytest.raises(ConfigError):
        made(device, **wrong)


def test_the_first_answer_of_reference_mode_is_that_of_batch_statistics(reference, tiny_frames):
    """Adapters are the identity then."""
    method, frames = made(reference), shifted(tiny_frames[:12])
    answer = method.step(method.init(), seen(frames)).logits
    with torch.no_grad():
        expected = method.tail(torch.from_numpy(frames), norm=batch_statistics).numpy()
    np.testing.assert_allclose(answer, expected, atol=1e-5)
