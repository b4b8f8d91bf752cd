"""The report of a replay: one HTML file with everything inside, for a screen, a phone or paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.replayed import BASELINE, Results, Row, read_results
from benchmarks.report.cost import cost_of, cost_plot
from benchmarks.report.errors import harm_plot, shifts_plot, timeline_plot
from benchmarks.report.look import count, method_styles
from benchmarks.report.page import drawing, filled, standing, write_page
from benchmarks.report.routes import routes_plot
from benchmarks.report.visits import visits_plot
from benchmarks.table import HARM, amount, cost_metrics, costs_of, error_metrics, per_cent, points, shift_metrics

TEMPLATE = "replay.html.j2"


def write_report(results: Mapping[str, Any] | Results, path: Path) -> None:
    """Write the report as one HTML file that needs nothing else, not even a network.

    Args:
        results: what results.json holds.
        path: where to write; missing folders are made, an older file is replaced in one step.

    Raises:
        ConfigError: jinja2 or matplotlib is not installed, or the results are not what results.json holds.
    """
    write_page(render(read_results(results)), path)


def render(results: Results) -> str:
    """The report's HTML."""
    styles = method_styles([row.method for row in results.rows])
    with drawing():
        plots = [
            timeline_plot(results, styles),
            routes_plot(results),
            visits_plot(results, styles),
            shifts_plot(results, styles),
            cost_plot(results, styles),
            harm_plot(results),
        ]
    return filled(
        TEMPLATE,
        results=results,
        methods=[row.method for row in results.rows],
        verdict=verdict(results),
        facts=_facts(results),
        summary=_summary(results),
        costs=costs_of(results.rows),
        numbers=[*shift_metrics(results), *error_metrics(results)[:1]],
        styles=styles,
        plots=[plot for plot in plots if plot is not None],
    )


def verdict(results: Results) -> str:
    """One sentence: the best method, what it is against source, the worst that any method does to a shift."""
    source, labelled = results.source, [row for row in results.rows if row.error_mean is not None]
    spread = f"over {count(len(results.shift_names), 'shift')}"
    if not labelled:
        costs = [(cost, row.method) for row in results.rows if (cost := cost_of(row)) is not None]
        cheapest = f"; the cheapest method is {min(costs)[1]} at {amount(min(costs)[0])} ms a frame" if costs else ""
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


def _summary(results: Results) -> list[dict[str, Any]]:
    """The summary table: a row a method, its cells as (text, class, note)."""
    mean, against = error_metrics(results)
    rows = []
    for i, row in enumerate(results.rows):
        worst = worst_harm(results, row) if row.method != BASELINE else None
        cells = [(metric.cells[i], standing(metric, i), "") for metric in (mean, against)]
        note = worst[1] if worst else ""
        cells.append((points(worst[0] if worst else None), "harm" if worst and worst[0] > HARM else "", note))
        cells += [(metric.cells[i], standing(metric, i), "") for metric in cost_metrics(results)]
        rows.append({"method": row.method, "cells": cells})
    return rows


def _facts(results: Results) -> list[str]:
    frames = max(row.frames for row in results.rows)
    settings = [f"{name.replace('_', ' ')} {_plain(value)}" for name, value in results.settings.items()]
    shifts, methods = count(len(results.shift_names), "shift"), count(len(results.rows), "method")
    foreign = [f"errors of genuine frames only: {count(results.foreign, 'frame')} foreign"] if results.foreign else []
    return [methods, shifts, count(frames, "frame"), *foreign, *settings]


def _mean(row: Row) -> float:
    return float("inf") if row.error_mean is None else row.error_mean


def _plain(value: object) -> str:
    return "none" if value is None else str(value)
