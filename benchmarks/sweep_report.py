"""What a sweep found: a table of methods and boards, one table a board, and error drawn against time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from benchmarks.sweep import BASELINE, BOARDS, Cell, read_cells
from benchmarks.table import NOTHING, amount
from edge_adapt.delta import write_atomically
from edge_adapt.errors import DataError

TABLE, PLOT = "README.md", "methods.svg"
LEARNS_LITTLE = 1.5
"""Multiples of plain inference that the default profile may take; drawn as a line."""
LABELLED = 9
"""The best so many of a mode are named in the plot."""


@dataclass(frozen=True)
class Summary:
    """One method on one board, over its seeds."""

    board: str
    method: str
    error: float
    spread: float | None
    """Standard deviation over the seeds; None for one."""
    time: float
    learn_ms: float
    passes: float
    extra_mb: float | None
    worst: float
    """Points above source on the corruption where the method does worst; below zero it harms nowhere."""


def summaries(out: Path, board: str) -> list[Summary]:
    """The cells of a board by method, the best first."""
    cells = [cell for cell in read_cells(out, board) if cell["status"] == "ok"]
    source: dict[str, float] = next((cell["errors"] for cell in cells if cell["method"] == BASELINE), {})
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(cell["method"], []).append(cell)
    made = [_summary(board, method, group, source) for method, group in grouped.items()]
    return sorted(made, key=lambda summary: summary.error)


def _summary(board: str, method: str, cells: Sequence[Cell], source: dict[str, float]) -> Summary:
    errors = [cell["error"] for cell in cells]
    memory = [cell["extra_mb"] for cell in cells if cell["extra_mb"] is not None]
    harm = [mean(cell["errors"][shift] for cell in cells) - error for shift, error in source.items()]
    return Summary(
        board=board,
        method=method,
        error=mean(errors),
        spread=stdev(errors) if len(errors) > 1 else None,
        time=mean(cell["time"] for cell in cells),
        learn_ms=mean(cell["learn_ms"] for cell in cells),
        passes=mean(cell["passes"] for cell in cells),
        extra_mb=mean(memory) if memory else None,
        worst=max(harm, default=0.0),
    )


def skipped(out: Path, board: str) -> dict[str, str]:
    """Method -> why it has no figures on a board."""
    cells = read_cells(out, board)
    return {cell["method"]: cell["status"] for cell in cells if cell["status"] != "ok"}


def write(out: Path) -> None:
    """Write the tables and the plot beside the results. Raises: DataError if there are none."""
    write_atomically(out / TABLE, page(out).encode())
    draw(_boards(out), out / PLOT)


def page(out: Path) -> str:
    """All tables as Markdown. Raises: DataError if there are no results."""
    boards = _boards(out)
    parts = ["# Methods", overview(boards), f"![error against time]({PLOT})"]
    parts += [_board(board, rows, skipped(out, board)) for board, rows in boards.items()]
    return "\n\n".join(parts) + "\n"


def _boards(out: Path) -> dict[str, list[Summary]]:
    boards = {board: summaries(out, board) for board in BOARDS}
    boards = {board: rows for board, rows in boards.items() if rows}
    if not boards:
        raise DataError(f"{out} holds no results", remedy="run `edge-adapt bench methods` first")
    return boards


def overview(boards: dict[str, list[Summary]]) -> str:
    """Markdown: a row a method, a column a board; error in per cent, and time in multiples of plain inference."""
    methods = list(dict.fromkeys(row.method for rows in boards.values() for row in rows))
    found = {(board, row.method): row for board, rows in boards.items() for row in rows}
    best = {board: f"{rows[0].error:.1f}" for board, rows in boards.items()}

    def cell(board: str, method: str) -> str:
        row = found.get((board, method))
        if row is None:
            return NOTHING
        text = f"{row.error:.1f}"
        return f"{f'**{text}**' if text == best[board] else text} ({amount(row.time)} x)"

    head = [["method", *boards], ["---", *("---:" for _ in boards)]]
    body = [[method, *(cell(board, method) for board in boards)] for method in methods]
    return markdown(head + body) + "\n\nMean error in per cent, and time in multiples of plain inference beside it."


def _board(board: str, rows: Sequence[Summary], missing: dict[str, str]) -> str:
    facts = BOARDS[board]
    where = f"`{facts.data}`" + (f", {facts.limit} images a corruption" if facts.limit else "")
    mode = "reference mode (the whole network in PyTorch)" if facts.is_reference else "device mode (frozen engine)"
    warm = ", warmed up at export" if facts.warm_up else ""
    lines = [["method", "error %", "time x", "learn ms", "passes", "extra MB", "worst vs source"]]
    lines += [["---", *("---:" for _ in lines[0][1:])]]
    for row in rows:
        error = f"{row.error:.2f}" + (f" ± {row.spread:.2f}" if row.spread is not None else "")
        figures = (amount(value) for value in (row.time, row.learn_ms, row.passes, row.extra_mb))
        lines.append([row.method, error, *figures, f"{row.worst:+.1f}"])
    text = f"## {board}\n\n{facts.model}, {mode}{warm}; {where}, batches of {facts.batch_size}.\n\n{markdown(lines)}"
    reasons = "\n".join(f"- {method}: {reason}" for method, reason in missing.items())
    return f"{text}\n\n{reasons}" if reasons else text


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """Lines of cells as a table; the second line says how columns are aligned."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(boards: dict[str, list[Summary]], path: Path) -> None:
    """One panel a model: error against time, device and reference mode in two colours. Writes an SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(BOARDS[board].model for board in boards))
    with plt.rc_context({"svg.hashsalt": "edge-adapt", "font.size": 9}):
        figure, axes = plt.subplots(len(models), 1, figsize=(9, 4.2 * len(models)), squeeze=False)
        for axis, model in zip(axes[:, 0], models, strict=True):
            _panel(axis, {name: rows for name, rows in boards.items() if BOARDS[name].model == model})
            axis.set_title(model.removeprefix("zoo:"), loc="left", fontweight="bold")
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _panel(axis: object, boards: dict[str, list[Summary]]) -> None:
    from matplotlib.axes import Axes
    from matplotlib.ticker import LogLocator

    assert isinstance(axis, Axes)
    source = next((row.error for rows in boards.values() for row in rows if row.method == BASELINE), None)
    if source is not None:
        axis.axhline(source, color="0.6", linewidth=1, linestyle=":")
        axis.annotate(
            "frozen", (0.99, source), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.4"
        )
    axis.axvspan(0.8, LEARNS_LITTLE, color="0.95", zorder=0)
    for board, colour in zip(boards, ("#0b6e4f", "#c44536", "#e09f3e", "#5b5f97"), strict=False):
        rows = [row for row in boards[board] if row.method != BASELINE]
        axis.scatter(
            [row.time for row in rows], [row.error for row in rows], s=26, color=colour, label=board, zorder=3
        )
        shown = [row for row in rows if source is None or row.error < source][:LABELLED]
        for row in shown:
            axis.annotate(
                row.method,
                (row.time, row.error),
                xytext=(2, 5),
                textcoords="offset points",
                rotation=50,
                fontsize=7,
                color=colour,
            )
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("time, multiples of plain inference (shaded: what the default profile may take)")
    axis.set_ylabel("mean error, per cent")
    if source is not None:
        axis.set_ylim(top=source + 4)
    axis.legend(frameon=False, loc="center right")
    axis.spines[["top", "right"]].set_visible(False)
