"""The boards of the published table as plans, so that anybody can make the same cells with `edge-adapt replay`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.sweep import Board, Cell

FOLDER = "plans"
"""Below the results."""
DATA = "../../../../shared/data"
"""Where images and weights are, seen from there."""


def plan_file(board: Board) -> str | None:
    """Below the results; None for a board whose stream is drawn from a folder of images, which no plan can say."""
    return f"{FOLDER}/{board.id}.yaml" if Path(board.data).suffix == ".npz" else None


def plan_of(board: Board, cells: Sequence[Cell]) -> str:
    """The plan of these cells of a board, as YAML: a grid for each group of methods that have the same seeds."""
    seeds: dict[str, tuple[int, ...]] = {}
    for cell in cells:
        seeds[cell["method"]] = tuple(sorted({*seeds.get(cell["method"], ()), cell["seed"]}))
    data, recipe = Path(board.data).stem, {"model": board.model, "cut": board.cut}
    recipe |= {"weights": _below(board.weights), "calibration": _below(board.calibration)}
    recipe |= {"warm_up": _below(board.calibration) if board.warm_up else None}
    grids = [
        {
            "bundles": [board.id],
            "data": [data],
            "methods": [method for method, own in seeds.items() if own == group],
            "batch_sizes": [board.batch_size],
            "seeds": list(group),
            "severity": board.severity,
            "limit": board.limit,
        }
        for group in dict.fromkeys(seeds.values())
    ]
    plan = {
        "schema": 1,
        "data": {data: _below(board.data)},
        "bundles": {board.id: {"export": _known(recipe)}},
        "grid": [_known(grid) for grid in grids],
    }
    text = yaml.safe_dump(plan, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    return f"# The cells of {board.id}.json. Made by `edge-adapt bench tables --write`.\n{text}"


def _below(path: str | None) -> str | None:
    return None if path is None else f"{DATA}/{path}"


def _known(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}
