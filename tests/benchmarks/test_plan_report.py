"""The report of a plan: seeds together, harm on every stream, data beside every plot, and nothing fetched."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from html_page import Page

from benchmarks.plans.results import read_plan_results
from benchmarks.report import write_plan_report
from benchmarks.report.plan_page import verdict
from edge_adapt.errors import ConfigError

CHROMIUM = Path("/usr/bin/chromium")
PAPER = 688
"""CSS pixels across A4 within the page's margins."""
SHIFTS = {"fog": 40.0, "snow": 60.0}
SHARES = {"source": 1.0, "moments": 0.5, "tent": 0.9}
FRAMES = 256


def cell(method: str, scenario: str, size: int, seed: int, **changes: Any) -> dict[str, Any]:
    """Errors are a share of source's, plus a point a seed for what adapts; tent does harm on recurring, 64."""
    extra = seed if method != "source" else 0
    share = 1.2 if (method, scenario, size) == ("tent", "recurring", 64) else SHARES[method]
    errors = {name: error * share + extra for name, error in SHIFTS.items()}
    mean = sum(errors.values()) / 2
    windows = [error for error in errors.values() for _ in range(4)]
    routed = changes.get("router", "none") != "none"
    row = {
        "method": method,
        "error_mean": mean,
        "errors": errors,
        "answer_ms": {"p50": 1.0, "p99": 2.0, "mean": 1.1},
        "learn_ms": {"p50": 0.2, "p99": 0.9, "mean": 0.3} if extra or method != "source" else {"p50": 0, "p99": 0},
        "extra_mb": 3.0,
        "passes": 2 * FRAMES * 1.25,
        "backward_passes": 2 * FRAMES // 8,
        "state_bytes": 123_456,
        "energy_j": None,
        "time": {"source": 1.0, "moments": 1.3, "tent": 2.6}[method],
        "error_estimate": {"value": mean + 2, "low": mean - 3, "high": mean + 8},
        "frames": 2 * FRAMES,
        "timeline": {"frames": [64 * (i + 1) for i in range(8)], "error": windows},
        "events": [{"frame": FRAMES, "name": "domain change"}] if method == "moments" else [],
        "entries": [{"frame": 16, "entry": "1"}, {"frame": 272, "entry": "2"}] if routed else [],
    }
    return {
        "bundle": "rn20",
        "bundle_id": "ab12cd34",
        "data": "cifar",
        "scenario": scenario,
        "method": method,
        "router": "none",
        "batch_size": size,
        "seed": seed,
        "engine": "onnxruntime",
        "severity": 5,
        "limit": FRAMES,
        "status": "ok",
        "why": None,
        "shifts": [{"name": name, "start": FRAMES * i, "frames": FRAMES} for i, name in enumerate(SHIFTS)],
        "row": row,
        **changes,
    }


def no_result(method: str, status: str, why: str) -> dict[str, Any]:
    return cell("source", "continual", 16, 0) | {"method": method, "status": status, "why": why, "row": None}


