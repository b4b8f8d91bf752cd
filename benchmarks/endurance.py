"""Endurance: a corrupted stream, over and over. Does a method end no worse than source, and does its state stay small?

After Press et al. (NeurIPS 2023) and Sojka et al., who found that most methods fall below the model they began with
once a stream is long enough.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import scenarios
from benchmarks.environment import environment
from benchmarks.replay import check_labels
from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.protocol import Engine
from edge_adapt.engines.switching import settled
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import Answered, Context, Method, Observation, Step
from edge_adapt.plugins import ENGINES, find
from edge_adapt.preprocess import Preprocess
from edge_adapt.runtime.loop import adapt
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.streams.corruptions import CORRUPTIONS
from edge_adapt.streams.data import Dataset
from edge_adapt.tail import Tail

Array = NDArray[Any]
Progress = Callable[[str, int, int], None]

SCHEMA = 1
MARGIN = 0.5
"""Points of error above source that count as worse, as in the project's rule to do no harm."""
GROWTH = 1.05
"""The second half of the stream may see a state so many times the largest of the first."""


@dataclass(frozen=True, kw_only=True)
class Endurance:
    """What to run."""

    methods: tuple[str, ...] = ("moments", "tent", "cotta")
    frames: int = 200_000
    """Length of the stream; it ends with a whole round, however long that makes it."""
    batch_size: int = 50
    limit: int = 200
    """Frames of each shift, in one round."""
    severity: int = 5
    seed: int = 0
    corruptions: tuple[str, ...] = CORRUPTIONS
    engine: str = "onnxruntime"
    threads: int = 1
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Method -> values for its config, and its `guards`."""

    def __post_init__(self) -> None:
        for name in ("frames", "batch_size", "limit"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}, expected 1 or more", remedy="use the default")
        if not self.methods:
            raise ConfigError("no method was given", remedy="name one or more, such as moments,tent")


def endurance(
    bundle: Bundle, data: Dataset, plan: Endurance, *, progress: Progress = lambda what, done, total: None
) -> dict[str, Any]:
    """Run every method over the same long stream.

    Returns: for each method the error of every round in per cent beside the source's, the largest state in bytes in
    each half, the events by name, and whether it held: no worse than source in the last round, state not growing.
    Raises: DataError for data without labels, ConfigError for a method that the bundle cannot serve.
    """
    check_labels(bundle, data)
    frames, labels = _round(bundle, data, plan)
    tails: list[Tail] = []

    def tail() -> Tail:
        if not tails:
            tails.append(Tail(bundle))
        return tails[0]

    methods = {
        name: build(name, Context(bundle, tail, plan.seed, plan.settings.get(name, {}))) for name in plan.methods
    }
    rounds = -(-plan.frames // len(frames))
    engine: Engine = settled(find(ENGINES, plan.engine)(bundle, threads=plan.threads))
    try:
        wrong = [engine.run(batch).argmax(axis=1) for batch in _batches(frames, plan.batch_size, 1)]
        source = float((np.concatenate(wrong) != labels).mean() * 100)
        rows = []
        for name, method in methods.items():
            rows.append(_row(name, method, Predictor(bundle, engine), frames, labels, rounds, source, plan, progress))
    finally:
        engine.close()
    return {
        "schema": SCHEMA,
        "data": data.name,
        "bundle": {"name": bundle.manifest.name, "id": bundle.id},
        "settings": {
            "frames": rounds * len(frames),
            "rounds": rounds,
            "batch_size": plan.batch_size,
            "limit": plan.limit,
            "seed": plan.seed,
            **({"methods": plan.settings} if plan.settings else {}),
        },
        "environment": environment(plan.threads, engine.description),
        "source_error": round(source, 3),
        "rows": rows,
    }


def _round(bundle: Bundle, data: Dataset, plan: Endurance) -> tuple[Array, Array]:
    """Every shift once: frames as the network is fed, and labels. A short one is kept in memory, and repeated."""
    preprocess = Preprocess(bundle.manifest.input)
    shifts = list(scenarios.get("continual").shifts(data[: plan.limit], plan.severity, plan.seed, plan.corruptions))
    labels = [shift.labels for shift in shifts if shift.labels is not None]
    if not shifts or len(labels) != len(shifts):
        raise DataError(f"{data.name} has no labels, or no frames", remedy="give data that errors can be counted on")
    return np.concatenate([preprocess(shift.images[:]) for shift in shifts]), np.concatenate(labels)


def _batches(frames: Array, size: int, rounds: int) -> Iterator[Array]:
    for _ in range(rounds):
        for start in range(0, len(frames), size):
            yield frames[start : start + size]


def _row(
    name: str,
    method: Method[Any],
    predictor: Predictor,
    frames: Array,
    labels: Array,
    rounds: int,
    source: float,
    plan: Endurance,
    progress: Progress,
) -> dict[str, Any]:
    weighed = Weighed(method)
    errors: list[float] = []
    sizes: list[int] = []
    events: Counter[str] = Counter()
    predictor.engine.apply(predictor._merge(Delta.source()))
    answers = adapt(predictor, weighed, _batches(frames, plan.batch_size, rounds))
    finite = True
    for number in range(rounds):
        wrong = 0
        for start in range(0, len(frames), plan.batch_size):
            answer = next(answers)
            wrong += int((answer.logits.argmax(axis=1) != labels[start : start + plan.batch_size]).sum())
            events.update(answer.events)
            finite &= bool(np.isfinite(answer.logits).all())
        errors.append(round(wrong / len(frames) * 100, 3))
        sizes.append(weighed.take())
        progress(name, (number + 1) * len(frames), rounds * len(frames))
    half = -(-len(sizes) // 2)
    first, second = max(sizes[:half]), max(sizes[half:], default=0)
    no_worse, constant = errors[-1] <= source + MARGIN, second <= first * GROWTH
    return {
        "method": name,
        "error_mean": round(float(np.mean(errors)), 3),
        "error_last": errors[-1],
        "errors": errors,
        "state_bytes": [first, second],
        "events": dict(events.most_common()),
        "held": {"no_worse": no_worse, "state_constant": constant, "finite": finite},
    }


def print_endurance(results: dict[str, Any]) -> None:
    """One line for each method, on the terminal."""
    settings, source = results["settings"], results["source_error"]
    table = Table(box=box.SIMPLE_HEAD, title=f"{settings['frames']} frames, {settings['rounds']} rounds; error in %")
    for column in ("method", "first", "last", "mean", "source", "state kB", "guards", "held"):
        table.add_column(column, justify="left" if column in ("method", "guards", "held") else "right")
    for row in results["rows"]:
        guards = [f"{event.partition(': ')[2]} {count}" for event, count in row["events"].items() if "guard:" in event]
        missed = [name for name, held in row["held"].items() if not held]
        figures = (row["errors"][0], row["error_last"], row["error_mean"], source)
        table.add_row(
            row["method"],
            *(f"{figure:.1f}" for figure in figures),
            f"{max(row['state_bytes']) / 1024:.0f}",
            ", ".join(guards) or "none",
            f"not: {', '.join(missed)}" if missed else "yes",
        )
    Console().print(table)


class Weighed:
    """A method whose largest state is measured, at every look, in bytes."""

    name: ClassVar[str] = "weighed"

    def __init__(self, method: Method[Any]) -> None:
        self.method = method
        self.requires, self.needs = method.requires, method.needs
        self.watches, self.answers = method.watches, method.answers
        self._largest = 0

    def init(self) -> Any:
        return self.method.init()

    def look(self, state: Any, frames: int, passed: int) -> int:
        return self.method.look(state, frames, passed)

    def delta(self, state: Any) -> Delta:
        return self.method.delta(state)

    def step(self, state: Any, seen: Observation) -> Step[Any]:
        made = self.method.step(state, seen)
        self._largest = max(self._largest, size_of(made.state))
        return made

    def watch(self, state: Any, answered: Answered) -> Step[Any]:
        return self.method.watch(state, answered)

    def take(self) -> int:
        """The largest since the last call."""
        largest, self._largest = self._largest, 0
        return largest


def size_of(value: Any, seen: set[int] | None = None) -> int:
    """Bytes of all arrays and tensors in a state, each counted once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, torch.Tensor):
        return value.element_size() * value.numel()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return sum(size_of(getattr(value, item.name), seen) for item in dataclasses.fields(value))
    if hasattr(value, "items"):
        return sum(size_of(part, seen) for part in value.values())
    if isinstance(value, (list, tuple)):
        return sum(size_of(part, seen) for part in value)
    return 0
