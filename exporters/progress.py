"""How far a long stage of an export is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]

LINES = 10
"""A stage says so often how far it is, where there is no terminal."""


@contextmanager
def shown() -> Iterator[Progress]:
    """Give a function that is told (what, done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what, done, total: _line(console.print, what, done, total)
        return
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def draw(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield draw


def _line(say: Callable[..., None], what: str, done: int, total: int) -> None:
    if done * LINES // total != (done - 1) * LINES // total:
        say(f"  {what}: {done} of {total} steps", highlight=False)
