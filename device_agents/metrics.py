"""What Prometheus scrapes: the board as text, in units of the base (seconds, bytes, ratios)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeHistogramMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from device_agents.board import SLOTS, Board, State, Status
from device_agents.settings import Mode

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
LINKS = ("none", "online", "offline")
LEARN_COUNTS = {
    "looks": "Looks that the method has learned from or has refused to learn from.",
    "steps": "Steps of learning that were taken.",
    "shed": "Looks that were not learned from because the budget or the queue was full.",
}
GAUGES = (
    ("uptime_seconds", "Seconds since the agent started.", "uptime_s", 1.0),
    ("frames_per_second", "Frames answered per second, lately.", "fps", 1.0),
    ("version", "Rises with every change of what is in force.", "version", 1.0),
    ("ood_ratio", "Share of the latest frames that were stranger than the threshold of the bundle.", "ood", 1.0),
    ("confidence_ratio", "Mean confidence of the latest answers.", "confidence", 1.0),
    ("outbox_messages", "Messages that wait for the broker.", "waiting", 1.0),
    ("snapshot_age_seconds", "Seconds since the last snapshot was written.", "snapshot_age_s", 1.0),
)
HOST = {
    "rss_mb": ("resident_memory_bytes", "Resident memory of the agent.", 2.0**20),
    "threads": ("threads", "Threads of the agent.", 1.0),
    "fds": ("open_file_descriptors", "Open file descriptors of the agent.", 1.0),
    "temperature_c": ("temperature_celsius", "Hottest thermal zone of the board.", 1.0),
    "power_w": ("power_watts", "Power draw of the board, where it tells.", 1.0),
}


class Metrics:
    """The text, from a registry of its own: two agents in one process do not mix."""

    def __init__(self, board: Board) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_FromBoard(board))

    def text(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(self._registry)


class _FromBoard(Collector):
    """Reads the board at each scrape; keeps nothing."""

    def __init__(self, board: Board) -> None:
        self.board = board

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        status = self.board.status
        yield from _identity(status)
        yield from _counters(status)
        yield from _gauges(status)
        yield from _latency(status, self.board.latencies_ms)


def _identity(status: Status) -> Iterator[Metric]:
    yield InfoMetricFamily(
        "edge_adapt",
        "Which agent, bundle, method and engine.",
        value={
            name: str(getattr(status, name))
            for name in ("site", "device", "boot", "bundle", "bundle_id", "method", "engine")
        },
    )
    yield _one_of("state", "1 for the state the agent is in, 0 for the others.", "state", get_args(State), status.state)
    yield _one_of("mode", "1 for the mode in force, 0 for the others.", "mode", get_args(Mode), status.mode)
    yield _one_of("link", "1 for how the link to the broker is, 0 for the others.", "link", LINKS, status.link)
    yield _one_of("slot", "1 for the slot that answers, 0 for the others.", "slot", SLOTS, status.slot)
    yield _gauge("frozen", "1 while somebody told the agent not to learn.", float(status.frozen))
    yield _gauge("on_probation", "1 while a new adapter is not trusted yet.", float(status.on_probation))


def _counters(status: Status) -> Iterator[Metric]:
    yield CounterMetricFamily("edge_adapt_answered", "Frames answered.", value=status.answered)
    yield CounterMetricFamily(
        "edge_adapt_restarts", "Parts of the agent that had to be started again.", value=status.restarts
    )
    yield _by("frames_refused", "Frames not answered or not learned from, by reason.", "reason", status.frames)
    yield _by("guard_events", "Events of the guards and of the method, by name.", "guard", status.guards)
    for name, text in LEARN_COUNTS.items():
        if name in status.learn:
            yield CounterMetricFamily(f"edge_adapt_learn_{name}", text, value=status.learn[name])


def _gauges(status: Status) -> Iterator[Metric]:
    """What is not known is left out: no guess, and no zero that looks like a measurement."""
    for name, text, field, scale in GAUGES:
        value = getattr(status, field)
        if value is not None:
            yield _gauge(name, text, value * scale)
    learn = {"ms_per_s": "used", "allowed_ms_per_s": "allowed"}
    for key, name in learn.items():
        if key in status.learn:
            yield _gauge(f"learn_{name}_ratio", f"Share of each second of learning, {name}.", status.learn[key] / 1000)
    if "waiting" in status.learn:
        yield _gauge("learn_queue", "Looks that wait to be learned from.", status.learn["waiting"])
    for key, (name, text, scale) in HOST.items():
        if key in status.host:
            yield _gauge(name, text, status.host[key] * scale)
    if status.estimate is not None:
        family = GaugeMetricFamily(
            "edge_adapt_estimated_accuracy_ratio",
            "Accuracy estimated without labels, with the bounds of its interval.",
            labels=["bound"],
        )
        for bound in ("low", "value", "high"):
            if bound in status.estimate:
                family.add_metric([bound], status.estimate[bound] / 100)
        yield family


def _latency(status: Status, values_ms: NDArray[Any]) -> Iterator[Metric]:
    """A window, not a count from the start: take `histogram_quantile` of it as it is, without `rate`."""
    seconds = values_ms[np.isfinite(values_ms)] / 1000
    if len(seconds):
        counts = np.searchsorted(np.sort(seconds), BUCKETS_S, side="right")
        buckets = [(f"{bound:g}", float(count)) for bound, count in zip(BUCKETS_S, counts, strict=True)]
        yield GaugeHistogramMetricFamily(
            "edge_adapt_answer_latency_seconds",
            "From taking a frame to its answer, over the latest answers (a moving window: no rate needed).",
            buckets=[*buckets, ("+Inf", float(len(seconds)))],
            gsum_value=float(seconds.sum()),
        )
    family = GaugeMetricFamily(
        "edge_adapt_answer_latency_quantile_seconds", "Quantiles of the same window.", labels=["quantile"]
    )
    for name, quantile in (("p50", "0.5"), ("p95", "0.95"), ("p99", "0.99")):
        if name in status.latency_ms:
            family.add_metric([quantile], status.latency_ms[name] / 1000)
    yield family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"edge_adapt_{name}", text, value=value)


def _by(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"edge_adapt_{name}", text, labels=[label])
    for key, value in sorted(values.items()):
        family.add_metric([str(key)], value)
    return family


def _one_of(name: str, text: str, label: str, known: Iterable[str], now: str) -> Metric:
    family = GaugeMetricFamily(f"edge_adapt_{name}", text, labels=[label])
    for value in known:
        family.add_metric([value], float(value == now))
    return family
