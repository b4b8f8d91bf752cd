"""`edge-adapt demo` and `bench`: arguments and printing only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.accuracy_cli import bench_accuracy
from benchmarks.choice_cli import bench_choice
from benchmarks.device_cli import bench_device
from benchmarks.published_cli import bench_tables
from benchmarks.routing_cli import bench_routing

if TYPE_CHECKING:
    from benchmarks.replay import Progress

bench = typer.Typer(no_args_is_help=True, help="Measure speed, side by side in one process.")


def demo(
    out: Annotated[Path, typer.Option(help="folder for results.json and report.html")] = Path("runs/demo"),
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the results")] = None,
    limit: Annotated[int | None, typer.Option(help="frames of each shift")] = None,
    agent: Annotated[bool, typer.Option("--agent", help="broker, agent and page until Ctrl-C, instead")] = False,
    fps: Annotated[float, typer.Option(help="with --agent: frames a second", min=0.1, max=1000)] = 15.0,
    seconds: Annotated[float | None, typer.Option(help="with --agent: end by itself", min=0.1)] = None,
) -> None:
    """The main job on real handwritten digits, with no network and no data of yours: train, export, adapt, report."""
    from benchmarks.demo import run, weather
    from edge_adapt.plugins import DEMOS, find
    from edge_adapt.threads import one_thread

    one_thread()

    def tell(text: str) -> None:
        typer.echo(text, err=True)

    if agent:
        with progress_bar() as progress:
            bundle, parts = weather(progress, tell)
        raise typer.Exit(find(DEMOS, "agent")(bundle, parts, fps=fps, seconds=seconds, report=tell))
    with progress_bar() as progress:
        results = run(progress, tell, limit=limit)
    publish(results, out, json_file)


@bench.callback()
def _bench() -> None:
    """Measure speed, side by side in one process."""


bench.command("choice")(bench_choice)
bench.command("device")(bench_device)
bench.command("routing")(bench_routing)
bench.command("accuracy")(bench_accuracy)
bench.command("tables")(bench_tables)


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


@bench.command("agent")
def agent(
    bundle: Annotated[Path, typer.Argument(help="folder of a bundle")],
    data: Annotated[str, typer.Option(help="images: .npz, folder, or sklearn:digits")],
    method: Annotated[str, typer.Option(help="what learns")] = "auto",
    fps: Annotated[float, typer.Option(help="camera pace", min=0.1)] = 15.0,
    frames: Annotated[int, typer.Option(help="answers of each block", min=10)] = 150,
    rounds: Annotated[int, typer.Option(help="blocks of each kind", min=1)] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the figures")] = None,
) -> None:
    """What learning costs the answers: off, in a thread and in a process, in turns."""
    from benchmarks.agent import agent_latency
    from edge_adapt.bundle import Bundle
    from edge_adapt.streams.data import load_data
    from edge_adapt.threads import one_thread

    one_thread()
    loaded = Bundle.load(bundle)
    with progress_bar() as progress:
        figures = agent_latency(
            loaded,
            load_data(data, loaded.manifest.classes),
            method=method,
            fps=fps,
            frames=frames,
            rounds=rounds,
            progress=progress,
        )
    typer.echo(f"{'pace':>10} {'learning':>10} {'p50 ms':>9} {'ratio':>7} {'p99 ms':>9} {'ratio':>7}")
    for row in figures["rows"]:
        typer.echo(
            f"{row['pace']:>10} {row['learning']:>10} {row['p50_ms']:9.2f} {row['p50_ratio']:7.3f} "
            f"{row['p99_ms']:9.2f} {row['p99_ratio']:7.3f}"
        )
    for way, facts in figures["facts"].items():
        typer.echo(f"{way:>10}  {facts['steps']} steps, {facts['missed_at_camera_pace']} frames missed at camera pace")
    if json_file is not None:
        write_json(json_file, figures)


@bench.command("learner")
def learner(
    bundle: Annotated[Path, typer.Argument(help="folder of a bundle")],
    method: Annotated[str, typer.Option(help="a method whose step can be compiled")] = "tent",
    batch_size: Annotated[int, typer.Option(help="frames of one step")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the figures")] = None,
) -> None:
    """What a learning step takes, eager and as one graph."""
    from benchmarks.learner import learner as run
    from edge_adapt.bundle import Bundle
    from edge_adapt.threads import one_thread

    one_thread()
    figures = run(Bundle.load(bundle), method=method, batch_size=batch_size)
    for name, milliseconds in figures["median_ms"].items():
        typer.echo(f"{name:>6}  {milliseconds:8.3f} ms")
    typer.echo(f"graph is {figures['ratio']:.2f} x as fast, values differ by {figures['difference']:.1e} at most")
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


@bench.command("classes")
def classes(
    bundle: Annotated[Path, typer.Argument(help="folder of a bundle, not cut at its input")],
    train: Annotated[Path, typer.Option(help=".npz archive whose labels come late")],
    test: Annotated[Path, typer.Option(help=".npz archive that is scored")],
    method: Annotated[str | None, typer.Option(help="rows, with semicolons between; None: all")] = None,
    tasks: Annotated[int, typer.Option(help="in how many parts the classes come")] = 5,
    frames: Annotated[int, typer.Option(help="labelled frames of each class")] = 1000,
    score: Annotated[int, typer.Option(help="scored frames of each class")] = 100,
    late: Annotated[int, typer.Option(help="batches answered before the labels of one come")] = 4,
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the figures")] = None,
) -> None:
    """Classes that come one task after the other: fine-tuning an adapter against LAE and MOS."""
    from benchmarks.class_incremental import METHODS, Classes, table
    from benchmarks.class_incremental import class_incremental as run
    from edge_adapt.bundle import Bundle
    from edge_adapt.streams.data import load_data
    from edge_adapt.threads import one_thread

    one_thread()
    rows = tuple(name.strip() for name in method.split(";")) if method else tuple(METHODS)
    plan = Classes(methods=rows, tasks=tasks, train=frames, test=score, late=late, seed=seed)
    loaded = Bundle.load(bundle)
    with progress_bar() as progress:
        results = run(
            loaded,
            load_data(train, loaded.manifest.classes),
            load_data(test, loaded.manifest.classes),
            plan,
            progress=progress,
        )
    typer.echo(table(results))
    if json_file is not None:
        write_json(json_file, results)


@bench.command("forecast")
def forecast(
    data: Annotated[list[Path], typer.Option(help="METR-LA or ETT series as .npz; may be given more than once")],
    lr: Annotated[float | None, typer.Option(help="of the corrector; None: as published")] = None,
    limit: Annotated[int | None, typer.Option(help="forecasts of each stream")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the figures")] = None,
) -> None:
    """A frozen forecaster against the same one corrected by ADCSD, on the weeks after those it was trained on."""
    from benchmarks.forecast import Forecast, load_series
    from benchmarks.forecast import forecast as run
    from edge_adapt.methods.adcsd import ADCSDConfig
    from edge_adapt.threads import one_thread

    one_thread()
    plan = Forecast(seed=seed, limit=limit, adcsd=ADCSDConfig() if lr is None else ADCSDConfig(lr=lr))
    results = []
    for path in data:
        with progress_bar() as progress:
            results.append(run(load_series(path), plan, progress=progress))
    typer.echo(f"{'data':>20}  {'method':>8}  {'MAE':>9}  {'RMSE':>9}  {'ms':>7}")
    for result in results:
        for row in result["rows"]:
            figures = f"{row['mae']:9.3f}  {row['rmse']:9.3f}  {row['ms']:7.3f}"
            typer.echo(f"{result['data']:>20}  {row['method']:>8}  {figures}")
    if json_file is not None:
        write_json(json_file, {"series": results})


@bench.command("endurance")
def endurance(
    bundle: Annotated[Path, typer.Argument(help="folder of a bundle")],
    data: Annotated[str, typer.Option(help="labelled frames, as for replay")],
    method: Annotated[str, typer.Option(help="one or more, with commas between")] = "moments,tent,cotta",
    frames: Annotated[int, typer.Option(help="length of the stream")] = 200_000,
    batch_size: Annotated[int, typer.Option(help="frames that arrive together")] = 50,
    limit: Annotated[int, typer.Option(help="frames of each shift in one round")] = 200,
    seed: Annotated[int, typer.Option()] = 0,
    guards: Annotated[bool | None, typer.Option("--guards/--no-guards", help="instead of the default")] = None,
    threads: Annotated[int, typer.Option()] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the figures")] = None,
) -> None:
    """Repeat a corrupted stream for long: no method may end worse than source, and no state may grow."""
    from benchmarks.endurance import Endurance, print_endurance
    from benchmarks.endurance import endurance as run
    from edge_adapt.bundle import Bundle
    from edge_adapt.streams.data import load_data
    from edge_adapt.threads import one_thread

    one_thread()
    names = tuple(name.strip() for name in method.split(",") if name.strip())
    plan = Endurance(
        methods=names,
        frames=frames,
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        threads=threads,
        settings={} if guards is None else {name: {"guards": guards} for name in names},
    )
    loaded = Bundle.load(bundle)
    with progress_bar() as progress:
        results = run(loaded, load_data(data, loaded.manifest.classes), plan, progress=progress)
    print_endurance(results)
    if json_file is not None:
        write_json(json_file, results)
    if not all(all(row["held"].values()) for row in results["rows"]):
        raise typer.Exit(1)


def publish(results: dict[str, Any], out: Path | None, json_file: Path | None) -> None:
    """Table on the terminal, files where they were asked for."""
    from benchmarks.estimate import lines
    from benchmarks.report import write_report
    from benchmarks.table import print_table

    print_table(results)
    for line in lines(results["rows"]):
        typer.echo(line)
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
