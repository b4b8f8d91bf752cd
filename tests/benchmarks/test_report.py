"""The report and the tables: all that was measured is in them, nothing is fetched, no name can break them."""

from __future__ import annotations

import copy
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from html_page import Page
from rich.console import Console

from benchmarks.replayed import read_results
from benchmarks.report import verdict, write_report
from benchmarks.report.look import Style, method_styles
from benchmarks.table import as_markdown, print_table
from edge_adapt.errors import ConfigError

SHIFTS = {"gaussian_noise": 72.0, "defocus_blur": 46.5, "snow": 25.25, "brightness": 9.0}
COLLAPSE = {"tent": {"brightness": 21.4}}
FRAMES = 256


def row(method: str, share: float, answer: float, learn: float) -> dict[str, Any]:
    """A method whose errors are a share of source's."""
    errors = {name: COLLAPSE.get(method, {}).get(name, error * share) for name, error in SHIFTS.items()}
    windows = [(error, 64) for error in errors.values() for _ in range(FRAMES // 64)]
    return {
        "method": method,
        "error_mean": sum(errors.values()) / len(errors),
        "errors": errors,
        "answer_ms": {"p50": answer, "p99": 2 * answer, "mean": 1.1 * answer},
        "learn_ms": {"p50": learn, "p99": 6 * learn, "mean": 1.5 * learn},
        "extra_mb": 10 * learn,
        "frames": FRAMES * len(SHIFTS),
        "seconds": 9.1,
        "timeline": {"frames": [64 * (i + 1) for i in range(len(windows))], "error": [e for e, _ in windows]},
        "events": [{"frame": FRAMES, "name": "domain change"}] if method == "moments" else [],
    }


def sample() -> dict[str, Any]:
    """Four methods on four shifts; tent does harm on brightness."""
    return {
        "schema": 1,
        "scenario": "continual",
        "data": "digits",
        "bundle": {"name": "digits-cnn", "id": "ab12cd34"},
        "settings": {"batch_size": 50, "severity": 5, "seed": 0, "limit": None, "mode": "device"},
        "environment": {"edge_adapt": "0.1.0", "processor": "Cortex-A76", "cores": 4, "commit": None},
        "shifts": [{"name": name, "start": FRAMES * i, "frames": FRAMES} for i, name in enumerate(SHIFTS)],
        "rows": [
            row("source", 1.0, 0.9, 0.0),
            row("moments", 0.5, 0.95, 0.1),
            row("tent", 0.8, 2.8, 2.0),
            row("cotta", 0.7, 3.0, 17.0),
        ],
    }


@pytest.fixture
def results() -> dict[str, Any]:
    return sample()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The HTML of the sample; drawing takes a second, so the tests that only read it share it."""
    return written(sample(), tmp_path_factory.mktemp("report"))


@pytest.fixture
def hostile(results: dict[str, Any]) -> dict[str, Any]:
    """Names that mean something to HTML, SVG, CSS, TeX, a terminal, Markdown or CSV."""
    shift = "</svg><script>alert(1)</script>"
    results["shifts"][0]["name"] = shift
    for one in results["rows"]:
        one["errors"] = {shift if name == "gaussian_noise" else name: e for name, e in one["errors"].items()}
    results["rows"][1]["method"] = '<script>alert("2")</script>'
    results["rows"][2]["method"] = "[red]$\\frac{,|\x1b[31m\n"
    results["bundle"]["name"] = "<script>alert(3)</script>"
    results["environment"]["processor"] = "<img src=x onerror=alert(4)>"
    results["settings"]["<b>"] = "<script>alert(5)</script>"
    return results


def written(results: dict[str, Any], folder: Path) -> str:
    path = folder / "deeper" / "report.html"
    write_report(results, path)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def printed(results: dict[str, Any], width: int = 100) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    print_table(results, console)
    return console.export_text().splitlines()


# --- the page --------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(report: str) -> None:
    assert not re.search(r"https?://|url\((?!#)|@import", report)
    page = Page(report)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "img"})
    links = [a.get("href") or a.get("src") or "" for _, a in page.tags if a.get("href") or a.get("src")]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)


def test_the_page_shows_all_that_was_measured(report: str) -> None:
    page = Page(report)
    for name in [*SHIFTS, "source", "moments", "tent", "cotta", "ab12cd34", "Cortex-A76", "unknown"]:
        assert any(name in text for text in page.text), name
    plots = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(plots) == 8  # four, each for a wide and for a narrow screen
    assert all(attrs["aria-label"] for attrs in plots)


def test_ids_are_unique_and_every_reference_has_its_target(report: str) -> None:
    ids = [attrs["id"] for _, attrs in Page(report).tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(|href=\")#([\w-]+)", report)) <= set(ids)


def test_the_same_results_make_the_same_page(results: dict[str, Any], report: str, tmp_path: Path) -> None:
    assert written(results, tmp_path) == report


def test_plots_take_their_colours_from_the_page(report: str) -> None:
    body = report.partition("<body>")[2]
    assert "var(--m-moments)" in body
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r"base64,[^\"]*|#[mp][0-9a-f]{10}", "", body))


def test_hostile_names_stay_text(hostile: dict[str, Any], tmp_path: Path) -> None:
    page = Page(written(hostile, tmp_path))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "b>"})
    assert "</svg><script>alert(1)</script>" in page.text
    assert '<script>alert("2")</script>' in page.text
    assert page.table("error-per-shift")[0][1] == "</svg><script>alert(1)</script>"
    assert "<img src=x onerror=alert(4)>" in page.text


def test_csv_gives_the_numbers_back(results: dict[str, Any], report: str) -> None:
    page = Page(report)
    head, *rows = page.table("error-per-shift")
    assert head == ["method", *SHIFTS, "mean"]
    for one, cells in zip(results["rows"], rows, strict=True):
        assert cells[0] == one["method"]
        assert [float(cell) for cell in cells[1:]] == pytest.approx(
            [*one["errors"].values(), one["error_mean"]]
        )

    head, *rows = page.table("error-over-time")
    assert head == ["method", "frames", "error"]
    tent = [(int(frames), float(error)) for method, frames, error in rows if method == "tent"]
    timeline = results["rows"][2]["timeline"]
    assert [frames for frames, _ in tent] == timeline["frames"]
    assert [error for _, error in tent] == pytest.approx(timeline["error"])

    head, *rows = page.table("cost-against-error")
    assert [(cells[0], cells[3]) for cells in rows] == [
        ("source", "yes"), ("moments", "yes"), ("tent", "no"), ("cotta", "no"),
    ]  # fmt: skip
    assert float(rows[2][1]) == pytest.approx(1.1 * 2.8 + 1.5 * 2.0)

    head, *rows = page.table("do-no-harm")
    assert [cells[0] for cells in rows] == ["moments", "tent", "cotta"]
    assert float(rows[1][head.index("brightness")]) == pytest.approx(21.4 - 9.0)


def test_long_timelines_are_averaged(results: dict[str, Any], tmp_path: Path) -> None:
    for one in results["rows"]:
        one["timeline"] = {"frames": [10 * (i + 1) for i in range(40_000)], "error": [20.0, 40.0] * 20_000}
    source = written(results, tmp_path)
    assert len(source) < 600_000
    lines = Page(source).table("error-over-time")[1:]
    assert len(lines) <= 4 * 400
    assert {float(error) for _, _, error in lines} == {30.0}
    assert lines[-1][1] == "400000"


def test_fifteen_shifts_and_four_methods_stay_small(results: dict[str, Any], tmp_path: Path) -> None:
    names = [f"a_rather_long_shift_{i}" for i in range(15)]
    results["shifts"] = [{"name": name, "start": 5000 * i, "frames": 5000} for i, name in enumerate(names)]
    for k, one in enumerate(results["rows"]):
        one["errors"] = {name: 10.0 + i + k for i, name in enumerate(names)}
        jagged = [float(10 + (i * 37 + k * 11) % 60) for i in range(1200)]
        one["timeline"] = {"frames": [64 * (i + 1) for i in range(1200)], "error": jagged}
    assert len(written(results, tmp_path)) < 600_000


def test_without_labels_the_page_says_so(results: dict[str, Any], tmp_path: Path) -> None:
    for one in results["rows"]:
        one["error_mean"], one["extra_mb"] = None, None
        one["errors"] = dict.fromkeys(one["errors"])
        one["timeline"] = {"frames": [], "error": []}
    source = written(results, tmp_path)
    assert source.count('class="missing"') == 4
    assert "The stream has no labels" in source
    assert "None" not in source
    assert not any("None" in line or "nan" in line for line in printed(results))
    assert "None" not in as_markdown(results)


def test_one_method_on_one_shift(results: dict[str, Any], tmp_path: Path) -> None:
    results["rows"] = [row("moments", 0.5, 1.0, 0.1)]
    results["rows"][0]["errors"] = {"snow": 12.0}
    results["rows"][0]["extra_mb"] = float("nan")
    results["shifts"] = [{"name": "snow", "start": 0, "frames": 1024}]
    source = written(results, tmp_path)
    assert source.count('class="missing"') == 1  # no source, so no harm
    assert "moments" in "".join(printed(results))


def test_zero_everywhere(results: dict[str, Any], tmp_path: Path) -> None:
    for one in results["rows"]:
        one["error_mean"], one["errors"] = 0.0, dict.fromkeys(SHIFTS, 0.0)
        one["answer_ms"] = one["learn_ms"] = {"p50": 0.0, "p99": 0.0, "mean": 0.0}
        one["timeline"]["error"] = [0.0] * len(one["timeline"]["error"])
    assert "No method beats source" in written(results, tmp_path)


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_missing_package_says_what_to_install(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match="the report needs jinja2 and matplotlib") as error:
        write_report(results, tmp_path / "report.html")
    assert error.value.remedy == "pip install 'edge-adapt[report]'"
    assert not list(tmp_path.iterdir())


# --- words and colours -----------------------------------------------------------------------------


def test_verdict_names_the_best_and_the_worst_harm(results: dict[str, Any]) -> None:
    assert verdict(read_results(results)) == (
        "Best is moments: its mean error is 19.1 % against 38.2 % for source, 19.1 points less over 4 shifts"
        "; it is on no shift more than 0.5 points worse than source, "
        "while the worst harm of all is tent's, 12.4 points on brightness."
    )


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (["source"], "Only source was run: its mean error is 38.2 % over 4 shifts."),
        (["moments"], "source was not run, so whether adapting helped is unknown."),
        (["source", "moments"], "With moments the mean error is 19.1 % against 38.2 % for source"),
        (["source", "moments", "cotta"], "no method is on any shift more than 0.5 points worse than source."),
        (["source", "tent"], "its worst harm is 12.4 points above source, on brightness."),
    ],
)
def test_verdict_of_fewer_methods(results: dict[str, Any], keep: list[str], expected: str) -> None:
    results["rows"] = [one for one in results["rows"] if one["method"] in keep]
    assert expected in verdict(read_results(results))


def test_verdict_when_adapting_is_worse(results: dict[str, Any]) -> None:
    for one in results["rows"][1:]:
        one["error_mean"] = 50.0
    assert verdict(read_results(results)).startswith(
        "No method beats source, whose mean error is 38.2 % over 4 shifts; the nearest is moments at 50.0 %"
    )


def test_a_method_keeps_its_style() -> None:
    alone, together = method_styles(["tent"]), method_styles(["source", "mine", "moments", "tent", "cotta"])
    assert alone[0] == together[3] == Style("m-tent", "^")
    many = method_styles([f"method {i}" for i in range(12)])
    assert len(set(many)) == 12


# --- the tables ------------------------------------------------------------------------------------


def test_table_prints_every_method_and_shift(results: dict[str, Any]) -> None:
    lines = printed(results)
    text = "\n".join(lines)
    for name in ["source", "moments", "tent", "cotta", "19.1", "-19.1", "21.4", "2.80"]:
        assert name in text, name
    assert max(map(len, lines)) <= 100


def test_few_shifts_stand_beside_many_below(results: dict[str, Any]) -> None:
    few = copy.deepcopy(results)
    for one in few["rows"]:
        one["errors"] = {"snow": one["errors"]["snow"]}
    few["shifts"] = few["shifts"][2:3]
    assert any(line.split()[:3] == ["moments", "19.1", "-19.1"] for line in printed(few))

    for one in results["rows"]:
        one["errors"] = {f"shift_number_{i}": 10.0 + i for i in range(15)}
    results["shifts"] = []
    lines = printed(results)
    assert any(line.split() == ["shift_number_7", "17.0", "17.0", "17.0", "17.0"] for line in lines)


@pytest.mark.parametrize("width", [30, 60, 100, 250])
def test_too_many_methods_make_several_tables(results: dict[str, Any], width: int) -> None:
    results["rows"] = [row(f"method_{i:02}", 0.9, 1.0, 0.1) for i in range(20)]
    lines = printed(results, width)
    assert max(map(len, lines)) <= min(width, 100)
    assert "…" not in "".join(lines)
    assert all(f"method_{i:02}" in "\n".join(lines) for i in range(20))


def test_best_is_bold_green_and_harm_is_red(results: dict[str, Any]) -> None:
    console = Console(width=100, force_terminal=True, color_system="standard", file=io.StringIO())
    print_table(results, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"\x1b\[1;32m *19\.1\x1b", text)  # the best mean
    assert re.search(r"\x1b\[31m *21\.4\x1b", text)  # tent on brightness, 12.4 above source
    assert not re.search(r"\x1b\[31m *37\.2\x1b", text)  # tent on defocus_blur, below source


def test_hostile_names_do_not_reach_the_terminal(hostile: dict[str, Any]) -> None:
    text = "\n".join(printed(hostile))
    assert "[red]" in text
    assert "\x1b" not in text


def test_markdown_table_parses(results: dict[str, Any]) -> None:
    lines = [line for line in as_markdown(results).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(line) for line in cells} == {5}
    assert cells[0][1:] == ["source", "moments", "tent", "cotta"]
    assert all(re.fullmatch(r"-+:?", cell) for cell in cells[1])
    body = {line[0]: line[1:] for line in cells[2:]}
    assert body["mean error %"] == ["38.2", "**19.1**", "34.1", "26.7"]
    assert body["brightness"] == ["9.0", "**4.5**", "21.4 ▲", "6.3"]
    assert body["extra MB"] == ["**0**", "1.00", "20.0", "170"]


def test_markdown_escapes(hostile: dict[str, Any]) -> None:
    text = as_markdown(hostile)
    assert "<" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", line)) for line in rows} == {7}


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("schema", 2, "'schema' is '2'"), ("rows", [], "'rows'"), ("bundle", "x", "'bundle' is 'x'")],
)
def test_wrong_results_are_named(results: dict[str, Any], key: str, value: object, named: str) -> None:
    results[key] = value
    with pytest.raises(ConfigError, match=named):
        print_table(results)


def test_missing_keys_are_named(results: dict[str, Any]) -> None:
    del results["rows"][2]["errors"]
    with pytest.raises(ConfigError, match=r"rows\.2\.errors"):
        as_markdown(results)
