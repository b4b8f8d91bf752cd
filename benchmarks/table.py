"""Results of a replay: read and checked once (`Results`), shown as a table on a terminal or as Markdown."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from edge_adapt.errors import ConfigError

WIDTH = 100
"""Columns that a printed table takes at most."""
BASELINE = "source"
"""The method that every other is compared with: the frozen network."""
HARM = 0.5
"""Points of error above source from which a method is said to do harm; less is noise."""
NOTHING = "–"  # noqa: RUF001
"""Stands where a number is not known."""


def _printable(name: str) -> str:
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    return shown.strip() or "unnamed"


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


Name = Annotated[str, AfterValidator(_printable)]
"""What may come from a file's name or a plug-in: control characters would break a terminal and an SVG."""
Number = Annotated[float | None, AfterValidator(_finite)]
"""Null where it was not measured; JSON written by Python may hold NaN, which is no number either."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Shift(_Part):
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


class Times(_Part):
    """Milliseconds per frame."""

    p50: Number = None
    p99: Number = None
    mean: Number = None


class Timeline(_Part):
    """Error in per cent over consecutive windows; `frames` counts the frames seen at each window's end."""

    frames: tuple[int, ...] = ()
    error: tuple[Number, ...] = ()


class Event(_Part):
    """Something that a method reported when it had seen this many frames."""

    frame: int
    name: Name


class Visit(_Part):
    """A stretch of a shift that comes more than once; `error` in per cent for each 64 frames of it."""

    name: Name
    start: int
    frames: int = Field(ge=0)
    error: tuple[Number, ...] = ()


class Entry(_Part):
    """The entry of the bank that answers from this frame on."""

    frame: int = Field(ge=0)
    entry: Name


class Row(_Part):
    """One method. Errors in per cent, null for a stream without labels."""

    method: Name
    error_mean: Number
    errors: dict[Name, Number]
    answer_ms: Times = Times()
    learn_ms: Times = Times()
    extra_mb: Number = None
    frames: int = 0
    seconds: Number = None
    timeline: Timeline = Timeline()
    visits: tuple[Visit, ...] = ()
    events: tuple[Event, ...] = ()
    entries: tuple[Entry, ...] = ()


class Bundle(_Part):
    """The network that was replayed."""

    name: Name
    id: Name = ""


class Results(_Part):
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
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"results: {where!r} is {str(first['input'])[:80]!r}: {first['msg']}",
            remedy="run the benchmark again with this version of edge-adapt, which writes schema 1",
        ) from error


def difference(value: float | None, reference: float | None) -> float | None:
    """`value - reference`, where both are known."""
    return None if value is None or reference is None else value - reference


def per_cent(value: float | None) -> str:
    """An error or a number of points with one decimal."""
    return NOTHING if value is None else f"{value + 0.0:.1f}"


def points(value: float | None) -> str:
    """A difference with its sign; what rounds to zero has none."""
    text = NOTHING if value is None else f"{value:+.1f}"
    return text.lstrip("+-") if text in {"+0.0", "-0.0"} else text


def amount(value: float | None) -> str:
    """A time or a size with three figures or so."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    size = abs(value)
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 3}f}"


@dataclass(frozen=True)
class Metric:
    """One thing that was measured, for every method: cells in the order of the rows, and which stand out.

    `best` and `worst` are empty where all methods show the same; equal cells are equally good.
    """

    name: str
    kind: Literal["error", "shift", "cost"]
    values: tuple[float | None, ...]
    cells: tuple[str, ...]
    best: frozenset[int]
    worst: frozenset[int]
    harm: frozenset[int]


def _metric(
    name: str,
    kind: Literal["error", "shift", "cost"],
    values: Sequence[float | None],
    show: Callable[[float | None], str],
    harm: Sequence[float | None] = (),
) -> Metric:
    cells = tuple(show(value) for value in values)
    known = sorted({value for value in values if value is not None})
    low, high = (show(known[0]), show(known[-1])) if known else ("", "")
    return Metric(
        *(name, kind, tuple(values), cells),
        best=frozenset(i for i, cell in enumerate(cells) if low != high and cell == low),
        worst=frozenset(i for i, cell in enumerate(cells) if low != high and cell == high),
        harm=frozenset(i for i, above in enumerate(harm) if above is not None and above > HARM),
    )


def error_metrics(results: Results) -> list[Metric]:
    """Mean error, and what it is against source."""
    means = [row.error_mean for row in results.rows]
    reference = results.source.error_mean if results.source else None
    against = [difference(mean, reference) for mean in means]
    return [
        _metric("mean error", "error", means, per_cent, against),
        _metric("vs source", "error", against, points, against),
    ]


def shift_metrics(results: Results) -> list[Metric]:
    """The error on every shift."""
    return [
        _metric(
            *(name, "shift", [row.errors.get(name) for row in results.rows], per_cent),
            [results.harm(row, name) for row in results.rows],
        )
        for name in results.shift_names
    ]


def cost_metrics(results: Results) -> list[Metric]:
    """What a method takes: milliseconds per frame, memory beyond source's."""
    rows = results.rows
    return [
        _metric("answer p50 ms", "cost", [row.answer_ms.p50 for row in rows], amount),
        _metric("answer p99 ms", "cost", [row.answer_ms.p99 for row in rows], amount),
        _metric("learn p50 ms", "cost", [row.learn_ms.p50 for row in rows], amount),
        _metric("learn p99 ms", "cost", [row.learn_ms.p99 for row in rows], amount),
        _metric("extra MB", "cost", [row.extra_mb for row in rows], amount),
    ]


