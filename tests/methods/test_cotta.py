"""CoTTA against a plain float64 one, its invariants, and the device mode against the engine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from edge_adapt.bundle import Bundle, InputSpec
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.methods.cotta import CoTTA, restored
from edge_adapt.methods.learner import LearnerState
from edge_adapt.methods.protocol import Context, Observation
from edge_adapt.preprocess import Preprocess
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail, batch_statistics
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


class Rolled:
    """Views without chance: the frames moved by one, two, three, one, two... pixels and dimmed as much."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        self.calls += 1
        move = 1 + (self.calls - 1) % 3
        return x.roll(move, -1) * (1 - 0.2 * move)


def published(batches: list[Array], *, confident: float, momentum: float, views: int = 3) -> list[Array]:
    """CoTTA without restoring, step by step, with nothing of the package: the teacher's logits before each step."""
    student, teacher, anchor = (without_running_statistics(tiny()) for _ in range(3))
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-3)
    augment = Rolled()
    answers = []
    for batch in batches:
        x = torch.from_numpy(batch).double()
        logits = student(x)
        with torch.no_grad():
            if float(anchor(x).softmax(1).max(1).values.mean()) < confident:
                target = torch.stack([teacher(augment(x)) for _ in range(views)]).mean(0)
            else:
                target = teacher(x)
        optimiser.zero_grad()
        (-(target.softmax(1) * logits.log_softmax(1)).sum(1)).mean().backward()
        optimiser.step()
        with torch.no_grad():
            for kept, value in zip(teacher.parameters(), student.parameters(), strict=True):
                kept.copy_(momentum * kept + (1 - momentum) * value)
        answers.append(target.numpy())
    return answers


def certainty(batch: Array) -> float:
    """Mean confidence of source under the statistics of the batch."""
    with torch.no_grad():
        return float(
            without_running_statistics(tiny())(torch.from_numpy(batch).double()).softmax(1).amax(1).mean()
        )


@pytest.mark.parametrize("unsure", ["all", "first"])
def test_reference_mode_is_cotta_as_published(reference, unsure):
    """With the views, and without from the second batch on. A momentum of 0.9 moves the teacher by the third.

    Never without: student and teacher start equal, the gradient is then zero but for rounding, and Adam makes steps
    of its sign, in float32 others than in float64.
    """
    batches = sorted((frames(12, seed) for seed in range(1, 4)), key=certainty)
    confident = 1.0 if unsure == "all" else (certainty(batches[0]) + certainty(batches[1])) / 2
    given = {"confident": confident, "momentum": 0.9}
    augment = Rolled()
    method = CoTTA(context(reference, **given, views=3, restore=0.0), augment=augment)
    assert method.answers
    state = method.init()
    for batch, expected in zip(batches, published(batches, **given), strict=True):
        step = method.step(state, seen(batch))
        # Float32 against float64: 1e-6 of logits of size 3, and Adam enlarges the rounding of small gradients.
        np.testing.assert_allclose(step.logits, expected, atol=5e-5, rtol=0)
        state = step.state
    assert augment.calls == (9 if unsure == "all" else 3)
    still = published(batches, confident=confident, momentum=1.0)[-1]
    assert np.abs(published(batches, **given)[-1] - still).max() > 5e-4  # so that the comparison can fail


def test_the_published_settings_are_the_defaults_of_reference_mode(reference, device):
    method = CoTTA(context(reference))
    config = method.config
    assert (method.views, method.momentum, method.lr) == (32, 0.999, 1e-3)
    assert (config.restore, config.confident, config.betas) == (0.01, 0.92, (0.9, 0.999))
    assert set(method.source) == set(method.tail.parameters)
    assert CoTTA(context(device)).views < 32


def test_the_answer_does_not_depend_on_the_step_that_follows_it(reference):
    slow, fast = (CoTTA(context(reference, lr=lr, views=2)) for lr in (1e-3, 1e3))
    one, other = slow.step(slow.init(), seen(frames(12))), fast.step(fast.init(), seen(frames(12)))
    np.testing.assert_array_equal(one.logits, other.logits)
    assert not torch.equal(one.state.student["linear.weight"], other.state.student["linear.weight"])


def test_a_teacher_that_keeps_everything_answers_as_source(reference):
    method = CoTTA(context(reference, restore=0.0, momentum=1.0, confident=0.0))
    state = method.init()
    for seed in range(3):
        batch = frames(12, seed)
        step = method.step(state, seen(batch))
        with torch.no_grad():
            source = method.tail(torch.from_numpy(batch), norm=batch_statistics).numpy()
        np.testing.assert_allclose(step.logits, source, atol=1e-6)
        state = step.state
    assert not torch.equal(state.student["linear.weight"], method.source["linear.weight"])


def test_restoring_everything_leaves_the_student_at_source(reference):
    method = CoTTA(context(reference, restore=1.0, views=2))
    state = method.init()
    for seed in range(3):
        state = method.step(state, seen(frames(12, seed))).state
        assert all(torch.equal(value, method.source[name]) for name, value in state.student.items())


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_the_share_that_is_restored(share):
    values, source = {"w": torch.ones(400, 250)}, {"w": torch.zeros(400, 250)}
    made = restored(values, source, share, torch.Generator().manual_seed(0))["w"]
    count, deviation = 100_000, np.sqrt(100_000 * share * (1 - share))
    assert abs(float((made == 0).sum()) - count * share) < 3 * deviation
    by_row = (made == 0).float().mean(1)  # scalar by scalar, not row by row
    assert float(by_row.max()) < share + 6 * np.sqrt(share * (1 - share) / 250)


