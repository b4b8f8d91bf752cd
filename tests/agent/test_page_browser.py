"""The page in a real browser: it follows the agent, asks before it acts, shows text as text, and fits a phone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lively import LABELS, START, Asked, answers, lively_board

from device_agents.board import Board, Point
from device_agents.dashboard.server import Page
from device_agents.settings import PageSettings
from edge_adapt.errors import StateError

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = Path("/usr/bin/chromium")
SOON = 8000
"""Milliseconds in which something must show."""
EVIL = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM} (Debian: apt install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


class Seen:
    """An agent's page that is open in a browser, with all that the browser complained of."""

    def __init__(self, browser: Any, board: Board, **context: Any) -> None:
        self.board, self.control = board, Asked()
        self.server = Page(PageSettings(port=0), board, self.control)
        self.server.start()
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(self.server.address)

    def text(self, where: str, wanted: str | re.Pattern[str]) -> None:
        """Wait until an element says that."""
        playwright.expect(self.page.locator(where)).to_have_text(wanted, timeout=SOON)

    def has(self, where: str, wanted: str) -> None:
        playwright.expect(self.page.locator(where)).to_contain_text(wanted, timeout=SOON)

    def close(self) -> None:
        self.context.close()
        self.server.stop()


@pytest.fixture
def seen(browser: Any) -> Iterator[Seen]:
    opened = Seen(browser, lively_board())
    yield opened
    opened.close()


def test_everything_on_the_board_is_shown_and_nothing_is_complained_of(seen: Seen) -> None:
    for where, wanted in (
        ("#device", "line-camera-07"),
        ("#state", "Ready"),
        ("#slot", "Adapter"),
        ("#version", "version 41"),
        ("#estimate", "91.4 %"),
        ("#interval", "between 88.2 and 94.1 %"),
        ("#spent", "163 ms"),
        ("#allowed", "of 250 ms"),
        ("#learn", "17,904"),
        ("#guards", "ood gate"),
        ("#host", "7.4 W"),
        ("#link", "online"),
        ("#rate", "14.9 frames a second"),
        ("#rate", "12 dropped"),
        ("#p99", "p99"),
        ("#events", "Adapter A was rolled back"),
        ("#label", LABELS[0]),
    ):
        seen.has(where, wanted)
    assert seen.page.locator("#events li").count() == 3
    assert seen.page.locator("#events li").first.inner_text().endswith("slot A, guard collapse")
    seen.page.wait_for_function("document.querySelector('#frame').naturalWidth === 80", timeout=SOON)
    assert seen.complaints == []


def painted(seen: Seen, canvas: str) -> int:
    """Pixels of a canvas that are not empty."""
    return int(
        seen.page.evaluate(
            """id => { const c = document.getElementById(id);
            const pixels = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
            return pixels.filter((value, index) => index % 4 === 3 && value).length; }""",
            canvas,
        )
    )


def test_curves_and_histogram_are_drawn(browser: Any, seen: Seen) -> None:
    seen.has("#p99", "p99")
    empty = Seen(browser, Board())
    try:
        empty.has("#noframe", "No frame yet")
        for canvas in ("confidence", "ood", "latency"):
            assert painted(seen, canvas) > painted(empty, canvas) + 500, canvas
    finally:
        empty.close()


def test_an_agent_that_knows_nothing_yet_says_so(browser: Any) -> None:
    seen = Seen(browser, Board())
    try:
        seen.text("#estimate", "Not known yet")
        seen.text("#spent", "Not known yet")
        seen.has("#state", "Starting")
        seen.has("#noevents", "Nothing has happened yet")
        seen.has("#link", "not configured")
        assert "NaN" not in seen.page.inner_text("body")
        assert "undefined" not in seen.page.inner_text("body")
        assert seen.complaints == []
    finally:
        seen.close()


