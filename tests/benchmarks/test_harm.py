"""Cells held against source: what counts as harm, and what is told of domains that return."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.harm import harms, main, returns
from benchmarks.harm_report import FIGURES, PAGE, page, strangers, write
from benchmarks.plans.plan import load_plan

TABLES = Path(__file__).parents[2] / "benchmarks" / "plans"


def cell(method, error, *, seed=0, batch=64, router="none", frames=1000, scenario="continual", status="ok", visits=()):
    return {
        "bundle": "rn20", "data": "cifar", "scenario": scenario, "method": method, "router": router,
        "batch_size": batch, "seed": seed, "engine": "onnxruntime", "severity": 5, "limit": 100,
        "status": status, "why": None if status == "ok" else "it broke",
        "shifts": [{"name": "fog", "start": 0, "frames": 2 * frames, "genuine": frames}],
        "row": None if status != "ok" else {"error_mean": error, "visits": list(visits)},
    }  # fmt: skip


def written(tmp_path, cells):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"schema": 2, "cells": cells}))
    return path


def test_a_method_above_source_by_more_than_half_a_point_and_chance_harms(tmp_path, capsys):
    cells = [cell("source", 20.0), cell("tent", 21.7), cell("cotta", 22.0)]
    found = {harm.method: harm for harm in harms(cells)}
    assert found["tent"].noise == pytest.approx(1.265, abs=0.001)  # of the frames that are scored
    assert {name: harm.harms for name, harm in found.items()} == {"tent": False, "cotta": True}
    assert {name: harm.above for name, harm in found.items()} == {"tent": True, "cotta": True}
    assert main(written(tmp_path, cells)) == 1
    told = capsys.readouterr().out
    assert "HARM   rn20 cifar continual batch 64: cotta 22.00" in told
    assert "ABOVE  rn20 cifar continual batch 64: tent 21.70" in told
    assert "2 cells beside source, 2 above it by 0.5 points, 1 harm" in told


def test_half_a_point_above_source_is_allowed():
    assert not any(harm.above for harm in harms([cell("source", 20.0), cell("tent", 20.5)]))


def test_seeds_are_taken_together_and_batch_sizes_apart():
    cells = [cell("source", 20, seed=seed) for seed in (0, 1)] + [cell("source", 30, batch=1)]
    cells += [cell("tent", 18, seed=0), cell("tent", 24, seed=1), cell("tent", 29, batch=1)]
    assert [(harm.source, harm.error) for harm in harms(cells)] == [(20, 21), (30, 29)]


def test_a_cell_that_broke_fails_the_check_and_one_without_source_is_not_judged(tmp_path):
    assert main(written(tmp_path, [cell("source", 20), cell("tent", 19)])) == 0
    assert main(written(tmp_path, [cell("source", 20), cell("tent", None, status="timeout")])) == 1
    assert main(written(tmp_path, [cell("source", 20), cell("tent", 90, batch=1)])) == 0


def test_what_is_told_of_domains_that_return():
    visits = [{"name": "fog", "start": 0, "frames": 256, "error": [80, 70, 60, 50]}]
    visits += [{"name": "fog", "start": 512 * n, "frames": 256, "error": [30, 20, 10, 20]} for n in (1, 2)]
    (found,) = returns([cell("moments", 30, scenario="recurring", router="hdc", visits=visits)])
    assert str(found) == "rn20 batch 64 moments (hdc): on return 25.00, settled 15.00"


@pytest.mark.parametrize("name", ["no_harm", "no_harm_short"])
def test_the_plans_of_the_tables_are_sound_and_have_source_beside_every_cell(name):
    combinations = load_plan(TABLES / f"{name}.yaml").combinations()
    streams = [(c.bundle, c.data, c.scenario, c.batch_size, c.seed, c.limit, c.corruptions) for c in combinations]
    sources = {stream for stream, c in zip(streams, combinations, strict=True) if c.method == "source"}
    assert set(streams) == sources


def test_what_is_published_says_the_same_as_the_results(tmp_path):
    visits = [{"name": "fog", "start": 512 * n, "frames": 256, "error": [30, 20, 10, 20]} for n in (0, 1, 2)]
    cells = [cell("source", 20.0), cell("tent", 19.0), cell("cotta", 22.0), cell("sar", 21.0)]
    cells.append(cell("lae", None, status="failed"))
    cells += [cell(name, 30, scenario="recurring", router="hdc", visits=visits) for name in ("source", "moments")]
    for each in cells:
        each["bundle_id"] = "0"
        if each["row"]:
            each["row"] |= {"time": 1.0, "timeline": [1] * 1000}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"schema": 2, "environment": {}, "cells": cells}))
    assert main(path, tmp_path) == 1
    assert "timeline" not in (tmp_path / FIGURES).read_text()
    kept = json.loads((tmp_path / FIGURES).read_text())["cells"]
    good = [each for each in kept if each["status"] == "ok"]
    assert list(map(str, harms(good))) == list(map(str, harms([each for each in cells if each["status"] == "ok"])))
    text = (tmp_path / PAGE).read_text()
    assert text == page(tmp_path / FIGURES)
    assert "| source | 20.0 % |" in text and "| tent | -1.0 |" in text and "| cotta | **+2.0** |" in text
    assert "| sar | *+1.0* |" in text
    assert "2 of 4 are, in italics, and 1 of these, in bold," in text and "1 cells broke" in text
    assert "| rn20 | 64 | moments | hdc | 25.0 | 15.0 |" in text
    assert "were not run" not in text and "earlier state" not in text
    write(path, tmp_path, not_run=7, older=5)
    text = (tmp_path / PAGE).read_text()
    assert "7 cells of it were not run. 5 cells are of an earlier state of the code." in text


def test_strangers_stand_beside_the_same_domains_alone():
    cells = [cell(method, error) for method, error in (("source", 40), ("tent", 20), ("auto", 18))]
    cells += [cell(method, error, scenario="contaminated_30") for method, error in (("source", 40), ("tent", 22.5))]
    lines = strangers(list(harms(cells))).splitlines()
    assert lines[0] == "| bundle | batch | frames a domain | method | alone | contaminated_30 (cifar) |"
    assert lines[2:] == ["| rn20 | 64 | 100 | tent | 20.0 | 22.5 |"]
    assert strangers(list(harms(cells[:3]))) == ""
