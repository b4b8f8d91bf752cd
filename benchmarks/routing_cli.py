"""`edge-adapt bench routing`: arguments and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench_routing(
    bundle: Annotated[list[Path], typer.Argument(help="folders of bundles")],
    data_root: Annotated[Path, typer.Option(help="folder that holds the images")],
    frames: Annotated[int, typer.Option(help="of each domain; half of them make its centroid", min=128)] = 800,
    usual: Annotated[int, typer.Option(help="source frames that strangers are told from", min=10)] = 2000,
    severity: Annotated[str, typer.Option(help="one or more, with commas between")] = "5,3",
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the figures")] = None,
) -> None:
    """Domains told apart, strangers told from source frames, and what that costs."""
    from benchmarks.cli import progress_bar, write_json
    from benchmarks.routing import Plan, routing, tables
    from edge_adapt.bundle import Bundle
    from edge_adapt.threads import one_thread

    one_thread()
    severities = tuple(int(part) for part in severity.split(","))
    plan = Plan(data_root=data_root, frames=frames, usual=usual, severities=severities, seed=seed)
    made = []
    for path in bundle:
        with progress_bar() as progress:
            made.append(routing(Bundle.load(path), plan, progress))
        typer.echo(tables(made[-1]))
    if json_file is not None:
        write_json(json_file, {"bundles": made})
