"""Classes that come one task after the other, with labels that come late: who learns them, and who forgets?

The trunk is frozen, and what it says of every frame at the cut is computed once, by the engine. The head starts
without any class; a method answers each batch, and is handed its labels some batches later. No frame comes twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.environment import environment
from benchmarks.replay import Progress, check_labels
from edge_adapt.bundle import Bundle
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import Context, Labelled, LearnsFromLabels
from edge_adapt.preprocess import Preprocess
from edge_adapt.streams.data import Dataset
from edge_adapt.tail import Tail

Array = NDArray[Any]

SCHEMA = 1
NOTE = (
    "The network was trained on all of these classes, so its frozen trunk knows features of classes that the head "
    "has not met. Figures tell methods apart; they are not those of a network that never saw the later classes."
)
CHUNK = 200
"""Frames that are scored at a time."""

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fine-tuning": ("lae", {"known": (), "momentum": 0.0, "freeze": 0, "local": False}),
    "fine-tuning, local": ("lae", {"known": (), "momentum": 0.0, "freeze": 0}),
    "lae": ("lae", {"known": ()}),
    "mos": ("mos", {"known": ()}),
}
"""Row -> method and settings. Fine-tuning is the same adapter and head without what LAE adds: the offline adapter,
the freeze phase, and (but for `local`) the loss among the classes of a task only."""


@dataclass(frozen=True, kw_only=True)
class Classes:
    """What to run."""

    methods: tuple[str, ...] = tuple(METHODS)
    tasks: int = 5
    train: int = 1000
    """Frames of each class that come with labels, at most."""
    test: int = 100
    """Frames of each class that are scored, at most."""
    batch_size: int = 24
    late: int = 4
    """Batches that are answered before the labels of one come."""
    seed: int = 0
    """Of the order of the classes, the order of the frames, and the adapters; 0 leaves the classes as numbered."""

    def __post_init__(self) -> None:
        for name, least in (("tasks", 1), ("train", 1), ("test", 1), ("batch_size", 1), ("late", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, expected {least} or more", remedy="use the default"
                )
        for name in self.methods:
            if name not in METHODS:
                raise ConfigError(f"there is no row {name!r}", remedy=f"known: {', '.join(METHODS)}")


@dataclass(frozen=True)
class Part:
    """Frames as the tail is given them, and their labels."""

    cut: Array
    labels: Array

    def __getitem__(self, rows: Any) -> Part:
        return Part(self.cut[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, classes: Array) -> Part:
        """The frames of some classes."""
        return self[np.isin(self.labels, classes)]


@dataclass(frozen=True)
class _Course:
    """What every row goes through."""

    tasks: tuple[Array, ...]
    """Classes of each."""
    train: Part
    test: Part


def class_incremental(
    bundle: Bundle,
    train: Dataset,
    test: Dataset,
    plan: Classes,
    *,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Run every row of the plan over the same tasks.

    Returns: JSON-able figures, accuracies in per cent.
    Raises: ConfigError for a bundle cut at the input or more tasks than classes, DataError for data without labels.
    """
    if bundle.is_reference:
        raise ConfigError(
            f"bundle {bundle.manifest.name!r} is cut at its input, there is no frozen trunk",
            remedy="export it with another cut",
        )
    rng = np.random.default_rng(plan.seed)
    learned, scored = (_chosen(bundle, data, count, rng) for data, count in ((train, plan.train), (test, plan.test)))
    tasks = _tasks(np.unique(learned.labels), plan)
    engine = OnnxRuntimeEngine(bundle)
    try:
        learned = _through_trunk(bundle, engine, learned, "train", progress)
        scored = _through_trunk(bundle, engine, scored, "test", progress)
    finally:
        engine.close()
    course = _Course(tuple(tasks), learned, scored)
    tail = Tail(bundle)
    rows = [_row(name, bundle, tail, course, plan, progress) for name in plan.methods]
    return {
        "schema": SCHEMA,
        "note": NOTE,
        "bundle": {"name": bundle.manifest.name, "id": bundle.id},
        "data": {"train": train.name, "test": test.name},
        "settings": {
            "train": plan.train,
            "test": plan.test,
            "batch_size": plan.batch_size,
            "late": plan.late,
            "seed": plan.seed,
        },
        "environment": environment(1, engine.description),
        "tasks": [task.tolist() for task in tasks],
        "rows": rows,
    }


def _chosen(bundle: Bundle, data: Dataset, count: int, rng: np.random.Generator) -> Part:
    """Some frames of each class, in random order; not through the trunk yet."""
    check_labels(bundle, data)
    if data.images is None or data.labels is None or not len(data.labels):
        raise DataError(f"{data.name} has no labelled frames", remedy="give an archive with `images` and `labels`")
    order = rng.permutation(len(data.labels))
    rows = np.concatenate([order[data.labels[order] == label][:count] for label in np.unique(data.labels)])
    rows = rng.permutation(rows)
    return Part(data.images[rows], data.labels[rows])


