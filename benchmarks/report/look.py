"""How a report looks: colours and marks of methods, figures as SVG that follow the page, words and numbers.

The plots are SVG with text left as text. They are drawn with the light colours of `THEME`, which are then
replaced by the page's CSS variables, so a plot follows the page into dark mode and onto paper. Each is drawn
twice, for a wide and for a narrow screen; the page shows the one that fits.
"""

from __future__ import annotations

import base64
import csv
import io
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 960, 348
"""Width of a plot in CSS pixels: matplotlib's points, since every figure has 72 dots an inch."""
THEME = {
    "page": ("#f5f6f8", "#0e1114"),
    "card": ("#ffffff", "#171b20"),
    "ink": ("#1a1e24", "#e9ecef"),
    "muted": ("#5b6470", "#9ea8b3"),
    "rule": ("#dfe3e8", "#313840"),
    "better": ("#2a7ab9", "#3a86c4"),
    "worse": ("#d4571c", "#d4622a"),
    "m-source": ("#737a85", "#a3abb6"),
    "m-moments": ("#0072b2", "#4fa8e8"),
    "m-tent": ("#d55e00", "#f58b45"),
    "m-cotta": ("#00936b", "#2ec99c"),
    "m-violet": ("#2f1fe0", "#6368ff"),
    "m-olive": ("#5c5600", "#f5e04a"),
    "m-maroon": ("#7d0c17", "#c4544c"),
    "m-night": ("#14233c", "#ffffff"),
    "d-blue": ("#1769aa", "#5aaeea"),
    "d-orange": ("#c75b00", "#f59a4f"),
    "d-green": ("#2a8540", "#57c878"),
    "d-violet": ("#6f42c1", "#a98bf0"),
    "d-yellow": ("#8a7400", "#dcc544"),
    "d-red": ("#b3261e", "#ef7d76"),
    "d-pink": ("#b8367f", "#f083bd"),
    "d-teal": ("#0f7f86", "#48c2c9"),
}
"""CSS variables: (light, dark). The methods' hues stay apart for the common kinds of colour blindness."""
HUES = tuple(name for name in THEME if name.startswith("d-"))
"""Those of domains, in turn."""

KNOWN = {
    "source": ("m-source", "o"),
    "moments": ("m-moments", "s"),
    "tent": ("m-tent", "^"),
    "cotta": ("m-cotta", "D"),
}
SPARE = (("m-violet", "v"), ("m-olive", "P"), ("m-maroon", "X"), ("m-night", "p"))
MARKERS = {
    "o": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "s": "M-4.5 -4.5h9v9h-9z",
    "^": "M0 -5.5l5.5 10h-11z",
    "D": "M0 -6l6 6l-6 6l-6 -6z",
    "v": "M0 5.5l5.5 -10h-11z",
    "P": "M-2 -5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5z",
    "X": "M-5.5 -3l2.5 -2.5l3 3l3 -3l2.5 2.5l-3 3l3 3l-2.5 2.5l-3 -3l-3 3l-2.5 -2.5l3 -3z",
    "p": "M0 -5.5l5.5 4l-2 6.3h-7l-2 -6.3z",
}
"""matplotlib's markers again, as SVG paths for the key."""


@dataclass(frozen=True)
class Style:
    """How a method looks in every plot; the marker serves those to whom the colour says nothing."""

    variable: str
    marker: str

    @property
    def colour(self) -> str:
        """What to give matplotlib, which knows no CSS variables."""
        return THEME[self.variable][0]

    @property
    def path(self) -> str:
        """The marker, for the key of the page."""
        return MARKERS[self.marker]


class Swatch(NamedTuple):
    """How a domain looks, and an entry that answers it."""

    name: str
    variable: str
    opacity: float

    @property
    def colour(self) -> str:
        """What to give matplotlib."""
        return THEME[self.variable][0]