def test_it_follows_the_agent(seen: Seen) -> None:
    seen.has("#slot", "Adapter")
    seen.board.update(slot="source", version=43, state="degraded", why=("thermal",), on_probation=True, estimate=None)
    seen.board.tell("reset", "Back to source", START)
    seen.board.answered(Point(START + 61_000, "tea cosy", 0.42, 3.0, 20.0, 43), np.zeros((8, 8), np.uint8))
    seen.text("#slot", "Source")
    seen.text("#version", "version 43")
    seen.has("#state", "thermal")
    seen.has("#trust", "on probation")
    seen.text("#estimate", "Not known yet")
    seen.text("#label", "tea cosy")
    seen.text("#sure", "42.0 %")
    seen.text("#ood-now", "3.00")
    seen.has("#events li:first-child", "Back to source")
    assert seen.complaints == []


@pytest.mark.parametrize("verb", ["snapshot", "rollback", "reset", "freeze"])
def test_a_button_asks_first_and_tells_what_came_of_it(seen: Seen, verb: str) -> None:
    page = seen.page
    page.click(f"[data-verb={verb}]")
    assert page.locator("#ask").is_visible()
    assert page.evaluate("document.activeElement.id") == "ask-no"
    page.click("#ask-no")
    assert not page.locator("#ask").is_visible()
    page.click(f"[data-verb={verb}]")
    page.keyboard.press("Escape")
    assert seen.control.asked == []
    page.click(f"[data-verb={verb}]")
    page.click("#ask-yes")
    seen.has("#result", "done. version 42")
    assert seen.control.asked == [(verb, {"on": True} if verb == "freeze" else {}, "page")]
    assert seen.complaints == []


def test_freeze_becomes_its_opposite(seen: Seen) -> None:
    seen.board.update(frozen=True)
    seen.text("[data-verb=freeze]", "Learn again")
    seen.page.click("[data-verb=freeze]")
    seen.page.click("#ask-yes")
    seen.has("#result", "done")
    assert seen.control.asked == [("freeze", {"on": False}, "page")]


def test_a_refusal_is_shown_with_its_remedy(seen: Seen) -> None:
    seen.control.error = StateError("there is no adapter before this one", remedy="reset instead")
    seen.page.click("[data-verb=rollback]")
    seen.page.click("#ask-yes")
    seen.has("#result", "there is no adapter before this one")
    seen.has("#result", "reset instead")


def test_text_from_outside_is_inert(browser: Any) -> None:
    board = lively_board()
    board.tell(EVIL, EVIL, START, facts_of={EVIL: EVIL})
    board.update(
        device=EVIL, site=EVIL, bundle=EVIL, method=EVIL, engine=EVIL, guards={EVIL: 1}, frames={EVIL: 2}, why=(EVIL,)
    )
    board.answered(Point(START + 70_000, EVIL, 0.5, 1.0, 1.0, 1), np.zeros((8, 8), np.uint8))
    seen = Seen(browser, board)
    try:
        for where in ("#device", "#label", "#events li:first-child", "#guards", "#rate", "#facts", "#state"):
            seen.has(where, "<script>")
        seen.page.wait_for_timeout(200)
        assert "hacked" not in seen.page.title().split(":")[0].replace(EVIL, "")
        assert seen.page.evaluate("document.querySelectorAll('body img, body script').length") == 2
        assert seen.complaints == []
    finally:
        seen.close()


def test_what_was_smuggled_in_all_the_same_would_not_run(seen: Seen) -> None:
    """The policy is the second wall: a script or a handler put into the page by force is refused."""
    seen.has("#device", "line-camera-07")
    refused = seen.page.evaluate(
        "() => { try { document.body.innerHTML += '<p>x'; return false; } catch (error) { return error.name; } }"
    )
    assert refused == "TypeError"
    ran = seen.page.evaluate(
        """async () => {
        const button = document.createElement('button');
        try { button.setAttribute('onclick', 'window.ran = true'); } catch (error) { /* refused already here */ }
        document.body.append(button); button.click();
        return window.ran === true;
      }"""
    )
    assert not ran


@pytest.mark.parametrize("width", [320, 390, 700, 1280])
def test_no_width_needs_scrolling_to_the_side(browser: Any, width: int) -> None:
    board = lively_board()
    board.tell("fault", "w" * 400, START, path="/very/" + "long/" * 60)
    board.update(device="d" * 64, site="s" * 64, method="m" * 120, why=("r" * 200,), guards={"g" * 90: 1})
    board.answered(Point(START + 70_000, "l" * 300, 0.5, 1.0, 1.0, 1), np.zeros((8, 8), np.uint8))
    phone = {"is_mobile": True, "has_touch": True} if width < 700 else {}
    seen = Seen(browser, board, viewport={"width": width, "height": 800}, **phone)
    try:
        seen.has("#events li:first-child", "wwww")
        seen.has("#label", "llll")
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
        columns = seen.page.evaluate(
            "new Set([...document.querySelectorAll('main > section')].map(s => s.offsetLeft)).size"
        )
        assert (columns == 1) == (width < 700)
    finally:
        seen.close()


