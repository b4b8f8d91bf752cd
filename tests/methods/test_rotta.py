"""RoTTA and its memory against plain ones, and what the device remembers."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from edge_adapt.bundle import Bundle
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError
from edge_adapt.methods.learner import LearnerState
from edge_adapt.methods.protocol import Context, Observation
from edge_adapt.methods.rotta import ITEMS, Memory, RoTTA, RoTTAConfig
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail

Array = NDArray[Any]
STORE = 16


def context(bundle: Bundle, **settings: Any) -> Context:
    return Context(bundle, lambda: Tail(bundle), seed=3, settings={"store": STORE, **settings})


def seen(batch: Array) -> Observation:
    """What the loop shows in reference mode."""
    return Observation(batch, None, batch)


def batches(frames: Array, count: int = 5, size: int = 24) -> list[Array]:
    shifted = (frames * np.float32(0.6) + np.float32(0.4)).astype(np.float32)
    return [shifted[at * size : (at + 1) * size] for at in range(count)]


def rolled(x: Tensor, generator: Generator | None = None) -> Tensor:
    """A view without chance: moved by a pixel, and dimmed."""
    return x.roll(1, -1) * 0.8


@dataclass
class Item:
    what: Tensor
    label: int
    unsure: float
    age: int = 0


class PlainMemory:
    """CSTU as a list of items for each class."""

    def __init__(self, store: int, classes: int) -> None:
        self.store, self.share = store, store / classes
        self.lists: list[list[Item]] = [[] for _ in range(classes)]

    def score(self, age: int, unsure: float) -> float:
        return 1 / (1 + math.exp(-age / self.store)) + unsure

    def room(self, label: int, score: float) -> bool:
        if len(self.lists[label]) < self.share:
            if sum(map(len, self.lists)) < self.store:
                return True
            most = max(map(len, self.lists))
            rivals = [item for items in self.lists if len(items) == most for item in items]
        else:
            rivals = self.lists[label]
        worst = max(rivals, key=lambda item: self.score(item.age, item.unsure))
        if self.score(worst.age, worst.unsure) <= score:
            return False
        self.lists[worst.label] = [item for item in self.lists[worst.label] if item is not worst]
        return True

    def offer(self, item: Item) -> None:
        if self.room(item.label, self.score(0, item.unsure)):
            self.lists[item.label].append(item)
        for held in self.items():
            held.age += 1

    def items(self) -> list[Item]:
        return [item for items in self.lists for item in items]


@pytest.mark.parametrize(("store", "classes", "favourite"), [(16, 5, 0.7), (8, 3, 0.0), (8, 20, 0.0)])
def test_the_memory_is_the_published_one(store, classes, favourite):
    """Conformance 8: never more than it holds, no class over its share, the worst by its score gives way."""
    rng = np.random.default_rng(0)
    plain = PlainMemory(store, classes)
    memory = Memory({}, RoTTAConfig(store=store), classes, torch.zeros(2))
    full = []
    for number in range(150):
        label = 0 if rng.random() < favourite else int(rng.integers(classes))
        unsure = float(np.float32(rng.random()))
        what = torch.full((2,), float(number))
        full.append(memory.offer(what, torch.tensor(label), torch.tensor(unsure)))
        plain.offer(Item(what, label, unsure))
        taken = memory.taken
        mine = {
            (float(item[0]), int(label), int(age))
            for item, label, age in zip(memory.items[taken], memory.label[taken], memory.age[taken], strict=True)
        }
        assert mine == {(float(item.what[0]), item.label, item.age) for item in plain.items()}
        assert int(taken.sum()) <= store
        assert int(torch.bincount(memory.label[taken]).max()) <= math.ceil(store / classes)
        if number == 70:  # to a state and back
            memory = Memory(memory.tensors(), RoTTAConfig(store=store), classes, torch.zeros(2))
    assert [number for number, at in enumerate(full, 1) if at] == list(range(store, 151, store))


class RobustNorm(nn.Module):
    """Robust batch norm as a module."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.mean, self.variance = norm.running_mean.clone(), norm.running_var.clone()

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.mean, self.variance
        if self.training:
            mean = 0.95 * mean + 0.05 * x.mean((0, 2, 3))
            variance = 0.95 * variance + 0.05 * x.var((0, 2, 3), unbiased=False)
            self.mean, self.variance = mean.detach(), variance.detach()
        y = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return y * self.weight[:, None, None] + self.bias[:, None, None]


def robust(net: nn.Module) -> nn.Module:
    model = copy.deepcopy(net).double()
    for name, part in list(model.named_modules()):
        if isinstance(part, nn.BatchNorm2d):
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, RobustNorm(part))
    return model


def published(net: nn.Module, stream: list[Array], lr: float = 1e-3) -> list[Array]:
    """RoTTA step by step, frame by frame, with nothing of the package: the teacher's logits before each step."""
    student, teacher = robust(net), robust(net)
    affine = [value for part in student.modules() if isinstance(part, RobustNorm) for value in (part.weight, part.bias)]
    optimiser = torch.optim.Adam(affine, lr=lr)
    memory, count, answers = PlainMemory(STORE, 5), 0, []
    for batch in stream:
        x = torch.from_numpy(batch).double()
        teacher.eval()
        with torch.no_grad():
            logits = teacher(x)
        answers.append(logits.numpy())
        for frame, row in zip(x, logits, strict=True):
            p = row.softmax(0)
            memory.offer(Item(frame, int(row.argmax()), -float((p * p.log()).sum()) / math.log(5)))
            count += 1
            if count % STORE:
                continue
            student.train()
            teacher.train()
            items = memory.items()
            held = torch.stack([item.what for item in items])
            age = torch.tensor([item.age / STORE for item in items]).double()
            with torch.no_grad():
                target = teacher(held).softmax(1)
            losses = -(target * student(rolled(held)).log_softmax(1)).sum(1)
            optimiser.zero_grad()
            ((-age).exp() / (1 + (-age).exp()) * losses).mean().backward()
            optimiser.step()
            with torch.no_grad():
                for kept, value in zip(teacher.parameters(), student.parameters(), strict=True):
                    kept.copy_(0.9 * kept + 0.1 * value)
    return answers


