"""MOS: merging once per step and never while answering, retrieval that stops, and a bank of domains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_adapt.bundle import Bundle
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError
from edge_adapt.methods.learner import Lesson
from edge_adapt.methods.mos import MOS, classes_noted, cosines, nearest, retrieve
from edge_adapt.methods.protocol import Context, Labelled, LearnsFromLabels
from edge_adapt.methods.tent import entropy
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail

Array = NDArray[Any]
UP = "adapter/point/up"


def mos(bundle: Bundle, **settings: Any) -> MOS:
    return MOS(Context(bundle, lambda: Tail(bundle), seed=3, settings=settings))


@pytest.fixture(scope="module")
def h(device_bundle: Bundle, tiny_frames: Array) -> Array:
    return Predictor(device_bundle, OnnxRuntimeEngine(device_bundle)).trunk(tiny_frames).copy()


def taught(method: MOS, h: Array, tasks: list[list[int]], steps: int = 3) -> Any:
    """The state after some steps on each task's labels."""
    state = method.init()
    for number, labels in enumerate(tasks):
        for _ in range(steps):
            step = method.learn_from(state, Labelled(h[: len(labels)], np.array(labels), number))
            assert not step.events
            state = step.state
    return state


def test_merging_happens_once_per_step_for_every_layer(device_bundle: Bundle, h: Array) -> None:
    """Golden: A <- 0.9 A + 0.1 mean of the entries, after the optimiser's step; upstream does it in every block."""
    state = taught(mos(device_bundle, known=()), h, [[0, 1] * 4, [2, 3] * 4])
    labelled = Labelled(h[:8], np.array([2, 3] * 4), 1)
    plain, merging = (mos(device_bundle, known=(), merge=share) for share in (0.0, 0.1))
    stepped = plain.learn_from(state, labelled).state.student
    merged = merging.learn_from(state, labelled).state.student
    assert [bool(full) for full in state.own["filled"][:2]] == [True, False]
    for name in merging.adapters:
        expected = 0.9 * stepped[name] + 0.1 * state.own[f"bank/{name}"][0]
        torch.testing.assert_close(merged[name], expected, atol=1e-7, rtol=1e-6)
        assert not torch.equal(merged[name], stepped[name])
    assert all(torch.equal(merged[name], stepped[name]) for name in merging.head)


def test_answering_changes_nothing(device_bundle: Bundle, h: Array) -> None:
    """Upstream merges while it evaluates too, and its stored adapters drift to their mean."""
    method = mos(device_bundle, known=(), merge=0.5)
    state = taught(method, h, [[0, 1] * 4, [2, 3] * 4])
    before = {name: value.clone() for name, value in {**state.student, **state.own}.items()}
    first, again = (method.predict(state, h[:64]) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert all(torch.equal(value, before[name]) for name, value in {**state.student, **state.own}.items())


def test_entries_of_the_bank_stay_as_their_tasks_left_them(device_bundle: Bundle, h: Array) -> None:
    method = mos(device_bundle, known=())
    one = taught(method, h, [[0, 1] * 4])
    later = taught(method, h, [[0, 1] * 4, [2, 3] * 4, [4] * 4])
    assert torch.equal(later.own[f"bank/{UP}"][0], one.student[UP])
    assert [bool(full) for full in later.own["filled"][:3]] == [True, True, False]
    assert later.own["task_of"].tolist() == [0, 0, 1, 1, 2]
    with pytest.raises(ConfigError, match="task 2 has no place in a bank of 2"):
        taught(mos(device_bundle, known=(), slots=2), h, [[0, 1], [2, 3], [4]], steps=1)


TASK_OF = torch.tensor([0, 0, 1, 1, 2])


def one_hot(classes: list[int]) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), 5).float()


def test_retrieval_stops_where_answer_and_adapter_agree() -> None:
    """Golden: frame 0 agrees at once; frame 1 goes 0 -> 1 -> 2 and stays there; frame 2 goes round until it may not."""
    says = {(0, 0): 1, (1, 0): 2, (1, 1): 4, (1, 2): 4, (2, 0): 3, (2, 1): 0}
    asked: list[tuple[int, int]] = []

    def answer(rows: Tensor, task: int) -> Tensor:
        asked.extend((row, task) for row in rows.tolist())
        return one_hot([says[row, task] for row in rows.tolist()])

    logits, tasks = retrieve(torch.tensor([0, 0, 0]), answer, TASK_OF, rounds=4)
    assert sorted(asked) == sorted([(0, 0), (1, 0), (1, 1), (1, 2), *[(2, 0), (2, 1)] * 2])
    assert logits.argmax(1).tolist() == [1, 4, 0]
    assert tasks.tolist() == [0, 2, 1]


def test_prototypes_are_compared_by_angle() -> None:
    features = torch.tensor([[2.0, 0.0], [3.0, 3.0]])
    made = cosines(features, torch.tensor([[0.0, 9.0], [0.1, 0.0], [1.0, 1.0]]), torch.tensor([True, True, False]))
    torch.testing.assert_close(made[:, :2], torch.tensor([[0.0, 1.0], [0.5**0.5, 0.5**0.5]]))
    assert made[:, 2].max() < -1000
    keys, filled = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([True, True, False])
    slot, likeness = nearest(torch.tensor([1.0, 2.0]), keys, filled)
    assert slot == 1
    assert likeness == pytest.approx(2 / 5**0.5)
    assert nearest(torch.ones(2), keys, torch.zeros(3, dtype=torch.bool))[1] == -np.inf


