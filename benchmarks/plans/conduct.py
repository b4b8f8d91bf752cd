"""A plan carried out: what was made before comes from the cache, the rest from a pool or from Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, processor
from benchmarks.plans.cache import CellCache
from benchmarks.plans.identity import data_digest
from benchmarks.plans.plan import BundleSpec, Plan
from benchmarks.plans.pool import run_pool
from benchmarks.plans.recipes import exported
from benchmarks.plans.tasks import Cell, Task
from benchmarks.scenarios import get
from edge_adapt.bundle import Bundle
from edge_adapt.errors import ConfigError, did_you_mean

SCHEMA = 2
PROCESSES, RAY = "processes", "ray"
CELLS = "cells"
Progress = Callable[[str, int, int], None]
Tell = Callable[[str], None]
Runner = Callable[[Sequence[Task], int], Iterator[tuple[int, Cell]]]


def conduct(
    plan: Plan,
    *,
    cache: Path,
    jobs: int = 1,
    by: str = PROCESSES,
    progress: Progress = lambda what, done, total: None,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Make every cell of a plan that is not in the cache yet, and keep it there at once.

    Args:
        cache: folder for cells, corrupted images and exported bundles; may be deleted at any time.
        jobs: cells at a time.
        by: `processes` of this machine, or `ray`.
        progress: told of cells done.
        tell: given a sentence for what a person should know.
    Returns: results.json of a plan; its cells are in the order of the plan whoever made them, and whenever.
    Raises: ConfigError, DataError or ArtifactError if the plan cannot begin, or the cache cannot be written.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs is {jobs}, expected 1 or more", remedy="use the number of cores")
    runner = _runner(by)
    tasks = resolved(plan, cache, tell)
    known = CellCache(cache / "cells", processor())
    cells: list[Cell | None] = [known.find(task) for task in tasks]
    for path in known.damaged:
        tell(f"{path} is damaged; its cell is made again")
    waiting = [number for number, cell in enumerate(cells) if cell is None]
    done = len(cells) - len(waiting)
    if done:
        tell(f"{done} of {len(cells)} cells were made before")
    progress(CELLS, done, len(cells))
    for place, cell in runner([tasks[number] for number in waiting], jobs):
        number = waiting[place]
        cells[number] = cell
        known.keep(tasks[number], cell)
        done += 1
        progress(CELLS, done, len(cells))
    engines = ", ".join(sorted({task.combination.engine for task in tasks}))
    return {
        "schema": SCHEMA,
        "plan": plan.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        "environment": environment(1, engines) | {"jobs": jobs, "by": by},
        "cells": cells,
    }


def resolved(plan: Plan, cache: Path, tell: Tell) -> list[Task]:
    """The tasks of a plan, in its order. Bundles that it has recipes for are made here.

    Raises: ArtifactError or DataError naming the bundle or the data that is not there.
    """
    sources = plan.used_data()
    digests = {
        source: data_digest(source) for spec in sources.values() for source in (spec.path, spec.foreign) if source
    }
    bundles = {name: _bundle(spec, cache, tell) for name, spec in plan.used_bundles().items()}
    made = []
    for asked in plan.combinations():
        bundle, data = bundles[asked.bundle], sources[asked.data]
        foreign = data.foreign if get(asked.scenario).contaminated else None
        made.append(
            Task(
                combination=asked,
                bundle_path=str(bundle.path),
                bundle_id=bundle.id,
                data_source=data.path,
                data_digest=digests[data.path],
                foreign_source=foreign,
                foreign_digest=None if foreign is None else digests[foreign],
                images=str((cache / "images").absolute()),
            )
        )
    return made


def _bundle(spec: BundleSpec, cache: Path, tell: Tell) -> Bundle:
    path = spec.path if spec.export is None else exported(spec.export, cache / "bundles", tell)
    assert path is not None
    return Bundle.load(path.absolute())


def _runner(by: str) -> Runner:
    if by == PROCESSES:
        return lambda tasks, jobs: run_pool(tasks, jobs=jobs)
    if by == RAY:
        from benchmarks.plans.rays import run_ray

        return lambda tasks, jobs: run_ray(tasks, jobs=jobs)
    raise ConfigError(
        f"cells cannot be made by {by!r}; {did_you_mean(by, (PROCESSES, RAY))}",
        remedy="engines of inference stand in the plan, as `engines: [onnxruntime]`",
    )
