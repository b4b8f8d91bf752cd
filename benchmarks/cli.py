"""`edge-adapt replay`, `demo` and `bench`: arguments and printing only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from benchmarks.replay import Progress

bench = typer.Typer(no_args_is_help=True, help="Measure speed, side by side in one process.")


def replay(
    bundle: Annotated[Path, typer.Argument(help="folder of a bundle")],
    data: Annotated[str, typer.Option(help=".npz archive, image folder, sklearn:digits, or {har,usps,pacs,kws}:PATH")],
    scenario: Annotated[str, typer.Option(help="continual, reset_each_shift or natural")] = "continual",
    method: Annotated[str, typer.Option(help="one or more, with commas between")] = "source,moments",
    batch_size: Annotated[int, typer.Option(help="frames that arrive together")] = 64,
    limit: Annotated[int | None, typer.Option(help="frames of each shift")] = None,
    severity: Annotated[int, typer.Option(help="1 to 5")] = 5,
    seed: Annotated[int, typer.Option()] = 0,
    corruption: Annotated[str | None, typer.Option(help="some of the fifteen, with commas between")] = None,
    engine: Annotated[str, typer.Option(help="onnxruntime or torch")] = "onnxruntime",
    threads: Annotated[int, typer.Option()] = 1,
    out: Annotated[Path | None, typer.Option(help="folder for results.json and report.html")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the results")] = None,
) -> None:
    """Replay a stream through one or more methods, and compare them."""
    from benchmarks.replay import Replay
    from benchmarks.replay import replay as run
    from edge_adapt.bundle import Bundle
    from edge_adapt.streams.corruptions import CORRUPTIONS
    from edge_adapt.streams.data import load_data
    from edge_adapt.threads import one_thread

    one_thread()
    plan = Replay(
        scenario=scenario,
        methods=tuple(name.strip() for name in method.split(",") if name.strip()),
        batch_size=batch_size,
        limit=limit,
        severity=severity,
        seed=seed,
        corruptions=tuple(corruption.split(",")) if corruption else CORRUPTIONS,
        engine=engine,
        threads=threads,
    )
    loaded = Bundle.load(bundle)
    with progress_bar() as progress:
        results = run(loaded, load_data(data, loaded.manifest.classes), plan, progress=progress)
    publish(results, out, json_file)


def demo(
    out: Annotated[Path, typer.Option(help="folder for results.json and report.html")] = Path("runs/demo"),
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the results")] = None,
    limit: Annotated[int | None, typer.Option(help="frames of each shift")] = None,
) -> None:
    """The main job on real handwritten digits, with no network and no data of yours: train, export, adapt, report."""
    from benchmarks.demo import run
    from edge_adapt.threads import one_thread

    one_thread()
    with progress_bar() as progress:
        results = run(progress, lambda text: typer.echo(text, err=True), limit=limit)
    publish(results, out, json_file)


@bench.callback()
def _bench() -> None:
    """Measure speed, side by side in one process."""


@bench.command("latency")
def latency(
    bundle: Annotated[Path, typer.Argument(help="folder of a bundle")],
    batch_size: Annotated[int, typer.Option(help="frames of one call")] = 1,
    rounds: Annotated[int, typer.Option(help="how often each case is timed")] = 40,
    threads: Annotated[int, typer.Option()] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the figures")] = None,
) -> None:
    """What live ports, taps and deltas cost against a bare ONNX Runtime session."""
    from benchmarks.latency import latency as run
    from edge_adapt.bundle import Bundle
    from edge_adapt.threads import one_thread

    one_thread()
    with progress_bar() as progress:
        figures = run(
            Bundle.load(bundle),
            batch_size=batch_size,
            rounds=rounds,
            threads=threads,
            progress=lambda done, total: progress("timing", done, total),
        )
    for name, milliseconds in figures["median_ms"].items():
        typer.echo(f"{name:>20}  {milliseconds:9.3f} ms  {figures['ratios'][name]:6.3f} x bare")
    if json_file is not None:
        write_json(json_file, figures)


@bench.command("methods")
def methods(
    data_root: Annotated[Path, typer.Option(help="folder that holds the images and the models")],
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("benchmarks/results"),
    work: Annotated[Path, typer.Option(help="folder for the exported bundles")] = Path("runs/methods"),
    board: Annotated[str | None, typer.Option(help="some of the boards, with commas between")] = None,
    again: Annotated[str | None, typer.Option(help="methods whose cells are made anew, with commas between")] = None,
    short: Annotated[bool, typer.Option("--short", help="a cut of ten minutes")] = False,
    jobs: Annotated[int, typer.Option(help="cells at a time; more than one disturbs the times")] = 1,
) -> None:
    """Every method on every model, in both modes. Stopped, it goes on where it was; table and plot at the end."""
    from benchmarks import sweep, sweep_report

    boards = sweep.short() if short else sweep.selected(board.split(",") if board else ())
    with progress_bar() as progress:
        sweep.sweep(
            boards,
            data_root=data_root,
            out=out,
            work=work,
            jobs=jobs,
            again=again.split(",") if again else (),
            progress=progress,
        )
    sweep_report.write(out)
    typer.echo(f"table: {out / sweep_report.TABLE}, plot: {out / sweep_report.PLOT}")


def publish(results: dict[str, Any], out: Path | None, json_file: Path | None) -> None:
    """Table on the terminal, files where they were asked for."""
    from benchmarks.report import write_report
    from benchmarks.table import print_table

    print_table(results)
    if json_file is not None:
        write_json(json_file, results)
    if out is not None:
        write_json(out / "results.json", results)
        write_report(results, out / "report.html")
        typer.echo(f"report: {out / 'report.html'}")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Raises: ArtifactError if the place cannot be written."""
    from edge_adapt.delta import write_atomically
    from edge_adapt.errors import ArtifactError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(value, indent=1).encode())
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror}", remedy="choose another place") from error


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar per stage on a terminal; one line per stage elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        told: set[str] = set()

        def line(what: str, done: int, total: int) -> None:
            if done >= total and what not in told:
                told.add(what)
                console.print(f"{what}: {total} done", highlight=False)

        yield line
        return
    columns = (TextColumn("{task.description:>18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def draw(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield draw
