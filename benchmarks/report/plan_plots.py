"""Plots of a whole plan: harm on every stream, cost against error, and the label-free estimate against the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.plans.results import Board, PlanResults
from benchmarks.replayed import BASELINE, Row
from benchmarks.report.cost import Placed, cost_of, draw_cost, on_front
from benchmarks.report.heat import drawn_harm
from benchmarks.report.look import WIDE, Plot, Style, count, csv_uri, drawn, ink, listed, new_figure, raw, short, words
from benchmarks.table import HARM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Styles = Mapping[str, Style]


def matrix_plot(board: Board, key: str, title: str) -> Plot:
    """Scenario x method x batch: error of what adapts minus error of source."""
    variants = [variant for variant in board.variants if variant != BASELINE]
    cells: list[list[float | None]] = []
    for variant in variants:
        line = [board.harm(variant, stream) for stream in board.streams]
        known = [value for value in line if value is not None]
        cells.append([*line, sum(known) / len(known) if len(known) == len(line) else None])
    plot = Plot(
        key=key,
        title=title,
        caption=f"Error minus {BASELINE}'s, in points, over all seeds. Framed: more than {HARM} points of harm.",
        alt=f"Heat map: error minus that of {BASELINE}, one row a method, one column a scenario and batch size.",
        csv=csv_uri(
            ["method", *(stream.label for stream in board.streams), "mean"],
            [[variant, *map(raw, line)] for variant, line in zip(variants, cells, strict=True)],
        ),
    )
    if not any(value is not None for line in cells for value in line):
        return replace(
            plot, missing=f"There is nothing to compare without errors of both {BASELINE} and another method."
        )
    one_size = len(board.batch_sizes) == 1
    columns = [words(stream.scenario) + ("" if one_size else f", {stream.batch_size}") for stream in board.streams]
    return drawn_harm(plot, cells, [short(variant) for variant in variants], [*columns, "mean"])


def front_plot(board: Board, size: int, styles: Styles, key: str, title: str) -> Plot:
    """Time against error at one batch size, over all scenarios; what did not run in all of them is left out."""
    streams = [stream for stream in board.streams if stream.batch_size == size]
    whole = [variant for variant in board.variants if all(board.seeds(variant, stream) for stream in streams)]
    timed = all(cell.row is None or cell.row.time is not None for cell in board.cells)
    costs = [board.cost(variant, streams, _time if timed else cost_of) for variant in whole]
    errors = [board.error(variant, streams) for variant in whole]
    means = [None if error is None else error.mean for error in errors]
    placed: list[Placed] = [
        (cost, mean, variant, styles[variant])
        for variant, cost, mean in zip(whole, costs, means, strict=True)
        if cost is not None and mean is not None
    ]
    scale = "time, multiples of plain inference" if timed else "answer + learn, ms per frame"
    absent = [v for v in board.variants if v not in whole and any(board.seeds(v, stream) for stream in streams)]
    left_out = f" Left out, since not run in every scenario: {listed(absent)}." if absent else ""
    plot = Plot(
        key=key,
        title=title,
        caption=f"Down and to the left is better. The line joins what nothing else beats in both.{left_out}",
        alt=f"Scatter plot: mean error in per cent against {scale}, a labelled mark a method.",
        csv=csv_uri(
            ["method", "time_ratio" if timed else "ms_per_frame", "mean_error", "pareto"],
            [
                [variant, raw(cost), raw(mean), on_front(cost, mean, placed)]
                for variant, cost, mean in zip(whole, costs, means, strict=True)
            ],
        ),
    )
    if not placed:
        return replace(plot, missing="The results hold no mean errors, so cost has nothing to stand against.")
    return drawn(plot, lambda width: draw_cost(placed, width, scale))


def _time(row: Row) -> float | None:
    return row.time


class Told(NamedTuple):
    """An error as it was estimated, and as it was."""

    board: str
    stream: str
    variant: str
    seed: int
    value: float
    low: float
    high: float
    error: float


def reliability_plot(results: PlanResults, styles: Styles) -> Plot | None:
    """None where no cell has both an estimate and an error."""
    told = list(_told(results))
    if not told:
        return None
    inside = sum(one.low <= one.error <= one.high for one in told)
    apart = sum(abs(one.value - one.error) for one in told) / len(told)
    return drawn(
        Plot(
            key="reliability",
            title="The estimate without labels",
            legend=True,
            caption=(
                f"On the line the estimate is right; bars are its intervals of 90 %. {inside} of "
                f"{count(len(told), 'interval')} hold the truth; the mean distance is {apart:.1f} points."
            ),
            alt="Scatter plot: true error in per cent against the error that was estimated without labels.",
            csv=csv_uri(["board", "stream", "method", "seed", "estimate", "low", "high", "error"], told),
        ),
        lambda width: _draw_told(told, styles, width),
    )


def _told(results: PlanResults) -> list[Told]:
    found = []
    for board in results.boards:
        for stream in board.streams:
            for variant in board.variants:
                for seed, cell in board.seeds(variant, stream).items():
                    if cell.row is None or cell.row.error_mean is None or (said := cell.row.error_estimate) is None:
                        continue
                    if said.value is not None and said.low is not None and said.high is not None:
                        place = (board.name, stream.label, variant, seed)
                        found.append(Told(*place, said.value, said.low, said.high, cell.row.error_mean))
    return found


def _draw_told(told: Sequence[Told], styles: Styles, width: int) -> Figure:
    figure, axes = new_figure(width, 480 if width == WIDE else 340)
    top = min(max(max(one.high, one.error) for one in told) * 1.05, 100)
    axes.plot([0, top], [0, top], color=ink("muted"), linewidth=1.2, linestyle=(0, (3, 3)), zorder=1)
    for one in told:
        style = styles[one.variant]
        axes.plot([one.low, one.high], [one.error] * 2, color=style.colour, linewidth=1.2, alpha=0.45, zorder=2)
        axes.plot(
            *([one.value], [one.error]),
            linestyle="",
            marker=style.marker,
            markersize=8,
            color=style.colour,
            markeredgecolor=ink("card"),
            markeredgewidth=0.8,
            zorder=3,
        )
    axes.set(xlim=(0, top), ylim=(0, top), xlabel="estimated error, %", ylabel="true error, %")
    axes.set_box_aspect(1)
    axes.grid(color=ink("rule"), linewidth=0.8)
    axes.locator_params(nbins=6)
    return figure
