"""The heat map of harm: what adapting changes against source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from typing import TYPE_CHECKING

from benchmarks.report.look import NARROW, WIDE, Plot, drawn, ink, minus, new_figure
from benchmarks.table import HARM, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cells = Sequence[Sequence[float | None]]


def drawn_harm(plot: Plot, cells: Cells, down: Sequence[str], across: Sequence[str]) -> Plot:
    """A plot with its drawings; columns become rows on a narrow screen.

    Args:
        cells: points of error above source, [down][across]; the last column is the mean and stands apart.
    """
    plot = replace(plot, scale=True)
    turned = [list(line) for line in zip(*cells, strict=True)]
    return drawn(
        plot, lambda width: _draw(cells, down, across, width) if width == WIDE else _draw(turned, across, down, width)
    )


def _draw(cells: Cells, down: Sequence[str], across: Sequence[str], width: int) -> Figure:
    flat = width == NARROW
    gap = 0.25 if flat else 14 * len(across) / (width - 130)  # before the mean, which comes last
    slanted = max(map(len, across)) * 7 > (width - 130) / len(across)
    figure, axes = new_figure(width, (30 if flat else 38) * len(down) + (100 if slanted and not flat else 60))
    most = max([abs(value) for line in cells for value in line if value is not None] + [1.0])
    small = (width - 130) / len(across) < 44
    for y, line in enumerate(cells):
        for x, value in enumerate(line):
            gap_x, gap_y = gap * (not flat and x == len(across) - 1), gap * (flat and y == len(down) - 1)
            _draw_cell(axes, (x + gap_x, y + gap_y), value, most, small=small)
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
    axes.tick_params(labelcolor=ink("ink"), length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _draw_cell(axes: Axes, place: tuple[float, float], value: float | None, most: float, *, small: bool) -> None:
    """Blue below source, orange above, what does harm framed; opacity grows with the root, so little can be seen."""
    from matplotlib.patches import Rectangle

    shown = value is not None and abs(value) >= 0.05
    harms = value is not None and value > HARM
    x, y = place
    frame = (x - 0.47, y - 0.46), 0.94, 0.92
    axes.add_patch(
        Rectangle(
            *frame,
            facecolor=ink("page") if value is None or not shown else ink("worse" if value > 0 else "better"),
            alpha=0.1 + 0.65 * sqrt(min(abs(value) / most, 1)) if shown and value is not None else 1,
            linewidth=0,
        )
    )
    if harms:
        axes.add_patch(Rectangle(*frame, fill=False, edgecolor=ink("worse"), linewidth=1.6))
    axes.text(
        *(x, y, minus(_points_in(value, small=small))),
        ha="center",
        va="center_baseline",
        fontsize=9.5 if small else 12,
        fontweight="bold" if harms else "normal",
        color=ink("ink"),
    )


def _points_in(value: float | None, *, small: bool) -> str:
    return f"{value:+.0f}" if small and value is not None and abs(value) >= 9.95 else points(value)
