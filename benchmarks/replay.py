"""Offline replay: one bundle, one stream, several methods; error, time and memory of each, measured side by side."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import scenarios
from benchmarks.memory import PeakMemory
from benchmarks.scenarios import Scenario, Shift
from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.protocol import Engine
from edge_adapt.errors import ConfigError, DataError, did_you_mean
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import Context, Method
from edge_adapt.plugins import ENGINES, find
from edge_adapt.preprocess import Preprocess
from edge_adapt.runtime.loop import Answer, adapt
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.streams.corruptions import CORRUPTIONS
from edge_adapt.streams.data import Dataset
from edge_adapt.tail import Tail

Array = NDArray[Any]
Progress = Callable[[str, int, int], None]
"""Told (what, frames done, frames in all)."""

SCHEMA = 1
WINDOWS = 200
"""Points of an error curve."""
WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What to run."""

    scenario: str = "continual"
    methods: tuple[str, ...] = ("source", "moments")
    batch_size: int = 64
    limit: int | None = None
    """Frames of each shift."""
    severity: int = 5
    seed: int = 0
    corruptions: tuple[str, ...] = CORRUPTIONS
    engine: str = "onnxruntime"
    threads: int = 1
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Method -> values for its config."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch size is {self.batch_size}, expected 1 or more", remedy="use 1 for a camera")
        if not 1 <= self.severity <= 5:
            raise ConfigError(f"severity is {self.severity}, expected 1 to 5", remedy="the field reports 5")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}, expected 1 or more", remedy="leave it out for all frames")
        if not self.methods:
            raise ConfigError("no method was given", remedy="name one or more, such as source,moments")
        for name in self.corruptions:
            if name not in CORRUPTIONS:
                raise ConfigError(f"there is no corruption {name!r}", remedy=did_you_mean(name, CORRUPTIONS))


def replay(
    bundle: Bundle, data: Dataset, plan: Replay, *, progress: Progress = lambda what, done, total: None
) -> dict[str, Any]:
    """Run every method of the plan over the same frames.

    Returns: the form of results.json; errors in per cent, times in milliseconds a frame.
    """
    scenario = scenarios.get(plan.scenario)
    check_labels(bundle, data)
    tail = _lazy_tail(bundle)
    methods = {
        name: build(name, Context(bundle, tail, plan.seed, plan.settings.get(name, {}))) for name in plan.methods
    }
    shifts = _shifts(scenario, data, plan, progress)
    preprocess = Preprocess(bundle.manifest.input)
    preprocess(shifts[0].images[:1])
    engine: Engine = find(ENGINES, plan.engine)(bundle, threads=plan.threads)
    total = sum(len(shift.images) for shift in shifts)
    rows = []
    try:
        warm = preprocess(shifts[0].images[: plan.batch_size])

        def plain_inference() -> None:
            for _ in range(WARM_UP):
                engine.run(warm)

        for name, method in methods.items():
            memory = PeakMemory(plain_inference)
            predictor = Predictor(bundle, engine)
            score = _Score(name, shifts, total)
            for frames, shift, answer in _run(predictor, method, scenario, shifts, plan, preprocess):
                score.add(frames, shift, answer)
                progress(name, score.frames, total)
            rows.append(score.row(memory.extra_mb, predictor.passes))
            predictor.apply(Delta.source())
    finally:
        engine.close()
    return {
        "schema": SCHEMA,
        "scenario": plan.scenario,
        "data": data.name,
        "bundle": {"name": bundle.manifest.name, "id": bundle.id},
        "settings": {
            "batch_size": plan.batch_size,
            "severity": None if plan.scenario == "natural" or data.shifts else plan.severity,
            "seed": plan.seed,
            "limit": plan.limit,
            "mode": "reference" if bundle.is_reference else "device",
            **({"methods": plan.settings} if plan.settings else {}),
        },
        "environment": environment(plan.threads, engine.description),
        "shifts": _places(shifts),
        "rows": rows,
    }


def check_labels(bundle: Bundle, data: Dataset) -> None:
    """Raises: DataError if a label is no output of the model."""
    for labels in (data.labels, *data.shift_labels.values()):
        if labels is None or not len(labels):
            continue
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= bundle.manifest.outputs:
            raise DataError(
                f"{data.name}: labels go from {low} to {high}, the model has {bundle.manifest.outputs} outputs",
                remedy="use the data that belongs to this bundle",
            )


