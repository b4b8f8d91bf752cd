"""What the report draws of a routed stream: which entry answered, what arriving costs, what is not scored."""

from __future__ import annotations

import base64
import copy
import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks.report import write_report
from benchmarks.report.look import NARROW, WIDE
from benchmarks.report.routes import pieces
from benchmarks.table import print_table
from edge_adapt.errors import ConfigError

VISITS = [("fog", 0), ("snow", 256), ("fog", 512), ("snow", 768)]


def row(method: str, share: float, entries: list[tuple[int, str]]) -> dict[str, Any]:
    return {
        "method": method,
        "error_mean": 40 * share,
        "errors": {"fog": 30 * share, "snow": 50 * share},
        "answer_ms": {"p50": 1.0, "p99": 2.0, "mean": 1.1},
        "learn_ms": {"p50": 0.1, "p99": 0.2, "mean": 0.1},
        "frames": 1024,
        "timeline": {"frames": [512, 1024], "error": [40.0 * share, 40.0 * share]},
        "visits": [
            {"name": name, "start": start, "frames": 256, "error": [50 * share, 30 * share, 20 * share, 20 * share]}
            for name, start in VISITS
        ],
        "events": [],
        "entries": [{"frame": frame, "entry": entry} for frame, entry in entries],
    }


@pytest.fixture
def results() -> dict[str, Any]:
    """Two domains that come back once, and a router that is late for each by 16 frames at first."""
    return {
        "schema": 1,
        "scenario": "recurring",
        "data": "made",
        "bundle": {"name": "tiny", "id": "ab12"},
        "shifts": [{"name": name, "start": start, "frames": 256} for name, start in VISITS],
        "rows": [
            row("source", 1.0, []),
            row("moments", 0.5, [(16, "1"), (272, "2"), (512, "1"), (768, "2")]),
        ],
    }


