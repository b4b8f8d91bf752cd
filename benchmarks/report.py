"""The report of a replay: one HTML file with everything inside, for a screen, a phone or paper.

The plots are SVG with text left as text. They are drawn with the light colours of `THEME`, which are then
replaced by the page's CSS variables, so a plot follows the page into dark mode and onto paper. Each is drawn
twice, for a wide and for a narrow screen; the page shows the one that fits.
"""

from __future__ import annotations

import base64
import csv
import io
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from benchmarks.table import (
    BASELINE,
    HARM,
    Metric,
    Results,
    Row,
    amount,
    cost_metrics,
    difference,
    error_metrics,
    per_cent,
    points,
    read_results,
    shift_metrics,
)
from edge_adapt.delta import write_atomically
from edge_adapt.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPLATE = "report.html.j2"
WIDE, NARROW = 960, 348
"""Width of a plot in CSS pixels: matplotlib's points, since every figure has 72 dots an inch."""
LINE_POINTS = {WIDE: 400, NARROW: 130}
"""Points that a line of the timeline has at most; longer ones are averaged to keep the file small."""
DOMAIN_CHANGE = "domain change"

THEME = {
    "page": ("#f5f6f8", "#0e1114"),
    "card": ("#ffffff", "#171b20"),
    "ink": ("#1a1e24", "#e9ecef"),
    "muted": ("#5b6470", "#9ea8b3"),
    "rule": ("#dfe3e8", "#313840"),
    "better": ("#2a7ab9", "#3a86c4"),
    "worse": ("#d4571c", "#d4622a"),
    "m-source": ("#737a85", "#a3abb6"),
    "m-moments": ("#0072b2", "#4fa8e8"),
    "m-tent": ("#d55e00", "#f58b45"),
    "m-cotta": ("#00936b", "#2ec99c"),
    "m-violet": ("#2f1fe0", "#6368ff"),
    "m-olive": ("#5c5600", "#f5e04a"),
    "m-maroon": ("#7d0c17", "#c4544c"),
    "m-night": ("#14233c", "#ffffff"),
}
"""CSS variables: (light, dark). The methods' hues stay apart for the common kinds of colour blindness."""

KNOWN = {
    "source": ("m-source", "o"),
    "moments": ("m-moments", "s"),
    "tent": ("m-tent", "^"),
    "cotta": ("m-cotta", "D"),
}
SPARE = (("m-violet", "v"), ("m-olive", "P"), ("m-maroon", "X"), ("m-night", "p"))
MARKERS = {
    "o": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "s": "M-4.5 -4.5h9v9h-9z",
    "^": "M0 -5.5l5.5 10h-11z",
    "D": "M0 -6l6 6l-6 6l-6 -6z",
    "v": "M0 5.5l5.5 -10h-11z",
    "P": "M-2 -5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5z",
    "X": "M-5.5 -3l2.5 -2.5l3 3l3 -3l2.5 2.5l-3 3l3 3l-2.5 2.5l-3 -3l-3 3l-2.5 -2.5l3 -3z",
    "p": "M0 -5.5l5.5 4l-2 6.3h-7l-2 -6.3z",
}
"""matplotlib's markers again, as SVG paths for the key."""


@dataclass(frozen=True)
class Style:
    """How a method looks in every plot; the marker serves those to whom the colour says nothing."""

    variable: str
    marker: str

    @property
    def colour(self) -> str:
        """What to give matplotlib, which knows no CSS variables."""
        return THEME[self.variable][0]

    @property
    def path(self) -> str:
        """The marker, for the key of the page."""
        return MARKERS[self.marker]


@dataclass(frozen=True)
class Plot:
    """A figure of the page. Without drawings, `missing` says why there are none."""

    key: str
    title: str
    caption: str
    alt: str
    csv: str
    legend: bool = False
    """Whether the page draws a key of all methods above it."""
    numbers: bool = False
    """Whether the page has the table of errors per shift below it."""
    wide: str = ""
    narrow: str = ""
    missing: str = ""


def write_report(results: Mapping[str, Any] | Results, path: Path) -> None:
    """Write the report as one HTML file that needs nothing else, not even a network.

    Args:
        results: what results.json holds.
        path: where to write; missing folders are made, an older file is replaced in one step.

    Raises:
        ConfigError: jinja2 or matplotlib is not installed, or the results are not what results.json holds.
    """
    page = render(read_results(results))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())


