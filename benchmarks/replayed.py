"""What results.json of a replay holds: read and checked once (`Results`)."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from edge_adapt.errors import ConfigError

BASELINE = "source"
"""The method that every other is compared with: the frozen network."""


def _printable(name: str) -> str:
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    return shown.strip() or "unnamed"


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


Name = Annotated[str, AfterValidator(_printable)]
"""What may come from a file's name or a plug-in: control characters would break a terminal and an SVG."""
Number = Annotated[float | None, AfterValidator(_finite)]
"""Null where it was not measured; JSON written by Python may hold NaN, which is no number either."""


class Part(BaseModel):
    """Something within a file of results."""

    model_config = ConfigDict(frozen=True)


class Shift(Part):
    """One stretch of the stream. The same name may come again later."""

    name: Name
    start: int
    frames: int = Field(ge=0)
    domains: tuple[Name, ...] = ()
    """What its frames are of, where that is not the name."""
    domain: tuple[int, ...] = ()
    """Index of each frame's domain, where there are several."""
    genuine: int | None = None
    """Frames that are scored, where others are foreign."""

    @model_validator(mode="after")
    def _each_frame_has_a_domain(self) -> Shift:
        if self.domain and (len(self.domain) != self.frames or not set(self.domain) <= set(range(len(self.domains)))):
            raise ValueError(f"domain of {self.name} holds no index of its domains for each frame")
        return self


class Times(Part):
    """Milliseconds per frame."""

    p50: Number = None
    p99: Number = None
    mean: Number = None


class Timeline(Part):
    """Error in per cent over consecutive windows; `frames` counts the frames seen at each window's end."""

    frames: tuple[int, ...] = ()
    error: tuple[Number, ...] = ()
    spread: tuple[Number, ...] = ()
    """Standard deviation over seeds, where the row stands for several."""


class Event(Part):
    """Something that a method reported when it had seen this many frames."""

    frame: int
    name: Name


class Visit(Part):
    """A stretch of a shift that comes more than once; `error` in per cent for each 64 frames of it."""

    name: Name
    start: int
    frames: int = Field(ge=0)
    error: tuple[Number, ...] = ()


class Entry(Part):
    """The entry of the bank that answers from this frame on."""

    frame: int = Field(ge=0)
    entry: Name


class Estimate(Part):
    """An error in per cent that was told without labels: the truth lies from `low` to `high` nine times of ten."""

    value: Number
    low: Number
    high: Number


class Row(Part):
    """One method. Errors in per cent, null for a stream without labels."""

    method: Name
    error_mean: Number
    errors: dict[Name, Number]
    answer_ms: Times = Times()
    learn_ms: Times = Times()
    extra_mb: Number = None
    time: Number = None
    """Multiple of plain inference, measured in the same process."""
    passes: Number = None
    """Frames that went through the trunk."""
    backward_passes: Number = None
    state_bytes: Number = None
    """Of what the method remembers; null where that is no value."""
    energy_j: Number = None
    """Of the whole board; null where it does not tell."""
    error_estimate: Estimate | None = None
    frames: int = 0
    seconds: Number = None
    timeline: Timeline = Timeline()
    visits: tuple[Visit, ...] = ()
    events: tuple[Event, ...] = ()
    entries: tuple[Entry, ...] = ()


class Bundle(Part):
    """The network that was replayed."""

    name: Name
    id: Name = ""


class Results(Part):
    """What results.json holds."""

    version: Literal[1] = Field(alias="schema")
    scenario: Name
    data: Name
    bundle: Bundle
    settings: dict[Name, Any] = Field(default_factory=dict)
    environment: dict[Name, Any] = Field(default_factory=dict)
    shifts: tuple[Shift, ...]
    rows: tuple[Row, ...] = Field(min_length=1)

    @property
    def source(self) -> Row | None:
        """The row of the frozen network, if it was run."""
        return next((row for row in self.rows if row.method == BASELINE), None)

    @property
    def shift_names(self) -> list[str]:
        """Every shift with an error or a place in the stream, once, in order; the domains of one that has several."""
        names = [name for shift in self.shifts for name in (shift.domains if shift.domain else (shift.name,))]
        return list(dict.fromkeys(names + [name for row in self.rows for name in row.errors]))

    @property
    def foreign(self) -> int:
        """Frames that are not scored, since they are none of the task's."""
        return sum(shift.frames - shift.genuine for shift in self.shifts if shift.genuine is not None)

    def harm(self, row: Row, shift: str) -> float | None:
        """Points of error by which a method is above source on one shift; below zero it helps."""
        return difference(row.errors.get(shift), self.source.errors.get(shift) if self.source else None)


def read_results(results: Mapping[str, Any] | Results) -> Results:
    """Check a results dict.

    Raises:
        ConfigError: something in it is missing or of the wrong type, or it has another schema.
    """
    if isinstance(results, Results):
        return results
    try:
        return Results.model_validate(dict(results))
    except ValidationError as error:
        raise not_results(error) from error


def not_results(error: ValidationError) -> ConfigError:
    """Names the first thing that is wrong with results."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return ConfigError(
        f"results: {where!r} is {str(first['input'])[:80]!r}: {first['msg']}",
        remedy="run the benchmark again with this version of edge-adapt: schema 1 is a replay, schema 2 a plan",
    )


def difference(value: float | None, reference: float | None) -> float | None:
    """`value - reference`, where both are known."""
    return None if value is None or reference is None else value - reference
