"""How well accuracy is told without labels: windows of every shift, with source weights and adapted, and collapses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from benchmarks import scenarios
from benchmarks.replay import check_labels
from benchmarks.scenarios import Shift
from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import DataError
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import FEATURES, LOGITS, Answered, Context, Step
from edge_adapt.methods.wrapper import Wrapped, Wrapper
from edge_adapt.monitor.accuracy import MEMORY, Accuracy, Interval, Seen, compared
from edge_adapt.preprocess import Preprocess
from edge_adapt.runtime.loop import adapt
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.streams.data import Dataset
from edge_adapt.tail import Tail

Array = NDArray[Any]
Progress = Callable[[str, int, int], None]

REHEARSED = 4
"""One frame in so many is given to the source weights too."""
SEVERITY, BATCH = 5, 32
FOREIGN = -1
"""Label of a frame that is none of the model's classes, and not scored."""
CLASS = 0
"""What a collapsed network answers."""
COLLAPSES = ("one class", "biased head")
SEEN_WITHIN = 512


class Recorder(Wrapper[None]):
    """Keeps what was answered, and what the head was given for it."""

    name: ClassVar[str] = "recorder"
    adds: ClassVar[frozenset[str]] = frozenset({LOGITS, FEATURES})

    def __init__(self, context: Context, host: Any) -> None:
        super().__init__(context, host)
        self.answered: list[Answered] = []

    def start(self) -> None:
        return None

    def watch(self, state: Wrapped[None], answered: Answered) -> Step[Wrapped[None]]:
        state, answered, events = self.watched_by_host(state, answered)
        self.answered.append(answered)
        return Step(state, answered.logits, events)

    @property
    def all(self) -> tuple[Array, Array]:
        """Logits [N, K] and features [N, D] since the start."""
        return (
            np.concatenate([answered.logits for answered in self.answered]),
            np.concatenate([self.features_of(answered) for answered in self.answered]),
        )


