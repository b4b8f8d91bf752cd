"""`edge-adapt contract`: arguments and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from benchmarks.contract.run import Verdict

COLOURS = {"kept": "green", "broken": "red", "skipped": "yellow"}


def contract(
    package: Annotated[str, typer.Argument(help="name of an installed package, as pip knows it")],
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the verdicts")] = None,
) -> None:
    """Check that the methods, engines, routers, sources and scenarios of a package keep what every part promises.

    Exit status: 0 if all is kept, 1 if something is broken, 2 if there is nothing to check.
    """
    from dataclasses import asdict

    from benchmarks.cli import write_json
    from benchmarks.contract.run import BROKEN, judge
    from edge_adapt.threads import one_thread

    one_thread()
    verdicts = judge(package, tell)
    counts = {status: sum(verdict.status == status for verdict in verdicts) for status in COLOURS}
    typer.echo(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    if json_file is not None:
        write_json(json_file, {"schema": 1, "package": package, "verdicts": [asdict(verdict) for verdict in verdicts]})
    if counts[BROKEN]:
        raise typer.Exit(1)


def tell(verdict: Verdict) -> None:
    """One line for one promise."""
    status = typer.style(f"{verdict.status:>8}", fg=COLOURS[verdict.status])
    why = f": {verdict.why}" if verdict.why else ""
    typer.echo(f"{status}  {verdict.kind} {verdict.name}: {verdict.promise}{why}")