@dataclass(frozen=True)
class Plot:
    """A figure of the page. Without drawings, `missing` says why there are none."""

    key: str
    title: str
    caption: str
    alt: str
    csv: str
    legend: bool = False
    """Whether the page draws a key of all methods above it."""
    numbers: bool = False
    """Whether the page has the table of errors per shift below it."""
    scale: bool = False
    """Whether the page draws the scale from better to worse beside the caption."""
    swatches: tuple[Swatch, ...] = ()
    """A key of its own, which the page draws above it."""
    wide: str = ""
    narrow: str = ""
    missing: str = ""


def method_styles(methods: Sequence[str]) -> list[Style]:
    """One style a method. A name has the same one in every report, unless two spare ones meet in this one."""
    taken: set[tuple[str, str]] = set()
    styles = []
    for method in methods:
        first = zlib.crc32(method.encode()) % len(SPARE)
        wanted = [KNOWN[method]] if method in KNOWN else [*SPARE[first:], *SPARE[:first]]
        every = [*wanted, *((colour, marker) for marker in reversed(MARKERS) for colour, _ in SPARE)]
        pair = next((pair for pair in every if pair not in taken), wanted[0])
        taken.add(pair)
        styles.append(Style(*pair))
    return styles


def new_figure(width: int, height: float) -> tuple[Figure, Axes]:
    """A figure with one plot in it, in pixels."""
    figure, [axes] = new_grid(width, height, 1, 1)
    return figure, axes


def new_grid(width: int, height: float, down: int, across: int) -> tuple[Figure, list[Axes]]:
    """A figure with plots in rows."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained", facecolor="none")
    FigureCanvasSVG(figure)
    grid = [figure.add_subplot(down, across, place, facecolor="none") for place in range(1, down * across + 1)]
    for axes in grid:
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0)
        axes.tick_params(labelcolor=ink("muted"), labelsize=12 if width == WIDE else 11)
        axes.xaxis.label.set_color(ink("muted"))
        axes.yaxis.label.set_color(ink("muted"))
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set(color=ink("rule"), linewidth=1)
    return figure, grid


def drawn(plot: Plot, draw: Callable[[int], Figure]) -> Plot:
    wide, narrow = (_svg(draw(width), plot.alt, f"{plot.key}-{width}") for width in (WIDE, NARROW))
    return replace(plot, wide=wide, narrow=narrow)


def _svg(figure: Figure, alt: str, salt: str) -> str:
    """The figure as an <svg> element for a page: no metadata, short numbers, the page's colours and font."""
    import matplotlib as mpl

    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", facecolor="none", metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    text = file.getvalue().decode()
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}style") or child.tag.endswith("}metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        if f"#{attributes.get('id')}" not in text:
            attributes.pop("id", None)
        for name in attributes.keys() & {"d", "x", "y", "transform", "points"}:
            attributes[name] = re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"\s+", " ", attributes[name]).strip())
        if "style" in attributes:
            attributes["style"] = _themed(attributes["style"])
        element.attrib.clear()
        element.attrib.update(attributes)
        if element.tag != "text":
            element.text = None
        element.tail = None
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    root.attrib.pop("version", None)
    root.attrib.update({"role": "img", "aria-label": alt})
    return ElementTree.tostring(root, encoding="unicode")


def _themed(style: str) -> str:
    for name, (light, _) in THEME.items():
        style = style.replace(light, f"var(--{name})")
    return re.sub(r"font: (?:(bold|\d+) )?([\d.]+px) [^;]*", _font, style)


def _font(match: re.Match[str]) -> str:
    weight = match[1] or "normal"
    return f"font-size: {match[2]}; font-weight: {weight}"


def ink(name: str) -> str:
    return THEME[name][0]


def csv_uri(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A data: URI, so that the table is in the file and a browser can save it."""
    file = io.StringIO(newline="")
    csv.writer(file).writerows([head, *rows])
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(file.getvalue().encode()).decode()}"


def raw(value: float | None) -> str:
    return "" if value is None else repr(round(value, 6))


def short(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:21]}…"


def words(name: str) -> str:
    return short(name.replace("_", " "))


def minus(text: str) -> str:
    return f"\N{MINUS SIGN}{text[1:]}" if text.startswith("-") else text


def count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
