"""What an owner of a board runs: figures for what runs, and the reason for what does not."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.device import device, learner_facts, line_of
from benchmarks.gpu.__main__ import ENGINES, measure
from edge_adapt.cli import run
from edge_adapt.errors import ConfigError


def test_an_engine_that_runs_has_figures_and_one_that_does_not_a_reason(device_bundle, tmp_path, capsys):
    out = tmp_path / "device.json"
    words = ["--engine", "onnxruntime,tensorrt", "--rounds", "5", "--json", str(out)]
    assert run(["bench", "device", str(device_bundle.path), *words]) == 0
    figures = json.loads(out.read_text())
    plain, plan = figures["engines"]
    assert plain["status"] == "ok"
    assert plain["parity"]["source_error"] == plain["parity"]["ports_error"] == 0
    for cases in plain["batches"].values():
        for case in ("answer", "ports", "look"):
            assert 0 < cases[case]["p50_ms"] <= cases[case]["p99_ms"]
    if not torch.cuda.is_available():
        assert (plan["status"], plan["why"]) == ("skipped", "no CUDA driver answers")
        assert "finds no GPU" in figures["learners"][1]["why"]
    assert figures["learners"][0]["status"] == "ok"
    assert figures["host"]["after"]["rss_mb"] > 0
    said = capsys.readouterr().out
    assert "onnxruntime  answer" in said
    assert "tensorrt  skipped: " in said


def test_every_installed_engine_but_the_slow_reference_is_measured(device_bundle):
    told: list[str] = []
    figures = device(device_bundle, rounds=5, tell=told.append)
    assert {row["name"] for row in figures["engines"]} >= set(ENGINES)
    assert "torch" not in {row["name"] for row in figures["engines"]}
    assert len(told) == len(figures["engines"]) + len(figures["learners"])


def test_an_unknown_engine_is_an_error(device_bundle):
    with pytest.raises(ConfigError, match="no engine 'tensorrtt'"):
        device(device_bundle, engines=["tensorrtt"], rounds=5)


def test_the_script_for_a_gpu_ends_and_says_why_nothing_ran(device_bundle, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    figures = measure(device_bundle, limit_s=60, rounds=20)
    skipped = {row["name"]: row["why"] for row in figures["rows"] if row["status"] == "skipped"}
    assert set(skipped) >= {"torch on cuda", "torch, CUDA graph", "answers beside learning", "GPU out of memory"}
    assert set(skipped) >= set(ENGINES) - {"onnxruntime"}
    assert all(skipped.values())
    assert len(capsys.readouterr().out.splitlines()) == len(figures["rows"])


def test_without_time_nothing_begins(device_bundle):
    figures = measure(device_bundle, limit_s=0, rounds=5)
    assert {row["why"] for row in figures["rows"]} == {"no time is left"}


def test_a_step_is_timed_on_the_cpu(device_bundle):
    row = learner_facts(device_bundle, "cpu", rounds=5)
    assert row["step"]["p50_ms"] > 0
    assert "ms a step of 32 frames" in line_of(row)
