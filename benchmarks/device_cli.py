"""`edge-adapt bench device`: arguments and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench_device(
    bundle: Annotated[Path, typer.Argument(help="folder of a bundle")],
    engine: Annotated[str | None, typer.Option(help="some, with commas between; None: all that are installed")] = None,
    rounds: Annotated[int, typer.Option(help="answers that are timed, of each engine and batch size", min=5)] = 200,
    threads: Annotated[int, typer.Option()] = 1,
    wait_s: Annotated[float, typer.Option(help="how long a plan may take to build")] = 600.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the figures")] = None,
) -> None:
    """What this board does: every engine that runs here, ports, taps, learning, memory and temperature."""
    from benchmarks.cli import write_json
    from benchmarks.device import device as run
    from edge_adapt.bundle import Bundle
    from edge_adapt.threads import one_thread

    one_thread()
    chosen = [name.strip() for name in engine.split(",") if name.strip()] if engine else None
    figures = run(
        Bundle.load(bundle), engines=chosen, rounds=rounds, threads=threads, wait_s=wait_s, tell=typer.echo
    )
    host = figures["host"]["after"]
    said = ", ".join(f"{name} {value:.1f}" for name, value in host.items())
    typer.echo(f"{'board':>22}  {figures['board']['model'] or 'unknown'}; {said}")
    if json_file is not None:
        write_json(json_file, figures)
