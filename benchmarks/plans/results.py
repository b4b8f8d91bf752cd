"""Results of a plan: read and checked once, and looked at stream by stream with its seeds taken together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator, model_validator

from benchmarks.replayed import (
    BASELINE,
    Bundle,
    Name,
    Part,
    Results,
    Row,
    Shift,
    Timeline,
    Times,
    not_results,
)

OK = "ok"
NO_ROUTER = "none"


class Cell(Part):
    """One method on one stream with one seed, and what came of it."""

    bundle: Name
    bundle_id: Name = ""
    data: Name
    scenario: Name
    method: Name
    router: Name = NO_ROUTER
    batch_size: int
    seed: int
    engine: Name
    severity: int | None = None
    limit: int | None = None
    corruptions: tuple[Name, ...] | None = None
    settings: dict[Name, Any] = Field(default_factory=dict)
    status: Literal["ok", "skipped", "failed", "timeout"]
    why: Name | None = None
    shifts: tuple[Shift, ...] = ()
    row: Row | None = None

    @field_validator("why", mode="before")
    @classmethod
    def _in_one_line(cls, why: object) -> object:
        return " ".join(why.split()) if isinstance(why, str) else why

    @model_validator(mode="after")
    def _what_went_well_has_figures(self) -> Cell:
        if self.status == OK and self.row is None:
            raise ValueError(f"the cell of {self.method} is ok and holds no row")
        return self

    @property
    def variant(self) -> str:
        """The method, and what else sets it apart from others on the same stream; source answers without a router."""
        routed = [] if self.router == NO_ROUTER or self.method == BASELINE else [self.router]
        settings = [f"{name} {json.dumps(value)}" for name, value in sorted(self.settings.items())]
        return ", ".join([self.method, *routed, *settings])


class PlanResults(Part):
    """What results.json of a plan holds."""

    version: Literal[2] = Field(alias="schema")
    plan: dict[str, Any] = Field(default_factory=dict)
    environment: dict[Name, Any] = Field(default_factory=dict)
    cells: tuple[Cell, ...] = Field(min_length=1)

    @property
    def missing(self) -> list[Cell]:
        """Cells without figures."""
        return [cell for cell in self.cells if cell.status != OK]

    @cached_property
    def boards(self) -> list[Board]:
        """Methods that can be compared, in the order of the plan; none without a single figure."""
        found: dict[tuple[object, ...], list[Cell]] = {}
        for cell in self.cells:
            key = (cell.bundle, cell.data, cell.engine, cell.severity, cell.limit, cell.corruptions)
            found.setdefault(key, []).append(cell)
        told = [_differing(place, list(found)) for place in range(6)]
        boards = [Board(_name(key, told), tuple(cells)) for key, cells in found.items()]
        return [board for board in boards if any(cell.status == OK for cell in board.cells)]


def _differing(place: int, keys: Sequence[tuple[object, ...]]) -> bool:
    """Whether a part of a board's key tells boards apart; bundle and data are always told."""
    return place < 2 or len({key[place] for key in keys}) > 1


def _name(key: tuple[object, ...], told: Sequence[bool]) -> str:
    bundle, data, engine, severity, limit, corruptions = key
    many = corruptions if isinstance(corruptions, tuple) else ()
    words = (
        *(bundle, data, engine, f"severity {severity}"),
        "all frames" if limit is None else f"{limit} frames a shift",
        f"{len(many)} corruptions" if many else "all corruptions",
    )
    return ", ".join(str(word) for word, is_told in zip(words, told, strict=True) if is_told)


class Stream(NamedTuple):
    """What methods of a board are compared on."""

    scenario: str
    batch_size: int

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.scenario}, batches of {self.batch_size}"


class Over(NamedTuple):
    """A figure over seeds."""

    mean: float
    spread: float | None
    """Standard deviation; None for one seed."""