def test_statistics_of_classes_are_running_means() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=rng) * torch.tensor([1.0, 2.0, 3.0]) + 5
    zeros = torch.zeros(2, 3)
    own = {"prototype": zeros, "mean": zeros, "variance": zeros, "count": torch.zeros(2)}
    for part in x.split(20):
        own = classes_noted(own, torch.ones(20, dtype=torch.int64), part, 2 * part)
    assert own["count"].tolist() == [0, 60]
    torch.testing.assert_close(own["mean"][1], x.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own["prototype"][1], 2 * x.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own["variance"][1], x.var(0), atol=0, rtol=0.2)
    assert not own["mean"][0].any()


def test_the_answer_is_the_retrieved_one_and_the_prototypes(device_bundle: Bundle, h: Array) -> None:
    """Golden: softmax of the retrieved logits plus softmax of tasks x cosine."""
    method = mos(device_bundle, known=())
    assert isinstance(method, LearnsFromLabels)
    state = taught(method, h, [[0, 1] * 4, [2, 3] * 4], steps=5)
    x = torch.from_numpy(h[:24])
    features = method.tail.with_features(x)[1].detach()
    unit, prototypes = features / features.norm(dim=1, keepdim=True), state.own["prototype"][:4]
    cosine = unit @ (prototypes / prototypes.norm(dim=1, keepdim=True)).T
    for row in range(len(x)):
        task = int(cosine[row].argmax()) // 2
        for _ in range(4):
            values = dict(state.student) if task == 1 else {
                **state.student,
                **{name: state.own[f"bank/{name}"][0] for name in method.adapters},
            }
            logits = method.tail(x[row : row + 1], method.weights(values)).detach()[0]
            task, last = int(logits.argmax()) // 2, task
            if task == last:
                break
        expected = logits.softmax(0)[:4] + (2 * cosine[row]).softmax(0)
        np.testing.assert_allclose(np.exp(method.predict(state, h[row : row + 1]))[0, :4], expected, atol=1e-4)


def moved_to(method: MOS, state: Any, mean: Array) -> Any:
    """What a change of domain makes of a state, when the taps of the new one have this mean."""
    return method._forgotten(replace(state, moments=replace(state.moments, mean=mean)))


def having_learned(method: MOS, state: Any, value: float) -> Any:
    """As after a step in the domain at hand: an adapter that can be told from others, and its prototype."""
    values = {**state.student, UP: torch.full_like(state.student[UP], value)}
    own = {**state.own, "key": torch.tensor(state.moments.mean, dtype=torch.float32)}
    return replace(state, student=values, teacher=values, own=own)


def test_a_domain_that_comes_back_finds_its_adapter(device_bundle: Bundle) -> None:
    """Without labels: entries are keyed by the mean of the taps, and the nearest comes back."""
    method = mos(device_bundle, slots=2)
    dark, noisy, third = np.random.default_rng(0).normal(size=(3, device_bundle.channels))
    state = moved_to(method, method.init(), dark)
    assert not state.own["filled"].any()  # nothing was learned before, so there is nothing to keep
    state = moved_to(method, having_learned(method, state, 1.0), noisy)
    assert state.student is method.source
    assert state.own["filled"].tolist() == [True, False]
    state = moved_to(method, having_learned(method, state, 2.0), dark + 0.1 * noisy)
    assert int(state.own["slot"]) == 0
    assert (state.student[UP] == 1).all()
    state = moved_to(method, having_learned(method, state, 3.0), third)  # goes back to its own place
    assert state.own[f"bank/{UP}"][:, 0, 0].tolist() == [3, 2]
    state = moved_to(method, having_learned(method, state, 5.0), third)  # no place left: half of the nearest
    slot = int(state.own["slot"])
    assert float(state.own[f"bank/{UP}"][slot, 0, 0]) == (5 + [3, 2][slot]) / 2


def test_without_labels_the_adapter_learns_and_is_merged_softly(device_bundle: Bundle, h: Array) -> None:
    """The entropy goes down; the head and a labelled method's state stay."""
    x = torch.from_numpy(h[:32])
    softly, alone = (mos(device_bundle, reliable=1.0, lr=0.01, pull=0.0, merge=share) for share in (0.5, 0.0))
    start = having_learned(softly, softly.init(), 0.0)
    own = {**start.own, "filled": torch.ones_like(start.own["filled"])}
    tail = softly.tail

    def lesson() -> Lesson:
        return Lesson(
            frames=h[:32], cut=x, tail=lambda cut, values: tail(cut, dict(values)), trunk=lambda frames: frames
        )

    state = replace(start, own=own)
    (merged, before), (plain, _) = (method.learn(state, lesson()) for method in (softly, alone))
    for name in softly.adapters:
        torch.testing.assert_close(merged.student[name], plain.student[name] / 2)  # the entries are zeros
    assert all(torch.equal(plain.student[name], start.student[name]) for name in softly.head)
    after = tail(x, alone.weights(plain.student)).detach()
    assert float(entropy(after).mean()) < float(entropy(before).mean())
    labelled = mos(device_bundle, known=(0, 1))
    untouched = labelled.init()
    assert labelled.learn(untouched, lesson())[0] is untouched