def render(results: Results) -> str:
    """The report's HTML."""
    try:
        import jinja2
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError(
            "the report needs jinja2 and matplotlib", remedy="pip install 'edge-adapt[report]'"
        ) from error
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["minus"] = _minus
    styles = method_styles([row.method for row in results.rows])
    drawing: Any = {
        "font.family": ["DejaVu Sans"],
        "font.size": 12,
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.image_inline": True,
        "path.simplify": True,
        "axes.unicode_minus": True,
    }
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()  # not the user's own style, which may be made for another background
        mpl.rcParams.update(drawing)
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        plots = [
            _timeline_plot(results, styles),
            _shifts_plot(results, styles),
            _cost_plot(results, styles),
            _harm_plot(results),
        ]
    return environment.get_template(TEMPLATE).render(
        results=results,
        theme=THEME,
        verdict=verdict(results),
        facts=_facts(results),
        summary=_summary(results),
        numbers=[*shift_metrics(results), *error_metrics(results)[:1]],
        styles=styles,
        plots=plots,
        baseline=BASELINE,
        harm=HARM,
    )


def verdict(results: Results) -> str:
    """One sentence: the best method, what it is against source, the worst that any method does to a shift."""
    source, labelled = results.source, [row for row in results.rows if row.error_mean is not None]
    spread = f"over {_count(len(results.shift_names), 'shift')}"
    if not labelled:
        costs = [(cost, row.method) for row in results.rows if (cost := _cost(row)) is not None]
        cheapest = (
            f"; the cheapest method is {min(costs)[1]} at {amount(min(costs)[0])} ms a frame" if costs else ""
        )
        return f"The stream has no labels, so nothing can be said about errors{cheapest}."
    best = min(labelled, key=_mean)
    adapting = [row for row in labelled if row.method != BASELINE]
    if not adapting:
        return f"Only {BASELINE} was run: its mean error is {per_cent(best.error_mean)} % {spread}."
    if source is None or source.error_mean is None:
        verb = "Best is" if len(labelled) > 1 else "Only one method was run:"
        why = "was not run" if source is None else "has none"
        return (
            f"{verb} {best.method}, with a mean error of {per_cent(best.error_mean)} % {spread}; "
            f"{BASELINE} {why}, so whether adapting helped is unknown."
        )
    chosen = min(adapting, key=_mean)
    gain = source.error_mean - _mean(chosen)
    mean, reference = per_cent(chosen.error_mean), per_cent(source.error_mean)
    if gain < 0.05:
        opening = (
            f"No method beats {BASELINE}, whose mean error is {reference} % {spread}; "
            f"the nearest is {chosen.method} at {mean} % ({points(-gain)} points)"
        )
    else:
        subject = f"Best is {chosen.method}:" if len(adapting) > 1 else f"With {chosen.method}"
        verb = "its" if len(adapting) > 1 else "the"
        opening = (
            f"{subject} {verb} mean error is {mean} % against {reference} % for {BASELINE}, "
            f"{per_cent(gain)} points less {spread}"
        )
    return f"{opening}{_harm_in_words(results, chosen, adapting)}."


def _harm_in_words(results: Results, chosen: Row, adapting: Sequence[Row]) -> str:
    worst = {row.method: harm for row in adapting if (harm := worst_harm(results, row)) is not None}
    if not worst:
        return ""
    method, (most, shift) = max(worst.items(), key=lambda item: item[1][0])
    if most <= HARM:
        who = f"{chosen.method} is" if len(adapting) == 1 else "no method is"
        where = "on no shift" if len(adapting) == 1 else "on any shift"
        return f"; {who} {where} more than {HARM} points worse than {BASELINE}"
    if method == chosen.method:
        return f"; its worst harm is {per_cent(most)} points above {BASELINE}, on {shift}"
    own, where = worst.get(chosen.method, (0.0, ""))
    tame = f"it is on no shift more than {HARM} points worse than {BASELINE}"
    wild = f"at its worst it is {per_cent(own)} points above {BASELINE}, on {where}"
    return (
        f"; {wild if own > HARM else tame}, "
        f"while the worst harm of all is {method}'s, {per_cent(most)} points on {shift}"
    )


