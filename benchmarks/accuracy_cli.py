"""`edge-adapt bench accuracy`: arguments and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench_accuracy(
    bundle: Annotated[Path, typer.Argument(help="folder of a bundle that was exported with --calibration")],
    data: Annotated[str, typer.Option(help="labelled frames, as for replay")],
    method: Annotated[str, typer.Option(help="one or more, with commas between")] = "source,moments",
    scenario: Annotated[str, typer.Option(help="as for replay")] = "continual",
    limit: Annotated[int | None, typer.Option(help="frames of each shift")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the figures")] = None,
) -> None:
    """How near the estimate of accuracy without labels is to the truth, and how soon it sees a collapse."""
    from benchmarks.accuracy import accuracy as run
    from benchmarks.accuracy import print_accuracy
    from benchmarks.cli import progress_bar, write_json
    from edge_adapt.bundle import Bundle
    from edge_adapt.streams.data import load_data
    from edge_adapt.threads import one_thread

    one_thread()
    loaded = Bundle.load(bundle)
    names = tuple(name.strip() for name in method.split(",") if name.strip())
    with progress_bar() as progress:
        results = run(
            loaded,
            load_data(data, loaded.manifest.classes),
            methods=names,
            scenario=scenario,
            limit=limit,
            seed=seed,
            progress=progress,
        )
    print_accuracy(results, typer.echo)
    if json_file is not None:
        write_json(json_file, results)
