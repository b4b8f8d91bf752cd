"""`edge-adapt bench tables`: arguments and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench_tables(
    root: Annotated[Path, typer.Argument(help="the source checkout")] = Path(),
    write: Annotated[bool, typer.Option("--write/--check", help="mend what drifted, or fail on it")] = False,
) -> None:
    """The tables of the README and of benchmarks/results, made from the JSON files there; exit status 1 on drift."""
    from benchmarks import published

    changed = published.write(root) if write else published.drifted(root)
    for path in changed:
        typer.echo(f"{'written' if write else 'not what the results say'}: {path}")
    if not changed:
        typer.echo("all tables are what the results say")
    elif not write:
        typer.echo("run `edge-adapt bench tables --write`", err=True)
        raise typer.Exit(1)