def accuracy(
    bundle: Bundle,
    data: Dataset,
    *,
    methods: Sequence[str] = ("source", "moments"),
    scenario: str = "continual",
    limit: int | None = None,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Estimates beside the truth, for every window of `MEMORY` frames within a shift.

    Returns: `rows` of windows, `summary` by method, and `collapses`: frames until one was seen. Shares are 0 to 1.
    """
    check_labels(bundle, data)
    estimator = Accuracy(bundle)
    data = data[:limit] if limit else data
    shifts = list(scenarios.get(scenario).play(data, SEVERITY, seed))
    if any(shift.labels is None for shift in shifts):
        raise DataError(f"{data.name} has no labels to compare with", remedy="give labelled frames")
    preprocess = Preprocess(bundle.manifest.input)
    frames = [preprocess(shift.images[: len(shift.images)]) for shift in shifts]
    stretches = [(shift.name, len(part)) for shift, part in zip(shifts, frames, strict=True)]
    labels = np.concatenate([_scored(shift) for shift in shifts])
    engine = OnnxRuntimeEngine(bundle)
    rows: list[dict[str, Any]] = []
    collapses: list[dict[str, Any]] = []
    try:
        predictor = Predictor(bundle, engine)
        source = _source(predictor, frames)
        for number, name in enumerate(methods):
            answers = _answers(bundle, predictor, name, frames, seed)
            rows += list(_windows(estimator, name, stretches, answers, source, labels))
            collapses += _collapses(estimator, name, stretches, answers, source)
            progress("methods", number + 1, len(methods))
    finally:
        engine.close()
    summary = [_summary(name, [row for row in rows if row["method"] == name]) for name in methods]
    return {
        "data": data.name,
        "scenario": scenario,
        "bundle": {"name": bundle.manifest.name, "id": bundle.id},
        "rows": rows,
        "summary": [*summary, _summary("all", rows)],
        "collapses": collapses,
    }


def _scored(shift: Shift) -> Array:
    """[N] labels, `FOREIGN` for frames that are not scored."""
    assert shift.labels is not None
    labels = shift.labels.astype(np.int64)
    return labels if shift.counts is None else np.where(shift.counts, labels, FOREIGN)


def _batches(frames: Sequence[Array]) -> Iterator[Array]:
    for part in frames:
        for start in range(0, len(part), 2 * BATCH):
            yield part[start : start + 2 * BATCH]


def _source(predictor: Predictor, frames: Sequence[Array]) -> Array:
    """[N, K], of all frames; only some of them are shown to the estimator."""
    answers = [predictor.rehearse(part, Delta.source(), frozenset()).logits for part in _batches(frames)]
    return np.concatenate([part for part in answers if part is not None])


def _answers(
    bundle: Bundle, predictor: Predictor, name: str, frames: Sequence[Array], seed: int
) -> tuple[Array, Array]:
    context = Context(bundle, lambda: Tail(bundle), seed)
    recorder = Recorder(context, build(name, context))
    for _ in adapt(predictor, recorder, _batches(frames)):
        pass
    predictor.apply(Delta.source())
    return recorder.all


def _windows(
    estimator: Accuracy,
    method: str,
    stretches: Sequence[tuple[str, int]],
    answers: tuple[Array, Array],
    source: Array,
    labels: Array,
) -> Iterator[dict[str, Any]]:
    start = 0
    for shift, length in stretches:
        for first in range(start, start + length - MEMORY + 1, MEMORY):
            part = slice(first, first + MEMORY)
            found = estimator.estimate(watched(estimator, estimator.init(), answers, source, part))
            assert found is not None
            scored = labels[part] != FOREIGN
            truth = float((answers[0][part].argmax(axis=1) == labels[part])[scored].mean())
            yield {"method": method, "shift": shift, "truth": truth, **_shares(found)}
        start += length


def watched(estimator: Accuracy, state: Seen, answers: tuple[Array, Array], source: Array, part: slice) -> Seen:
    """The state after some frames, of which one in `REHEARSED` was given to the source weights."""
    logits, features = answers
    for first in range(part.start, part.stop, BATCH):
        here = slice(first, min(first + BATCH, part.stop))
        state = estimator.after(state, logits[here], features[here])
        some = slice(here.start, here.stop, REHEARSED)
        state = compared(state, logits[some].argmax(axis=1), source[some].argmax(axis=1))
    return state


def _collapses(
    estimator: Accuracy,
    method: str,
    stretches: Sequence[tuple[str, int]],
    answers: tuple[Array, Array],
    source: Array,
) -> Iterator[dict[str, Any]]:
    """A network that turns bad by hand: the frames of a shift once more, and how many of them it takes to see it."""
    start = 0
    for shift, length in stretches:
        part = slice(start, start + min(length, SEEN_WITHIN))
        start += length
        if length < MEMORY:
            continue
        healthy = watched(estimator, estimator.init(), answers, source, part)
        before = estimator.estimate(healthy)
        assert before is not None
        for kind in COLLAPSES:
            bad = collapsed(answers[0], kind), answers[1]
            seen_after = _seen_after(estimator, healthy, before.value, bad, source, part)
            yield {"method": method, "shift": shift, "collapse": kind, "before": before.value, "seen_after": seen_after}


def _seen_after(
    estimator: Accuracy, state: Seen, before: float, answers: tuple[Array, Array], source: Array, part: slice
) -> int | None:
    """Frames until the whole interval is below the estimate of before; None if it never is."""
    for first in range(part.start, part.stop, BATCH):
        state = watched(estimator, state, answers, source, slice(first, min(first + BATCH, part.stop)))
        found = estimator.estimate(state)
        if found is not None and found.high < before:
            return int(first + BATCH - part.start)
    return None


def collapsed(logits: Array, kind: str) -> Array:
    """Logits [N, K] of a head that knows one class alone, or that leans to it by twice the usual margin."""
    one = np.eye(logits.shape[1], dtype=logits.dtype)[CLASS]
    if kind == "one class":
        return np.tile(30 * one, (len(logits), 1))
    margin = float(np.median(logits.max(axis=1) - np.median(logits, axis=1)))
    made: Array = logits + 2 * margin * one
    return made


def _shares(found: Interval) -> dict[str, float]:
    return {"low": found.low, "value": found.value, "high": found.high}


def _summary(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    if not rows:
        raise DataError(f"no shift has {MEMORY} frames", remedy="give more, or leave --limit out")
    low, value, high, truth = (np.array([row[key] for row in rows]) for key in ("low", "value", "high", "truth"))
    return {
        "method": name,
        "windows": len(rows),
        "error": float(np.abs(value - truth).mean()),
        "bias": float((value - truth).mean()),
        "held": float(((low <= truth) & (truth <= high)).mean()),
        "width": float((high - low).mean()),
    }


def print_accuracy(results: dict[str, Any], tell: Callable[[str], None]) -> None:
    """Tables: means over the windows of each shift, then all of them, then the collapses."""
    tell(f"{'method':>10} {'shift':>20} {'truth':>7} {'estimate':>9} {'interval':>15}")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["method"], row["shift"]), []).append(row)
    for (method, shift), rows in groups.items():
        truth, value, low, high = (
            100 * float(np.mean([row[key] for row in rows])) for key in ("truth", "value", "low", "high")
        )
        tell(f"{method:>10} {shift:>20} {truth:7.1f} {value:9.1f} {low:7.1f} {high:7.1f}")
    for row in results["summary"]:
        tell(
            f"{row['method']:>10}  {row['windows']} windows: mean error {100 * row['error']:.1f} points, bias "
            f"{100 * row['bias']:+.1f}, truth inside {100 * row['held']:.0f} %, width {100 * row['width']:.0f} points"
        )
    for kind in COLLAPSES:
        found = [row["seen_after"] for row in results["collapses"] if row["collapse"] == kind]
        seen = [frames for frames in found if frames is not None]
        tell(f"  collapse, {kind}: seen in {len(seen)} of {len(found)} shifts, within {max(seen, default=0)} frames")