def test_what_is_restored_changes_with_every_step_and_with_the_seed(reference):
    def zeros(seed: int, steps: int) -> list[Tensor]:
        method = CoTTA(Context(reference, lambda: Tail(reference), seed, {"restore": 0.5, "views": 0}))
        state, found = method.init(), []
        for _ in range(steps):
            state = method.step(state, seen(frames(12))).state
            found.append(state.student["conv2.weight"] == method.source["conv2.weight"])
        return found

    first, second = zeros(0, 2)
    assert not torch.equal(first, second)
    assert torch.equal(first, zeros(0, 1)[0])
    assert not torch.equal(first, zeros(1, 1)[0])


def test_logits_are_averaged_not_probabilities(reference):
    method = CoTTA(context(reference, confident=1.0, views=3), augment=Rolled())
    batch = frames(12)
    answer = method.step(method.init(), seen(batch)).logits
    views = Rolled()
    with torch.no_grad():
        each = torch.stack([method.tail(views(torch.from_numpy(batch)), norm=batch_statistics) for _ in range(3)])
    np.testing.assert_allclose(answer, each.mean(0).numpy(), atol=1e-5)
    assert np.abs(answer - each.softmax(2).mean(0).log().numpy()).max() > 0.01


@pytest.mark.parametrize(("confident", "calls"), [(0.0, 0), (1.0, 5)])
def test_views_are_made_only_where_source_is_unsure(reference, confident, calls):
    augment = Rolled()
    method = CoTTA(context(reference, confident=confident, views=5), augment=augment)
    method.step(method.init(), seen(frames(12)))
    assert augment.calls == calls


def test_the_reference_takes_a_batch_of_one_and_refuses_nan(reference):
    method = CoTTA(context(reference, views=2))
    step = method.step(method.init(), seen(frames(1)))
    assert step.logits.shape == (1, 5)
    assert not step.events
    broken = frames(4)
    broken[0, 0, 0, 0] = np.nan
    refused = method.step(step.state, seen(broken))
    assert refused.state is step.state
    assert refused.events[0].startswith("refused")


def test_on_the_device_the_engine_answers_as_the_teacher(device):
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    method = CoTTA(context(device, lr=0.02, momentum=0.5, views=2, moments={"alarm": 1e9}))
    assert not method.answers
    state, events = walk(method, predictor, [frames(40, seed) for seed in range(4)])
    assert state.updates >= 3
    assert not any(event.startswith("refused") for event in events)
    delta = method.delta(state)
    assert {"bn2.weight", "bn2.bias", "conv2.weight", "linear.weight", "linear.bias"} <= set(delta.tail)
    check = frames(16, 9)
    h = torch.from_numpy(predictor.trunk(check).copy())
    engine = predictor.answer(check).logits
    close = 1e-4 * np.abs(engine).max()
    np.testing.assert_allclose(method.tail.with_delta(h, delta).detach().numpy(), engine, atol=close, rtol=0)
    teacher = method.tail(h, dict(state.teacher), ports=delta).detach().numpy()
    np.testing.assert_allclose(teacher, engine, atol=close, rtol=0)
    assert (
        np.abs(method.tail(h, dict(state.student), ports=delta).detach().numpy() - engine).max() > 100 * close
    )


def test_views_on_the_device_go_through_the_trunk(device):
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    method = CoTTA(context(device, confident=1.0, views=3))
    look = predictor.look(frames(32), method.needs)
    before = predictor.passes
    method.step(method.init(), look)
    assert predictor.passes - before == 3 * 32


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("where", ["reference", "device"])
def test_a_step_is_pure(where, request):
    bundle = request.getfixturevalue(where)
    predictor = Predictor(bundle, OnnxRuntimeEngine(bundle))
    method = CoTTA(context(bundle, views=2, confident=1.0))
    look: Callable[[int], Observation] = (
        (lambda seed: seen(frames(40, seed)))
        if method.reference
        else (lambda seed: predictor.look(frames(40, seed), method.needs))
    )
    state = method.step(method.init(), look(1)).state
    observed, before, parameters = look(2), numbers(state), copy.deepcopy(method.tail.parameters)
    first, again = (method.step(state, observed) for _ in range(2))
    assert first.state.updates == state.updates + 1
    assert same(numbers(first.state), numbers(again.state))
    assert first.state.delta.same_as(again.state.delta)
    assert not same(numbers(first.state), before)
    assert same(numbers(state), before)
    assert same(method.tail.parameters, parameters)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_frames_are_refused_on_the_device(device, bad):
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    method = CoTTA(context(device, views=2))
    state, _ = walk(method, predictor, [frames(64)])
    broken = frames(32, 2)
    broken[3] = bad
    step = method.step(state, predictor.look(broken, method.needs))
    assert step.events[0].startswith("refused")
    assert method.delta(step.state) is method.delta(state)
    assert method.delta(step.state).is_finite()


def test_the_device_learns_frame_by_frame(device):
    predictor = Predictor(device, OnnxRuntimeEngine(device))
    method = CoTTA(context(device, views=1, window=16))
    state, events = walk(method, predictor, [frames(1, seed) for seed in range(40)])
    assert state.updates == 2
    assert len(state.frames) == 8
    assert not any(event.startswith("refused") for event in events)
