"""What is made from committed results: tables, so that no figure in them is typed by hand, and the plans of these."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import domains, harm_report, sweep_report
from benchmarks.board_plans import plan_file, plan_of
from benchmarks.sweep import BASELINE, BOARDS, read_cells
from benchmarks.sweep_report import Summary, summaries
from benchmarks.table import NOTHING, amount
from edge_adapt.delta import write_atomically
from edge_adapt.errors import DataError

RESULTS = Path("benchmarks/results")
FRAMES = 15 * 800
"""Images of `cifar10_c_sev5`."""


def expected(root: Path) -> dict[Path, str]:
    """File -> what it should hold, made from the results below a source tree.

    Raises: DataError if there are no results, or a block has no place in its file.
    """
    made = {root / RESULTS / sweep_report.TABLE: sweep_report.page(root / RESULTS)}
    for board in BOARDS.values():
        if (place := plan_file(board)) is not None and (cells := read_cells(root / RESULTS, board.id)):
            made[root / RESULTS / place] = plan_of(board, cells)
    if (figures := root / RESULTS / harm_report.FIGURES).exists():
        made[root / RESULTS / harm_report.PAGE] = harm_report.page(figures)
    if (folder := root / RESULTS / "domains").exists():
        made[folder / domains.PAGE] = domains.page(folder)
    for name, blocks in BLOCKS.items():
        text = _read(root / name)
        for block, body in blocks.items():
            text = with_block(text, block, body(root / RESULTS), root / name)
        made[root / name] = text
    return made


def drifted(root: Path) -> list[Path]:
    """Files that do not hold what they should. Raises: as `expected`."""
    return [path for path, text in expected(root).items() if not path.exists() or _read(path) != text]


def write(root: Path) -> list[Path]:
    """Mend them, and say which they were. Raises: as `expected`."""
    wanted = expected(root)
    changed = drifted(root)
    for path in changed:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, wanted[path].encode())
    return changed


def with_block(text: str, name: str, body: str, where: Path) -> str:
    """A text with what stands between `<!-- name -->` and `<!-- /name -->` replaced. Raises: DataError without them."""
    parts = re.split(rf"(?<=<!-- {re.escape(name)} -->\n).*?(?=<!-- /{re.escape(name)} -->)", text, flags=re.DOTALL)
    if len(parts) != 2:
        raise DataError(
            f"{where} has {len(parts) - 1} blocks <!-- {name} -->, expected 1",
            remedy=f"put <!-- {name} --> and <!-- /{name} --> on lines of their own",
        )
    return f"{parts[0]}{body}\n{parts[1]}"


def methods_block(results: Path) -> str:
    """ResNet-20, every method in the frozen engine beside the whole network in PyTorch."""
    device, reference = (summaries(results, f"resnet20-{mode}") for mode in ("device", "reference"))
    whole = {row.method: row for row in reference if row.method != BASELINE}
    board = BOARDS["resnet20-device"]
    seeds = len({cell["seed"] for cell in read_cells(results, board.id)})
    head = ["method", "frozen engine: error %", "time x", "learn ms"]
    head += ["whole network in PyTorch: error %", "time x", "learn ms"]
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    lines += [[row.method, *_figures(row), *_figures(whole.get(row.method))] for row in device]
    return (
        f"ResNet-20, `{Path(board.data).stem}`, 15 x {FRAMES // 15} images in batches of {board.batch_size}, "
        f"device mode over {seeds} {'seed' if seeds == 1 else 'seeds'}.\n"
        "Times are multiples of plain inference, learning in milliseconds a frame, both on a machine that was busy "
        f"otherwise.\n\n{sweep_report.markdown(lines)}"
    )


BLOCKS: dict[str, dict[str, Callable[[Path], str]]] = {"README.md": {"methods": methods_block}}
"""File -> block -> what makes it. What `demo` prints depends on the machine and is pasted."""


def _figures(row: Summary | None) -> list[str]:
    return [NOTHING] * 3 if row is None else [f"{row.error:.1f}", amount(row.time), amount(row.learn_ms)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", remedy="run this in a source checkout") from error