def worst_harm(results: Results, row: Row) -> tuple[float, str] | None:
    """The most points by which a method is above source, and the shift; None without labels or source."""
    known = [(harm, name) for name in results.shift_names if (harm := results.harm(row, name)) is not None]
    return max(known, default=None)


def method_styles(methods: Sequence[str]) -> list[Style]:
    """One style a method. A name has the same one in every report, unless two spare ones meet in this one."""
    taken: set[tuple[str, str]] = set()
    styles = []
    for method in methods:
        first = zlib.crc32(method.encode()) % len(SPARE)
        wanted = [KNOWN[method]] if method in KNOWN else [*SPARE[first:], *SPARE[:first]]
        every = [*wanted, *((colour, marker) for marker in reversed(MARKERS) for colour, _ in SPARE)]
        pair = next((pair for pair in every if pair not in taken), wanted[0])
        taken.add(pair)
        styles.append(Style(*pair))
    return styles


def _summary(results: Results) -> list[dict[str, Any]]:
    """The summary table: a row a method, its cells as (text, class, note)."""
    mean, against = error_metrics(results)
    rows = []
    for i, row in enumerate(results.rows):
        worst = worst_harm(results, row) if row.method != BASELINE else None
        cells = [(metric.cells[i], _standing(metric, i), "") for metric in (mean, against)]
        note = worst[1] if worst else ""
        cells.append((points(worst[0] if worst else None), "harm" if worst and worst[0] > HARM else "", note))
        cells += [(metric.cells[i], _standing(metric, i), "") for metric in cost_metrics(results)]
        rows.append({"method": row.method, "cells": cells})
    return rows


def _standing(metric: Metric, method: int) -> str:
    marks = {"best": metric.best, "worst": metric.worst, "harm": metric.harm}
    return " ".join(mark for mark, methods in marks.items() if method in methods)


def _facts(results: Results) -> list[str]:
    frames = max(row.frames for row in results.rows)
    settings = [f"{name.replace('_', ' ')} {_plain(value)}" for name, value in results.settings.items()]
    shifts, methods = _count(len(results.shift_names), "shift"), _count(len(results.rows), "method")
    return [methods, shifts, _count(frames, "frame"), *settings]


# --- plots ----------------------------------------------------------------------------------------


def _timeline_plot(results: Results, styles: Sequence[Style]) -> Plot:
    lines = [_thinned(row) for row in results.rows]
    ticked = [row.method for row in results.rows if _changes(row)]
    longest = max(lines, key=len)
    window = longest[0][0] if longest else 0
    wider = " (wider ones on a narrow screen)" if len(longest) > LINE_POINTS[NARROW] else ""
    caption = f"Error over windows of {_count(window, 'frame')}{wider}, in the order of the stream."
    if ticked:
        caption += f" Ticks above the axis: where {_listed(ticked)} reported a domain change."
    table = [
        [row.method, frames, _raw(error)]
        for row, line in zip(results.rows, lines, strict=True)
        for frames, error in line
    ]
    plot = Plot(
        key="error-over-time",
        title="Error over time",
        legend=True,
        caption=caption,
        alt="Line chart: error in per cent against frames seen, one line a method.",
        csv=_csv(["method", "frames", "error"], table),
    )
    if not any(lines):
        return replace(plot, missing="The results hold no errors over time: the stream has no labels.")
    return _drawn(plot, lambda width: _draw_timeline(results, styles, width))


