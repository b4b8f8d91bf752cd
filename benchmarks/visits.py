"""Domains that come back: the error when they arrive, against the error once the method has settled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.replayed import Row, Visit

BLOCK = 64
"""Frames of one error within a visit."""
EARLY = 128
"""Frames of a visit that count as its beginning; a multiple of `BLOCK`."""


def visits_of(row: Row, name: str) -> list[Visit]:
    """Its visits to one domain, in order."""
    return [visit for visit in row.visits if visit.name == name]


def pooled(visits: Iterable[Visit], first: int = 0, last: int | None = None) -> float | None:
    """Error in per cent over the frames `first` to `last` of each visit, multiples of `BLOCK`; every frame counts once.

    None if there is no such frame, or none has a label.
    """
    wrong = frames = 0.0
    for visit in visits:
        for start, error in zip(range(0, visit.frames, BLOCK), visit.error, strict=False):
            if error is not None and start >= first and (last is None or start < last):
                size = min(BLOCK, visit.frames - start)
                wrong, frames = wrong + error * size, frames + size
    return wrong / frames if frames else None


def settled(visits: Sequence[Visit]) -> float | None:
    """Error over all but the first `EARLY` frames of each visit but the first."""
    return pooled(visits[1:], EARLY)


def on_return(visits: Sequence[Visit]) -> float | None:
    """Error over the first `EARLY` frames of each visit but the first."""
    return pooled(visits[1:], 0, EARLY)
