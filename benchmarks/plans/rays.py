"""Tasks on a Ray cluster, or on Ray on this machine. Each node does them in the same pool as without Ray."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plans.pool import run_pool
from benchmarks.plans.tasks import Cell, Task, failed
from edge_adapt.errors import EngineError

ADDRESS = "RAY_ADDRESS"


def run_ray(tasks: Sequence[Task], *, jobs: int) -> Iterator[tuple[int, Cell]]:
    """Do all tasks on Ray, so many at a time. Yield (number of the task, its cell) as they are done.

    Every node needs this package, and the bundles and data at the paths of the plan.
    Raises: EngineError if Ray is not installed, or its cluster is not there.
    """
    ray = _ray()
    begun = not ray.is_initialized()
    if begun:
        _begin(ray, jobs)
    remote = ray.remote(num_cpus=1, max_retries=0)(_one)
    added = {str(Path.cwd())} - set(sys.path)
    waiting = list(enumerate(tasks))[::-1]
    running: dict[Any, tuple[int, Task]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, task = waiting.pop()
                running[remote.remote(task.to_json(), added)] = number, task
            for reference in ray.wait(list(running), num_returns=1)[0]:
                number, task = running.pop(reference)
                try:
                    cell = json.loads(ray.get(reference))
                except ray.exceptions.RayError as error:
                    cell = failed(task, error)
                yield number, cell
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if begun:
            ray.shutdown()


def _one(text: str, added: set[str]) -> str:
    """One task on a node, in a process of its own that is fresh, and may be killed.

    Args:
        added: what Ray put before all else to look for modules, the folder that it was called in: what lies there need
            not be what is installed.
    """
    sys.path[:] = [place for place in sys.path if place not in added]
    ((_, cell),) = run_pool([Task.from_json(text)], jobs=1)
    return json.dumps(cell)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise EngineError(
            "Ray is not installed", remedy="pip install 'edge-adapt[ray]', or leave --engine out"
        ) from error
    return ray


def _begin(ray: Any, jobs: int) -> None:
    address = os.environ.get(ADDRESS)
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(num_cpus=jobs, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"Ray cannot begin at {address or 'this machine'}: {error}", remedy=f"check {ADDRESS}, or unset it"
        ) from error