@dataclass(frozen=True)
class Board:
    """One bundle on one data set: methods x scenarios x batch sizes x seeds."""

    name: str
    cells: tuple[Cell, ...]

    @cached_property
    def variants(self) -> list[str]:
        """Methods with a figure, in the order of the plan."""
        return list(dict.fromkeys(cell.variant for cell in self.cells if cell.status == OK))

    @cached_property
    def streams(self) -> list[Stream]:
        """Streams with a figure, in the order of the plan."""
        return list(dict.fromkeys(Stream(cell.scenario, cell.batch_size) for cell in self.cells if cell.status == OK))

    @cached_property
    def batch_sizes(self) -> list[int]:
        """In the order of the plan."""
        return list(dict.fromkeys(stream.batch_size for stream in self.streams))

    @cached_property
    def _groups(self) -> dict[tuple[str, Stream], dict[int, Cell]]:
        groups: dict[tuple[str, Stream], dict[int, Cell]] = {}
        for cell in self.cells:
            if cell.status == OK:
                group = groups.setdefault((cell.variant, Stream(cell.scenario, cell.batch_size)), {})
                group.setdefault(cell.seed, cell)
        return groups

    def seeds(self, variant: str, stream: Stream) -> dict[int, Cell]:
        """Seed -> cell, of those with figures."""
        return self._groups.get((variant, stream), {})

    def errors(self, variant: str, stream: Stream) -> dict[int, float]:
        """Seed -> mean error in per cent."""
        cells = self.seeds(variant, stream)
        return {
            seed: cell.row.error_mean for seed, cell in cells.items() if cell.row and cell.row.error_mean is not None
        }

    def error(self, variant: str, streams: Sequence[Stream]) -> Over | None:
        """Mean error over streams; the spread is that of the seeds that all of them have."""
        found = [errors for stream in streams if (errors := self.errors(variant, stream))]
        if not found:
            return None
        common = set.intersection(*(set(errors) for errors in found))
        seeds = [fmean(errors[seed] for errors in found) for seed in sorted(common)]
        mean = fmean(fmean(errors.values()) for errors in found)
        return Over(mean, stdev(seeds) if len(seeds) > 1 else None)

    def harm(self, variant: str, stream: Stream) -> float | None:
        """Points of error above source, over the seeds that both have; below zero it helps."""
        own, reference = self.errors(variant, stream), self.errors(BASELINE, stream)
        common = own.keys() & reference.keys()
        return fmean(own[seed] - reference[seed] for seed in common) if common else None

    def cost(self, variant: str, streams: Sequence[Stream], of: Callable[[Row], float | None]) -> float | None:
        """Mean of something over streams and seeds."""
        known = [
            value
            for stream in streams
            for cell in self.seeds(variant, stream).values()
            if cell.row and (value := of(cell.row)) is not None
        ]
        return fmean(known) if known else None

    def results(self, stream: Stream) -> Results:
        """One stream as a replay's results, a row a method with its seeds taken together."""
        groups = {variant: list(self.seeds(variant, stream).values()) for variant in self.variants}
        groups = {variant: cells for variant, cells in groups.items() if cells}
        first = next(iter(groups.values()))[0]
        return Results(
            schema=1,
            scenario=stream.scenario,
            data=first.data,
            bundle=Bundle(name=first.bundle, id=first.bundle_id),
            shifts=first.shifts,
            rows=tuple(
                _together(variant, [cell.row for cell in cells if cell.row]) for variant, cells in groups.items()
            ),
        )


def read_plan_results(results: Mapping[str, Any] | PlanResults) -> PlanResults:
    """Check the results of a plan. Raises: ConfigError if something in them is missing or of a wrong type or schema."""
    if isinstance(results, PlanResults):
        return results
    try:
        return PlanResults.model_validate(dict(results))
    except ValidationError as error:
        raise not_results(error) from error


def _together(variant: str, rows: Sequence[Row]) -> Row:
    """Means over seeds; what happened when (events, entries, visits) is the first seed's."""
    names = dict.fromkeys(name for row in rows for name in row.errors)
    return rows[0].model_copy(
        update={
            "method": variant,
            "error_mean": _mean(row.error_mean for row in rows),
            "errors": {name: _mean(row.errors.get(name) for row in rows) for name in names},
            "answer_ms": _times([row.answer_ms for row in rows]),
            "learn_ms": _times([row.learn_ms for row in rows]),
            "extra_mb": _mean(row.extra_mb for row in rows),
            "time": _mean(row.time for row in rows),
            "timeline": _timeline([row.timeline for row in rows]),
        }
    )


def _times(times: Sequence[Times]) -> Times:
    return Times(
        p50=_mean(one.p50 for one in times), p99=_mean(one.p99 for one in times), mean=_mean(one.mean for one in times)
    )


def _timeline(lines: Sequence[Timeline]) -> Timeline:
    """Window by window, over the seeds whose windows are those of the first."""
    alike = [line for line in lines if line.frames == lines[0].frames]
    if len(alike) == 1:
        return alike[0]
    errors = zip(*(line.error for line in alike), strict=False)
    windows = [[error for error in window if error is not None] for window in errors]
    return Timeline(
        frames=lines[0].frames,
        error=tuple(fmean(window) if window else None for window in windows),
        spread=tuple(stdev(window) if len(window) > 1 else None for window in windows),
    )


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
