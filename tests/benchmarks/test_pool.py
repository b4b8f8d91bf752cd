"""A pool of processes: what a task does to its own process happens to no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.plans.pool import ONE_THREAD, run_pool
from benchmarks.plans.tasks import Cell, Combination, Task, head
from edge_adapt.errors import EngineError


def task(method: str, *, timeout_s: float = 600.0) -> Task:
    asked = Combination(
        bundle="b",
        data="d",
        scenario="continual",
        method=method,
        router="none",
        batch_size=1,
        seed=0,
        engine="onnxruntime",
        severity=5,
        limit=None,
        corruptions=None,
        settings="{}",
        threads=1,
        timeout_s=timeout_s,
    )
    return Task(combination=asked, bundle_path="b", bundle_id="1", data_source="d", data_digest="2")


def play(given: Task) -> Cell:
    """What the name of the method says."""
    match given.combination.method:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "leave":
            os._exit(3)
        case "sleep":
            time.sleep(600)
        case "raise":
            raise EngineError("the engine refused", remedy="try another")
        case "break":
            raise ZeroDivisionError("by nothing")
    return head(given, "ok", None) | {"process": os.getpid(), "row": {"big": "x" * 200_000}}


def run(*tasks: Task, jobs: int = 2) -> list[Cell]:
    made = dict(run_pool(tasks, jobs=jobs, work=play))
    return [made[number] for number in range(len(tasks))]


def test_each_task_has_a_process_of_its_own():
    cells = run(*(task("fine") for _ in range(4)))
    assert [cell["status"] for cell in cells] == ["ok"] * 4
    assert len({cell["process"] for cell in cells} | {os.getpid()}) == 5


def test_a_process_that_is_killed_is_one_failed_cell():
    cells = run(task("fine"), task("die"), task("leave"), task("fine"))
    assert [cell["status"] for cell in cells] == ["ok", "failed", "failed", "ok"]
    assert "SIGKILL" in cells[1]["why"]
    assert "code 3" in cells[2]["why"]
    assert cells[1]["row"] is None


def test_what_a_task_raises_is_its_result():
    cells = run(task("raise"), task("break"), task("fine"), jobs=1)
    assert [(cell["status"], cell["why"]) for cell in cells[:2]] == [
        ("failed", "the engine refused"),
        ("failed", "ZeroDivisionError: by nothing"),
    ]
    assert cells[2]["status"] == "ok"


def test_a_task_that_takes_too_long_is_ended():
    cells = run(task("sleep", timeout_s=0.2), task("fine"), jobs=1)
    assert [cell["status"] for cell in cells] == ["timeout", "ok"]
    assert cells[0]["why"] == "it took longer than 0.2 s"


def test_whoever_stops_leaves_no_process_behind():
    made = run_pool([task("fine"), task("sleep")], jobs=2, work=play)
    assert next(made)[0] == 0
    started = time.monotonic()
    made.close()
    assert time.monotonic() - started < 60  # not the ten minutes that the other one sleeps


@pytest.mark.parametrize("jobs", [1, 3])
def test_no_task_is_no_process(jobs):
    assert list(run_pool([], jobs=jobs, work=play)) == []


def test_what_is_preloaded_starts_no_thread():
    """A thread would not be there after the fork, and what it held would be held for ever."""
    code = "import benchmarks.plans.preloaded, os; print(len(os.listdir('/proc/self/task')))"
    environment = {**os.environ, **ONE_THREAD}
    made = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, cwd="/")
    assert made.stdout.split() == [b"1"]
