"""Offline replay: one bundle, one stream, several methods; error, time and memory of each, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks import scenarios
from benchmarks.costs import Energy, Kept, PlainInference
from benchmarks.environment import environment
from benchmarks.estimate import Estimated
from benchmarks.late import LateLabels
from benchmarks.memory import PeakMemory
from benchmarks.replayed import BASELINE
from benchmarks.scenarios import Scenario, Shift
from benchmarks.scenarios.foreign import NOISE, foreign_images
from benchmarks.score import Score, expected_of
from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.protocol import Engine
from edge_adapt.engines.switching import settled
from edge_adapt.errors import ConfigError, DataError, did_you_mean
from edge_adapt.methods.catalogue import NO_ROUTER, ROUTER, build
from edge_adapt.methods.optim import tallied
from edge_adapt.methods.protocol import Context, Method
from edge_adapt.plugins import ENGINES, ROUTERS, find, names
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
WARM_UP = 3
PLAIN_SHARE = 100
"""Plain inference is timed with one batch for so many of the stream, before it and after it."""


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
    corruptions: tuple[str, ...] | None = None
    """None: those of the scenario."""
    router: str = NO_ROUTER
    """What chooses among the entries of a bank, around every method but source."""
    engine: str = "onnxruntime"
    threads: int = 1
    estimate: bool = False
    """Estimate the error as if there were no labels, also where there are: to compare both."""
    label_delay: int | None = None
    """Frames after which the true label of a frame comes, for methods that learn from such; None: labels never come."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Method -> values for its config."""

    def __post_init__(self) -> None:
        if self.label_delay is not None and self.label_delay < 0:
            raise ConfigError(
                f"label delay is {self.label_delay}, expected 0 or more frames", remedy="leave it out for no labels"
            )
        if self.batch_size < 1:
            raise ConfigError(f"batch size is {self.batch_size}, expected 1 or more", remedy="use 1 for a camera")
        if not 1 <= self.severity <= 5:
            raise ConfigError(f"severity is {self.severity}, expected 1 to 5", remedy="the field reports 5")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}, expected 1 or more", remedy="leave it out for all frames")
        if not self.methods:
            raise ConfigError("no method was given", remedy="name one or more, such as source,moments")
        if self.router not in (routers := (NO_ROUTER, *names(ROUTERS))):
            raise ConfigError(f"there is no router {self.router!r}", remedy=did_you_mean(self.router, routers))
        for name in self.corruptions or ():
            if name not in CORRUPTIONS:
                raise ConfigError(f"there is no corruption {name!r}", remedy=did_you_mean(name, CORRUPTIONS))


