"""The plot of routes: which entry of the bank answered over time, and beneath it which domain it was."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.replayed import BASELINE, Results, Row
from benchmarks.report.look import HUES, WIDE, Plot, Swatch, csv_uri, drawn, ink, new_figure, raw, short, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]

CLEAN = "clean"
"""The domain that source is at home in."""
PALE = 0.42
"""Opacity of the second round of hues."""
TRUTH = "true domain"
STEPS = {WIDE: 80}
"""Parts that a strip is cut into where it changes too often to be drawn as it is; the narrow one into half of them."""


class Strip(NamedTuple):
    """Something that has a name at every frame."""

    label: str
    names: list[str]
    codes: Array
    """[frames], indices of `names`."""
    swatches: list[Swatch]
    """How each name looks."""


class Piece(NamedTuple):
    """Part of a strip, with the share of each name; shares add up to 1."""

    start: int
    end: int
    shares: dict[int, float]


def routes_plot(
    results: Results, key: str = "entries-over-time", title: str = "Which entry answered"
) -> Plot | None:
    """None where no method told which entry answered."""
    routed = [row for row in results.rows if row.entries]
    if not routed:
        return None
    truth = _truth(results)
    strips = [*(_answered(row, truth) for row in routed), truth]
    caption = ["An entry has the colour of the domain that it answered most; source is grey."]
    caption += [_purity(strip, truth) for strip in strips[:-1]]
    if any(len(piece.shares) > 1 for strip in strips for piece in pieces(strip.codes, WIDE)):
        caption.append("Where a strip changes too often to be drawn, it shows the share of each.")
    return drawn(
        Plot(
            key=key,
            title=title,
            caption=" ".join(caption),
            alt="Strips over time: the entry of the bank that answered, and beneath it the true domain.",
            csv=csv_uri(
                ["strip", "start", "end", "name", "share"],
                [
                    [strip.label, piece.start, piece.end, strip.names[code], raw(share)]
                    for strip in strips
                    for piece in pieces(strip.codes, WIDE)
                    for code, share in piece.shares.items()
                ],
            ),
            swatches=tuple(truth.swatches),
        ),
        lambda width: _draw(strips, width),
    )


def _truth(results: Results) -> Strip:
    names = list(dict.fromkeys(name for shift in results.shifts for name in shift.domains or (shift.name,)))
    place = {name: number for number, name in enumerate(names)}
    codes = [
        np.array([place[shift.domains[number]] for number in shift.domain])
        if shift.domain
        else np.full(shift.frames, place[(shift.domains or (shift.name,))[0]])
        for shift in results.shifts
    ]
    hued = [name for name in names if name != CLEAN]
    swatches = {name: _swatch(name, number) for number, name in enumerate(hued)}
    grey = Swatch(CLEAN, f"m-{BASELINE}", 1.0)
    return Strip(TRUTH, names, np.concatenate(codes).astype(int), [swatches.get(name, grey) for name in names])


def _swatch(name: str, number: int) -> Swatch:
    return Swatch(name, HUES[number % len(HUES)], PALE if number // len(HUES) % 2 else 1.0)


def _answered(row: Row, truth: Strip) -> Strip:
    """The entry at each frame; source before the first that was told."""
    frames = len(truth.codes)
    names = list(dict.fromkeys([BASELINE, *(entry.entry for entry in row.entries)]))
    place = {name: number for number, name in enumerate(names)}
    codes = np.zeros(frames, int)
    for entry in row.entries:
        codes[entry.frame :] = place[entry.entry]
    homes = [_home(code, codes, truth) for code in range(len(names))]
    swatches = [Swatch(name, *truth.swatches[home][1:]) for name, home in zip(names, homes, strict=True)]
    swatches[0] = Swatch(BASELINE, f"m-{BASELINE}", 1.0)
    return Strip(row.method, names, codes, swatches)


def _home(entry: int, codes: Array, truth: Strip) -> int:
    """The domain that an entry answered most."""
    return int(np.bincount(truth.codes[codes == entry], minlength=len(truth.names)).argmax())


def _purity(strip: Strip, truth: Strip) -> str:
    """In words: how many frames were answered by an entry that mostly answers their domain."""
    homes = [_home(code, strip.codes, truth) for code in range(len(strip.names))]
    homes[0] = truth.names.index(CLEAN) if CLEAN in truth.names else -1
    share = float((np.array(homes)[strip.codes] == truth.codes).mean()) * 100
    entries = len(np.setdiff1d(strip.codes, [0]))
    return (
        f"{strip.label}: {entries} {'entry' if entries == 1 else 'entries'}, "
        f"{share:.1f}\N{NO-BREAK SPACE}% of the frames answered by the entry of their domain."
    )


def pieces(codes: Array, width: int) -> list[Piece]:
    """A strip cut where its name changes, or into equal parts with shares if that is too often for the width."""
    total = len(codes)
    ends = [*(np.flatnonzero(np.diff(codes)) + 1).tolist(), total]
    if len(ends) <= width / 2:
        return [Piece(start, end, {int(codes[start]): 1.0}) for start, end in zip([0, *ends], ends, strict=False)]
    parts = STEPS.get(width, STEPS[WIDE] // 2)
    cuts = np.linspace(0, total, parts + 1).round().astype(int)
    made = []
    for start, end in pairwise(cuts.tolist()):
        found, counts = np.unique(codes[start:end], return_counts=True)
        shares = {int(code): float(part) / (end - start) for code, part in zip(found, counts, strict=True)}
        made.append(Piece(start, end, shares))
    return made


def _draw(strips: Sequence[Strip], width: int) -> Figure:
    figure, axes = new_figure(width, 60 + 46 * len(strips))
    total = len(strips[-1].codes)
    for y, strip in enumerate(strips):
        _draw_strip(axes, y, strip, width, total)
    axes.set(xlim=(0, max(total, 1)), ylim=(len(strips) - 0.5, -0.5), xlabel="frames seen")
    axes.set_yticks(range(len(strips)), [short(strip.label) for strip in strips])
    axes.tick_params(axis="y", labelcolor=ink("ink"))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.locator_params(axis="x", nbins=8 if width == WIDE else 4)
    axes.spines["left"].set_visible(False)
    return figure


def _draw_strip(axes: Axes, y: int, strip: Strip, width: int, total: int) -> None:
    """One path for each look, and the names that there is room for."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    parts = pieces(strip.codes, width)
    corners: dict[Swatch, list[tuple[float, float]]] = {}
    for piece in parts:
        top = y - 0.4
        for code, share in piece.shares.items():
            low = top + 0.8 * share
            box = [(piece.start, top), (piece.end, top), (piece.end, low), (piece.start, low), (piece.start, top)]
            corners.setdefault(strip.swatches[code], []).extend(box)
            top = low
    apart = 0.8 if len(parts) < width / 8 and all(len(piece.shares) == 1 for piece in parts) else 0
    rectangle = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    for swatch, points in corners.items():
        path = Path(points, rectangle * (len(points) // 5))
        axes.add_patch(
            PathPatch(path, facecolor=swatch.colour, alpha=swatch.opacity, edgecolor=ink("card"), linewidth=apart)
        )
    pixel = (width - 130) / max(total, 1)
    for piece in parts:
        code, *others = piece.shares
        name = words(strip.names[code])
        if not others and (piece.end - piece.start) * pixel > 6.6 * len(name) + 6:
            axes.text(
                *((piece.start + piece.end) / 2, y, name),
                ha="center",
                va="center_baseline",
                fontsize=11 if width == WIDE else 10,
                color=ink("card" if strip.swatches[code].opacity == 1 else "ink"),
            )
