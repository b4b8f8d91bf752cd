"""The report of a plan: one HTML file with everything inside, and the data of every plot as CSV beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from benchmarks.plans.results import Board, Cell, PlanResults, Stream, read_plan_results
from benchmarks.replayed import BASELINE
from benchmarks.report.errors import timeline_plot
from benchmarks.report.look import Plot, Style, count, csv_uri, listed, method_styles, raw
from benchmarks.report.page import drawing, filled, standing, write_page
from benchmarks.report.plan_plots import front_plot, matrix_plot, reliability_plot
from benchmarks.report.routes import routes_plot
from benchmarks.table import COSTS, HARM, Cost, amount, costs_of, measured, per_cent, points
from edge_adapt.delta import write_atomically

TEMPLATE = "plan.html.j2"
CSV = "csv"
"""Folder beside the page."""


def write_plan_report(results: Mapping[str, Any] | PlanResults, path: Path) -> None:
    """Write the report as one HTML file that needs nothing else, and its figures as CSV into a folder beside it.

    Args:
        results: what results.json of a plan holds.
        path: where to write; missing folders are made, older files are replaced.

    Raises:
        ConfigError: jinja2 or matplotlib is not installed, or the results are not those of a plan.
    """
    checked = read_plan_results(results)
    page, tables = render(checked)
    write_page(page, path)
    folder = path.parent / CSV
    folder.mkdir(exist_ok=True)
    for key, uri in tables.items():
        write_atomically(folder / f"{key}.csv", base64.b64decode(uri.partition(",")[2]))


def render(results: PlanResults) -> tuple[str, dict[str, str]]:
    """The report's HTML, and its CSV files as data: URIs."""
    boards = results.boards
    costs = costs_of(cell.row for cell in results.cells if cell.row)
    variants = list(dict.fromkeys(variant for board in boards for variant in board.variants))
    styles = dict(zip(variants, method_styles(variants), strict=True))
    with drawing():
        plots = [*_board_plots(boards, styles), *_told(results, styles)]
        streams = _stream_plots(boards, styles)
    cells = csv_uri(*_every_cell(results.cells))
    page = filled(
        TEMPLATE,
        results=results,
        boards=boards,
        bundles=listed(list(dict.fromkeys(cell.bundle for cell in results.cells))),
        data=listed(list(dict.fromkeys(cell.data for cell in results.cells))),
        verdict=verdict(results),
        facts=_facts(results),
        groups=[_group(board, size, costs, many=len(boards) > 1) for board in boards for size in board.batch_sizes],
        has_spread=any(len(board.seeds(v, s)) > 1 for board in boards for v in board.variants for s in board.streams),
        costs=costs,
        styles=list(styles.values()),
        style_of=styles,
        methods=variants,
        plots=plots,
        streams=streams,
        cells=cells,
        plan=yaml.safe_dump(results.plan, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100),
        ids=dict.fromkeys(f"{cell.bundle} {cell.bundle_id}" for cell in results.cells),
        seeds=sorted({cell.seed for cell in results.cells}),
        folder=CSV,
    )
    every = [*plots, *(plot for group in streams.values() for plot in group.plots)]
    return page, {"cells": cells} | {plot.key: plot.csv for plot in every if not plot.missing}


def _board_plots(boards: Sequence[Board], styles: Mapping[str, Style]) -> list[Plot]:
    made = []
    for number, board in enumerate(boards, start=1):
        name = [board.name] if len(boards) > 1 else []
        key = f"-{number}-{_slug(board.name)}" if name else ""
        made.append(matrix_plot(board, f"do-no-harm{key}", ": ".join(["Do no harm", *name])))
        for size in board.batch_sizes:
            sized = [f"batches of {size}"] if len(board.batch_sizes) > 1 else []
            title = ": ".join(["Cost against error", *([", ".join([*sized, *name])] if sized or name else [])])
            end = f"-{size}" if sized else ""
            made.append(front_plot(board, size, styles, f"cost-against-error{key}{end}", title))
    return made