def _draw_timeline(results: Results, styles: Sequence[Style], width: int) -> Figure:
    lines = [_thinned(row, width) for row in results.rows]
    figure, axes = _figure(width, 380 if width == WIDE else 340)
    last = max(
        [line[-1][0] for line in lines if line] + [shift.start + shift.frames for shift in results.shifts]
    )
    top = max(error for line in lines for _, error in line)
    axes.set(xlim=(0, max(last, 1)), ylim=(0, max(top * 1.06, 1)))
    axes.grid(axis="y", color=_ink("rule"), linewidth=0.8)
    apart = ceil(len(results.shifts) * 15 / (width - 80))
    pixels = (width - 70) / max(last, 1)
    level = all(shift.frames * pixels > 7 * len(_words(shift.name)) for shift in results.shifts)
    rotation = 0 if level else 90 if width == NARROW else 45
    for i, shift in enumerate(results.shifts):
        if i:
            axes.axvline(shift.start, color=_ink("rule"), linewidth=0.8, zorder=0.5)
        if i % max(apart, 1) == 0:
            axes.text(
                *(shift.start + shift.frames / 2, 1.02, _words(shift.name)),
                transform=axes.get_xaxis_transform(),
                rotation=rotation,
                rotation_mode="anchor",
                ha="center" if level else "left",
                va="center" if rotation == 90 else "baseline",
                color=_ink("muted"),
                fontsize=11 if width == WIDE else 10,
            )
    ticks = 0
    for i, (row, line, style) in enumerate(zip(results.rows, lines, styles, strict=True)):
        every = max(len(line) // (12 if width == WIDE else 6), 1)
        axes.plot(
            *([frames for frames, _ in line], [error for _, error in line]),
            color=style.colour,
            linewidth=1.6 if width == WIDE else 1.3,
            linestyle=(0, (4, 2)) if row.method == BASELINE else "-",
            marker=style.marker,
            markersize=5.5,
            markeredgecolor=_ink("card"),
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


def _shifts_plot(results: Results, styles: Sequence[Style]) -> Plot:
    names = results.shift_names
    plot = Plot(
        key="error-per-shift",
        title="Error per shift",
        legend=True,
        numbers=True,
        caption="Further left is better. The bar of each shift spans its best and its worst method.",
        alt="Dot plot: error in per cent, one row a shift, one mark a method.",
        csv=_csv(
            ["method", *names, "mean"],
            [
                [row.method, *(_raw(row.errors.get(name)) for name in names), _raw(row.error_mean)]
                for row in results.rows
            ],
        ),
    )
    lines = [(_words(name), [row.errors.get(name) for row in results.rows]) for name in names]
    lines.append(("mean", [row.error_mean for row in results.rows]))
    if not any(value is not None for _, values in lines for value in values):
        return replace(plot, missing="The results hold no errors: the stream has no labels.")
    return _drawn(plot, lambda width: _draw_shifts(lines, styles, width))


def _draw_shifts(
    lines: Sequence[tuple[str, Sequence[float | None]]], styles: Sequence[Style], width: int
) -> Figure:
    figure, axes = _figure(width, 64 + 27 * len(lines))
    top = max(value for _, values in lines for value in values if value is not None)
    for y, (name, values) in enumerate(lines):
        known = [value for value in values if value is not None]
        if not known:
            continue
        if name == "mean" and y == len(lines) - 1:
            axes.axhspan(y - 0.5, y + 0.5, color=_ink("page"), zorder=0, linewidth=0)
        axes.plot(
            [min(known), max(known)],
            [y, y],
            color=_ink("rule"),
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
                    markeredgecolor=_ink("card"),
                    markeredgewidth=0.8,
                    clip_on=False,
                    zorder=3,
                )
    axes.set(xlim=(0, max(top * 1.04, 1)), ylim=(len(lines) - 0.5, -0.5))
    axes.set_yticks(range(len(lines)), [name for name, _ in lines])
    axes.tick_params(axis="y", labelcolor=_ink("ink"))
    axes.grid(axis="x", color=_ink("rule"), linewidth=0.8)
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


def _cost_plot(results: Results, styles: Sequence[Style]) -> Plot:
    costs = [(row, _cost(row)) for row in results.rows]
    placed = [
        (cost, row.error_mean, row.method, style)
        for (row, cost), style in zip(costs, styles, strict=True)
        if cost is not None and row.error_mean is not None
    ]
    plot = Plot(
        key="cost-against-error",
        title="Cost against error",
        caption=(
            "Down and to the left is better. The line joins the methods that no other beats in both; "
            "cost is the mean time to answer and to learn."
        ),
        alt="Scatter plot: mean error in per cent against milliseconds per frame, a labelled mark a method.",
        csv=_csv(
            ["method", "ms_per_frame", "mean_error", "pareto"],
            [
                [row.method, _raw(cost), _raw(row.error_mean), _on_front(cost, row.error_mean, placed)]
                for row, cost in costs
            ],
        ),
    )
    if not placed:
        return replace(plot, missing="The results hold no mean errors, so cost has nothing to stand against.")
    return _drawn(plot, lambda width: _draw_cost(placed, width))


Placed = tuple[float, float, str, Style]
"""Cost, mean error, method, and how it is drawn."""
LABEL_SPOTS = (
    (11, 0),
    (0, 15),
    (0, -15),
    (-11, 0),
    (9, 13),
    (9, -13),
    (-9, 13),
    (-9, -13),
    (0, 29),
    (0, -29),
)
"""Where a name may stand, in pixels from its mark; the first is liked best."""


def _on_front(cost: float | None, error: float | None, placed: Sequence[Placed]) -> str:
    if cost is None or error is None:
        return ""
    beaten = any(c <= cost and e <= error and (c, e) != (cost, error) for c, e, *_ in placed)
    return "no" if beaten else "yes"


def _draw_cost(placed: Sequence[Placed], width: int) -> Figure:
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = _figure(width, 380 if width == WIDE else 320)
    costs, errors = [cost for cost, *_ in placed], [error for _, error, *_ in placed]
    low, high, bottom, top = min(costs), max(costs), min(errors), max(errors)
    axes.grid(color=_ink("rule"), linewidth=0.8)
    if low > 0 and high > 10 * low:
        axes.set_xscale("log")
        room = (high / low) ** 0.14
        axes.set_xlim(low / room, high * room)
        dense = (1, 2, 5) if high < (1000 if width == WIDE else 50) * low else (1,)
        axes.xaxis.set_major_locator(LogLocator(subs=dense))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_xlim(max(low - 0.2 * (high - low or low or 1), 0), high + 0.2 * (high - low or low or 1))
        axes.locator_params(axis="x", nbins=8 if width == WIDE else 5)
    room = max(0.16 * (top - bottom), 1.0)
    axes.set_ylim(max(bottom - room, 0), top + room)
    axes.locator_params(axis="y", nbins=6)
    axes.set_xlabel("answer + learn, ms per frame" + (", log scale" if axes.get_xscale() == "log" else ""))
    axes.set_ylabel("mean error, %")
    front = sorted({(cost, error) for cost, error, *_ in placed if _on_front(cost, error, placed) == "yes"})
    steps = [(front[0][0], axes.get_ylim()[1]), *front, (axes.get_xlim()[1], front[-1][1])]
    axes.step(
        *([x for x, _ in steps], [y for _, y in steps]),
        where="post",
        color=_ink("muted"),
        linewidth=1.2,
        linestyle=(0, (3, 3)),
        zorder=2,
    )
    for cost, error, _, style in placed:
        axes.plot(
            *([cost], [error]),
            linestyle="",
            marker=style.marker,
            markersize=11 if width == WIDE else 10,
            color=style.colour,
            markeredgecolor=_ink("card"),
            markeredgewidth=1,
            clip_on=False,
            zorder=4,
        )
    _label_points(figure, axes, placed, steps)
    return figure


class Box(NamedTuple):
    """A rectangle in pixels, from the lower left."""

    left: float
    low: float
    right: float
    high: float

    def covers(self, other: Box) -> float:
        """The area that both have in common."""
        across = min(self.right, other.right) - max(self.left, other.left)
        return max(across, 0) * max(min(self.high, other.high) - max(self.low, other.low), 0)

    def outside(self, frame: Box) -> float:
        """How far it sticks out of a frame."""
        across = max(frame.left - self.left, 0) + max(self.right - frame.right, 0)
        return across + max(frame.low - self.low, 0) + max(self.high - frame.high, 0)


def _label_points(
    figure: Figure, axes: Axes, placed: Sequence[Placed], steps: Sequence[tuple[float, float]]
) -> None:
    """Write each name beside its mark, where it covers no mark, name or line if there is such a place."""
    figure.draw_without_rendering()
    frame = Box(*map(float, axes.get_window_extent().extents))

    def pixels(x: float, y: float) -> tuple[float, float]:
        across, up = axes.transData.transform((x, y))
        return float(across), float(up)

    marks = [pixels(cost, error) for cost, error, *_ in placed]
    used = [Box(x - 8, y - 8, x + 8, y + 8) for x, y in marks]
    for (x, y), (to_x, to_y) in pairwise(pixels(*step) for step in steps):
        used.append(Box(x - 1, y - 1, to_x + 1, y + 1))
        used.append(Box(to_x - 1, min(y, to_y) - 1, to_x + 1, max(y, to_y) + 1))
    for (x, y), (cost, error, method, _) in sorted(zip(marks, placed, strict=True), key=lambda pair: pair[0]):
        name = _short(method)
        long = 7.8 * len(name)
        places: list[tuple[float, int, Box, tuple[int, int]]] = []
        for dx, dy in LABEL_SPOTS:
            left = x + dx - (0 if dx > 0 else long if dx < 0 else long / 2)
            box = Box(left, y + dy - 7, left + long, y + dy + 7)
            places.append((50 * box.outside(frame) + sum(map(box.covers, used)), len(places), box, (dx, dy)))
        _, _, box, spot = min(places)
        used.append(box)
        label = axes.annotate(
            *(name, (cost, error)),
            xytext=spot,
            textcoords="offset points",
            ha="left" if spot[0] > 0 else "right" if spot[0] < 0 else "center",
            va="center_baseline",
            color=_ink("ink"),
            fontsize=12,
            zorder=5,
        )
        label.set_in_layout(False)


def _harm_plot(results: Results) -> Plot:
    rows, names = [row for row in results.rows if row.method != BASELINE], results.shift_names
    means = [
        difference(row.error_mean, results.source.error_mean if results.source else None) for row in rows
    ]
    cells = [
        [*(results.harm(row, name) for name in names), mean] for row, mean in zip(rows, means, strict=True)
    ]
    plot = Plot(
        key="do-no-harm",
        title="Do no harm",
        caption=f"Error minus {BASELINE}'s, in points.",
        alt=f"Heat map: error minus that of {BASELINE}, one row a method, one column a shift.",
        csv=_csv(
            ["method", *names, "mean"],
            [[row.method, *map(_raw, line)] for row, line in zip(rows, cells, strict=True)],
        ),
    )
    if not any(value is not None for line in cells for value in line):
        return replace(
            plot, missing=f"There is nothing to compare without errors of both {BASELINE} and another method."
        )
    methods, columns = [_short(row.method) for row in rows], [*map(_words, names), "mean"]
    return _drawn(
        plot,
        lambda width: (
            _draw_harm(cells, methods, columns, width)
            if width == WIDE
            else _draw_harm([list(line) for line in zip(*cells, strict=True)], columns, methods, width)
        ),
    )


def _draw_harm(
    cells: Sequence[Sequence[float | None]], down: Sequence[str], across: Sequence[str], width: int
) -> Figure:
    """Blue below source, orange above; opacity grows with the root, so that small harm can be seen."""
    from matplotlib.patches import Rectangle

    flat = width == NARROW
    gap = 0.25 if flat else 14 * len(across) / (width - 130)  # before the mean, which comes last
    slanted = max(map(len, across)) * 7 > (width - 130) / len(across)
    figure, axes = _figure(width, (30 if flat else 38) * len(down) + (100 if slanted and not flat else 60))
    most = max([abs(value) for line in cells for value in line if value is not None] + [1.0])
    small = (width - 130) / len(across) < 44
    for y, line in enumerate(cells):
        for x, value in enumerate(line):
            gap_x, gap_y = gap * (not flat and x == len(across) - 1), gap * (flat and y == len(down) - 1)
            shown = value is not None and abs(value) >= 0.05
            axes.add_patch(
                Rectangle(
                    (x - 0.47 + gap_x, y - 0.46 + gap_y),
                    *(0.94, 0.92),
                    facecolor=_ink("page")
                    if value is None or not shown
                    else _ink("worse" if value > 0 else "better"),
                    alpha=0.1 + 0.65 * sqrt(min(abs(value) / most, 1)) if shown and value is not None else 1,
                    linewidth=0,
                )
            )
            axes.text(
                *(x + gap_x, y + gap_y, _minus(_points_in(value, small=small))),
                ha="center",
                va="center_baseline",
                fontsize=9.5 if small else 12,
                fontweight="bold" if value is not None and value > HARM else "normal",
                color=_ink("ink"),
            )
    axes.set(
        xlim=(-0.5, len(across) - 0.5 + (0 if flat else gap)),
        ylim=(len(down) - 0.5 + (gap if flat else 0), -0.5),
    )
    axes.set_yticks([y + gap * (flat and y == len(down) - 1) for y in range(len(down))], down)
    axes.set_xticks([x + gap * (not flat and x == len(across) - 1) for x in range(len(across))], across)
    axes.xaxis.tick_top()
    if slanted:
        for label in axes.get_xticklabels():
            label.set(rotation_mode="anchor", ha="left")
            label.set(**({"rotation": 90, "va": "center"} if flat else {"rotation": 45, "va": "baseline"}))
    axes.tick_params(labelcolor=_ink("ink"), length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


# --- from matplotlib to the page ------------------------------------------------------------------


def _figure(width: int, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained", facecolor="none")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot(facecolor="none")
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0)
    axes.tick_params(labelcolor=_ink("muted"), labelsize=12 if width == WIDE else 11)
    axes.xaxis.label.set_color(_ink("muted"))
    axes.yaxis.label.set_color(_ink("muted"))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set(color=_ink("rule"), linewidth=1)
    return figure, axes


def _drawn(plot: Plot, draw: Callable[[int], Figure]) -> Plot:
    wide, narrow = (_svg(draw(width), plot.alt, f"{plot.key}-{width}") for width in (WIDE, NARROW))
    return replace(plot, wide=wide, narrow=narrow)


def _svg(figure: Figure, alt: str, salt: str) -> str:
    """The figure as an <svg> element for a page: no metadata, short numbers, the page's colours and font."""
    import matplotlib as mpl

    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", facecolor="none", metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    text = file.getvalue().decode()
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}style") or child.tag.endswith("}metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        if f"#{attributes.get('id')}" not in text:
            attributes.pop("id", None)
        for name in attributes.keys() & {"d", "x", "y", "transform", "points"}:
            attributes[name] = re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"\s+", " ", attributes[name]).strip())
        if "style" in attributes:
            attributes["style"] = _themed(attributes["style"])
        element.attrib.clear()
        element.attrib.update(attributes)
        if element.tag != "text":
            element.text = None
        element.tail = None
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    root.attrib.pop("version", None)
    root.attrib.update({"role": "img", "aria-label": alt})
    return ElementTree.tostring(root, encoding="unicode")


