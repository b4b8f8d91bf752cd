"""`edge-adapt compare`: arguments and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.compare import Comparison, Difference

WIDTH = 120
"""Columns of the table where nobody watches."""


def compare(
    base: Annotated[Path, typer.Argument(help="results.json of before")],
    head: Annotated[Path, typer.Argument(help="results.json of now, of the same kind")],
    tolerance: Annotated[
        list[str] | None, typer.Option(help="error_mean=0.3, time=50%: how much a metric may rise; may be repeated")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for all differences")] = None,
) -> None:
    """Tell what got worse from one results file to the other; exit status 1 if anything did by more than it may."""
    from benchmarks.cli import write_json
    from benchmarks.compare import compare as run
    from benchmarks.compare import load_results, with_tolerances
    from benchmarks.table import screen

    metrics = with_tolerances(tolerance or [])
    found = run(load_results(base), load_results(head), metrics)
    print_comparison(found, screen(WIDTH))
    if json_file is not None:
        write_json(json_file, found.as_json())
    if found.regressed:
        raise typer.Exit(1)


def print_comparison(found: Comparison, console: Console) -> None:
    """What is out of tolerance, cells that only one file has, and one line about each metric."""
    from rich.text import Text

    from benchmarks.compare import in_words

    if found.worse or found.better:
        console.print(_table([*found.worse, *found.better]))
    for what, keys in (("missing", found.missing), ("new", found.new)):
        for key in keys:
            console.print(Text.assemble((f"{what}: ", "bold red" if what == "missing" else "bold"), in_words(key)))
    for metric in dict.fromkeys(one.metric for one in found.differences):
        console.print(Text(_summary([one for one in found.differences if one.metric == metric])))
    told = "worse than before" if found.regressed else "nothing is worse than before"
    console.print(Text(told, style="bold red" if found.regressed else "bold green"))


def _table(differences: list[Difference]) -> object:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="dim")
    table.add_column("cell", overflow="fold")
    for name in ("metric", "base", "head", "change", "allowed"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for one in differences:
        mark = Text(one.verdict, style="bold red" if one.verdict == "worse" else "bold green")
        figures = (_shown(one.base), _shown(one.head), _change(one), one.allowed)
        table.add_row(Text(one.cell), Text(one.metric), *map(Text, figures), mark)
    return table


def _shown(value: float | str | None) -> str:
    from benchmarks.table import NOTHING

    return NOTHING if value is None else value if isinstance(value, str) else f"{value:.6g}"


def _change(one: Difference) -> str:
    if isinstance(one.base, float) and isinstance(one.head, float):
        share = f" ({100 * (one.head / one.base - 1):+.0f} %)" if one.base else ""
        return f"{one.head - one.base:+.4g}{share}"
    return ""


def _summary(differences: list[Difference]) -> str:
    changes = [
        (one.head - one.base, one.cell)
        for one in differences
        if isinstance(one.base, float) and isinstance(one.head, float)
    ]
    counted = {word: sum(one.verdict == word for one in differences) for word in ("worse", "same", "better")}
    text = f"{differences[0].metric:>10}: " + ", ".join(
        f"{number} {word}" for word, number in counted.items() if number
    )
    most, where = max(changes, default=(0.0, ""))
    return text + (f"; most added: {most:+.4g} ({where})" if most > 0 else "")
