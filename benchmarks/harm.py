"""Does anything do harm? The results of a plan held against source: `python -m benchmarks.harm results.json`.

With a folder behind it, such as benchmarks/results, the figures and their tables are written there.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from benchmarks.replayed import BASELINE, Visit
from benchmarks.visits import on_return, settled

Cell = dict[str, Any]
Key = tuple[Any, ...]

HARM = 0.5
"""Points of mean error above source that nothing may have."""
STREAM = "bundle", "data", "scenario", "batch_size", "engine", "severity", "limit", "corruptions"
"""What makes cells comparable; their seeds are taken together."""


@dataclass(frozen=True)
class Harm:
    """A method on one stream, beside source on the same frames."""

    stream: Key
    method: str
    router: str
    source: float
    error: float
    noise: float
    """One standard error of source's error over the frames that are scored: what chance may do."""

    names: ClassVar[tuple[str, ...]] = STREAM
    """Of the parts of `stream`."""

    @property
    def above(self) -> bool:
        """True if it is worse than it may be, be that by chance or not."""
        return self.error > self.source + HARM

    @property
    def harms(self) -> bool:
        """True if it is above by more than one standard error of source besides."""
        return self.error > self.source + HARM + self.noise

    @property
    def row(self) -> str:
        """Method, and router if there is one."""
        return self.method if self.router == "none" else f"{self.method} ({self.router})"

    @property
    def column(self) -> str:
        """Scenario and data."""
        _, data, scenario, *_ = self.stream
        return f"{scenario} ({data})"

    def __str__(self) -> str:
        told = " ".join(str(part) for part in (*self.stream[:3], f"batch {self.stream[3]}"))
        return f"{told}: {self.row} {self.error:.2f}, source {self.source:.2f}, noise {self.noise:.2f}"


@dataclass(frozen=True)
class Return:
    """A method where domains come back."""

    bundle: str
    batch_size: int
    method: str
    router: str
    arriving: float
    """Error over the first 128 frames of each visit but the first."""
    settled: float

    def __str__(self) -> str:
        return (
            f"{self.bundle} batch {self.batch_size} {self.method} ({self.router}): "
            f"on return {self.arriving:.2f}, settled {self.settled:.2f}"
        )


def harms(cells: Sequence[Cell]) -> Iterator[Harm]:
    """Every method and router on every stream, over the seeds that source was run with too."""
    grouped = _by(cells, (*STREAM, "method", "router"))
    sources = {key[:-2]: found for key, found in grouped.items() if key[-2] == BASELINE}
    for (*stream, method, router), found in grouped.items():
        beside = sources.get(tuple(stream), [])
        seeds = {cell["seed"] for cell in beside} & {cell["seed"] for cell in found}
        if method == BASELINE or not seeds:
            continue
        source, error = (fmean(_errors(part, seeds)) for part in (beside, found))
        frames = sum(_scored(cell) for cell in found if cell["seed"] in seeds)
        share = source / 100
        noise = 100 * math.sqrt(max(share * (1 - share), 0.0) / max(1, frames))
        yield Harm(tuple(stream), method, router, source, error, noise)


def returns(cells: Sequence[Cell]) -> Iterator[Return]:
    """What a bank gains where domains come back. Streams whose visits are too short to tell are left out."""
    for key, found in _by(
        [cell for cell in cells if cell["scenario"] == "recurring"], (*STREAM, "method", "router")
    ).items():
        made = [_returning(cell) for cell in found]
        arriving, late = (fmean(part) for part in zip(*made, strict=True))
        if not math.isnan(late):
            yield Return(key[0], key[3], key[-2], key[-1], arriving, late)


def main(path: Path, folder: Path | None = None) -> int:
    """Print every cell above source, harmful or by chance, and every one that broke; 1 if any harms or broke.

    `folder`: where tables are written.
    """
    cells: list[Cell] = json.loads(path.read_text())["cells"]
    broken = [cell for cell in cells if cell["status"] in ("failed", "timeout")]
    good = [cell for cell in cells if cell["status"] == "ok" and cell["row"]["error_mean"] is not None]
    found = list(harms(good))
    for cell in broken:
        print(f"BROKEN {cell['scenario']} batch {cell['batch_size']} {cell['method']}: {cell['why']}")
    for harm in sorted(found, key=lambda harm: harm.source - harm.error):
        if harm.above:
            print(f"{'HARM' if harm.harms else 'ABOVE':6} {harm}")
    for line in returns(good):
        print(f"return {line}")
    if folder is not None:
        from benchmarks import harm_report

        harm_report.write(path, folder)
    worst = max(found, key=lambda harm: harm.error - harm.source, default=None)
    above, beyond = (sum(getattr(harm, name) for harm in found) for name in ("above", "harms"))
    print(f"{len(found)} cells beside source, {above} above it by {HARM} points, {beyond} harm; the worst: {worst}")
    return int(bool(broken) or any(harm.harms for harm in found))


def _by(cells: Iterable[Cell], parts: Sequence[str]) -> dict[Key, list[Cell]]:
    made: dict[Key, list[Cell]] = {}
    for cell in cells:
        values = (cell.get(part) for part in parts)
        made.setdefault(tuple(tuple(part) if isinstance(part, list) else part for part in values), []).append(cell)
    return made


def _errors(cells: Iterable[Cell], seeds: set[int]) -> list[float]:
    return [cell["row"]["error_mean"] for cell in cells if cell["seed"] in seeds]


def _scored(cell: Cell) -> int:
    """Frames whose answers count."""
    return sum(shift.get("genuine", shift["frames"]) for shift in cell["shifts"])


def _returning(cell: Cell) -> tuple[float, float]:
    """Mean over the domains of the error on return, and once settled."""
    visits = [Visit(**visit) for visit in cell["row"]["visits"]]
    parts = [
        [visit for visit in visits if visit.name == name] for name in dict.fromkeys(visit.name for visit in visits)
    ]
    pairs = [(on_return(part), settled(part)) for part in parts]
    known = [(first, late) for first, late in pairs if first is not None and late is not None]
    if not known:
        return math.nan, math.nan
    return fmean(first for first, _ in known), fmean(late for _, late in known)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
