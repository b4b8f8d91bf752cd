"""The plot of visits: what a domain costs when it comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING

from benchmarks.replayed import BASELINE, Results
from benchmarks.report.look import NARROW, WIDE, Plot, Style, csv_uri, drawn, ink, new_grid, raw, words
from benchmarks.visits import EARLY, pooled, settled, visits_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def visits_plot(results: Results, styles: Sequence[Style]) -> Plot | None:
    """None where no domain came back."""
    names = list(dict.fromkeys(visit.name for row in results.rows for visit in row.visits))
    if not names:
        return None
    plot = Plot(
        key="error-per-visit",
        title="Domains that come back",
        legend=True,
        caption=(
            f"Marks: error over the first {EARLY} frames of each visit. Lines across: error over the later frames, "
            "from the second visit on. A mark above its line is what it costs to arrive."
        ),
        alt=f"Line charts, one a domain: error over the first {EARLY} frames against the visit, one line a method.",
        csv=csv_uri(["method", "domain", "visit", "start", f"first_{EARLY}", "later"], _rows(results, names)),
    )
    if not any(error is not None for row in results.rows for visit in row.visits for error in visit.error):
        return replace(plot, missing="The results hold no errors: the stream has no labels.")
    return drawn(plot, lambda width: _draw(results, names, styles, width))


def _rows(results: Results, names: Sequence[str]) -> list[list[object]]:
    return [
        [row.method, name, number, visit.start, raw(pooled([visit], 0, EARLY)), raw(pooled([visit], EARLY))]
        for row in results.rows
        for name in names
        for number, visit in enumerate(visits_of(row, name), start=1)
    ]


def _draw(results: Results, names: Sequence[str], styles: Sequence[Style], width: int) -> Figure:
    across = min(len(names), 4 if width == WIDE else 1 if len(names) < 4 else 2)
    down = ceil(len(names) / across)
    figure, grid = new_grid(width, 190 * down + 40, down, across)
    for place, (axes, name) in enumerate(zip(grid, names, strict=False)):
        _draw_domain(axes, results, name, styles, width)
        if place % across == 0:
            axes.set_ylabel("error, %")
        if place >= len(names) - across:
            axes.set_xlabel("visit")
    tops = [axes.get_ylim()[1] for axes in grid[: len(names)]]
    for axes in grid[: len(names)]:
        axes.set_ylim(0, max(tops))
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    return figure


def _draw_domain(axes: Axes, results: Results, name: str, styles: Sequence[Style], width: int) -> None:
    last, top = 1, 1.0
    for row, style in zip(results.rows, styles, strict=True):
        visits = visits_of(row, name)
        begins = [pooled([visit], 0, EARLY) for visit in visits]
        known = [(number, error) for number, error in enumerate(begins, start=1) if error is not None]
        level = settled(visits)
        last = max(last, len(visits))
        top = max([top, *(error for _, error in known), level or 0])
        if level is not None:
            axes.plot([0.6, len(visits) + 0.4], [level, level], color=style.colour, linewidth=1, alpha=0.7, zorder=2)
        axes.plot(
            *([number for number, _ in known], [error for _, error in known]),
            color=style.colour,
            linewidth=1,
            linestyle=(0, (4, 2)) if row.method == BASELINE else (0, (1, 2)),
            marker=style.marker,
            markersize=7 if width != NARROW else 6,
            markeredgecolor=ink("card"),
            markeredgewidth=0.8,
            zorder=3,
        )
    axes.set(xlim=(0.4, last + 0.6), ylim=(0, top * 1.08))
    axes.set_title(words(name), color=ink("ink"), fontsize=12, loc="left")
    axes.grid(axis="y", color=ink("rule"), linewidth=0.8)
    step = ceil(last / (8 if width == WIDE else 12))
    axes.set_xticks(range(1, last + 1, step))
    axes.locator_params(axis="y", nbins=5)