def _themed(style: str) -> str:
    for name, (light, _) in THEME.items():
        style = style.replace(light, f"var(--{name})")
    return re.sub(r"font: (?:(bold|\d+) )?([\d.]+px) [^;]*", _font, style)


def _font(match: re.Match[str]) -> str:
    weight = match[1] or "normal"
    return f"font-size: {match[2]}; font-weight: {weight}"


def _ink(name: str) -> str:
    return THEME[name][0]


# --- words and numbers ----------------------------------------------------------------------------


def _thinned(row: Row, width: int = WIDE) -> list[tuple[int, float]]:
    """(frames seen, error) of a method; where there are too many windows, several are averaged into one."""
    ends, errors = row.timeline.frames, row.timeline.error
    sizes = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    known = [
        (end, size, error) for end, size, error in zip(ends, sizes, errors, strict=False) if error is not None
    ]
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


def _cost(row: Row) -> float | None:
    return None if row.answer_ms.mean is None else row.answer_ms.mean + (row.learn_ms.mean or 0.0)


def _mean(row: Row) -> float:
    return float("inf") if row.error_mean is None else row.error_mean


def _csv(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A data: URI, so that the table is in the file and a browser can save it."""
    file = io.StringIO(newline="")
    csv.writer(file).writerows([head, *rows])
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(file.getvalue().encode()).decode()}"


def _raw(value: float | None) -> str:
    return "" if value is None else repr(round(value, 6))


def _points_in(value: float | None, *, small: bool) -> str:
    return f"{value:+.0f}" if small and value is not None and abs(value) >= 9.95 else points(value)


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:21]}…"


def _words(name: str) -> str:
    return _short(name.replace("_", " "))


def _plain(value: object) -> str:
    return "none" if value is None else str(value)


def _minus(text: str) -> str:
    return f"\N{MINUS SIGN}{text[1:]}" if text.startswith("-") else text


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
