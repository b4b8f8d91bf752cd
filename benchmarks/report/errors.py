"""Plots of errors: over time, for each shift, and against source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING

from benchmarks.replayed import BASELINE, Results, Row, Timeline, difference
from benchmarks.report.heat import drawn_harm
from benchmarks.report.look import (
    NARROW,
    WIDE,
    Plot,
    Style,
    count,
    csv_uri,
    drawn,
    ink,
    listed,
    new_figure,
    raw,
    short,
    words,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_POINTS = {WIDE: 400, NARROW: 130}
"""Points that a line of the timeline has at most; longer ones are averaged to keep the file small."""
DOMAIN_CHANGE = "domain change"


def timeline_plot(
    results: Results, styles: Sequence[Style], key: str = "error-over-time", title: str = "Error over time"
) -> Plot:
    """Bands show the standard deviation over seeds, where a row stands for several."""
    lines = [_thinned(row) for row in results.rows]
    ticked = [row.method for row in results.rows if _changes(row)]
    longest = max(lines, key=len)
    window = longest[0][0] if longest else 0
    wider = " (wider ones on a narrow screen)" if len(longest) > LINE_POINTS[NARROW] else ""
    caption = f"Error over windows of {count(window, 'frame')}{wider}, in the order of the stream."
    if ticked:
        caption += f" Ticks above the axis: where {listed(ticked)} reported a domain change."
    if any(row.timeline.spread for row in results.rows):
        caption += " Bands: the standard deviation over seeds" + ("; ticks are the first seed's." if ticked else ".")
    table = [
        [row.method, frames, raw(error)]
        for row, line in zip(results.rows, lines, strict=True)
        for frames, error in line
    ]
    plot = Plot(
        key=key,
        title=title,
        legend=True,
        caption=caption,
        alt="Line chart: error in per cent against frames seen, one line a method.",
        csv=csv_uri(["method", "frames", "error"], table),
    )
    if not any(lines):
        return replace(plot, missing="The results hold no errors over time: the stream has no labels.")
    return drawn(plot, lambda width: _draw_timeline(results, styles, width))


def _draw_timeline(results: Results, styles: Sequence[Style], width: int) -> Figure:
    lines = [_thinned(row, width) for row in results.rows]
    figure, axes = new_figure(width, 380 if width == WIDE else 340)
    last = max([line[-1][0] for line in lines if line] + [shift.start + shift.frames for shift in results.shifts])
    top = max(error for line in lines for _, error in line)
    axes.set(xlim=(0, max(last, 1)), ylim=(0, max(top * 1.06, 1)))
    axes.grid(axis="y", color=ink("rule"), linewidth=0.8)
    _label_shifts(axes, results, last, width)
    ticks = 0
    for i, (row, line, style) in enumerate(zip(results.rows, lines, styles, strict=True)):
        every = max(len(line) // (12 if width == WIDE else 6), 1)
        _draw_band(axes, row, line, style, width)
        axes.plot(
            *([frames for frames, _ in line], [error for _, error in line]),
            color=style.colour,
            linewidth=1.6 if width == WIDE else 1.3,
            linestyle=(0, (4, 2)) if row.method == BASELINE else "-",
            marker=style.marker,
            markersize=5.5,
            markeredgecolor=ink("card"),
            markeredgewidth=0.8,
            markevery=(every * i // len(lines), every),
            zorder=2 if row.method == BASELINE else 3,
        )
        if changes := _changes(row):
            axes.plot(
                *(changes, [0.018 + 0.035 * ticks] * len(changes)),
                transform=axes.get_xaxis_transform(),
                linestyle="",
                marker="|",
                markersize=9,
                markeredgewidth=1.6,
                color=style.colour,
                zorder=4,
            )
            ticks += 1
    axes.set_ylabel("error, %")
    axes.set_xlabel("frames seen")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.locator_params(axis="x", nbins=8 if width == WIDE else 4)
    axes.locator_params(axis="y", nbins=6)
    return figure


def _label_shifts(axes: Axes, results: Results, last: int, width: int) -> None:
    """A line where each shift begins, and its name above where there is room."""
    apart = ceil(len(results.shifts) * 15 / (width - 80))
    pixels = (width - 70) / max(last, 1)
    level = all(shift.frames * pixels > 7 * len(words(shift.name)) for shift in results.shifts)
    rotation = 0 if level else 90 if width == NARROW else 45
    for i, shift in enumerate(results.shifts):
        if i:
            axes.axvline(shift.start, color=ink("rule"), linewidth=0.8, zorder=0.5)
        if i % max(apart, 1) == 0:
            axes.text(
                *(shift.start + shift.frames / 2, 1.02, words(shift.name)),
                transform=axes.get_xaxis_transform(),
                rotation=rotation,
                rotation_mode="anchor",
                ha="center" if level else "left",
                va="center" if rotation == 90 else "baseline",
                color=ink("muted"),
                fontsize=11 if width == WIDE else 10,
            )


def _draw_band(axes: Axes, row: Row, line: Sequence[tuple[int, float]], style: Style, width: int) -> None:
    """What the seeds spread by, around the line of their mean."""
    around = row.model_copy(update={"timeline": Timeline(frames=row.timeline.frames, error=row.timeline.spread)})
    spread = dict(_thinned(around, width))
    known = [(frames, error, spread[frames]) for frames, error in line if frames in spread]
    if known:
        axes.fill_between(
            [frames for frames, _, _ in known],
            [max(error - apart, 0) for _, error, apart in known],
            [error + apart for _, error, apart in known],
            color=style.colour,
            alpha=0.16,
            linewidth=0,
            zorder=1.5,
        )


def shifts_plot(results: Results, styles: Sequence[Style]) -> Plot:
    names = results.shift_names
    plot = Plot(
        key="error-per-shift",
        title="Error per shift",
        legend=True,
        numbers=True,
        caption="Further left is better. The bar of each shift spans its best and its worst method.",
        alt="Dot plot: error in per cent, one row a shift, one mark a method.",
        csv=csv_uri(
            ["method", *names, "mean"],
            [[row.method, *(raw(row.errors.get(name)) for name in names), raw(row.error_mean)] for row in results.rows],
        ),
    )
    lines = [(words(name), [row.errors.get(name) for row in results.rows]) for name in names]
    lines.append(("mean", [row.error_mean for row in results.rows]))
    if not any(value is not None for _, values in lines for value in values):
        return replace(plot, missing="The results hold no errors: the stream has no labels.")
    return drawn(plot, lambda width: _draw_shifts(lines, styles, width))


def _draw_shifts(lines: Sequence[tuple[str, Sequence[float | None]]], styles: Sequence[Style], width: int) -> Figure:
    figure, axes = new_figure(width, 64 + 27 * len(lines))
    top = max(value for _, values in lines for value in values if value is not None)
    for y, (name, values) in enumerate(lines):
        known = [value for value in values if value is not None]
        if not known:
            continue
        if name == "mean" and y == len(lines) - 1:
            axes.axhspan(y - 0.5, y + 0.5, color=ink("page"), zorder=0, linewidth=0)
        axes.plot(
            [min(known), max(known)],
            [y, y],
            color=ink("rule"),
            linewidth=5,
            solid_capstyle="round",
            zorder=1,
        )
        for value, aside, style in zip(values, _dodged(values, 9 * top / (width - 130)), styles, strict=True):
            if value is not None:
                axes.plot(
                    *([value], [y + aside]),
                    linestyle="",
                    marker=style.marker,
                    markersize=8.5 if style.marker in "oP^vXp" else 7.5,
                    color=style.colour,
                    markeredgecolor=ink("card"),
                    markeredgewidth=0.8,
                    clip_on=False,
                    zorder=3,
                )
    axes.set(xlim=(0, max(top * 1.04, 1)), ylim=(len(lines) - 0.5, -0.5))
    axes.set_yticks(range(len(lines)), [name for name, _ in lines])
    axes.tick_params(axis="y", labelcolor=ink("ink"))
    axes.grid(axis="x", color=ink("rule"), linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("error, %")
    axes.locator_params(axis="x", nbins=9 if width == WIDE else 5)
    return figure


def _dodged(values: Sequence[float | None], near: float) -> list[float]:
    """How far to move each mark up or down in its row, so that none hides another that is as near as this."""
    aside = [0.0] * len(values)
    order = sorted((value, i) for i, value in enumerate(values) if value is not None)
    group: list[int] = []
    for (value, i), following in zip(order, [*order[1:], None], strict=True):
        group.append(i)
        if following is None or following[0] - value > near:
            step = min(0.26, 0.7 / len(group))
            for place, member in enumerate(sorted(group)):
                aside[member] = step * (place - (len(group) - 1) / 2)
            group = []
    return aside


def harm_plot(results: Results) -> Plot:
    rows, names = [row for row in results.rows if row.method != BASELINE], results.shift_names
    means = [difference(row.error_mean, results.source.error_mean if results.source else None) for row in rows]
    cells = [[*(results.harm(row, name) for name in names), mean] for row, mean in zip(rows, means, strict=True)]
    plot = Plot(
        key="do-no-harm",
        title="Do no harm",
        caption=f"Error minus {BASELINE}'s, in points.",
        alt=f"Heat map: error minus that of {BASELINE}, one row a method, one column a shift.",
        csv=csv_uri(
            ["method", *names, "mean"],
            [[row.method, *map(raw, line)] for row, line in zip(rows, cells, strict=True)],
        ),
    )
    if not any(value is not None for line in cells for value in line):
        return replace(
            plot, missing=f"There is nothing to compare without errors of both {BASELINE} and another method."
        )
    methods, columns = [short(row.method) for row in rows], [*map(words, names), "mean"]
    return drawn_harm(plot, cells, methods, columns)


def _thinned(row: Row, width: int = WIDE) -> list[tuple[int, float]]:
    """(frames seen, error) of a method; where there are too many windows, several are averaged into one."""
    ends, errors = row.timeline.frames, row.timeline.error
    sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    known = [(end, size, error) for end, size, error in zip(ends, sizes, errors, strict=False) if error is not None]
    together = max(ceil(len(known) / LINE_POINTS[width]), 1)
    line = []
    for first in range(0, len(known), together):
        group = known[first : first + together]
        weight = sum(size for _, size, _ in group)
        mean = sum(size * error for _, size, error in group) / weight if weight else group[-1][2]
        line.append((group[-1][0], mean))
    return line


def _changes(row: Row) -> list[int]:
    return [event.frame for event in row.events if event.name.replace("_", " ") == DOMAIN_CHANGE]
