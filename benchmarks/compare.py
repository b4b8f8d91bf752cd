"""Two results files held against each other, cell by cell and metric by metric: what got worse by more than it may."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.plans.results import OK, Cell, PlanResults, read_plan_results
from benchmarks.replayed import BASELINE, Results, Row, read_results
from edge_adapt.errors import ConfigError, DataError, did_you_mean

SCHEMA = 1
Verdict = Literal["worse", "same", "better"]
Key = tuple[tuple[str, Any], ...]
"""What makes two cells the same, by name."""


@dataclass(frozen=True)
class Metric:
    """A figure of which less is better, and by how much it may rise: the larger of the two tolerances."""

    name: str
    of: Callable[[Row], float | None]
    absolute: float = 0.0
    relative: float = 0.0
    """Share of the base's figure."""
    both_ways: bool = False
    """Whether less is as wrong as more."""

    @property
    def allowed(self) -> str:
        """The tolerance in words."""
        parts = [f"{self.absolute:g}"] * bool(self.absolute) + [f"{100 * self.relative:g} %"] * bool(self.relative)
        return " or ".join(parts) or "none"

    def verdict(self, base: float | None, head: float | None) -> Verdict:
        """A figure that is no longer there is worse; one that is new is neither."""
        if base is None or head is None:
            return "worse" if base is not None else "same"
        room = max(self.absolute, self.relative * abs(base)) + 1e-9
        if abs(head - base) <= room:
            return "same"
        return "worse" if head > base or self.both_ways else "better"


METRICS = (
    Metric("error_mean", lambda row: row.error_mean, absolute=0.5),
    Metric("time", lambda row: row.time, relative=0.25),
    Metric("extra_mb", lambda row: row.extra_mb, absolute=5.0, relative=0.25),
    Metric("passes", lambda row: row.passes),
    Metric("backward_passes", lambda row: row.backward_passes),
    Metric("state_bytes", lambda row: row.state_bytes, relative=0.1),
    Metric("energy_j", lambda row: row.energy_j, relative=0.25),
    Metric("frames", lambda row: float(row.frames), both_ways=True),
)
STATUS = "status"
KINDS: Mapping[object, str] = {1: "a replay", 2: "a plan"}
"""By the schema of their results."""


@dataclass(frozen=True)
class Difference:
    """One metric of one cell in both files."""

    key: Key
    metric: str
    base: float | str | None
    head: float | str | None
    allowed: str
    verdict: Verdict

    @property
    def cell(self) -> str:
        """The cell in words."""
        return in_words(self.key)


@dataclass(frozen=True)
class Comparison:
    """All that was compared."""

    differences: tuple[Difference, ...]
    missing: tuple[Key, ...]
    """Cells that only the base has."""
    new: tuple[Key, ...]

    @property
    def worse(self) -> list[Difference]:
        return [one for one in self.differences if one.verdict == "worse"]

    @property
    def better(self) -> list[Difference]:
        return [one for one in self.differences if one.verdict == "better"]

    @property
    def regressed(self) -> bool:
        """Whether anything is worse, or gone."""
        return bool(self.worse or self.missing)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "schema": SCHEMA,
            "regressed": self.regressed,
            "differences": [
                {
                    **dict(one.key),
                    "metric": one.metric,
                    "base": one.base,
                    "head": one.head,
                    "allowed": one.allowed,
                    "verdict": one.verdict,
                }
                for one in self.differences
            ],
            "missing": [dict(key) for key in self.missing],
            "new": [dict(key) for key in self.new],
        }


def compare(base: Mapping[str, Any], head: Mapping[str, Any], metrics: Sequence[Metric] = METRICS) -> Comparison:
    """Hold the results of a replay or of a plan against older ones of the same kind.

    Raises: ConfigError if one of them holds no results, or one is of a replay and the other of a plan.
    """
    kinds = [
        next((kind for schema, kind in KINDS.items() if results.get("schema") == schema), None)
        for results in (base, head)
    ]
    if None not in kinds and kinds[0] != kinds[1]:
        raise ConfigError(
            f"BASE holds the results of {kinds[0]}, HEAD those of {kinds[1]}",
            remedy="compare two files of the same kind",
        )
    old, new = _cells(base, "BASE"), _cells(head, "HEAD")
    differences = [one for key, was in old.items() if key in new for one in _differences(key, was, new[key], metrics)]
    return Comparison(
        tuple(differences),
        missing=tuple(key for key in old if key not in new),
        new=tuple(key for key in new if key not in old),
    )