class Text(HTMLParser):
    """The text that a reader can see, and the tags."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page(results: dict[str, Any], folder: Path) -> str:
    write_report(results, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def table(source: str, key: str) -> list[list[str]]:
    [link] = [attrs["href"] for _, attrs in Text(source).tags if attrs.get("download") == f"{key}.csv"]
    return list(csv.reader(io.StringIO(base64.b64decode((link or "").partition(",")[2]).decode(), newline="")))


def test_strips_show_entries_and_the_true_domain(results: dict[str, Any], tmp_path: Path) -> None:
    source = page(results, tmp_path)
    head, *rows = table(source, "entries-over-time")
    assert head == ["strip", "start", "end", "name", "share"]
    entries = [(int(start), int(end), name) for strip, start, end, name, _ in rows if strip == "moments"]
    assert entries == [(0, 16, "source"), (16, 272, "1"), (272, 512, "2"), (512, 768, "1"), (768, 1024, "2")]
    truth = [(int(start), int(end), name) for strip, start, end, name, _ in rows if strip == "true domain"]
    assert truth == [(0, 256, "fog"), (256, 512, "snow"), (512, 768, "fog"), (768, 1024, "snow")]
    assert not any(strip == "source" for strip, *_ in rows)
    assert "moments: 2 entries, 96.9\N{NO-BREAK SPACE}% of the frames" in source  # all but 16 + 16 of 1,024
    assert "true domain" in Text(source).text


def test_a_single_entry_is_told_as_one(results: dict[str, Any], tmp_path: Path) -> None:
    results["rows"][1]["entries"] = [{"frame": 0, "entry": "only"}]
    assert "moments: 1 entry, 50.0\N{NO-BREAK SPACE}%" in page(results, tmp_path)


def test_source_is_at_home_on_clean_frames(results: dict[str, Any], tmp_path: Path) -> None:
    for shift in results["shifts"]:
        shift["name"] = "clean" if shift["name"] == "snow" else "fog"
    results["rows"][1]["entries"] = [
        {"frame": frame, "entry": entry} for frame, entry in ((0, "1"), (256, "source"), (512, "1"), (768, "source"))
    ]
    assert "moments: 1 entry, 100.0\N{NO-BREAK SPACE}%" in page(results, tmp_path)


def test_visits_give_the_early_and_the_later_error(results: dict[str, Any], tmp_path: Path) -> None:
    source = page(results, tmp_path)
    head, *rows = table(source, "error-per-visit")
    assert head == ["method", "domain", "visit", "start", "first_128", "later"]
    assert [line[:4] for line in rows[4:]] == [
        ["moments", "fog", "1", "0"],
        ["moments", "fog", "2", "512"],
        ["moments", "snow", "1", "256"],
        ["moments", "snow", "2", "768"],
    ]
    assert {(float(early), float(later)) for *_, early, later in rows[4:]} == {(20.0, 10.0)}


def test_without_entries_and_returns_there_is_neither(results: dict[str, Any], tmp_path: Path) -> None:
    for one in results["rows"]:
        one["entries"], one["visits"] = [], []
    source = page(results, tmp_path)
    assert "entries-over-time" not in source
    assert "error-per-visit" not in source


def test_visits_without_labels_say_so(results: dict[str, Any], tmp_path: Path) -> None:
    for one in results["rows"]:
        for visit in one["visits"]:
            visit["error"] = [None] * 4
    found = re.search(r'id="error-per-visit".*?</section>', page(results, tmp_path), re.S)
    assert found
    assert "no labels" in found[0]


def test_frames_of_many_domains_are_drawn_as_shares(results: dict[str, Any], tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 3, 1024).tolist()
    results["shifts"] = [
        {"name": "mixed", "start": 0, "frames": 1024, "domains": ["fog", "snow", "rain"], "domain": numbers}
    ]
    for one in results["rows"]:
        one["visits"], one["errors"] = [], {"fog": 20.0, "snow": 30.0, "rain": 40.0}
    source = page(results, tmp_path)
    rows = [line for line in table(source, "entries-over-time") if line[0] == "true domain"]
    assert {name for _, _, _, name, _ in rows} == {"fog", "snow", "rain"}
    assert sum(float(share) * (int(end) - int(start)) for _, start, end, _, share in rows) == pytest.approx(1024)
    assert "share of each" in source
    assert table(source, "error-per-shift")[0] == ["method", "fog", "snow", "rain", "mean"]  # and no column "mixed"
    body = source.partition("<body>")[2]
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r"base64,[^\"]*|#[mp][0-9a-f]{10}", "", body))


def test_a_page_of_many_frames_and_entries_stays_small(results: dict[str, Any], tmp_path: Path) -> None:
    rng, names = np.random.default_rng(0), [f"domain_{number}" for number in range(16)]
    count = 60_000
    results["shifts"] = [
        {"name": "mixed", "start": 0, "frames": count, "domains": names, "domain": rng.integers(0, 16, count).tolist()}
    ]
    for one in results["rows"][1:]:
        one["entries"] = [{"frame": 16 * i, "entry": str(rng.integers(8))} for i in range(count // 16)]
    source = page(results, tmp_path)
    assert len(source) < 600_000


def test_pieces_are_runs_or_shares() -> None:
    assert pieces(np.repeat([2, 0, 2], 50), WIDE) == [(0, 50, {2: 1.0}), (50, 100, {0: 1.0}), (100, 150, {2: 1.0})]
    noisy = np.tile([0, 1], 5000)
    assert len(pieces(noisy, NARROW)) < len(pieces(noisy, WIDE)) < 100
    assert all(piece.shares == {0: 0.5, 1: 0.5} for piece in pieces(noisy, NARROW))


def test_the_report_says_that_foreign_frames_are_not_scored(results: dict[str, Any], tmp_path: Path) -> None:
    plain = copy.deepcopy(results)
    for shift in results["shifts"]:
        shift["genuine"] = 200
    source = Text(page(results, tmp_path)).text
    assert "errors of genuine frames only: 224 frames foreign" in source
    assert "200 of them genuine" in source
    console = Console(width=120, record=True, file=io.StringIO())
    print_table(results, console)
    assert "of genuine frames; 224 are foreign" in console.export_text().replace("\n", " ")
    assert "genuine" not in Text(page(plain, tmp_path)).text


@pytest.mark.parametrize("numbers", [[0, 1], [0, 0, 2, 0], [0, 0, -1, 0]])
def test_domains_that_fit_no_frame_are_refused(results: dict[str, Any], tmp_path: Path, numbers: list[int]) -> None:
    results["shifts"] = [{"name": "mixed", "start": 0, "frames": 4, "domains": ["a", "b"], "domain": numbers}]
    with pytest.raises(ConfigError, match="no index of its domains"):
        page(results, tmp_path)


def test_hostile_names_of_entries_and_domains_stay_text(results: dict[str, Any], tmp_path: Path) -> None:
    results["rows"][1]["entries"][0]["entry"] = "</svg><script>alert(1)</script>"
    for shift in results["shifts"]:
        shift["name"] = "<img src=x>"
    found = Text(page(results, tmp_path))
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "img"})
    assert "<img src=x>" in found.text
