"""`edge-adapt replay`, of one bundle or of a whole plan: arguments and printing only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from benchmarks.replay import Replay

CACHE = Path("runs/cache")
BOTH = {"what", "out", "json_file", "engine"}
NAMES = ("bundle", "data", "scenario", "engine", "batch_size", "router", "method", "seed")
"""What may set the cells of a plan apart."""
WIDTH = 120
"""Columns of a plan's table where nobody watches."""
OF_PLANS = {"jobs", "cache"}


def replay(
    context: typer.Context,
    what: Annotated[Path, typer.Argument(metavar="BUNDLE|PLAN.yaml", help="folder of a bundle, or a plan of many")],
    data: Annotated[
        str | None, typer.Option(help=".npz, image folder, video, recording, sklearn:digits, {har,usps,pacs,kws}:PATH")
    ] = None,
    scenario: Annotated[str, typer.Option(help="continual, recurring, contaminated_30; see the README")] = "continual",
    method: Annotated[str, typer.Option(help="one or more, with commas between")] = "source,moments",
    batch_size: Annotated[int, typer.Option(help="frames that arrive together")] = 64,
    limit: Annotated[int | None, typer.Option(help="frames of each shift")] = None,
    severity: Annotated[int, typer.Option(help="1 to 5")] = 5,
    seed: Annotated[int, typer.Option()] = 0,
    corruption: Annotated[str | None, typer.Option(help="some of the fifteen, with commas between")] = None,
    foreign: Annotated[str | None, typer.Option(help="images that contaminate, as for --data; None: noise")] = None,
    router: Annotated[str, typer.Option(help="hdc or none: what chooses among the entries of a bank")] = "none",
    engine: Annotated[
        str | None, typer.Option(help="of inference: onnxruntime or torch. Of a plan: processes or ray, which run it")
    ] = None,
    threads: Annotated[int, typer.Option()] = 1,
    label_delay: Annotated[int | None, typer.Option(help="frames until true labels come; None: never")] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="the estimate without labels beside the error")] = False,
    jobs: Annotated[int, typer.Option(help="of a plan: cells at a time")] = 1,
    cache: Annotated[Path, typer.Option(help="of a plan: folder for what is done, so that it goes on there")] = CACHE,
    out: Annotated[Path | None, typer.Option(help="folder for results.json and report.html")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the results")] = None,
) -> None:
    """Replay a stream through one or more methods, or every cell of a plan, and compare them."""
    from benchmarks.plans.plan import is_plan
    from benchmarks.replay import Replay

    given = {name for name in context.params if _given(context, name)}
    if is_plan(what):
        refuse(given - BOTH - OF_PLANS, "stands in the plan", "set it there")
        replay_plan(what, by=engine, jobs=jobs, cache=cache, out=out, json_file=json_file)
        return
    refuse(given & OF_PLANS, "belongs to a plan", "leave it out, or give a plan such as plan.yaml")
    plan = Replay(
        scenario=scenario,
        methods=tuple(name.strip() for name in method.split(",") if name.strip()),
        batch_size=batch_size,
        limit=limit,
        severity=severity,
        seed=seed,
        corruptions=tuple(corruption.split(",")) if corruption else None,
        router=router,
        engine=engine or "onnxruntime",
        threads=threads,
        label_delay=label_delay,
        estimate=estimate,
    )
    replay_bundle(what, data, foreign, plan, out, json_file)


def replay_bundle(
    bundle: Path, data: str | None, foreign: str | None, plan: Replay, out: Path | None, json_file: Path | None
) -> None:
    """One bundle on one stream. Raises: ConfigError without data."""
    from benchmarks.cli import progress_bar, publish
    from benchmarks.replay import replay as run
    from edge_adapt.bundle import Bundle
    from edge_adapt.errors import ConfigError
    from edge_adapt.streams.data import load_data
    from edge_adapt.threads import one_thread

    if data is None:
        raise ConfigError("--data is missing", remedy="give an .npz archive or a folder of images, or a plan")
    if plan.engine == "ray":
        raise ConfigError("ray is no engine of inference", remedy="it runs the cells of a plan: give a plan.yaml")
    one_thread()
    loaded = Bundle.load(bundle)
    others = None if foreign is None else load_data(foreign)
    with progress_bar() as progress:
        frames = load_data(data, loaded.manifest.classes, spec=loaded.manifest.input, limit=plan.limit)
        results = run(loaded, frames, plan, foreign=others, progress=progress)
    publish(results, out, json_file)


def replay_plan(
    path: Path, *, by: str | None, jobs: int, cache: Path, out: Path | None, json_file: Path | None
) -> None:
    """Every cell of a plan. Without `by`, Ray if RAY_ADDRESS says where one is."""
    from benchmarks.cli import progress_bar, write_json
    from benchmarks.plans.conduct import PROCESSES, RAY, conduct
    from benchmarks.plans.plan import load_plan
    from benchmarks.plans.rays import ADDRESS
    from edge_adapt.threads import one_thread

    one_thread()
    plan = load_plan(path)
    chosen = by or (RAY if os.environ.get(ADDRESS) else PROCESSES)
    with progress_bar() as progress:
        results = conduct(
            plan, cache=cache, jobs=jobs, by=chosen, progress=progress, tell=lambda text: typer.echo(text, err=True)
        )
    for place in (json_file, None if out is None else out / "results.json"):
        if place is not None:
            write_json(place, results)
            typer.echo(f"results: {place}")
    if out is not None:
        from benchmarks.report import write_plan_report

        write_plan_report(results, out / "report.html")
        typer.echo(f"report: {out / 'report.html'}")
    print_cells(results["cells"])


def print_cells(cells: list[dict[str, Any]]) -> None:
    """One line for each cell: what sets it apart, error, time against plain inference, and memory above it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from benchmarks.table import screen

    told = [part for part in NAMES if part == "method" or len({cell[part] for cell in cells}) > 1]
    table = Table(*(part.replace("_", " ") for part in told), "error %", "time", "extra MB", box=SIMPLE_HEAD)
    for cell in cells:
        name = [str(cell[part]) for part in told]
        if cell["status"] != "ok":
            typer.echo(f"{cell['status']}: {' '.join(name)}: {cell['why']}", err=True)
            continue
        row = cell["row"]
        figures = (row["error_mean"], "{:.2f}"), (row["time"], "{:.2f}"), (row["extra_mb"], "{:.1f}")
        table.add_row(*name, *("-" if value is None else form.format(value) for value, form in figures))
    if table.row_count:
        screen(WIDTH).print(table)


def refuse(names: set[str], why: str, remedy: str) -> None:
    """Raises: ConfigError if there are such options."""
    from edge_adapt.errors import ConfigError

    if names:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))
        raise ConfigError(f"{options} {why}", remedy=remedy)


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