def load_results(path: Path) -> dict[str, Any]:
    """What a results file holds, unchecked. Raises: DataError if it cannot be read or is no JSON object."""
    try:
        loaded = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}", remedy="give a file that `replay` wrote") from error
    if not isinstance(loaded, dict):
        raise DataError(f"{path} holds no JSON object", remedy="give a file that `replay` wrote")
    return loaded


def with_tolerances(asked: Sequence[str], metrics: Sequence[Metric] = METRICS) -> list[Metric]:
    """Metrics with tolerances such as `error_mean=0.3` (absolute) or `time=50%`.

    Raises: ConfigError for an unknown metric, or what is no number from 0.
    """
    found = {metric.name: metric for metric in metrics}
    for text in asked:
        name, _, value = text.partition("=")
        if name not in found:
            raise ConfigError(f"there is no metric {name!r}", remedy=did_you_mean(name, found))
        try:
            amount = float(value.removesuffix("%"))
        except ValueError:
            amount = -1.0
        if not 0 <= amount < float("inf"):
            raise ConfigError(
                f"tolerance of {name} is {value!r}, expected a number from 0", remedy="time=25% or time=0.1"
            )
        share = value.endswith("%")
        found[name] = replace(found[name], absolute=0.0 if share else amount, relative=amount / 100 if share else 0.0)
    return list(found.values())


def in_words(key: Key) -> str:
    """Only what tells cells apart for a reader: what is not set is left out."""
    facts = dict(key)
    size, seed = facts.pop("batch_size"), facts.pop("seed")
    left_out = ("engine", "mode", "severity", "limit")
    said = [str(value) for name, value in facts.items() if value not in (None, "none", "") and name not in left_out]
    return ", ".join([*said, f"batches of {size}", f"seed {seed}"])


def _differences(key: Key, was: _Found, now: _Found, metrics: Sequence[Metric]) -> Iterator[Difference]:
    if was.row is None or now.row is None:
        verdict: Verdict = "same" if was.row is now.row else "worse" if now.row is None else "better"
        yield Difference(key, STATUS, was.status, now.status, "none", verdict)
        return
    for metric in metrics:
        base, head = metric.of(was.row), metric.of(now.row)
        if base is not None or head is not None:
            yield Difference(key, metric.name, base, head, metric.allowed, metric.verdict(base, head))


@dataclass(frozen=True)
class _Found:
    row: Row | None
    status: str


def _cells(raw: Mapping[str, Any], which: str) -> dict[Key, _Found]:
    try:
        if raw.get("schema") == 1:
            return _of_replay(read_results(raw))
        return _of_plan(read_plan_results(raw))
    except ConfigError as error:
        raise ConfigError(f"{which}: {error.what}", remedy=error.remedy) from error


def _of_plan(results: PlanResults) -> dict[Key, _Found]:
    return {_key(cell): _Found(cell.row if cell.status == OK else None, cell.status) for cell in results.cells}


def _key(cell: Cell) -> Key:
    names = ("bundle", "data", "scenario", "method", "router", "batch_size", "seed", "engine", "severity", "limit")
    corruptions = None if cell.corruptions is None else ", ".join(cell.corruptions)
    settings = json.dumps(cell.settings, sort_keys=True) if cell.settings else None
    return (*((name, getattr(cell, name)) for name in names), ("corruptions", corruptions), ("settings", settings))


def _of_replay(results: Results) -> dict[Key, _Found]:
    """A single replay has no ratio of times: it is made from source's row."""
    settings = results.settings
    plain = results.source.answer_ms.mean if results.source else None
    common = {"bundle": results.bundle.name, "data": results.data, "scenario": results.scenario}
    rest = {name: settings.get(name) for name in ("router", "batch_size", "seed", "mode", "severity", "limit")}
    asked = settings.get("methods") or {}
    found = {}
    for row in results.rows:
        own = json.dumps(asked[row.method], sort_keys=True) if asked.get(row.method) else None
        key = tuple({**common, "method": row.method, **rest, "settings": own}.items())
        found[key] = _Found(row if row.time is not None else row.model_copy(update={"time": _ratio(row, plain)}), OK)
    return found


def _ratio(row: Row, plain: float | None) -> float | None:
    if not plain or row.answer_ms.mean is None:
        return None
    return 1.0 if row.method == BASELINE else (row.answer_ms.mean + (row.learn_ms.mean or 0.0)) / plain
