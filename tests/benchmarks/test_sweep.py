"""A sweep keeps every cell as it is made, goes on where it was stopped, and reports what it found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import sweep, sweep_report
from benchmarks.sweep import BOARDS, Board
from edge_adapt.errors import ArtifactError, ConfigError, DataError


def cell(method: str, error: float, *, seed: int = 0, time: float = 1.2, **more: object) -> dict:
    figures = {"error": error, "errors": {"fog": error}, "time": time, "learn_ms": 0.1, "passes": 1.1, "extra_mb": 3.0}
    return {"method": method, "seed": seed, "limit": None, "status": "ok", **figures, **more}


def keep(folder: Path, board: str, cells: list[dict]) -> None:
    (folder / f"{board}.json").write_text(json.dumps({"schema": 1, "cells": cells}))


def test_every_board_begins_with_source_and_asks_for_each_cell_once():
    for board in BOARDS.values():
        cells = board.cells()
        assert cells[0] == ("source", 0)
        assert len(set(cells)) == len(cells)


def test_methods_with_many_views_have_one_seed_in_reference_mode():
    cells = BOARDS["resnet20-reference"].cells()
    assert [seed for method, seed in cells if method == "cotta"] == [0]
    assert [seed for method, seed in cells if method == "tent"] == [0, 1, 2]


def test_a_sweep_makes_only_what_is_missing(tmp_path, monkeypatch):
    board = replace(BOARDS["resnet20-device"], methods=("source", "moments", "tent"), seeds=(0,))
    keep(tmp_path, board.id, [cell("source", 48.0), cell("moments", 25.0)])
    asked: list[tuple[str, int]] = []

    def made(board: Board, bundle: Path, data: Path, cells, jobs: int):
        asked.extend(cells)
        yield from (cell(method, 24.0, seed=seed) for method, seed in cells)

    monkeypatch.setattr(sweep, "_exported", lambda board, data_root, work: tmp_path)
    monkeypatch.setattr(sweep, "_made", made)
    run = {"data_root": tmp_path, "out": tmp_path, "work": tmp_path}
    sweep.sweep([board], **run)
    assert asked == [("tent", 0)]
    assert [entry["method"] for entry in sweep.read_cells(tmp_path, board.id)] == ["source", "moments", "tent"]
    sweep.sweep([board], **run)
    assert asked == [("tent", 0)]
    sweep.sweep([board], **run, again=["moments"])
    assert asked == [("tent", 0), ("moments", 0)]


def test_the_report_orders_methods_and_says_what_was_skipped(tmp_path):
    keep(
        tmp_path,
        "resnet20-device",
        [
            cell("source", 48.0),
            cell("moments", 25.0),
            cell("moments", 26.0, seed=1),
            cell("norm", 50.0),
            {"method": "foa", "seed": 0, "limit": None, "status": "skipped: it takes no prompts"},
        ],
    )
    sweep_report.write(tmp_path)
    rows = sweep_report.summaries(tmp_path, "resnet20-device")
    assert [row.method for row in rows] == ["moments", "source", "norm"]
    assert rows[0].error == 25.5
    assert rows[0].spread == pytest.approx(0.7071, abs=1e-3)
    assert rows[2].worst == 2.0
    text = (tmp_path / "README.md").read_text()
    assert "| moments | **25.5** (1.20 x) |" in text
    assert "- foa: skipped: it takes no prompts" in text
    assert (tmp_path / "methods.svg").stat().st_size > 5000


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no board 'resnet20-devise'"):
        sweep.selected(["resnet20-devise"])
    with pytest.raises(DataError, match="holds no results"):
        sweep_report.write(tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        sweep.sweep([], data_root=tmp_path / "none", out=tmp_path, work=tmp_path)
    (tmp_path / "resnet20-device.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        sweep.read_cells(tmp_path, "resnet20-device")
