"""One task of a plan, and the cell that it makes. The same function in a worker process and on a Ray node."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_adapt.errors import ConfigError, DataError, EdgeAdaptError

Cell = dict[str, Any]
OK, SKIPPED, FAILED, TIMEOUT = "ok", "skipped", "failed", "timeout"


@dataclass(frozen=True, kw_only=True)
class Combination:
    """What a plan asks for: one point of a grid."""

    bundle: str
    data: str
    scenario: str
    method: str
    router: str
    batch_size: int
    seed: int
    engine: str
    severity: int
    limit: int | None
    corruptions: tuple[str, ...] | None
    settings: str
    """The method's settings as JSON, its keys in order."""
    threads: int
    timeout_s: float
    label_delay: int | None = None
    """Frames until the true label of a frame comes; None: never."""
    estimate: bool = False
    """Whether the estimate without labels stands beside the error."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A combination, and where everything that it names is. All plain values: it travels as JSON."""

    combination: Combination
    bundle_path: str
    bundle_id: str
    data_source: str
    data_digest: str
    foreign_source: str | None = None
    foreign_digest: str | None = None
    images: str | None = None
    """Folder that keeps corrupted images; None: they are made each time."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        raw = json.loads(text)
        parts = raw.pop("combination")
        corruptions = parts.pop("corruptions")
        whole = Combination(**parts, corruptions=None if corruptions is None else tuple(corruptions))
        return cls(**raw, combination=whole)


def run_task(task: Task) -> Cell:
    """Replay one method, and tell what came of it. What the bundle or the data cannot serve is skipped.

    Raises: EdgeAdaptError where something broke that ought to have worked.
    """
    from benchmarks.plans.images import kept_in
    from benchmarks.replay import Replay, replay
    from edge_adapt.bundle import Bundle
    from edge_adapt.errors import ArtifactError
    from edge_adapt.streams.data import load_data

    asked = task.combination
    bundle = Bundle.load(task.bundle_path)
    if bundle.id != task.bundle_id:
        raise ArtifactError(
            f"{task.bundle_path} holds bundle {bundle.id}, the plan was made for {task.bundle_id}",
            remedy="leave bundles alone while a plan runs, and give every node the same ones",
        )
    settings = json.loads(asked.settings)
    try:
        plan = Replay(
            scenario=asked.scenario,
            methods=(asked.method,),
            batch_size=asked.batch_size,
            limit=asked.limit,
            severity=asked.severity,
            seed=asked.seed,
            corruptions=asked.corruptions,
            router=asked.router,
            engine=asked.engine,
            threads=asked.threads,
            label_delay=asked.label_delay,
            estimate=asked.estimate,
            settings={asked.method: settings} if settings else {},
        )
        data = load_data(task.data_source, bundle.manifest.classes, spec=bundle.manifest.input, limit=asked.limit)
        foreign = None if task.foreign_source is None else load_data(task.foreign_source)
        with kept_in(None if task.images is None else Path(task.images)):
            results = replay(bundle, data, plan, foreign=foreign)
    except (ConfigError, DataError) as error:
        return without_figures(task, SKIPPED, error.what)
    return head(task, OK, None) | {"shifts": results["shifts"], "row": results["rows"][0]}


def without_figures(task: Task, status: str, why: str) -> Cell:
    """The cell of a task that has no result."""
    return head(task, status, why) | {"shifts": [], "row": None}


def failed(task: Task, error: BaseException) -> Cell:
    """The cell of a task that broke."""
    why = error.what if isinstance(error, EdgeAdaptError) else f"{type(error).__name__}: {error}"
    return without_figures(task, FAILED, why)


def head(task: Task, status: str, why: str | None) -> Cell:
    """What every cell begins with."""
    asked = task.combination
    settings = json.loads(asked.settings)
    return {
        "bundle": asked.bundle,
        "bundle_id": task.bundle_id,
        "data": asked.data,
        "scenario": asked.scenario,
        "method": asked.method,
        "router": asked.router,
        "batch_size": asked.batch_size,
        "seed": asked.seed,
        "engine": asked.engine,
        "severity": asked.severity,
        "limit": asked.limit,
        **({"corruptions": list(asked.corruptions)} if asked.corruptions is not None else {}),
        **({"label_delay": asked.label_delay} if asked.label_delay is not None else {}),
        **({"settings": settings} if settings else {}),
        "status": status,
        "why": why,
    }
