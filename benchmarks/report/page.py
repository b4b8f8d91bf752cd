"""What every report shares: templates, the way its plots are drawn, and the file that it becomes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.replayed import BASELINE
from benchmarks.report.look import THEME, minus
from benchmarks.table import HARM, Cost, Metric
from edge_adapt.delta import write_atomically
from edge_adapt.errors import ConfigError


def filled(template: str, **values: Any) -> str:
    """The HTML of a template of this folder. Raises: ConfigError if jinja2 is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise _missing() from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["minus"] = minus
    environment.filters["groupby_runs"] = _runs
    return environment.get_template(template).render(theme=THEME, baseline=BASELINE, harm=HARM, **values)


@contextmanager
def drawing() -> Iterator[None]:
    """Within it matplotlib draws alike on every machine. Raises: ConfigError if it is not installed."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise _missing() from error
    settings: Any = {
        "font.family": ["DejaVu Sans"],
        "font.size": 12,
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.image_inline": True,
        "path.simplify": True,
        "axes.unicode_minus": True,
    }
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()  # not the user's own style, which may be made for another background
        mpl.rcParams.update(settings)
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield


def write_page(page: str, path: Path) -> None:
    """Missing folders are made, an older file is replaced in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())


def standing(metric: Metric, method: int) -> str:
    """CSS classes of a cell."""
    marks = {"best": metric.best, "worst": metric.worst, "harm": metric.harm}
    return " ".join(mark for mark, methods in marks.items() if method in methods)


def _runs(costs: Sequence[Cost]) -> list[tuple[str, list[Cost]]]:
    """Costs beside each other that are of one group."""
    return [(group, list(run)) for group, run in groupby(costs, key=lambda cost: cost.group)]


def _missing() -> ConfigError:
    return ConfigError("the report needs jinja2 and matplotlib", remedy="pip install 'edge-adapt[report]'")
