"""Tasks in processes: each in one of its own, forked from a server that has imported everything and done nothing.

So a task begins within milliseconds and in memory that nobody else has used, and whatever happens to its process, even
SIGKILL, happens to it alone.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.plans.tasks import TIMEOUT, Cell, Task, failed, run_task, without_figures
from edge_adapt.errors import EngineError

PRELOADED = ["benchmarks.plans.preloaded"]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Spinning threads of a neighbour slow everything, and no thread survives a fork."""
START_S, GRACE_S = 600.0, 5.0
"""For a process to begin, the server's first imports included; and to be gone once it is done."""
READY = b"ready"
Work = Callable[[Task], Cell]


@dataclass
class _Running:
    """A task at work."""

    number: int
    task: Task
    process: Any
    answer: Connection
    deadline: float
    late: str = f"its process did not begin within {START_S:g} s"
    """What is wrong once the deadline is over."""


def run_pool(tasks: Sequence[Task], *, jobs: int, work: Work = run_task) -> Iterator[tuple[int, Cell]]:
    """Do all tasks, so many at a time. Yield (number of the task, its cell) as they are done.

    A task that raises, is killed or takes too long is a cell that says so. When the caller stops, so do all tasks.
    """
    context = fresh()
    waiting = list(enumerate(tasks))[::-1]
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(context, *waiting.pop(), work))
            left = min(one.deadline for one in running) - time.monotonic()
            wait([one.answer for one in running], max(0.0, left))
            for one in list(running):
                cell = _ended(one)
                if cell is not None:
                    running.remove(one)
                    yield one.number, cell
    finally:
        for one in running:
            one.process.kill()
        for one in running:
            _end(one)


def fresh() -> Any:
    """Where processes come from: a server with the heavy libraries loaded, on one thread each.

    Returns: a context of `multiprocessing`.
    """
    os.environ.update(ONE_THREAD)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _start(context: Any, number: int, task: Task, work: Work) -> _Running:
    answer, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, task.to_json(), work), daemon=True)
    process.start()
    theirs.close()
    return _Running(number, task, process, answer, time.monotonic() + START_S)


def _serve(answer: Connection, text: str, work: Work) -> None:
    """One task, in its own process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides what Ctrl-C means
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    task = Task.from_json(text)
    answer.send_bytes(READY)
    try:
        cell = work(task)
    except Exception as error:  # whatever it is, it is the result of this task and of no other
        cell = failed(task, error)
    answer.send_bytes(json.dumps(cell).encode())
    answer.close()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _ended(one: _Running) -> Cell | None:
    """The cell of a task that is over, one way or another; None while it works."""
    cell: Cell | None = None
    try:
        while cell is None and one.answer.poll():
            message = one.answer.recv_bytes()
            if message == READY:
                limit_s = one.task.combination.timeout_s
                one.deadline, one.late = time.monotonic() + limit_s, f"it took longer than {limit_s:g} s"
            else:
                cell = json.loads(message)
    except (EOFError, OSError):  # it is gone, or is going
        one.process.join(GRACE_S)
        cell = failed(one.task, _death(one.process.exitcode))
    if cell is None and time.monotonic() >= one.deadline:
        cell = without_figures(one.task, TIMEOUT, one.late)
        one.process.kill()
    if cell is not None:
        _end(one)
    return cell


def _end(one: _Running) -> None:
    """Nothing of a task is left."""
    one.answer.close()
    one.process.join(GRACE_S)
    if one.process.exitcode is None:
        one.process.kill()
        one.process.join()
    one.process.close()


def _death(code: int | None) -> EngineError:
    how = f"was ended by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
    return EngineError(f"its process {how} before it was done", remedy="run the plan again; what is done is kept")