def sample() -> dict[str, Any]:
    cells = [
        cell(method, scenario, size, seed)
        for scenario in ("continual", "recurring")
        for size in (16, 64)
        for method in SHARES
        for seed in (0, 1, 2)
    ]
    cells += [cell("moments", "recurring", 64, seed, router="hdc") for seed in (0, 1, 2)]
    cells += [no_result("foa", "skipped", "takes no prompts"), no_result("cotta", "timeout", "took more\n  than 60 s")]
    return {
        "schema": 2,
        "plan": {"schema": 1, "grid": [{"methods": list(SHARES)}]},
        "environment": {"edge_adapt": "0.1.0", "processor": "Cortex-A76", "commit": None},
        "cells": cells,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    return sample()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the sample; drawing takes seconds, so the tests that only read it share it."""
    path = tmp_path_factory.mktemp("plan") / "deeper" / "report.html"
    write_plan_report(sample(), path)
    return path


@pytest.fixture(scope="module")
def report(written: Path) -> str:
    return written.read_text(encoding="utf-8")


def summary_row(source: str, method: str) -> list[str]:
    """Cells of the first row of a method in the summary."""
    found = re.search(rf"</svg>{re.escape(method)}</th>(.*?)</tr>", source, re.DOTALL)
    assert found
    return [re.sub(r"<[^>]+>|\s+", " ", part).strip() for part in re.findall(r"<td.*?</td>", found[1], re.DOTALL)]


# --- the page --------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(report: str) -> None:
    assert not re.search(r"https?://|url\((?!#)|@import", report)
    page = Page(report)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "img"})
    assert all((a.get("href") or "#").startswith(("data:", "#")) for _, a in page.tags)


def test_every_id_is_unique_and_every_link_leads_somewhere(report: str) -> None:
    ids = [attrs["id"] for _, attrs in Page(report).tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(|href=\")#([\w-]+)", report)) <= set(ids)


def test_every_plot_has_its_data_in_the_page_and_beside_it(written: Path, report: str) -> None:
    page = Page(report)
    plots = {attrs["id"] for tag, attrs in page.tags if tag == "section"} - {"summary", "missing", "measured"}
    beside = {file.stem for file in (written.parent / "csv").iterdir()}
    assert {file.name for file in written.parent.iterdir()} == {"report.html", "csv"}
    assert beside == {*plots, "cells"}
    assert len(plots) == 9  # harm, cost of two batch sizes, estimate, four streams, one of them routed
    for key in beside:
        with (written.parent / "csv" / f"{key}.csv").open(newline="") as file:
            assert list(csv.reader(file)) == page.table(key)


def test_seeds_stand_together_as_mean_and_spread(report: str) -> None:
    # moments: 50 % of 50, plus 0, 1 and 2 points for the seeds
    assert summary_row(report, "moments")[:3] == ["26.0", "± 1.00", "\N{MINUS SIGN}24.0"]
    assert summary_row(report, "source")[:2] == ["50.0", "± 0.00"]


def test_costs_have_a_column_where_they_are_known(report: str) -> None:
    heads = re.findall(r"<th[^>]*>(.*?)</th>", report.partition("</thead>")[0])
    assert heads[-12:] == [
        *("Time<br>×", "Answer, ms/frame", "Learn, ms/frame", "Passes/frame", "Extra<br>MB", "State<br>kB"),  # noqa: RUF001
        *("p50", "p99", "p50", "p99", "trunk", "back"),
    ]
    assert summary_row(report, "moments")[-5:] == ["0.90", "1.25", "0.12", "3.00", "123"]


def test_the_matrix_shows_what_every_stream_costs(report: str) -> None:
    head, *rows = Page(report).table("do-no-harm")
    assert head[1:3] == ["continual, batches of 16", "continual, batches of 64"]
    harms = {row[0]: [float(part) if part else None for part in row[1:]] for row in rows}
    assert harms["moments"] == pytest.approx([-24, -24, -24, -24, -24])
    assert harms["tent"] == pytest.approx([-4, -4, -4, 11, -0.25])
    assert harms["moments, hdc"] == [None, None, None, pytest.approx(-24), None]  # no mean of other streams
    assert "source" not in harms
    drawing = report.partition('id="do-no-harm"')[2].partition("</section>")[0]
    framed = re.findall(r"stroke: var\(--worse\)", drawing)
    assert len(framed) == 2  # tent on recurring, 64: in the wide drawing and in the narrow one


def test_the_front_is_of_times_as_multiples(report: str) -> None:
    page = Page(report)
    head, *rows = page.table("cost-against-error-16")
    assert head == ["method", "time_ratio", "mean_error", "pareto"]
    assert [(row[0], row[1], row[3]) for row in rows] == [
        ("source", "1.0", "yes"), ("moments", "1.3", "yes"), ("tent", "2.6", "no"),
    ]  # fmt: skip
    assert [row[0] for row in page.table("cost-against-error-64")[1:]] == ["source", "moments", "tent"]
    assert "Left out, since not run in every scenario: moments, hdc." in report


def test_estimates_stand_against_the_truth(report: str) -> None:
    rows = Page(report).table("reliability")[1:]
    assert len(rows) == 39
    assert all(float(row[4]) == pytest.approx(float(row[7]) + 2) for row in rows)
    assert "39 of 39 intervals hold the truth; the mean distance is 2.0 points" in report


def test_a_route_is_drawn_where_there_is_one(report: str) -> None:
    rows = Page(report).table("entries-over-time-4-recurring-64")[1:]
    assert [row[3] for row in rows if row[0] == "moments, hdc"] == ["source", "1", "2"]


def test_what_has_no_result_says_why(report: str) -> None:
    text = " ".join(Page(report).text)
    assert "skipped: takes no prompts" in text
    assert "timeout: took more than 60 s" in text
    assert "39 of 41 cells" in text


def test_where_the_figures_come_from_is_told(report: str) -> None:
    text = " ".join(Page(report).text)
    for part in ("Cortex-A76", "rn20 ab12cd34", "0, 1, 2", "methods: [source, moments, tent]", "unknown"):
        assert part in text


def test_verdict_names_the_best_the_harm_and_the_gaps(results: dict[str, Any]) -> None:
    assert verdict(read_plan_results(results)) == (
        "Of what ran everywhere the best is moments: its mean error is 26.0 % against 50.0 % for source. "
        "1 of 9 pairs of method and stream are more than 0.5 points worse than source; "
        "the worst is tent on recurring, batches of 64: 11.0 points. "
        "2 of 41 cells have no result."
    )


def test_what_did_not_run_everywhere_is_not_called_best(results: dict[str, Any], tmp_path: Path) -> None:
    results["cells"] = [
        one for one in results["cells"] if not (one["method"] == "moments" and one["scenario"] == "recurring")
    ]
    write_plan_report(results, tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text()
    row = re.search(r'</svg>moments<small>1 of 2 scenarios</small></th>\s*<td class="(.*?)">', source)
    assert row
    assert "best" not in row[1]
    assert verdict(read_plan_results(results)).startswith("Of what ran everywhere the best is tent")


def test_several_bundles_have_a_matrix_each(results: dict[str, Any], tmp_path: Path) -> None:
    results["cells"] = [one for one in results["cells"] if one["batch_size"] == 64 and one["seed"] == 0]
    results["cells"] += [one | {"bundle": "rn56"} for one in results["cells"]]
    write_plan_report(results, tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text()
    assert {"do-no-harm-1-rn20-cifar", "do-no-harm-2-rn56-cifar"} <= set(re.findall(r'id="([\w-]+)"', source))
    assert "Lowest mean error, of 2 comparisons: moments on 2." in source
    assert "±" not in source.partition("</table>")[0]


def test_without_labels_the_page_says_so(results: dict[str, Any], tmp_path: Path) -> None:
    for one in results["cells"]:
        if one["row"]:
            one["row"] |= {"error_mean": None, "errors": {}, "timeline": {"frames": [], "error": []}}
    write_plan_report(results, tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text()
    assert "Nothing has labels" in source
    assert "None" not in source


def test_nothing_ran(results: dict[str, Any], tmp_path: Path) -> None:
    results["cells"] = [one for one in results["cells"] if one["status"] != "ok"]
    write_plan_report(results, tmp_path / "report.html")
    assert "Nothing was measured. 2 of 2 cells have no result." in (tmp_path / "report.html").read_text()


def test_hostile_names_stay_text_and_in_the_folder(results: dict[str, Any], tmp_path: Path) -> None:
    evil = '../../<script>alert("1")</script>'
    results["cells"] = [one for one in results["cells"] if one["batch_size"] == 64 and one["row"]]
    for one in results["cells"]:
        one |= {"bundle": evil, "data": "<img src=x>", "scenario": "/a/b" if one["seed"] else "../a b"}
    results["environment"]["<b>"] = evil
    write_plan_report(results, tmp_path / "in" / "report.html")
    page = Page((tmp_path / "in" / "report.html").read_text())
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "b>"})
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert [file.name for file in tmp_path.iterdir()] == ["in"]
    assert all(re.fullmatch(r"[a-z0-9-]+\.csv", file.name) for file in (tmp_path / "in" / "csv").iterdir())


@pytest.mark.parametrize(
    ("change", "named"),
    [({"schema": 1}, "'schema' is '1'"), ({"cells": []}, "'cells'"), ({"cells": [{"bundle": "x"}]}, r"cells\.0\.data")],
)
def test_wrong_results_are_named(results: dict[str, Any], tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        write_plan_report(results | change, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


# --- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM} (Debian: apt install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "shown"), [(1200, "wide"), (390, "narrow")])
def test_all_plots_are_seen_and_nothing_is_fetched(browser: Any, written: Path, width: int, shown: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(written.as_uri())
    drawings = page.locator(f".plot.{shown} svg[role=img]")
    sizes = [drawings.nth(place).bounding_box() for place in range(drawings.count())]
    table = page.evaluate("(box => box.scrollWidth - box.clientWidth)(document.querySelector('#summary .scroll'))")
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    page.close()
    assert len(sizes) == 9
    assert all(size is not None and size["width"] > 250 and size["height"] > 60 for size in sizes)
    assert complaints == []
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert [url for url in asked if url.startswith("file:")] == [written.as_uri()]
    assert overflow == 0
    assert table == 0 or shown == "narrow"


def test_it_prints_in_light_colours_without_links(browser: Any, written: Path) -> None:
    page = browser.new_page(viewport={"width": PAPER, "height": 1017}, color_scheme="dark")
    page.goto(written.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    ink = page.evaluate("getComputedStyle(document.body).color")
    hidden = page.locator("nav").is_hidden() and page.locator(".head a").first.is_hidden()
    drawings = page.locator(".plot.wide svg[role=img]")
    seen = [drawings.nth(place).is_visible() for place in range(drawings.count())]
    table = page.locator("#summary table").bounding_box()
    pdf = page.pdf(format="A4")
    page.close()
    assert ink == "rgb(26, 30, 36)"
    assert hidden
    assert seen == [True] * 9
    assert table["x"] + table["width"] <= PAPER
    assert pdf.startswith(b"%PDF")
