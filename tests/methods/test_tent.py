"""TENT against a plain float64 one, Adam against torch's, and the device mode against the engine."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_adapt.bundle import Bundle, InputSpec
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError
from edge_adapt.methods.learner import LearnerState
from edge_adapt.methods.moments import Moments
from edge_adapt.methods.optim import AdamState, adam
from edge_adapt.methods.protocol import Context, Observation
from edge_adapt.methods.tent import Tent, entropy
from edge_adapt.preprocess import Preprocess
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail
from exporters.export import export, from_module

Array = NDArray[Any]
SPEC = InputSpec(shape=(3, 16, 16), scale=255.0, mean=(0.5,) * 3, std=(0.25,) * 3)


class Tiny(nn.Module):
    """conv-norm-relu twice, pool, linear: 3 -> 8 -> 8 -> 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


def tiny() -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Tiny()
        for norm in (module.bn1, module.bn2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            nn.init.normal_(norm.running_mean, std=0.2)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(module.linear.weight, std=1.0)
    return module.eval()


def raw(count: int, seed: int = 0) -> Array:
    """Smooth random pictures, uint8 [N, 16, 16, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3))
    return np.kron(coarse, np.ones((1, 4, 4, 1))).astype(np.uint8)


def frames(count: int, seed: int = 1, contrast: float = 0.5) -> Array:
    """Network input of another domain than `raw`."""
    return (contrast * Preprocess(SPEC)(raw(count, seed)) + 0.3).astype(np.float32)


def made(folder: Path, cut: str) -> Bundle:
    model = from_module(tiny(), "tiny", SPEC, cut=cut)
    return Bundle.load(export(model, folder / cut, calibration=raw(64), cut=cut))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return made(tmp_path_factory.mktemp("bundle"), "input")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return made(tmp_path_factory.mktemp("bundle"), "relu1")


def context(bundle: Bundle, **settings: Any) -> Context:
    return Context(bundle, lambda: Tail(bundle), seed=3, settings=settings)


def seen(batch: Array) -> Observation:
    """What the loop shows in reference mode."""
    return Observation(batch, None, batch)


def without_running_statistics(module: Tiny) -> Tiny:
    """In float64, every norm by its own batch."""
    module = copy.deepcopy(module).double().train()
    for norm in (module.bn1, module.bn2):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    return module


def walk(method: Any, predictor: Predictor, batches: list[Array]) -> tuple[LearnerState, list[str]]:
    """The loop, with the last state at hand."""
    state, passed, events = method.init(), 0, []
    for batch in batches:
        rest = batch
        while len(rest):
            count = method.look(state, len(rest), passed)
            if not count:
                passed += len(rest)
                break
            step = method.step(state, predictor.look(rest[:count], method.needs))
            state, passed, rest = step.state, 0, rest[count:]
            events += step.events
            predictor.apply(method.delta(state))
    return state, events


def numbers(state: LearnerState) -> dict[str, Tensor]:
    """Copies of all that a step could have written."""
    groups = {
        "student": state.student,
        "teacher": state.teacher,
        "m": state.adam.first,
        "v": state.adam.second,
    }
    return {
        f"{group}/{name}": value.clone() for group, values in groups.items() for name, value in values.items()
    }


def published(batches: list[Array], lr: float = 1e-3) -> list[Array]:
    """TENT step by step, with nothing of the package: the logits before each step."""
    model = without_running_statistics(tiny())
    affine = [value for norm in (model.bn1, model.bn2) for value in (norm.weight, norm.bias)]
    optimiser = torch.optim.Adam(affine, lr=lr)
    answers = []
    for batch in batches:
        logits = model(torch.from_numpy(batch).double())
        p = logits.softmax(1)
        optimiser.zero_grad()
        (-(p * p.log()).sum(1).mean()).backward()
        optimiser.step()
        answers.append(logits.detach().numpy())
    return answers


def test_reference_mode_is_tent_as_published(reference):
    method = Tent(context(reference))
    assert method.answers
    batches = [frames(12, seed) for seed in range(1, 4)]
    state = method.init()
    for batch, expected in zip(batches, published(batches), strict=True):
        step = method.step(state, seen(batch))
        # Float32 against float64: 1e-6 of logits of size 3, and Adam enlarges the rounding of small gradients.
        np.testing.assert_allclose(step.logits, expected, atol=2e-5, rtol=0)
        state = step.state
    still = published(batches, lr=0.0)[-1]
    assert np.abs(published(batches)[-1] - still).max() > 1e-3  # so that the comparison can fail


def test_the_answer_does_not_depend_on_the_step_that_follows_it(reference):
    batch = seen(frames(12))
    slow, fast = (Tent(context(reference, lr=lr)) for lr in (1e-3, 1e3))
    one, other = slow.step(slow.init(), batch), fast.step(fast.init(), batch)
    np.testing.assert_array_equal(one.logits, other.logits)
    assert not torch.equal(one.state.student["bn1.weight"], other.state.student["bn1.weight"])


def test_only_norms_learn_and_source_is_never_written(reference):
    method = Tent(context(reference))
    assert set(method.source) == {"bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"}
    before = {name: value.clone() for name, value in method.tail.parameters.items()}
    method.step(method.init(), seen(frames(12)))
    assert all(torch.equal(value, before[name]) for name, value in method.tail.parameters.items())


def test_the_reference_takes_a_batch_of_one_and_refuses_nan(reference):
    method = Tent(context(reference))
    step = method.step(method.init(), seen(frames(1)))
    assert step.logits.shape == (1, 5)
    assert not step.events
    broken = frames(4)
    broken[0, 0, 0, 0] = np.nan
    refused = method.step(step.state, seen(broken))
    assert refused.state is step.state
    assert refused.events[0].startswith("refused")


def test_entropy_of_a_uniform_and_of_a_certain_answer():
    assert entropy(torch.zeros(1, 5)).item() == pytest.approx(np.log(5))
    assert entropy(torch.tensor([[200.0, 0, 0, 0, 0]])).item() == 0


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_adam_is_that_of_torch(betas):
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Tensor] = {
        "a": torch.randn(4, 3, generator=generator),
        "b": torch.randn(5, generator=generator),
    }
    start = {name: value.clone() for name, value in values.items()}
    theirs = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    optimiser = torch.optim.Adam(theirs.values(), lr=0.01, betas=betas)
    state = AdamState()
    ours = values
    for _ in range(20):
        gradients = {name: torch.randn(value.shape, generator=generator) for name, value in values.items()}
        for name, value in theirs.items():
            value.grad = gradients[name].clone()
        optimiser.step()
        ours, state = adam(ours, gradients, state, lr=0.01, betas=betas)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.detach(), atol=1e-6, rtol=0)
        assert torch.equal(values[name], start[name])
    assert state.steps == 20


def test_on_the_device_the_engine_answers_as_the_tail_learned(device):
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    method = Tent(context(device, lr=0.02))
    assert not method.answers
    state, events = walk(method, predictor, [frames(40, seed) for seed in range(4)])
    assert state.updates >= 3
    assert not any(event.startswith("refused") for event in events)
    delta = method.delta(state)
    assert set(delta.tail) == {"bn2.weight", "bn2.bias"}
    assert "ports/scale" in delta
    check = frames(16, 9)
    tailed = method.tail.with_delta(torch.from_numpy(predictor.trunk(check).copy()), delta).numpy()
    engine = predictor.answer(check).logits
    np.testing.assert_allclose(tailed, engine, atol=1e-4 * np.abs(engine).max(), rtol=0)
    plain = method.tail(torch.from_numpy(predictor.trunk(check).copy()), ports=delta).numpy()
    assert np.abs(plain - engine).max() > 100 * np.abs(tailed - engine).max()


def test_entropy_goes_down_on_the_device(device):
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    method = Tent(context(device, lr=0.02, pull=0.0))
    batches = [frames(40, seed) for seed in range(6)]
    state, _ = walk(method, predictor, batches)
    learned = entropy(torch.from_numpy(predictor.answer(batches[0]).logits)).mean()
    predictor.apply(method.moments.delta(state.moments))
    assert learned < entropy(torch.from_numpy(predictor.answer(batches[0]).logits)).mean()


def test_a_step_is_pure(device):
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    method = Tent(context(device))
    state, _ = walk(method, predictor, [frames(70, 1)])
    look = predictor.look(frames(32, 2), method.needs)
    before = numbers(state)
    first, again = (method.step(state, look).state for _ in range(2))
    assert first.updates == state.updates + 1
    assert first.delta.same_as(again.delta)
    assert not first.delta.same_as(state.delta)
    assert all(torch.equal(value, before[name]) for name, value in numbers(state).items())


def test_small_looks_are_gathered_until_they_are_a_window(device):
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    method = Tent(context(device, window=8))
    state = method.init()
    for count in range(1, 9):
        assert state.updates == 0
        state = method.step(state, predictor.look(frames(1, count), method.needs)).state
        predictor.apply(method.delta(state))
    assert state.updates == 1
    assert state.frames is None


def test_moments_sees_what_it_would_see_alone(device):
    """Between its looks frames are looked at for learning, which it is not told of."""
    quiet = {"start": 8, "period": 4, "group": 2}
    method, alone = Tent(context(device, more=2, moments=quiet)), Moments(context(device, **quiet))
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    state, inner = method.init(), alone.init()
    passed = apart = 0
    kinds = ""
    for position in range(40):
        mine, theirs = method.look(state, 1, passed), alone.look(inner, 1, apart)
        look = predictor.look(frames(1, position), method.needs)
        assert mine >= theirs
        kinds += "m" if theirs else "l" if mine else "."
        passed, apart = 0 if mine else passed + 1, 0 if theirs else apart + 1
        if mine:
            state = method.step(state, look).state
        if theirs:
            inner = alone.step(inner, look).state
        np.testing.assert_array_equal(state.moments.mean, inner.mean)
    assert "mll.mll.mll." in kinds


def test_a_delta_is_the_same_object_while_nothing_changed(device):
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    method = Tent(context(device, moments={"start": 8}))
    state = method.init()
    for _ in range(2):
        state = method.step(state, predictor.look(frames(8), method.needs)).state
    assert method.delta(state) is method.delta(state)
    assert state.owed
    later = method.step(state, predictor.look(frames(2, 2), method.needs)).state
    assert method.delta(later) is method.delta(state)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_frames_are_refused_on_the_device(device, bad):
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    method = Tent(context(device))
    state, _ = walk(method, predictor, [frames(64)])
    broken = frames(32, 2)
    broken[3] = bad
    step = method.step(state, predictor.look(broken, method.needs))
    assert step.events[0].startswith("refused")
    assert method.delta(step.state) is method.delta(state)
    assert numbers(step.state).keys() == numbers(state).keys()


def test_a_step_that_diverges_is_refused(device):
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    method = Tent(context(device, lr=1e39))
    step = method.step(method.init(), predictor.look(frames(40), method.needs))
    assert "refused: the step is not finite" in step.events
    assert not method.delta(step.state).tail


def test_the_pull_goes_back_to_source(device):
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    free, bound = (Tent(context(device, lr=0.01, pull=pull)) for pull in (0.0, 1.0))
    look = predictor.look(frames(40), free.needs)
    assert not torch.equal(
        free.step(free.init(), look).state.student["bn2.weight"], free.source["bn2.weight"]
    )
    held = bound.step(bound.init(), look).state.student
    torch.testing.assert_close(held["bn2.weight"], bound.source["bn2.weight"])


def test_unreliable_frames_teach_nothing(device):
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    method = Tent(context(device, reliable=0.0))
    step = method.step(method.init(), predictor.look(frames(40), method.needs))
    assert step.state.updates == 0
    assert step.state.frames is None


def test_a_change_of_domain_forgets_old_gradients_and_frames(device, monkeypatch):
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    method = Tent(context(device, lr=0.01, keep=0.5))
    state, _ = walk(method, predictor, [frames(68)])
    assert state.adam.steps
    assert state.frames is not None
    plain = Moments.step
    monkeypatch.setattr(
        Moments, "step", lambda self, *given: replace(plain(self, *given), events=("domain change",))
    )
    after = method.step(state, predictor.look(frames(3, 5, contrast=2.0), method.needs)).state
    assert after.adam.steps == 0
    assert len(after.frames) == 3
    halfway = (state.student["bn2.bias"] + method.source["bn2.bias"]) / 2
    torch.testing.assert_close(after.student["bn2.bias"], halfway)
    np.testing.assert_allclose(method.delta(after).tail["bn2.bias"], halfway.numpy(), atol=1e-6)


def test_settings_are_checked(device):
    with pytest.raises(ConfigError, match="no setting 'lrr'"):
        Tent(context(device, lrr=1.0))
    with pytest.raises(ConfigError, match="window is 0"):
        Tent(context(device, window=0))
    with pytest.raises(ConfigError, match="no setting 'memry'"):
        Tent(context(device, moments={"memry": 3}))


def test_the_window_s_own_statistics_can_be_learned_under(device):
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    look = predictor.look(frames(40), Tent(context(device)).needs)
    biases = []
    for statistics in ("ports", "batch"):
        method = Tent(context(device, statistics=statistics))
        biases.append(method.step(method.init(), look).state.student["bn2.bias"])
    assert not torch.equal(*biases)
    with pytest.raises(ConfigError, match="statistics is 'both'"):
        Tent(context(device, statistics="both"))


def test_a_change_of_domain_goes_back_to_source_by_default(device, monkeypatch):
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    method = Tent(context(device))
    state, _ = walk(method, predictor, [frames(68)])
    assert method.delta(state).tail
    plain = Moments.step
    monkeypatch.setattr(
        Moments, "step", lambda self, *given: replace(plain(self, *given), events=("domain change",))
    )
    after = method.step(state, predictor.look(frames(3, 5), method.needs)).state
    assert not method.delta(after).tail
