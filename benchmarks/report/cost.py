"""The plot of cost against error, whose marks carry the names of their methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.replayed import Results, Row
from benchmarks.report.look import WIDE, Plot, Style, csv_uri, drawn, ink, new_figure, raw, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def cost_plot(results: Results, styles: Sequence[Style]) -> Plot:
    costs = [(row, cost_of(row)) for row in results.rows]
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
        csv=csv_uri(
            ["method", "ms_per_frame", "mean_error", "pareto"],
            [
                [row.method, raw(cost), raw(row.error_mean), on_front(cost, row.error_mean, placed)]
                for row, cost in costs
            ],
        ),
    )
    if not placed:
        return replace(plot, missing="The results hold no mean errors, so cost has nothing to stand against.")
    return drawn(plot, lambda width: draw_cost(placed, width, "answer + learn, ms per frame"))


def on_front(cost: float | None, error: float | None, placed: Sequence[Placed]) -> str:
    """Whether nothing is better in one and as good in the other: "yes", "no", or "" where one is not known."""
    if cost is None or error is None:
        return ""
    beaten = any(c <= cost and e <= error and (c, e) != (cost, error) for c, e, *_ in placed)
    return "no" if beaten else "yes"


def draw_cost(placed: Sequence[Placed], width: int, label: str) -> Figure:
    """Marks with their names, and the front that no other beats; `label` says what cost is."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = new_figure(width, 380 if width == WIDE else 320)
    costs, errors = [cost for cost, *_ in placed], [error for _, error, *_ in placed]
    low, high, bottom, top = min(costs), max(costs), min(errors), max(errors)
    axes.grid(color=ink("rule"), linewidth=0.8)
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
    axes.set_xlabel(label + (", log scale" if axes.get_xscale() == "log" else ""))
    axes.set_ylabel("mean error, %")
    front = sorted({(cost, error) for cost, error, *_ in placed if on_front(cost, error, placed) == "yes"})
    steps = [(front[0][0], axes.get_ylim()[1]), *front, (axes.get_xlim()[1], front[-1][1])]
    axes.step(
        *([x for x, _ in steps], [y for _, y in steps]),
        where="post",
        color=ink("muted"),
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
            markeredgecolor=ink("card"),
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


def _label_points(figure: Figure, axes: Axes, placed: Sequence[Placed], steps: Sequence[tuple[float, float]]) -> None:
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
        name = short(method)
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
            color=ink("ink"),
            fontsize=12,
            zorder=5,
        )
        label.set_in_layout(False)


def cost_of(row: Row) -> float | None:
    return None if row.answer_ms.mean is None else row.answer_ms.mean + (row.learn_ms.mean or 0.0)