def _told(results: PlanResults, styles: Mapping[str, Style]) -> list[Plot]:
    plot = reliability_plot(results, styles)
    return [] if plot is None else [plot]


class Drawn(NamedTuple):
    """One figure or two of a stream, and the key to them."""

    plots: list[Plot]
    methods: list[str]
    styles: list[Style]


def _stream_plots(boards: Sequence[Board], styles: Mapping[str, Style]) -> dict[str, Drawn]:
    """Figures by the name of their stream."""
    made: dict[str, Drawn] = {}
    every = [(board, stream) for board in boards for stream in board.streams]
    for board, stream in every:
        of = f"{stream.label}, {board.name}" if len(boards) > 1 else stream.label
        key = f"-{len(made) + 1}-{_slug(stream.scenario)}-{stream.batch_size}"
        view = board.results(stream)
        methods = [row.method for row in view.rows]
        looks = [styles[method] for method in methods]
        several = any(len(board.seeds(variant, stream)) > 1 for variant in board.variants)
        answered = f"Which entry answered{', first seed' if several else ''}: {of}"
        plots = [
            timeline_plot(view, looks, f"error-over-time{key}", f"Error over time: {of}"),
            routes_plot(view, f"entries-over-time{key}", answered),
        ]
        made[of] = Drawn([plot for plot in plots if plot is not None], methods, looks)
    return made


def verdict(results: PlanResults) -> str:
    """What a reader should know first: what is best, where anything does harm, what did not run."""
    boards = results.boards
    said = [_best(board) for board in boards[:1]] if len(boards) == 1 else [_best_of_many(boards)]
    pairs = [
        (harm, f"{variant} on {stream.label}" + (f", {board.name}" if len(boards) > 1 else ""))
        for board in boards
        for stream in board.streams
        for variant in board.variants
        if variant != BASELINE and (harm := board.harm(variant, stream)) is not None
    ]
    harmful = [pair for pair in pairs if pair[0] > HARM]
    if harmful:
        worst, where = max(harmful)
        said.append(
            f"{len(harmful)} of {count(len(pairs), 'pair')} of method and stream are more than {HARM} points worse "
            f"than {BASELINE}; the worst is {where}: {per_cent(worst)} points."
        )
    elif pairs:
        said.append(f"No method is on any stream more than {HARM} points worse than {BASELINE}.")
    if results.missing:
        said.append(f"{len(results.missing)} of {count(len(results.cells), 'cell')} have no result.")
    return " ".join(said)


def _best(board: Board) -> str:
    means = _means(board)
    if not means:
        return "Nothing has labels, so nothing can be said about errors." if board.variants else "Nothing was measured."
    best = min(means, key=lambda variant: means[variant])
    opening = "Best is" if len(means) == len(board.variants) else "Of what ran everywhere the best is"
    if best == BASELINE or BASELINE not in means:
        return f"{opening} {best}, with a mean error of {per_cent(means[best])} %."
    own, reference = per_cent(means[best]), per_cent(means[BASELINE])
    return f"{opening} {best}: its mean error is {own} % against {reference} % for {BASELINE}."


def _best_of_many(boards: Sequence[Board]) -> str:
    winners = [min(means, key=lambda variant: means[variant]) for board in boards if (means := _means(board))]
    if not winners:
        return "Nothing has labels, so nothing can be said about errors." if boards else "Nothing was measured."
    ranking = sorted(dict.fromkeys(winners), key=lambda name: -winners.count(name))
    told = [f"{name} on {winners.count(name)}" for name in ranking]
    return f"Lowest mean error, of {len(winners)} comparisons: {listed(told)}."


def _means(board: Board) -> dict[str, float]:
    """Mean error of what ran on every stream of a board."""
    complete = [variant for variant in board.variants if all(board.errors(variant, stream) for stream in board.streams)]
    found = {variant: board.error(variant, board.streams) for variant in complete}
    return {variant: over.mean for variant, over in found.items() if over is not None}


