"""What is committed of the matrix of no harm: the figures it is judged by, and pages of tables made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harm import HARM, Cell, Harm, Return, harms, returns
from benchmarks.replayed import BASELINE
from benchmarks.sweep_report import markdown
from benchmarks.table import NOTHING
from edge_adapt.delta import write_atomically

FIGURES, PAGE = "no_harm.json", "no_harm.md"
KEPT = (
    "bundle", "bundle_id", "data", "scenario", "method", "router", "batch_size", "seed", "engine", "severity", "limit",
    "corruptions", "status", "why",
)  # fmt: skip
ABOVE, HARMFUL = "*{}*", "**{}**"
ALONE, CONTAMINATED = "continual", "contaminated"
"""The scenario without strangers, and how the names of those with them begin."""
STRANGERS = "Error in % on the genuine frames; `alone` is `continual`, the same domains without strangers."


def compact(results: dict[str, Any], not_run: int = 0, older: int = 0) -> dict[str, Any]:
    """The results of a plan without what no table here is made from, such as timelines: in the same form.

    not_run: cells of the plan that are not among the results, because nobody waited for them.
    older: cells that are of an earlier state of the code, for the same reason.
    """
    return {
        "schema": results["schema"],
        "environment": results["environment"],
        "not_run": not_run,
        "older": older,
        "cells": [_compact(cell) for cell in results["cells"]],
    }


def _compact(cell: Cell) -> Cell:
    kept = {name: cell[name] for name in KEPT if name in cell}
    scored = sum(shift.get("genuine", shift["frames"]) for shift in cell["shifts"])
    kept["shifts"] = [{"name": "all", "start": 0, "frames": scored}]
    row = cell["row"]
    if row is None:
        return kept | {"row": None}
    told = bool(list(returns([cell])))
    return kept | {"row": {"error_mean": row["error_mean"], "time": row["time"], "visits": row["visits"] * told}}


def write(results: Path, folder: Path, not_run: int = 0, older: int = 0) -> None:
    """Both files, made anew from the results of a plan."""
    made = compact(json.loads(results.read_text()), not_run, older)
    write_atomically(folder / FIGURES, (json.dumps(made, separators=(",", ":")) + "\n").encode())
    write_atomically(folder / PAGE, page(folder / FIGURES).encode())


def page(figures: Path) -> str:
    """The tables, as Markdown."""
    made = json.loads(figures.read_text())
    good = [cell for cell in made["cells"] if cell["status"] == "ok" and cell["row"]["error_mean"] is not None]
    found = list(harms(good))
    broken = len(made["cells"]) - len([cell for cell in made["cells"] if cell["status"] == "ok"])
    worst = max(found, key=lambda harm: harm.error - harm.source)
    parts = [
        "# No harm",
        f"Mean error less that of `source` on the same frames, in points; below zero is better. Nothing may be "
        f"more than {HARM} above: {sum(harm.above for harm in found)} of {len(found)} are, in italics, and "
        f"{sum(harm.harms for harm in found)} of these, in bold, by more than one standard error of source's own "
        f"besides. {broken} cells broke. The worst: {worst}.\n\n"
        "Made by `make no-harm` from [no_harm.yaml](../plans/no_harm.yaml), which says how many frames, seeds and "
        "corruptions; more seeds are taken together, and a method is held against source on the seeds that it has: the "
        "line of source is of those of the last method."
        + (f" {missing} cells of it were not run." if (missing := made.get("not_run", 0)) else "")
        + (f" {older} cells are of an earlier state of the code." if (older := made.get("older", 0)) else ""),
    ]
    for title, group in _matrices(found):
        parts.append(f"## {title}\n\n{matrix(group)}")
    if lines := strangers(found):
        parts.append(f"## Strangers among the frames\n\n{STRANGERS}\n\n{lines}")
    parts.append(f"## Domains that come back\n\n{returning(list(returns(good)))}")
    return "\n\n".join(parts) + "\n"


def _matrices(found: Iterable[Harm]) -> Iterable[tuple[str, list[Harm]]]:
    """Each bundle, batch size and length of stream by itself."""
    groups: dict[str, list[Harm]] = {}
    for harm in found:
        at = dict(zip(harm.names, harm.stream, strict=True))
        length = "all frames" if at["limit"] is None else f"{at['limit']} frames a domain"
        groups.setdefault(f"{at['bundle']}, batch {at['batch_size']}, {length}", []).append(harm)
    return groups.items()


def matrix(found: Sequence[Harm]) -> str:
    """Methods by streams; source's own error in the first line."""
    streams = list(dict.fromkeys(harm.column for harm in found))
    sources = {harm.column: harm.source for harm in found}
    by = {(harm.row, harm.column): harm for harm in found}
    lines = [["method", *streams], ["---", *("---:" for _ in streams)]]
    lines.append([BASELINE, *(f"{sources[stream]:.1f} %" for stream in streams)])
    for row in dict.fromkeys(harm.row for harm in found):
        lines.append([row, *(_figure(by.get((row, stream))) for stream in streams)])
    return markdown(lines)


def _figure(harm: Harm | None) -> str:
    if harm is None:
        return NOTHING
    told = f"{harm.error - harm.source:+.1f}"
    return (HARMFUL if harm.harms else ABOVE).format(told) if harm.above else told


def strangers(found: Sequence[Harm]) -> str:
    """Error on the genuine frames of contaminated streams, and of the same stream alone; empty where there are none."""
    groups: dict[tuple[Any, ...], dict[str, Harm]] = {}
    for harm in found:
        at = dict(zip(harm.names, harm.stream, strict=True))
        if at["scenario"] == ALONE or at["scenario"].startswith(CONTAMINATED):
            name = ALONE if at["scenario"] == ALONE else harm.column
            groups.setdefault((at["bundle"], at["batch_size"], at["limit"], harm.row), {})[name] = harm
    groups = {key: group for key, group in groups.items() if ALONE in group and len(group) > 1}
    streams = list(dict.fromkeys(name for group in groups.values() for name in group if name != ALONE))
    if not streams:
        return ""
    lines = [["bundle", "batch", "frames a domain", "method", "alone", *streams]]
    lines.append(["---", "---:", "---:", "---", *("---:" for _ in (ALONE, *streams))])
    for (bundle, batch, limit, method), group in groups.items():
        cells = [f"{group[name].error:.1f}" if name in group else NOTHING for name in (ALONE, *streams)]
        lines.append([bundle, str(batch), NOTHING if limit is None else str(limit), method, *cells])
    return markdown(lines)


def returning(found: Sequence[Return]) -> str:
    """The error over the first 128 frames of every visit but the first, and over the rest, with and without a bank."""
    lines = [["bundle", "batch", "method", "router", "on return", "settled"]]
    lines.append(["---", "---:", "---", "---", "---:", "---:"])
    for each in found:
        lines.append(
            [each.bundle, str(each.batch_size), each.method, each.router, f"{each.arriving:.1f}", f"{each.settled:.1f}"]
        )
    return markdown(lines)
