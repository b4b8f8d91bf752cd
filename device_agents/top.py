"""`edge-adapt top`: the figures of the local page in a terminal."""

from __future__ import annotations

import json
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from edge_adapt.errors import ConfigError, DataError

MOST_BYTES = 4 * 2**20
TIMEOUT_S = 3.0
BARS = "▁▂▃▄▅▆▇█"
COLOURS = {"ready": "green", "degraded": "yellow", "safe": "red", "draining": "yellow", "info": "", "warning": "yellow"}
EVENTS_SHOWN = 8


def top(
    url: Annotated[str, typer.Option(help="address of the page")] = "http://127.0.0.1:8765",
    every: Annotated[float, typer.Option(min=0.1, help="seconds between looks")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="print once and leave")] = False,
) -> None:
    """Watch a running agent in the terminal. Ctrl-C leaves; the agent goes on."""
    console = Console()
    if once:
        console.print(render(fetch(url), console.width))
        return
    leave = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: leave.set())  # an exception could leave the screen half set up
    try:
        watch(url, every, console, leave)
    finally:
        signal.signal(signal.SIGINT, before)


def watch(url: str, every_s: float, console: Console, leave: threading.Event) -> None:
    """Show until `leave`. An agent that goes away is waited for. Raises: ConfigError if it was never there."""
    shown = render(fetch(url), console.width)
    with Live(shown, console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while not leave.wait(every_s):
            try:
                shown = render(fetch(url), console.width)
                live.update(shown, refresh=True)
            except (ConfigError, DataError) as error:
                live.update(Group(Text(f"not connected: {error.what}", "bold red"), shown), refresh=True)


def fetch(url: str) -> dict[str, Any]:
    """`/statez` of the agent. Raises: ConfigError if nobody answers there, DataError if what answers is no agent."""
    address = f"{url.rstrip('/')}/statez"
    try:
        if not address.startswith(("http://", "https://")):
            raise ValueError("expected http:// or https://")
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
            body = answer.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ConfigError(
            f"no agent answers at {url}: {reason}", remedy="start one with `page` in its configuration, or give --url"
        ) from error
    try:
        state = json.loads(body) if len(body) <= MOST_BYTES else None
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict) or not {"status", "points", "events"} <= state.keys():
        raise DataError(f"what answers at {address} is no agent of edge-adapt", remedy="give the right --url")
    return state


def render(state: Mapping[str, Any], width: int) -> RenderableType:
    """The whole view, for a terminal of so many columns."""
    state = printable(state)
    status, points = state["status"], state["points"]
    curve = max(8, min(width - 44, 120))
    columns = Table.grid(expand=True, padding=(0, 3))
    for _ in range(2):
        columns.add_column(ratio=1)
    columns.add_row(_answers(status), _learning(status))
    columns.add_row(Text(), Text())
    columns.add_row(_host(status), _guards(status))
    return Group(
        Panel(_head(status), border_style=COLOURS.get(status["state"], "dim")),
        _curves(points, state.get("latency"), curve),
        Text(),
        columns,
        Text(),
        _events(state["events"]),
    )


def printable(value: Any) -> Any:
    """The value with all text in it free of control characters: no event moves the cursor of who reads it."""
    if isinstance(value, str):
        return "".join(letter if letter.isprintable() else " " for letter in value)
    if isinstance(value, Mapping):
        return {printable(key): printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list | tuple) else value