def print_table(results: Mapping[str, Any] | Results, console: Console | None = None) -> None:
    """Print one row a method; where that is wider than 100 columns, one row a shift and one column a method.

    The best number of each kind is bold and green; an error more than 0.5 above source's is red.

    Args:
        results: what results.json holds.
        console: where to print; standard output by default.

    Raises:
        ConfigError: the results are not what results.json holds.
    """
    checked = read_results(results)
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)
    metrics = [*error_metrics(checked), *shift_metrics(checked), *cost_metrics(checked)]
    everyone = range(len(checked.rows))
    tables = [_methods_down(checked, metrics)]
    if not _fits(tables, console):
        for columns in reversed(range(1, len(everyone) + 1)):
            tables = [
                _methods_across(checked, metrics, everyone[first : first + columns])
                for first in everyone[::columns]
            ]
            if _fits(tables, console):
                break
    title = f"{checked.bundle.name}, {checked.scenario}, {checked.data}"
    scored = f" (of genuine frames; {checked.foreign:,} are foreign)" if checked.foreign else ""
    console.print(Text.assemble((title, "bold"), f": error in %{scored}, time in ms per frame"))
    for table in tables:
        console.print(table)


def _fits(tables: Sequence[Table], console: Console) -> bool:
    width = min(console.width, WIDTH)
    unbounded = console.options.update(max_width=10_000)
    return all(Measurement.get(console, unbounded, table).maximum <= width for table in tables)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="dim")


def _cell(metric: Metric, method: int) -> Text:
    style = "bold green" if method in metric.best else "red" if method in metric.harm else ""
    return Text(metric.cells[method], style=style)


def _methods_down(results: Results, metrics: Sequence[Metric]) -> Table:
    table = _table()
    table.add_column("method", no_wrap=True, vertical="bottom")
    heads = _abbreviated([metric.name for metric in metrics if metric.kind == "shift"])
    for metric in metrics:
        head = heads[metric.name] if metric.kind == "shift" else metric.name.replace(" ", "\n")
        table.add_column(Text(head), justify="right", no_wrap=True)
    for i, row in enumerate(results.rows):
        table.add_row(Text(row.method), *(_cell(metric, i) for metric in metrics))
    return table


def _methods_across(results: Results, metrics: Sequence[Metric], methods: Sequence[int]) -> Table:
    table = _table()
    table.add_column("", no_wrap=True)
    for i in methods:
        table.add_column(Text(results.rows[i].method), justify="right", no_wrap=True)
    for metric, after in zip(metrics, [*metrics[1:], None], strict=True):
        table.add_row(
            *(Text(metric.name), *(_cell(metric, i) for i in methods)),
            end_section=after is not None and after.kind != metric.kind,
        )
    return table


def _abbreviated(names: Sequence[str]) -> dict[str, str]:
    """Headings of at most six letters a line, one line a word; those that turn out alike get a number."""
    short: dict[str, str] = {}
    for name in names:
        words = name.replace("_", " ").split() or [name]
        head = "\n".join(word[:6] for word in words[:2])
        alike = sum(other == head or other.startswith(f"{head} ") for other in short.values())
        short[name] = f"{head} {alike + 1}" if alike else head
    return short


def as_markdown(results: Mapping[str, Any] | Results) -> str:
    """A Markdown table with one column a method. The best is bold; ▲ marks more than 0.5 above source.

    Raises:
        ConfigError: the results are not what results.json holds.
    """
    checked = read_results(results)
    metrics = [*error_metrics(checked), *shift_metrics(checked), *cost_metrics(checked)]
    lines = [
        ["", *(_markdown(row.method) for row in checked.rows)],
        ["---", *("---:" for _ in checked.rows)],
    ]
    for metric in metrics:
        unit = " %" if metric.name == "mean error" else ""
        cells = [f"{cell}{' ▲' if i in metric.harm else ''}" for i, cell in enumerate(metric.cells)]
        bold = [f"**{cell}**" if i in metric.best else cell for i, cell in enumerate(cells)]
        lines.append([_markdown(metric.name) + unit, *bold])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return (
        f"{table}\n\nErrors in per cent, times in milliseconds per frame. **Bold**: the best. "
        f"▲: more than {HARM} points worse than {BASELINE}.\n"
    )


def _markdown(name: str) -> str:
    text = html.escape(name, quote=False).replace("\\", "\\\\")
    for special in "|*`[]":
        text = text.replace(special, f"\\{special}")
    return text