def test_reference_mode_is_rotta_as_published(reference_bundle, tiny_net, tiny_frames):
    """And conformance 8: the teacher's statistics are its own."""
    method = RoTTA(context(reference_bundle, momentum=0.9), augment=rolled)
    stream, state = batches(tiny_frames), method.init()
    expected = published(tiny_net, stream)
    for batch, logits in zip(stream, expected, strict=True):
        step = method.step(state, seen(batch))
        # Float32 against float64, and Adam enlarges the rounding of small gradients.
        np.testing.assert_allclose(step.logits, logits, atol=1e-4, rtol=0)
        state = step.state
    assert np.abs(published(tiny_net, stream, lr=0.0)[-1] - expected[-1]).max() > 1e-3  # it can fail
    one, other = (state.own[f"{who}/block.bn.mean"] for who in ("student", "teacher"))
    assert not torch.allclose(one, other, atol=1e-3)


def test_the_published_settings_are_the_defaults_of_reference_mode(reference_bundle):
    method = RoTTA(Context(reference_bundle, lambda: Tail(reference_bundle)))
    config = method.config
    assert (config.store, method.momentum, method.lr, config.rate) == (64, 0.999, 1e-3, 0.05)
    assert (config.timeliness, config.uncertainty) == (1.0, 1.0)
    with pytest.raises(ConfigError, match=r"rotta\.store is 0"):
        RoTTA(context(reference_bundle, store=0))


def test_the_answer_does_not_depend_on_the_step_that_follows_it(reference_bundle, tiny_frames):
    """Conformance 1."""
    slow, fast = (RoTTA(context(reference_bundle, lr=lr)) for lr in (1e-3, 1e3))
    batch = seen(batches(tiny_frames)[0])
    one, other = slow.step(slow.init(), batch), fast.step(fast.init(), batch)
    np.testing.assert_array_equal(one.logits, other.logits)
    assert not torch.equal(one.state.student["alone.weight"], other.state.student["alone.weight"])


def learned(bundle: Bundle, stream: list[Array], **settings: Any) -> tuple[RoTTA, LearnerState, Predictor]:
    """The loop, with the last state at hand."""
    predictor, method = Predictor(bundle, OnnxRuntimeEngine(bundle)), RoTTA(context(bundle, window=8, **settings))
    state = method.init()
    for batch in stream:
        for at in range(0, len(batch), 8):
            step = method.step(state, predictor.look(batch[at : at + 8], method.needs))
            state = step.state
            assert not any(event.startswith("refused") for event in step.events)
            predictor.apply(method.delta(state))
    return method, state, predictor


def test_the_device_remembers_the_cut_in_half_precision_and_no_frame(device_bundle, tiny_frames):
    quiet = {"alarm": 1e9}
    stream = batches(tiny_frames)
    method, state, predictor = learned(device_bundle, stream, moments=quiet, lr=0.01)
    items = state.own[ITEMS]
    assert items.dtype == torch.float16
    assert items.shape == (STORE, *predictor.trunk(stream[0]).shape[1:])
    assert set(state.own) == {f"memory/{part}" for part in ("items", "label", "unsure", "age", "counted")}
    assert state.frames is None
    assert set(method.delta(state).tail) == set(method.source)
    first = learned(device_bundle, stream[:1], moments=quiet)[1]
    assert sum(v.nbytes for v in first.own.values()) == sum(v.nbytes for v in state.own.values())


def test_the_engine_answers_as_the_teacher(device_bundle, tiny_frames):
    stream = batches(tiny_frames)
    method, state, predictor = learned(device_bundle, stream, moments={"alarm": 1e9}, lr=0.05, momentum=0.5)
    h = torch.from_numpy(predictor.trunk(stream[0]).copy())
    teacher, student = (
        method.tail(h, dict(values), ports=method.delta(state)).numpy() for values in (state.teacher, state.student)
    )
    engine = predictor.answer(stream[0]).logits
    close = 1e-4 * np.abs(engine).max()
    np.testing.assert_allclose(engine, teacher, atol=close, rtol=0)
    assert np.abs(engine - student).max() > 10 * close


def test_another_domain_empties_the_memory(device_bundle, tiny_frames):
    method, state, _ = learned(device_bundle, batches(tiny_frames), moments={"alarm": 1e9})
    assert ITEMS in state.own
    assert not method._forgotten(state).own


def test_a_state_is_never_written(device_bundle, tiny_frames):
    method, state, predictor = learned(device_bundle, batches(tiny_frames, 2), moments={"alarm": 1e9})
    before = {name: value.clone() for name, value in state.own.items()}
    look = predictor.look(batches(tiny_frames)[3][:8], method.needs)
    first, again = (method.step(state, look).state for _ in range(2))
    assert all(torch.equal(value, before[name]) for name, value in state.own.items())
    assert all(torch.equal(value, again.own[name]) for name, value in first.own.items())
    assert all(torch.equal(value, again.student[name]) for name, value in first.student.items())
    assert not torch.equal(first.own[ITEMS], before[ITEMS])