def sparkline(values: Sequence[float | None], width: int, low: float | None = None, high: float | None = None) -> str:
    """The newest values as little bars, one a column; means where there are more values than columns.

    None leaves a gap. low, high: ends of the scale, else those of what is shown.
    """
    step = max(1, -(-len(values) // width))
    columns = [_mean(values[max(end - step, 0) : end]) for end in range(len(values), 0, -step)][::-1]
    known = [value for value in columns if value is not None]
    if not known:
        return ""
    floor, ceiling = (min(known) if low is None else low), (max(known) if high is None else high)
    scale = (len(BARS) - 1) / (ceiling - floor) if ceiling > floor else 0.0
    return "".join(
        " " if value is None else BARS[min(max(round((value - floor) * scale), 0), len(BARS) - 1)] for value in columns
    )


def _head(status: Mapping[str, Any]) -> RenderableType:
    state = status["state"]
    table = Table.grid(expand=True, padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    name = Text.assemble((status["device"] or "edge-adapt", "bold"), (f"  {status['site']}", "dim"))
    told = Text(f"● {state}", f"bold {COLOURS.get(state, 'dim')}")
    if status["why"]:
        told.append(f": {', '.join(status['why'])}", "not bold")
    table.add_row(name, told)
    facts = (status["mode"], status["bundle"], status["method"], status["engine"], f"up {span(status['uptime_s'])}")
    table.add_row(Text(" · ".join(fact for fact in facts if fact), "dim"), Text(f"MQTT {status['link']}", "dim"))
    return table


def _curves(points: Sequence[Sequence[Any]], latency: Mapping[str, Any] | None, width: int) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", min_width=12)
    table.add_column(width=width, no_wrap=True)
    table.add_column(no_wrap=True)
    confidence, ood, speed = ([point[index] for point in points] for index in (2, 3, 4))
    last = Text(str(points[-1][1]), "bold") if points else Text("no answer yet", "dim")
    if points:
        last.append(f" {_figure(confidence[-1], '{:.1%}')}", "not bold")
    table.add_row("confidence", Text(sparkline(confidence, width, 0.0, 1.0), "blue"), last)
    table.add_row("OOD score", Text(sparkline(ood, width, 0.0), "dark_orange"), _figure(_last(ood), "{:.2f}"))
    quantiles = f"p50 {latency['p50']:.1f} · p99 {latency['p99']:.1f} ms" if latency else ""
    table.add_row("latency", Text(sparkline(speed, width, 0.0), "cyan"), quantiles)
    return table


def _answers(status: Mapping[str, Any]) -> RenderableType:
    who = {"own": "what was learned here", "adapter": "an adapter from outside"}.get(status["slot"], status["slot"])
    notes = [name for name, on in (("on probation", status["on_probation"]), ("frozen", status["frozen"])) if on]
    estimate = status["estimate"]
    told = (
        f"{estimate['value']:.1f} % ({estimate['low']:.1f} to {estimate['high']:.1f})" if estimate else "not known yet"
    )
    refused = ", ".join(f"{count:,} {why}" for why, count in status["frames"].items() if count)
    return _facts(
        "Answers",
        {
            "who answers": ", ".join([f"{who}, version {status['version']}", *notes]),
            **({"domain": status["route"]} if status["route"] is not None else {}),
            "frames a second": _figure(status["fps"], "{:.1f}"),
            "answered": f"{status['answered']:,}" + (f" ({refused})" if refused else ""),
            "est. accuracy": told,
            "strange frames": _figure(status["ood"], "{:.1%}"),
        },
    )


def _learning(status: Mapping[str, Any]) -> RenderableType:
    learn = status["learn"]
    used = f"{_figure(learn.get('ms_per_s'), '{:.0f}')} of {_figure(learn.get('allowed_ms_per_s'), '{:.0f}')} ms/s"
    counts = {name: _figure(learn[name], "{:,.0f}") for name in ("looks", "steps", "shed", "waiting") if name in learn}
    return _facts("Learning", {"budget": used, **counts})


def _host(status: Mapping[str, Any]) -> RenderableType:
    host = status["host"]
    shown = {"rss_mb": ("memory", "{:.0f} MB"), "temperature_c": ("temperature", "{:.0f} °C")}
    shown |= {"power_w": ("power", "{:.1f} W"), "threads": ("threads", "{:.0f}"), "fds": ("open files", "{:.0f}")}
    rows = {name: _figure(host[key], form) for key, (name, form) in shown.items() if key in host}
    age = status["snapshot_age_s"]
    rows |= {"outbox": f"{status['waiting']} waiting", "snapshot": "none yet" if age is None else f"{span(age)} ago"}
    return _facts("Host", rows)


def _guards(status: Mapping[str, Any]) -> RenderableType:
    rows = {name: f"{count:,}" for name, count in sorted(status["guards"].items())}
    return _facts("Guards", {**rows, "restarts": str(status["restarts"])})


def _events(events: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_column()
    for event in reversed(events[-EVENTS_SHOWN:]):
        when = time.strftime("%H:%M:%S", time.localtime(event["ts"] / 1000))
        table.add_row(when, Text(event["kind"], COLOURS.get(event["severity"], "red")), Text(event["text"]))
    return table if events else Text("no events yet", "dim")


def _facts(title: str, rows: Mapping[str, str]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", min_width=15)
    table.add_column()
    table.add_row(Text(title, "bold not dim"), "")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _last(values: Sequence[float | None]) -> float | None:
    return values[-1] if values else None


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def span(seconds: float) -> str:
    """Seconds, for people."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole // 60 % 60:02} min"
    return f"{whole // 86_400} d {whole // 3600 % 24} h"