def _run(
    predictor: Predictor,
    method: Method[Any],
    scenario: Scenario,
    shifts: Sequence[Shift],
    plan: Replay,
    preprocess: Preprocess,
) -> Iterator[tuple[int, int, Answer]]:
    """Yield (frames, index of the shift, answer) for each batch; a batch never spans two shifts."""

    def batches(part: Sequence[Shift]) -> Iterator[Array]:
        for shift in part:
            for start in range(0, len(shift.images), plan.batch_size):
                yield preprocess(shift.images[start : start + plan.batch_size])

    sizes = [
        (index, min(plan.batch_size, len(shift.images) - start))
        for index, shift in enumerate(shifts)
        for start in range(0, len(shift.images), plan.batch_size)
    ]
    parts = [[shift] for shift in shifts] if scenario.reset else [shifts]
    answers = (answer for part in parts for answer in adapt(predictor, method, batches(part)))
    for (index, size), answer in zip(sizes, answers, strict=True):
        yield size, index, answer


class _Score:
    """Counts what was answered. The only place where labels are read."""

    def __init__(self, method: str, shifts: Sequence[Shift], total: int) -> None:
        self.method, self.shifts, self.total = method, shifts, total
        self.frames = 0
        self._place = 0
        self._shift = 0
        self._wrong: list[Array] = []
        self._answer: list[float] = []
        self._learn: list[float] = []
        self._events: list[dict[str, Any]] = []
        self._looked = 0
        self._started = time.perf_counter()

    def add(self, frames: int, shift: int, answer: Answer) -> None:
        if shift != self._shift:
            self._shift, self._place = shift, 0
        labels = self.shifts[shift].labels
        if labels is not None:
            expected = labels[self._place : self._place + frames]
            self._wrong.append(answer.logits.argmax(axis=1) != expected)
        self._answer.append(answer.answer_s * 1e3 / frames)
        self._learn.append(answer.learn_s * 1e3 / frames)
        self._events.extend({"frame": self.frames, "name": event} for event in answer.events)
        self._looked += answer.looked
        self.frames += frames
        self._place += frames

    def row(self, extra_mb: float | None, passes: int) -> dict[str, Any]:
        wrong = np.concatenate(self._wrong) if self._wrong else np.zeros(0, bool)
        errors: dict[str, float] = {}
        start = 0
        for shift in self.shifts if len(wrong) else ():
            if shift.labels is None:
                continue
            errors[shift.name] = round(float(wrong[start : start + len(shift.images)].mean()) * 100, 3)
            start += len(shift.images)
        window = max(32, -(-self.total // WINDOWS))
        ends = [min(stop, len(wrong)) for stop in range(window, len(wrong) + window, window)] if len(wrong) else []
        curve = [round(float(wrong[max(0, end - window) : end].mean()) * 100, 2) for end in ends]
        return {
            "method": self.method,
            "error_mean": round(float(np.mean(list(errors.values()))), 3) if errors else None,
            "errors": errors,
            "answer_ms": _milliseconds(self._answer),
            "learn_ms": _milliseconds(self._learn),
            "extra_mb": extra_mb,
            "frames": self.frames,
            "looked": self._looked,
            "passes": passes,
            "seconds": round(time.perf_counter() - self._started, 2),
            "timeline": {"frames": ends, "error": curve},
            "events": self._events,
        }


def _milliseconds(values: list[float]) -> dict[str, float]:
    array = np.array(values)
    return {
        "p50": round(float(np.percentile(array, 50)), 4),
        "p99": round(float(np.percentile(array, 99)), 4),
        "mean": round(float(array.mean()), 4),
    }


def _shifts(scenario: Scenario, data: Dataset, plan: Replay, progress: Progress) -> list[Shift]:
    data = data[: plan.limit] if plan.limit else data
    made = []
    for shift in scenario.shifts(data, plan.severity, plan.seed, plan.corruptions):
        made.append(shift)
        progress("making the stream", len(made), len(plan.corruptions))
    progress("making the stream", len(made), len(made))
    if not made or not len(made[0].images):
        raise DataError(f"{data.name} gives no frame for scenario {scenario.name}", remedy="check --data and --limit")
    return made


def _places(shifts: Sequence[Shift]) -> list[dict[str, Any]]:
    starts = np.cumsum([0, *(len(shift.images) for shift in shifts)])
    return [
        {"name": shift.name, "start": int(start), "frames": len(shift.images)}
        for shift, start in zip(shifts, starts, strict=False)
    ]


def _lazy_tail(bundle: Bundle) -> Callable[[], Tail]:
    made: list[Tail] = []

    def tail() -> Tail:
        if not made:
            made.append(Tail(bundle))
        return made[0]

    return tail


def environment(threads: int, engine: str) -> dict[str, Any]:
    """Where figures come from: they mean nothing without."""
    return {
        "edge_adapt": version("edge-adapt"),
        "engine": engine,
        "python": platform.python_version(),
        "torch": version("torch"),
        "onnxruntime": version("onnxruntime"),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _commit() -> str | None:
    """Commit of a source checkout, with a mark if it is not clean; None for an installed package."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