def _tasks(classes: Array, plan: Classes) -> list[Array]:
    """The classes in the order they come, split evenly."""
    if plan.tasks > len(classes):
        raise ConfigError(f"{plan.tasks} tasks, but only {len(classes)} classes", remedy="ask for fewer tasks")
    order = np.random.default_rng(plan.seed).permutation(classes) if plan.seed else classes
    return np.array_split(order, plan.tasks)


def _through_trunk(bundle: Bundle, engine: OnnxRuntimeEngine, part: Part, name: str, progress: Progress) -> Part:
    """The tensor at the cut for every frame, with source in force."""
    preprocess = Preprocess(bundle.manifest.input)
    made = []
    for start in range(0, len(part), CHUNK):
        seen = engine.observe(preprocess(part.cut[start : start + CHUNK]), cut=True)
        assert seen.cut is not None
        made.append(seen.cut)
        progress(f"trunk, {name}", min(start + CHUNK, len(part)), len(part))
    return Part(np.concatenate(made), part.labels)


def _row(
    name: str, bundle: Bundle, tail: Tail, course: _Course, plan: Classes, progress: Progress
) -> dict[str, Any]:
    """One method over all tasks: its accuracy on every task so far, after each."""
    kind, settings = METHODS[name]
    method = build(kind, Context(bundle, lambda: tail, plan.seed, settings))
    assert isinstance(method, LearnsFromLabels)
    state = method.init()
    online: list[Array] = []
    after: list[list[float]] = []
    done = 0
    for number, classes in enumerate(course.tasks):
        waiting: deque[Labelled] = deque()
        for batch in _batches(course.train.of(classes), plan.batch_size):
            online.append(_right(method.predict(state, batch.cut), batch.labels))
            waiting.append(Labelled(batch.cut, batch.labels, number))
            if len(waiting) > plan.late:
                state = method.learn_from(state, waiting.popleft()).state
            done += len(batch)
            progress(name, done, len(course.train))
        for labelled in waiting:
            state = method.learn_from(state, labelled).state
        after.append(_accuracies(partial(method.predict, state), course, number + 1))
    delta = method.delta(state)
    one_pass = _accuracies(lambda cut: tail.with_delta(torch.tensor(cut), delta).detach().numpy(), course, len(after))
    return _figures(name, after, np.concatenate(online), one_pass)


def _batches(part: Part, size: int) -> Iterator[Part]:
    for start in range(0, len(part), size):
        yield part[start : start + size]


def _accuracies(answer: Callable[[Array], Array], course: _Course, tasks: int) -> list[float]:
    """Of each of the first tasks, in per cent."""
    found = []
    for classes in course.tasks[:tasks]:
        right = [_right(answer(part.cut), part.labels) for part in _batches(course.test.of(classes), CHUNK)]
        found.append(round(float(np.concatenate(right).mean()) * 100, 2))
    return found


def _right(logits: Array, labels: Array) -> Array:
    return np.asarray(logits.argmax(1) == labels)


def _figures(name: str, after: list[list[float]], online: Array, one_pass: list[float]) -> dict[str, Any]:
    """`after[t][j]`: accuracy on task j when task t was learned. Tasks count alike.

    `one_pass` is what the engine answers at the end, with the delta in force.
    """
    last, old = after[-1], range(len(after) - 1)
    forgotten = [max(row[task] for row in after[task:]) - last[task] for task in old]
    return {
        "method": name,
        "last": round(float(np.mean(last)), 2),
        "average": round(float(np.mean([np.mean(row) for row in after])), 2),
        "old": round(float(np.mean(last[:-1])), 2) if len(last) > 1 else None,
        "new": last[-1],
        "forgetting": round(float(np.mean(forgotten)), 2) if forgotten else None,
        "one_pass": round(float(np.mean(one_pass)), 2),
        "online": round(float(online.mean()) * 100, 2),
        "after": after,
    }


def table(results: dict[str, Any]) -> str:
    """What `class_incremental` found, as plain text."""
    shown = ("last", "old", "new", "average", "forgetting", "one_pass", "online")
    lines = [
        f"{results['bundle']['name']}, {len(results['tasks'])} tasks, accuracy in % after the last one",
        f"{'':>20}" + "".join(f"{name:>11}" for name in shown),
    ]
    for row in results["rows"]:
        cells = ("-" if row[name] is None else f"{row[name]:.1f}" for name in shown)
        lines.append(f"{row['method']:>20}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join([*lines, "", f"Note: {results['note']}"])