def _group(board: Board, size: int, costs: Sequence[Cost], *, many: bool) -> dict[str, Any]:
    """Part of the summary: methods on the streams of one batch size; cells as (text, class, note)."""
    streams = [stream for stream in board.streams if stream.batch_size == size]
    variants = [variant for variant in board.variants if any(board.seeds(variant, stream) for stream in streams)]
    ran = [sum(bool(board.seeds(variant, stream)) for stream in streams) for variant in variants]
    complete = [number == len(streams) for number in ran]
    errors = [board.error(variant, streams) for variant in variants]
    harms = [_mean(board.harm(variant, stream) for stream in streams) for variant in variants]
    worst = [_worst(board, variant, streams) for variant in variants]
    columns = [
        _column([error.mean if error else None for error in errors], per_cent, complete, harms),
        [(f"± {error.spread:.2f}" if error and error.spread is not None else "", "", "") for error in errors],
        _column(harms, points, complete, harms),
        [(points(most), "harm" if most is not None and most > HARM else "", where) for most, where in worst],
        *(_column([board.cost(variant, streams, cost.of) for variant in variants], amount, complete) for cost in costs),
    ]
    return {
        "name": (f"{board.name}, " if many else "") + f"batches of {size}",
        "rows": [
            {
                "method": variant,
                "note": "" if whole else f"{number} of {len(streams)} scenarios",
                "cells": [column[place] for column in columns],
            }
            for place, (variant, number, whole) in enumerate(zip(variants, ran, complete, strict=True))
        ],
    }


def _column(
    values: Sequence[float | None],
    show: Callable[[float | None], str],
    complete: Sequence[bool],
    harm: Sequence[float | None] = (),
) -> list[tuple[str, str, str]]:
    """Cells with marks; what did not run everywhere is not compared."""
    among = [value if whole else None for value, whole in zip(values, complete, strict=True)]
    metric = measured("", "cost", among, show, harm)
    return [(show(value), standing(metric, place), "") for place, value in enumerate(values)]


def _worst(board: Board, variant: str, streams: Sequence[Stream]) -> tuple[float | None, str]:
    """The most points above source on a shift of any stream, and which."""
    if variant == BASELINE:
        return None, ""
    found = []
    for stream in streams:
        view = board.results(stream)
        row = next((row for row in view.rows if row.method == variant), None)
        where = f", {stream.scenario}" if len(streams) > 1 else ""
        if row is not None:
            known = [(view.harm(row, name), f"{name}{where}") for name in view.shift_names]
            found += [(harm, name) for harm, name in known if harm is not None]
    return max(found, default=(None, ""))


def _facts(results: PlanResults) -> list[str]:
    cells = results.cells
    done = len(cells) - len(results.missing)
    parts: dict[str, set[Any]] = {
        "bundle": {cell.bundle for cell in cells},
        "data set": {cell.data for cell in cells},
        "scenario": {cell.scenario for cell in cells},
        "method": {cell.variant for cell in cells},
        "batch size": {cell.batch_size for cell in cells},
        "seed": {cell.seed for cell in cells},
        "engine": {cell.engine for cell in cells},
    }
    return [f"{done:,} of {count(len(cells), 'cell')}", *(count(len(found), thing) for thing, found in parts.items())]


def _every_cell(cells: Iterable[Cell]) -> tuple[list[str], list[list[object]]]:
    """Head and rows of one big table: what a spreadsheet wants."""
    axes = ("bundle", "data", "scenario", "method", "router", "batch_size", "seed", "engine", "severity", "limit")
    rows: list[list[object]] = []
    for cell in cells:
        said = [getattr(cell, axis) for axis in axes]
        row = cell.row
        figures = ["", *("" for _ in COSTS)]
        if row is not None:
            figures = [raw(row.error_mean), *(raw(cost.of(row)) for cost in COSTS)]
        rows.append([*said, cell.status, cell.why or "", *figures])
    return [*axes, "status", "why", "error_mean", *(cost.name.replace(" ", "_") for cost in COSTS)], rows


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _slug(text: str) -> str:
    """What may stand in a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48] or "unnamed"
