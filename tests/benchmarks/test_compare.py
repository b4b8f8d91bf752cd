"""Comparing results: what got worse by more than it may cannot pass, and everything else can."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import METRICS, Difference, compare, load_results, with_tolerances
from benchmarks.plans.plan import load_plan
from edge_adapt import cli
from edge_adapt.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
Results = dict[str, Any]


def row(method: str, error: float | None, time: float) -> dict[str, Any]:
    return {
        "method": method,
        "error_mean": error,
        "errors": {} if error is None else {"fog": error},
        "answer_ms": {"p50": 1.0, "p99": 2.0, "mean": 1.0},
        "learn_ms": {"p50": 0.0, "p99": 0.0, "mean": time - 1},
        "extra_mb": 40.0,
        "time": time,
        "passes": 1200,
        "backward_passes": 10,
        "frames": 1000,
    }


def plan() -> Results:
    common = {"bundle": "rn20", "data": "cifar", "scenario": "continual", "router": "none", "batch_size": 50, "seed": 0}
    cells = [
        {**common, "method": method, "engine": "onnxruntime", "severity": 5, "limit": 100, "status": "ok", "row": made}
        for method, made in (("source", row("source", 48.0, 1.0)), ("moments", row("moments", 25.0, 1.4)))
    ]
    cells.append({**cells[0], "method": "foa", "status": "skipped", "why": "takes no prompts", "row": None})
    return {"schema": 2, "plan": {}, "environment": {}, "cells": cells}


def replayed() -> Results:
    rows = [row("source", 48.0, 1.0), row("moments", 25.0, 1.4)]
    for one in rows:
        del one["time"]
    return {
        "schema": 1,
        "scenario": "continual",
        "data": "cifar",
        "bundle": {"name": "rn20", "id": "ab"},
        "settings": {"batch_size": 50, "seed": 0, "limit": 100, "severity": 5, "mode": "device"},
        "shifts": [{"name": "fog", "start": 0, "frames": 1000}],
        "rows": rows,
    }


def moments(results: Results) -> dict[str, Any]:
    """Its row."""
    found: dict[str, Any] = results["rows"][1] if "rows" in results else results["cells"][1]["row"]
    return found


def told(base: Results, head: Results) -> dict[str, str]:
    """Metric -> verdict, of what moments does otherwise."""
    found = compare(base, head)
    assert all(dict(one.key)["method"] == "moments" for one in [*found.worse, *found.better])
    return {one.metric: one.verdict for one in [*found.worse, *found.better]}


@pytest.fixture(params=[plan, replayed], ids=["plan", "replay"])
def make(request: pytest.FixtureRequest) -> Callable[[], Results]:
    made: Callable[[], Results] = request.param
    return made


def test_equal_results_have_no_difference(make: Callable[[], Results]) -> None:
    found = compare(make(), make())
    assert found.differences
    assert not found.regressed
    assert not found.better
    assert found.missing == found.new == ()


@pytest.mark.parametrize(
    ("metric", "within", "worse", "better"),
    [
        ("error_mean", 25.5, 25.51, 24.4),
        ("extra_mb", 50.0, 50.1, 29.9),
        ("passes", 1200, 1201, 1199),
        ("backward_passes", 10, 11, 9),
    ],
)
def test_less_is_better_and_a_little_more_is_noise(
    make: Callable[[], Results], metric: str, within: float, worse: float, better: float
) -> None:
    for value, expected in ((within, {}), (worse, {metric: "worse"}), (better, {metric: "better"})):
        head = make()
        moments(head)[metric] = value
        assert told(make(), head) == expected, value


def test_time_of_a_plan_is_a_share(make: Callable[[], Results]) -> None:
    for time, expected in ((1.74, {}), (1.76, {"time": "worse"}), (1.04, {"time": "better"})):
        head = make()
        if "rows" in head:
            moments(head)["learn_ms"]["mean"] = time - 1  # against source's in the same file
        else:
            moments(head)["time"] = time
        assert told(make(), head) == expected, time


def test_a_machine_twice_as_slow_is_no_regression() -> None:
    head = replayed()
    for one in head["rows"]:
        one["answer_ms"]["mean"] *= 2
        one["learn_ms"]["mean"] *= 2
    assert not compare(replayed(), head).regressed


def test_other_frames_are_never_the_same(make: Callable[[], Results]) -> None:
    for frames in (999, 1001):
        head = make()
        moments(head)["frames"] = frames
        assert told(make(), head) == {"frames": "worse"}


def test_a_figure_that_is_gone_is_worse_and_a_new_one_is_not(make: Callable[[], Results]) -> None:
    head = make()
    moments(head)["error_mean"] = None
    assert told(make(), head) == {"error_mean": "worse"}
    assert not compare(head, make()).regressed


def test_a_cell_that_breaks_is_worse_and_one_that_runs_again_is_better() -> None:
    head = plan()
    head["cells"][1] |= {"status": "failed", "why": "out of memory", "row": None}
    [worse] = compare(plan(), head).worse
    assert (worse.metric, worse.base, worse.head) == ("status", "ok", "failed")
    [better] = compare(head, plan()).better
    assert better.metric == "status"


def test_missing_cells_regress_and_new_ones_are_told() -> None:
    head = plan()
    head["cells"].append({**head["cells"][1], "seed": 1})
    found = compare(plan(), head)
    assert not found.regressed
    assert [dict(key)["seed"] for key in found.new] == [1]
    gone = compare(head, plan())
    assert gone.regressed
    assert [dict(key)["seed"] for key in gone.missing] == [1]


@pytest.mark.parametrize(
    "change",
    [
        *({"router": "hdc"}, {"seed": 1}, {"batch_size": 1}, {"engine": "torch"}, {"limit": None}, {"severity": 3}),
        *({"bundle": "rn56"}, {"settings": {"duty": 1}}, {"corruptions": ["fog"]}),
    ],
)
def test_cells_that_differ_in_anything_are_not_held_against_each_other(change: dict[str, Any]) -> None:
    head = plan()
    head["cells"][1] |= change
    found = compare(plan(), head)
    assert len(found.missing) == len(found.new) == 1


def test_tolerances_can_be_set() -> None:
    head = plan()
    moments(head)["error_mean"], moments(head)["time"] = 25.4, 1.9
    found = compare(plan(), head, with_tolerances(["error_mean=0.3", "time=50%"]))
    assert [one.metric for one in found.worse] == ["error_mean"]
    assert next(one for one in found.worse if isinstance(one, Difference)).allowed == "0.3"


@pytest.mark.parametrize("asked", ["tim=3", "time=much", "time=-1", "time=nan", "time=inf%", "time"])
def test_wrong_tolerances_are_named(asked: str) -> None:
    with pytest.raises(ConfigError, match=asked.partition("=")[0]):
        with_tolerances([asked])


def test_every_metric_says_what_it_allows() -> None:
    assert {metric.name: metric.allowed for metric in METRICS} == {
        "error_mean": "0.5",
        "time": "25 %",
        "extra_mb": "5 or 25 %",
        "passes": "none",
        "backward_passes": "none",
        "state_bytes": "10 %",
        "energy_j": "25 %",
        "frames": "none",
    }


@pytest.mark.parametrize(
    ("base", "head", "named"),
    [
        ({"schema": 1}, plan(), "BASE holds the results of a replay, HEAD those of a plan"),
        (plan(), {"schema": 7}, "HEAD: results: 'schema' is '7'"),
        ({}, plan(), "BASE: results: 'schema'"),
        (plan() | {"schema": []}, plan(), "BASE: results: 'schema'"),
        (plan(), plan() | {"cells": 3}, "HEAD: results: 'cells' is '3'"),
    ],
)
def test_what_holds_no_results_is_named(base: Results, head: Results, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        compare(base, head)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\xff", "[" * 100_000, None])
def test_files_that_hold_nothing_are_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"results\.json"):
        load_results(path)


def test_the_baseline_of_ci_is_of_its_plan() -> None:
    baseline = load_results(ROOT / ".ci" / "baseline.json")
    kept = {one.key for one in compare(baseline, baseline).differences}
    names = ("bundle", "data", "scenario", "method", "router", "batch_size", "seed", "engine", "severity", "limit")
    asked = [
        {name: getattr(one, name) for name in names} for one in load_plan(ROOT / ".ci" / "plan.yaml").combinations()
    ]
    assert [{name: cell[name] for name in names} for cell in baseline["cells"]] == asked
    assert len(kept) == len(asked)
    assert {cell["status"] for cell in baseline["cells"]} == {"ok"}


# --- the command -----------------------------------------------------------------------------------


def called(folder: Path, base: Results, head: Results, *more: str) -> int:
    for name, results in (("base", base), ("head", head)):
        (folder / f"{name}.json").write_text(json.dumps(results))
    return cli.run(["compare", str(folder / "base.json"), str(folder / "head.json"), *more])


def test_the_exit_status_says_whether_anything_is_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(tmp_path, plan(), plan()) == 0
    assert "nothing is worse than before" in capsys.readouterr().out
    head = plan()
    moments(head)["error_mean"] = 26.0
    assert called(tmp_path, plan(), head) == 1
    out = capsys.readouterr().out
    for part in ("moments", "error_mean", "+1 (+4 %)", "1 worse, 1 same"):
        assert part in out
    assert called(tmp_path, plan(), {"schema": 3}) == 2
    assert called(tmp_path, plan(), plan(), "--tolerance", "x=1") == 2
    assert cli.run(["compare", str(tmp_path / "no.json"), str(tmp_path / "no.json")]) == 2


def test_differences_go_into_a_file(tmp_path: Path) -> None:
    head = copy.deepcopy(plan())
    moments(head)["time"] = 3.0
    del head["cells"][0]
    assert called(tmp_path, plan(), head, "--json", str(tmp_path / "out.json")) == 1
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["regressed"] is True
    assert [one["method"] for one in found["missing"]] == ["source"]
    [worse] = [one for one in found["differences"] if one["verdict"] == "worse"]
    assert (worse["method"], worse["metric"], worse["base"], worse["head"]) == ("moments", "time", 1.4, 3.0)


def test_hostile_names_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, head = plan(), plan()
    for results in (base, head):
        results["cells"][1]["bundle"] = "\x1b[31m[bold]x"
    moments(head)["error_mean"] = 90.0
    assert called(tmp_path, base, head) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[bold]x" in out
