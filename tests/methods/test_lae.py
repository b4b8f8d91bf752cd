"""LAE against a plain float64 one, and what each of its three parts promises. Conformance 5, LAE's share of 1."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_adapt.bundle import Bundle
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.methods.lae import LAE, ensemble
from edge_adapt.methods.learner import LearnerState
from edge_adapt.methods.protocol import Context, Labelled, LearnsFromLabels, Observation
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail, batch_statistics

Array = NDArray[Any]
LABELLED = {"known": (), "freeze": 2, "momentum": 0.5}
UP, DOWN = "adapter/point/up", "adapter/point/down"


def lae(bundle: Bundle, **settings: Any) -> LAE:
    return LAE(Context(bundle, lambda: Tail(bundle), seed=3, settings=settings))


def seen(batch: Array) -> Observation:
    """What the loop shows in reference mode."""
    return Observation(batch, None, batch)


def cut(bundle: Bundle, frames: Array) -> Array:
    return Predictor(bundle, OnnxRuntimeEngine(bundle)).trunk(frames).copy()


def adapter_of(values: Any) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if name.startswith("adapter/")}


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def taught(method: LAE, h: Array, tasks: list[list[list[int]]]) -> list[LearnerState]:
    """The states after each batch of labels; frames are taken from `h` in turn."""
    state, states, at = method.init(), [], 0
    for number, batches in enumerate(tasks):
        for labels in batches:
            rows = np.arange(at, at + len(labels)) % len(h)
            step = method.learn_from(state, Labelled(h[rows], np.array(labels), number))
            assert not step.events
            state, at = step.state, at + len(labels)
            states.append(state)
    return states


@pytest.fixture(scope="module")
def h(device_bundle: Bundle, tiny_frames: Array) -> Array:
    return cut(device_bundle, tiny_frames)


def test_the_ensemble_is_the_greater_softmax() -> None:
    """Conformance 5: elementwise, after the softmax, not renormalised."""
    online, offline = torch.tensor([[4.0, 0.0, 1.0]]), torch.tensor([[10.0, 12.0, 10.0]])
    expected = np.maximum(online.softmax(1).numpy(), offline.softmax(1).numpy())
    np.testing.assert_allclose(ensemble(online, offline).exp().numpy(), expected, rtol=1e-6)
    assert expected.sum() > 1.5
    assert ensemble(online, offline).argmax() == 0  # the greater logit would say 1


def test_there_is_no_offline_adapter_in_the_first_task(device_bundle: Bundle, h: Array) -> None:
    """Conformance 5: absent in task 0; with task 1 it is a copy of the online one, and follows it from then on."""
    method = lae(device_bundle, **LABELLED)
    states = taught(method, h, [[[0, 1, 0, 1]] * 3, [[2, 3, 2, 3]] * 4])
    for state in states[:3]:
        assert not state.own["paired"]
        assert state.teacher is state.student
        tail = method.tail(torch.from_numpy(h[:8]), method.weights(state.student), ports=state.delta).detach()
        np.testing.assert_allclose(method.predict(state, h[:8]), tail.log_softmax(1).numpy(), atol=1e-5)
    assert all(state.own["paired"] for state in states[3:])
    assert same(adapter_of(states[3].teacher), adapter_of(states[2].student))
    for before, after in pairwise(states[3:]):
        middle = {n: (v + after.student[n]) / 2 for n, v in adapter_of(before.teacher).items()}
        assert all(torch.allclose(after.teacher[name], value) for name, value in middle.items())
    assert not torch.equal(states[-1].teacher[UP], states[-1].student[UP])
    assert torch.equal(states[-1].teacher["head.weight"], states[-1].student["head.weight"])


def test_the_freeze_phase_changes_the_head_only(device_bundle: Bundle, h: Array) -> None:
    """Conformance 5: from task 1 on, for `freeze` steps; in task 0 there is none."""
    states = taught(lae(device_bundle, **LABELLED), h, [[[0, 1, 0, 1]] * 2, [[2, 3, 2, 3]] * 4])
    adapters = [adapter_of(state.student) for state in states]
    heads = [state.student["head.weight"] for state in states]
    assert not same(adapters[0], adapters[1])
    assert same(adapters[1], adapters[2])
    assert same(adapters[1], adapters[3])
    assert not same(adapters[3], adapters[4])
    assert all(not torch.equal(one, other) for one, other in pairwise(heads))


class Slow:
    """LAE on labels step by step in float64, with torch's own Adam: the last layer's LoRA, the head, and no freeze."""

    def __init__(self, method: LAE) -> None:
        source = {name: value.double() for name, value in method.source.items()}
        self.weights = {name: value.double() for name, value in method.tail.parameters.items()}
        self.net = method.tail
        self.online = {name: value.clone().requires_grad_() for name, value in source.items()}
        self.offline: dict[str, Tensor] | None = None

    def logits(self, values: dict[str, Tensor], h: Tensor) -> Tensor:
        """Norm, relu, depthwise, norm, relu, 1 x 1, norm, relu, mean, head, by hand."""
        w, stored = self.weights, {name: value.double() for name, value in self.net.buffers.items()}

        def norm(x: Tensor, site: str) -> Tensor:
            mean, variance = stored[f"{site}.running_mean"], stored[f"{site}.running_var"]
            return nn.functional.batch_norm(x, mean, variance, w[f"{site}.weight"], w[f"{site}.bias"])

        x = norm(h, "alone").relu()
        x = norm(nn.functional.conv2d(x, w["depthwise.weight"], stride=2, padding=1, groups=8), "depthwise_bn").relu()
        point = w["point.weight"] + (values[UP] @ values[DOWN].flatten(1))[:, :, None, None]
        x = norm(nn.functional.conv2d(x, point), "point_bn").relu().mean((2, 3))
        return x @ values["head.weight"].T + values["head.bias"]

    def task(self, h: Tensor, batches: list[list[int]], momentum: float, *, first: bool) -> None:
        classes = sorted({label for labels in batches for label in labels})
        with torch.no_grad():
            self.online["head.bias"][classes] = 0.0
        if not first and self.offline is None:
            self.offline = {name: value.detach().clone() for name, value in self.online.items()}
        optimiser = torch.optim.Adam(list(self.online.values()), lr=0.01)
        for labels in batches:
            logits = self.logits(self.online, h)[:, classes]
            loss = nn.functional.cross_entropy(logits, torch.tensor([classes.index(label) for label in labels]))
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            if self.offline is not None:
                for name, value in self.online.items():
                    kept = 0.0 if name.startswith("head") else momentum
                    self.offline[name] = kept * self.offline[name] + (1 - kept) * value.detach()

    def answer(self, h: Tensor) -> Array:
        with torch.no_grad():
            both = [self.logits(values, h).softmax(1) for values in (self.online, self.offline) if values]
        return torch.stack(both).amax(0).log().numpy()


def test_two_tasks_against_a_plain_float64_one(device_bundle: Bundle, h: Array) -> None:
    """Golden: local cross-entropy, a fresh Adam for each task, accumulation with a shared head, the ensemble."""
    method = lae(device_bundle, known=(), freeze=0, momentum=0.8, labelled_lr=0.01)
    slow, state, x = Slow(method), method.init(), h[:12]
    for number, labels in enumerate(([0, 1] * 6, [2, 4, 2, 2] * 3)):
        slow.task(torch.from_numpy(x).double(), [labels] * 5, 0.8, first=number == 0)
        for _ in range(5):
            state = method.learn_from(state, Labelled(x, np.array(labels), number)).state
    got, expected = method.predict(state, h[:40]), slow.answer(torch.from_numpy(h[:40]).double())
    answered = [0, 1, 2, 4]
    # Float32 against float64: Adam makes steps of full size from gradients that are mostly rounding.
    np.testing.assert_allclose(got[:, answered], expected[:, answered], atol=2e-3, rtol=0)
    assert got[:, 3].max() < -1000
    first = lae(device_bundle, **LABELLED)
    assert np.abs(first.predict(first.init(), h[:40])[:, answered] - expected[:, answered]).max() > 0.1


def test_the_head_grows_by_the_classes_that_labels_name(device_bundle: Bundle, tiny_frames: Array, h: Array) -> None:
    """On the device the engine itself answers with the head as it is, in one pass, as the offline adapter."""
    method = lae(device_bundle, known=(4,), freeze=0, momentum=0.5)
    engine = OnnxRuntimeEngine(device_bundle)
    predictor = Predictor(device_bundle, engine)
    predictor.apply(method.delta(method.init()))
    assert set(predictor.answer(tiny_frames[:32]).logits.argmax(1)) == {4}
    state = taught(method, h, [[[0, 1, 0, 1]] * 3, [[2, 0, 2, 0]] * 3])[-1]
    predictor.apply(method.delta(state))
    answer = predictor.answer(tiny_frames[:32]).logits
    assert set(answer.argmax(1)) <= {0, 1, 2, 4}
    assert answer[:, 3].max() < -1000
    offline = method.tail(torch.from_numpy(h[:32]), method.weights(state.teacher)).detach().numpy()
    np.testing.assert_allclose(answer, offline, atol=1e-3, rtol=1e-4)
    predictor.apply(method.delta(lae(device_bundle).init()))


def test_old_classes_get_no_gradient_from_the_labels_of_a_task(device_bundle: Bundle, h: Array) -> None:
    states = taught(lae(device_bundle, **LABELLED), h, [[[0, 1, 0, 1]] * 2, [[2, 3, 2, 3]] * 3])
    assert torch.equal(states[1].student["head.weight"][:2], states[-1].student["head.weight"][:2])
    plain = lae(device_bundle, **{**LABELLED, "local": False})
    states = taught(plain, h, [[[0, 1, 0, 1]] * 2, [[2, 3, 2, 3]] * 3])
    assert not torch.equal(states[1].student["head.weight"][:2], states[-1].student["head.weight"][:2])


def test_a_step_on_labels_is_pure(device_bundle: Bundle, h: Array) -> None:
    method = lae(device_bundle, **LABELLED)
    state = taught(method, h, [[[0, 1]], [[2, 3]]])[-1]
    before = {name: value.clone() for name, value in {**state.student, **state.own}.items()}
    labelled = Labelled(h[:4], np.array([2, 3, 2, 3]), 1)
    one, other = (method.learn_from(state, labelled).state for _ in range(2))
    assert same(dict(one.student), dict(other.student))
    assert not same(dict(one.student), dict(state.student))
    assert same({**state.student, **state.own}, before)
    assert isinstance(method, LearnsFromLabels)


def test_bad_labels_are_refused(device_bundle: Bundle, h: Array) -> None:
    method = lae(device_bundle, **LABELLED)
    state = method.init()
    for labels in (np.array([0, 5]), np.array([0, -1]), np.array([0.0, 1.0]), np.array([0])):
        with pytest.raises(DataError, match="labels"):
            method.learn_from(state, Labelled(h[:2], labels))
    broken = h[:2].copy()
    broken[0, 0, 0, 0] = np.nan
    step = method.learn_from(state, Labelled(broken, np.array([0, 1])))
    assert step.state is state
    assert step.events[0].startswith("refused")
    with pytest.raises(ConfigError, match="known names class 7"):
        lae(device_bundle, known=(7,))
    with pytest.raises(ConfigError, match="momentum is 2"):
        lae(device_bundle, momentum=2)


def test_the_answer_does_not_depend_on_the_step_that_follows_it(reference_bundle: Bundle, tiny_frames: Array) -> None:
    """Conformance 1, for LAE without labels."""
    slow, fast = (lae(reference_bundle, lr=lr, freeze=0, reliable=1.0) for lr in (1e-3, 1e3))
    one, other = (method.step(method.init(), seen(tiny_frames[:32])) for method in (slow, fast))
    assert one.logits is not None
    np.testing.assert_array_equal(one.logits, other.logits)
    assert not same(dict(one.state.student), dict(other.state.student))


def test_without_labels_the_offline_adapter_teaches(reference_bundle: Bundle, tiny_frames: Array) -> None:
    """Golden: cross-entropy of the online answers to the sure ones of the offline one; both answer together."""
    warm = lae(reference_bundle, freeze=0, momentum=0.5, reliable=1.0, lr=0.01)
    state = warm.init()
    for start in (0, 32):
        state = warm.step(state, seen(tiny_frames[start : start + 32])).state
    assert not same(adapter_of(state.student), adapter_of(state.teacher))
    x = torch.from_numpy(tiny_frames[64:96])
    online = {name: value.clone().requires_grad_() for name, value in state.student.items()}
    logits = warm.tail(x, warm.weights(online), norm=batch_statistics)
    offline = warm.tail(x, warm.weights(state.teacher), norm=batch_statistics).detach()
    p = offline.double().softmax(1)
    entropies = -(p * p.log()).sum(1)
    threshold = float(entropies.sort().values[11:13].mean())  # between two frames, so that rounding decides nothing
    sure = entropies < threshold
    method = lae(reference_bundle, freeze=0, momentum=0.5, reliable=threshold / np.log(5), lr=0.01)
    loss = -logits[sure].log_softmax(1)[torch.arange(int(sure.sum())), p[sure].argmax(1)].mean()
    gradient = torch.autograd.grad(loss, online[UP])[0]
    step = method.step(state, seen(tiny_frames[64:96]))
    kept = state.adam.first[UP]
    torch.testing.assert_close(step.state.adam.first[UP], 0.9 * kept + 0.1 * gradient, atol=1e-6, rtol=1e-4)
    expected = np.maximum(logits.detach().softmax(1).numpy(), p.numpy())
    np.testing.assert_allclose(np.exp(step.logits), expected, atol=1e-5)


def test_without_labels_the_head_goes_first(reference_bundle: Bundle, tiny_frames: Array) -> None:
    """Conformance 5, for the first batches of a stream."""
    method = lae(reference_bundle, freeze=2, reliable=1.0)
    state, states = method.init(), []
    for start in (0, 32, 64):
        state = method.step(state, seen(tiny_frames[start : start + 32])).state
        states.append(state)
    assert same(adapter_of(states[1].student), adapter_of(method.source))
    assert not torch.equal(states[1].student["head.weight"], method.source["head.weight"])
    assert not same(adapter_of(states[2].student), adapter_of(method.source))


def test_unsure_answers_teach_nothing(reference_bundle: Bundle, tiny_frames: Array) -> None:
    method = lae(reference_bundle, reliable=0.0)
    state = method.init()
    step = method.step(state, seen(tiny_frames[:32]))
    assert step.state is state
    assert not step.events


def test_what_labels_taught_outlives_a_change_of_domain(device_bundle: Bundle, h: Array) -> None:
    method = lae(device_bundle, **LABELLED)
    state = taught(method, h, [[[0, 1, 0, 1]] * 2])[-1]
    assert method._forgotten(state).student is state.student
    free = lae(device_bundle)
    moved = free._accumulated(free.init(), {"head.bias": torch.ones(5)}, free.init().adam)
    assert free._forgotten(moved).student is free.source
    assert int(free._forgotten(moved).own["frozen"]) == free.freeze == 2
