"""Results of a replay, shown as a table on a terminal or as Markdown."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from benchmarks.replayed import BASELINE, Results, Row, difference, read_results

WIDTH = 100
"""Columns that a printed table takes at most."""
HARM = 0.5
"""Points of error above source from which a method is said to do harm; less is noise."""
NOTHING = "–"  # noqa: RUF001
"""Stands where a number is not known."""


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


def measured(
    name: str,
    kind: Literal["error", "shift", "cost"],
    values: Sequence[float | None],
    show: Callable[[float | None], str],
    harm: Sequence[float | None] = (),
) -> Metric:
    """Cells and what stands out among them; `harm` holds the points above source."""
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
        measured("mean error", "error", means, per_cent, against),
        measured("vs source", "error", against, points, against),
    ]


def shift_metrics(results: Results) -> list[Metric]:
    """The error on every shift."""
    return [
        measured(
            *(name, "shift", [row.errors.get(name) for row in results.rows], per_cent),
            [results.harm(row, name) for row in results.rows],
        )
        for name in results.shift_names
    ]


@dataclass(frozen=True)
class Cost:
    """Something that a method takes."""

    name: str
    head: str
    """Of its column."""
    of: Callable[[Row], float | None]
    group: str = ""
    """What columns beside each other share."""
    always: bool = False
    """Whether it is shown where nobody knows it."""


def _a_frame(count: float | None, row: Row) -> float | None:
    return None if count is None or not row.frames else count / row.frames


COSTS = (
    Cost("time x", "Time\n×", lambda row: row.time),  # noqa: RUF001
    Cost("answer p50 ms", "p50", lambda row: row.answer_ms.p50, "Answer, ms/frame", always=True),
    Cost("answer p99 ms", "p99", lambda row: row.answer_ms.p99, "Answer, ms/frame", always=True),
    Cost("learn p50 ms", "p50", lambda row: row.learn_ms.p50, "Learn, ms/frame", always=True),
    Cost("learn p99 ms", "p99", lambda row: row.learn_ms.p99, "Learn, ms/frame", always=True),
    Cost("trunk passes", "trunk", lambda row: _a_frame(row.passes, row), "Passes/frame"),
    Cost("backward passes", "back", lambda row: _a_frame(row.backward_passes, row), "Passes/frame"),
    Cost("extra MB", "Extra\nMB", lambda row: row.extra_mb, always=True),
    Cost("state kB", "State\nkB", lambda row: None if row.state_bytes is None else row.state_bytes / 1e3),
    Cost("energy J", "Energy\nJ", lambda row: row.energy_j),
)


def costs_of(rows: Iterable[Row]) -> list[Cost]:
    """The costs that there is something to say about."""
    known = list(rows)
    return [cost for cost in COSTS if cost.always or any(cost.of(row) is not None for row in known)]


def cost_metrics(results: Results) -> list[Metric]:
    """What a method takes: time in milliseconds a frame, passes a frame, memory beyond source's."""
    rows = results.rows
    return [measured(cost.name, "cost", [cost.of(row) for row in rows], amount) for cost in costs_of(rows)]


def screen(width: int = WIDTH) -> Console:
    """Standard output, so wide where it is no terminal and has no width of its own."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


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
    console = console or screen()
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