def test_what_can_be_touched_is_large_enough_on_a_phone(browser: Any) -> None:
    seen = Seen(browser, lively_board(), viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    try:
        for button in seen.page.locator("[data-verb]").all():
            assert button.bounding_box()["height"] >= 44
    finally:
        seen.close()


def contrast(seen: Seen) -> list[str]:
    """Texts whose contrast to what is behind them is below 4.5 (WCAG AA)."""
    found: list[str] = seen.page.evaluate(
        """() => {
        const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
        const rgb = (colours) => {  // painted one over the other, as the browser does
          canvas.clearRect(0, 0, 1, 1);
          for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
          return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
        };
        const light = (c) => { const [r, g, b] = c.map(v => v / 255)
          .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
          return .2126 * r + .7152 * g + .0722 * b; };
        const behind = (e) => e ? [...behind(e.parentElement), getComputedStyle(e).backgroundColor] : [];
        return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && !e.closest('noscript')
            && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).flatMap(e => {
          const back = behind(e), one = light(rgb(back)), other = light(rgb([...back, getComputedStyle(e).color]));
          const ratio = (Math.max(one, other) + .05) / (Math.min(one, other) + .05);
          return ratio < 4.5 ? [`${e.tagName} ${e.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`] : [];
        });
      }"""
    )
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", ["ready", "degraded", "safe", "init"])
def test_every_text_has_enough_contrast(browser: Any, scheme: str, state: str) -> None:
    seen = Seen(browser, lively_board(), color_scheme=scheme)
    try:
        seen.board.update(state=state)
        playwright.expect(seen.page.locator("#state")).to_have_attribute("data-state", state, timeout=SOON)
        playwright.expect(seen.page.locator("[data-verb=reset]")).to_be_enabled(timeout=SOON)
        assert contrast(seen) == []
    finally:
        seen.close()


def test_everything_that_can_be_used_has_a_name(seen: Seen) -> None:
    seen.has("#device", "line-camera-07")
    unnamed = seen.page.evaluate(
        """() => [...document.querySelectorAll('button, a, canvas, section, [tabindex], dialog')]
        .filter(e => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.textContent.trim()))
        .map(e => e.outerHTML)"""
    )
    assert [each for each in unnamed if "ask-yes" not in each] == []
    labels = seen.page.evaluate(
        "[...document.querySelectorAll('[aria-labelledby]')].map(e => e.getAttribute('aria-labelledby'))"
    )
    assert all(seen.page.locator(f"#{label}").count() == 1 for label in labels)
    assert seen.page.locator("#result").get_attribute("aria-live") == "polite"
    for canvas, figure in (("confidence", "%"), ("ood", "."), ("latency", "p99")):
        assert figure in (seen.page.locator(f"#{canvas}").get_attribute("aria-label") or ""), canvas


def test_an_agent_that_goes_away_and_comes_back_as_another_run(browser: Any) -> None:
    seen = Seen(browser, lively_board())
    try:
        seen.has("#state", "Ready")
        port = int(seen.server.address.rpartition(":")[2])
        seen.server.stop()
        seen.has("#lost", "No connection to the agent")
        seen.has("#state", "Not connected")
        assert seen.page.locator("[data-verb=reset]").is_disabled()
        board = lively_board()
        board.update(version=99)
        answers(board, 5)
        seen.server = Page(PageSettings(port=port), board, seen.control)
        seen.server.start()
        seen.text("#version", "version 99")
        playwright.expect(seen.page.locator("#lost")).to_be_hidden(timeout=SOON)
        seen.page.click("[data-verb=reset]")  # with the token of the new run
        seen.page.click("#ask-yes")
        seen.has("#result", "done")
    finally:
        seen.close()