def replay(
    bundle: Bundle,
    data: Dataset,
    plan: Replay,
    *,
    foreign: Dataset | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Run every method of the plan over the same frames.

    `foreign` holds the images that a contaminated scenario mixes in; None: noise.
    Returns: the form of results.json; errors in per cent, times in milliseconds a frame.
    """
    scenario = scenarios.get(plan.scenario)
    check_labels(bundle, data)
    tail = _lazy_tail(bundle)
    methods = {
        name: build(name, Context(bundle, tail, plan.seed, method_settings(plan, name))) for name in plan.methods
    }
    shifts = _shifts(scenario, data, plan, foreign, progress)
    preprocess = Preprocess(bundle.manifest.input)
    preprocess(shifts[0].images[:1])
    engine: Engine = settled(find(ENGINES, plan.engine)(bundle, threads=plan.threads))
    try:
        rows = [
            _row(name, method, Predictor(bundle, engine), scenario, shifts, plan, preprocess, progress)
            for name, method in methods.items()
        ]
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
            **({"router": plan.router} if plan.router != NO_ROUTER else {}),
            **({"foreign": NOISE if foreign is None else foreign.name} if scenario.contaminated else {}),
            **({"label_delay": plan.label_delay} if plan.label_delay is not None else {}),
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


def _row(
    name: str,
    method: Method[Any],
    predictor: Predictor,
    scenario: Scenario,
    shifts: Sequence[Shift],
    plan: Replay,
    preprocess: Preprocess,
    progress: Progress,
) -> dict[str, Any]:
    """One method over the whole stream; source is in force before and after."""
    wanted = plan.estimate or all(shift.labels is None for shift in shifts)
    told = Estimated(predictor.bundle, predictor.engine, method, preprocess) if wanted else None
    warm = preprocess(shifts[0].images[: plan.batch_size])
    batches = sum(-(-len(shift.images) // plan.batch_size) for shift in shifts)
    plain = PlainInference(predictor.engine, warm, rounds=max(WARM_UP, batches // PLAIN_SHARE))
    method = method if told is None else told.method
    late = None if plan.label_delay is None else LateLabels(predictor, method, plan.label_delay)
    kept = Kept(method)
    passes = predictor.passes
    memory = PeakMemory(plain)
    score = Score(name, shifts)
    started = time.perf_counter()
    with tallied() as tally, Energy() as energy:
        prepare = preprocess if told is None else told.preprocess
        for frames, answer in _run(predictor, cast("Method[Any]", kept), scenario, shifts, plan, prepare, late):
            score.add(frames, answer)
            if told is not None:
                told.add(*((0, 0) if late is None else late.arrived()))
            progress(name, score.frames, score.total)
    elapsed_s = time.perf_counter() - started
    costs = {
        "extra_mb": memory.extra_mb,
        "passes": predictor.passes - passes,
        "backward_passes": tally.backward,
        "state_bytes": kept.state_bytes,
        "energy_j": None if energy.joules is None else round(energy.joules, 3),
        "overhead": round(max(0.0, 1 - score.worked_s / elapsed_s), 4),
    }
    predictor.apply(Delta.source())
    plain()
    row = score.row({**costs, "plain_ms": round(plain.ms, 4), "time": round(score.mean_ms / plain.ms, 3)})
    return {
        **row,
        **({} if late is None else {"labelled": late.labelled}),
        **({} if told is None else told.row()),
    }


def _run(
    predictor: Predictor,
    method: Method[Any],
    scenario: Scenario,
    shifts: Sequence[Shift],
    plan: Replay,
    preprocess: Callable[[Array], Array],
    late: LateLabels | None,
) -> Iterator[tuple[int, Answer]]:
    """Yield (frames, answer) for each batch; a batch never spans two shifts."""
    answered: list[Array] = []

    def batches(part: Sequence[Shift]) -> Iterator[Array]:
        for shift in part:
            expected = expected_of(shift)
            for start in range(0, len(shift.images), plan.batch_size):
                frames = preprocess(shift.images[start : start + plan.batch_size])
                yield frames
                if late is not None:
                    late.answered(frames, expected[start : start + plan.batch_size], answered.pop())

    for part in [[shift] for shift in shifts] if scenario.reset else [shifts]:
        if late is not None:
            late.begin_anew()
        for answer in adapt(predictor, method, batches(part), between=None if late is None else late.between):
            if late is not None:
                answered.append(answer.logits)
            yield len(answer.logits), answer


def method_settings(plan: Replay, method: str) -> dict[str, Any]:
    """What a method is built with; the baseline answers without a bank."""
    settings = plan.settings.get(method, {})
    return settings if plan.router == NO_ROUTER or method == BASELINE else {ROUTER: plan.router, **settings}


def _shifts(
    scenario: Scenario, data: Dataset, plan: Replay, foreign: Dataset | None, progress: Progress
) -> list[Shift]:
    data = data[: plan.limit] if plan.limit else data
    images = None if foreign is None else foreign_images(foreign)
    expected = len(scenario.corruptions if plan.corruptions is None else plan.corruptions)
    made = []
    for shift in scenario.play(data, plan.severity, plan.seed, plan.corruptions, images):
        made.append(shift)
        progress("making the stream", len(made), max(len(made) + 1, expected))
    progress("making the stream", len(made), len(made))
    if not made or not len(made[0].images):
        raise DataError(f"{data.name} gives no frame for scenario {scenario.name}", remedy="check --data and --limit")
    return made


def _places(shifts: Sequence[Shift]) -> list[dict[str, Any]]:
    starts = np.cumsum([0, *(len(shift.images) for shift in shifts)])
    return [_place(shift, int(start)) for shift, start in zip(shifts, starts, strict=False)]


def _place(shift: Shift, start: int) -> dict[str, Any]:
    """Where a shift is; its domains if they are not its name, and its genuine frames if not all are."""
    made: dict[str, Any] = {"name": shift.name, "start": start, "frames": len(shift.images)}
    if shift.domains is not None:
        made["domains"] = names = shift.domain_names
        if len(names) > 1:
            numbers = {name: number for number, name in enumerate(names)}
            made["domain"] = [numbers[name] for name in shift.domains.tolist()]
    if shift.counts is not None:
        made["genuine"] = int(shift.counts.sum())
    return made


def _lazy_tail(bundle: Bundle) -> Callable[[], Tail]:
    made: list[Tail] = []

    def tail() -> Tail:
        if not made:
            made.append(Tail(bundle))
        return made[0]

    return tail
