"""`edge-adapt bench choice`: arguments and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench_choice(
    bundle: Annotated[Path, typer.Argument(help="folder of a bundle, not cut at its input")],
    data: Annotated[str, typer.Option(help="labelled images, as for replay; corrupted here if they are clean")],
    corruption: Annotated[str, typer.Option(help="some, with commas between")] = "gaussian_noise,frost,pixelate",
    under: Annotated[str, typer.Option(help="what answers meanwhile: moments or source")] = "moments",
    train: Annotated[int, typer.Option(help="labelled frames of each corruption to train on")] = 600,
    test: Annotated[int, typer.Option(help="frames of each that are scored")] = 800,
    steps: Annotated[int, typer.Option(help="of training, for each candidate")] = 24,
    limit: Annotated[int | None, typer.Option(help="candidates, drawn from all")] = 36,
    severity: Annotated[int, typer.Option(help="1 to 5")] = 5,
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the figures")] = None,
) -> None:
    """How well the score of adaptor choice ranks adapters, against short training of each with labels."""
    from benchmarks.choice import Choice, table
    from benchmarks.choice import choice as run
    from benchmarks.cli import progress_bar, write_json
    from edge_adapt.bundle import Bundle
    from edge_adapt.streams.data import load_data
    from edge_adapt.threads import one_thread

    one_thread()
    plan = Choice(
        corruptions=tuple(name.strip() for name in corruption.split(",") if name.strip()),
        severity=severity,
        train=train,
        test=test,
        steps=steps,
        limit=limit,
        under=under,
        seed=seed,
    )
    loaded = Bundle.load(bundle)
    with progress_bar() as progress:
        results = run(loaded, load_data(data, loaded.manifest.classes), plan, progress=progress)
    typer.echo(table(results))
    if json_file is not None:
        write_json(json_file, results)
