"""Outage: the broker away for 10 minutes while telemetry and events go on at their fastest; is all of it told after?

Usage: outage.py [--count 600] [--short]. Every message carries a number of one rising series, so that a gap, or a
message out of its order, shows. Answers are timed before the outage and while the queue drains.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from life import CHUNK
from stand import (
    TOPICS,
    Broker,
    Controller,
    Life,
    Promise,
    arguments,
    count_of,
    finish,
    mosquitto,
    percentiles,
    stand,
    wait_for,
    written,
)

EVENTS_PER_S = 5.0
BEFORE_S, SHORT_BEFORE_S, FPS, SHORT_FPS = 60.0, 10.0, 200.0, 50.0
WARM_FRAMES, WARM_S = 30_000, 900.0
"""Answered first, but not for a short cut: until every ring of the agent is full its memory grows, broker or not."""
AFTER_S = 3.0
"""Waited on, once the queue is empty."""
DRAIN_S, CALM_S = 300.0, 2.0
GROWTH_MB, FLAT_AFTER = 2.0, 0.2
"""Memory may grow so much during an outage, after so much of it."""
RATIO, WIDE_RATIO = 1.2, 3.0


class Series:
    """What arrived of the one series: telemetry, events and replies, as the device numbered them."""

    def __init__(self) -> None:
        self.first: dict[str, dict[int, tuple[int, float, str, bool]]] = {}
        """Boot -> number -> (place in the order of arrival, when, kind, told late)."""
        self._lock = threading.Lock()
        self._count = 0

    def came(self, topic: str, body: dict[str, Any], retained: bool) -> None:
        kind = topic.removeprefix(f"{TOPICS.root}/").split("/")[0]
        if kind not in ("tele", "event", "ack") or topic == TOPICS.tele("link"):
            return
        with self._lock:
            self._count += 1
            seen = self.first.setdefault(body["boot"], {})
            seen.setdefault(body["seq"], (self._count, time.monotonic(), kind, body["hist"]))

    @property
    def numbers(self) -> dict[int, tuple[int, float, str, bool]]:
        """Of the one boot there is."""
        with self._lock:
            (only,) = self.first.values() or ({},)
            return dict(only)

    @property
    def newest(self) -> float:
        """When the latest message arrived."""
        return max((when for _, when, _, _ in self.numbers.values()), default=0.0)


def latencies(life: Life, since: float, until: float) -> list[float]:
    """Milliseconds of the answers between two moments."""
    return [ms for note in life.notes("latencies") for at, ms in note["taken"] if since <= at < until]


class Outage:
    """One agent, one broker that goes and comes back, and what was seen."""

    def __init__(self, folder: Path, asked: Any, seconds: float) -> None:
        self.broker = Broker(folder / "broker").start()
        config = written(
            folder,
            self.broker.port,
            source={"fps": SHORT_FPS if asked.short else FPS},
            telemetry={"interval_s": 0.05, "minimum_s": 0.05},
            snapshots={"every_s": 5.0},
        )
        self.series, self.seconds = Series(), seconds
        self.controller = Controller(self.broker.port, self.series.came)
        self.life = Life(config, folder / "outage.notes", "--events", str(EVENTS_PER_S), "--latencies")
        self.rss: list[tuple[float, float]] = []
        """When, MB: during the outage."""
        self.warm_frames = 0 if asked.short else WARM_FRAMES
        self.before = SHORT_BEFORE_S if asked.short else BEFORE_S
        self.marks: dict[str, float] = {}

    def play(self) -> None:
        """Warm-up, before, away, back, drained. Ends the agent, then the broker."""
        self.life.wait_first()
        wait_for(self._warm, WARM_S, f"{self.warm_frames} frames were not answered")
        time.sleep(self.before / 2)
        self._mark("before")
        time.sleep(self.before)
        self._mark("away")
        self.broker.stop()
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            self.rss.append((time.monotonic(), self.life.rss_mb))
            time.sleep(min(5.0, self.seconds / 20))
        self.broker.start()
        self._mark("back")
        wait_for(lambda: self.series.newest > self.marks["back"], 180, "the agent did not come back")
        self._mark("online")
        wait_for(self._drained, DRAIN_S, "the queue did not drain")
        self._mark("drained", CALM_S)
        time.sleep(AFTER_S)
        self.code = self.life.stop()
        time.sleep(1.0)
        self.controller.close()
        self.broker.stop()

    def _warm(self) -> bool:
        time.sleep(0.5)
        return CHUNK * len(self.life.notes("latencies")) >= self.warm_frames

    def _drained(self) -> bool:
        """Whether nothing was told late for a moment."""
        time.sleep(0.2)
        lately = [when for _, when, _, late in self.series.numbers.values() if late]
        return bool(lately) and time.monotonic() - max(lately) > CALM_S

    def _mark(self, name: str, ago_s: float = 0.0) -> None:
        self.marks[name] = time.monotonic() - ago_s
        print(f"{name} after {self.marks[name] - self.life.began:.0f} s", flush=True)

    @property
    def missing(self) -> list[int]:
        numbers = self.series.numbers
        return sorted(set(range(1, max(numbers) + 1)) - numbers.keys())

    @property
    def misplaced(self) -> int:
        """Messages that first arrived after a later one of the same kind. Telemetry of the moment does not wait behind
        what is told late: it is another kind, and says so."""
        places: dict[tuple[str, bool], list[int]] = defaultdict(list)
        for _, (place, _, kind, late) in sorted(self.series.numbers.items()):
            if kind != "ack":  # replies go before all else
                places[kind, kind == "tele" and late].append(place)
        return sum(later < earlier for each in places.values() for earlier, later in pairwise(each))

    @property
    def growth_mb(self) -> float:
        """From the mean of the first quarter, after a moment, to that of the last."""
        start = self.rss[0][0] + FLAT_AFTER * self.seconds
        kept = [mb for at, mb in self.rss if at >= start]
        quarter = max(1, len(kept) // 4)
        return sum(kept[-quarter:]) / quarter - sum(kept[:quarter]) / quarter


def main() -> int:
    parser = arguments(__doc__ or "", 600, 20, "seconds without a broker")
    asked = parser.parse_args()
    if mosquitto() is None:
        print("not checked: mosquitto is not installed, and what it keeps over a restart is needed here")
        return 0
    with stand(asked) as folder:
        outage = Outage(folder, asked, count_of(asked))
        try:
            outage.play()
        finally:
            if outage.life.process.poll() is None:
                outage.life.kill()
            outage.broker.stop()
        marks, life = outage.marks, outage.life
        calm = percentiles(latencies(life, marks["before"], marks["away"]))
        gone = percentiles(latencies(life, marks["away"], marks["back"]))
        draining = percentiles(latencies(life, marks["online"], marks["drained"]))
    kinds = Counter(kind for _, _, kind, _ in outage.series.numbers.values())
    late = sum(hist for _, _, _, hist in outage.series.numbers.values())
    ratio = draining["p99"] / calm["p99"]
    print("| answers, ms    |    p50 |    p99 |    max |\n|----------------|-------:|-------:|-------:|")
    for name, found in (("before", calm), ("broker away", gone), ("queue drains", draining)):
        print(f"| {name:<14} | {found['p50']:>6.2f} | {found['p99']:>6.2f} | {found['max']:>6.2f} |")
    total, growth = max(outage.series.numbers), outage.growth_mb
    rate = late / max(1e-9, marks["drained"] - marks["online"])
    promises = [
        Promise(
            f"{outage.seconds:.0f} s without broker: nothing is lost",
            f"{len(outage.missing)} of {total:,} missing",
            not outage.missing and late > 0,
        ),
        Promise("order is kept", f"{outage.misplaced} out of it", not outage.misplaced),
        Promise(f"memory grows at most {GROWTH_MB:g} MB meanwhile", f"{growth:+.2f} MB", growth <= GROWTH_MB),
        Promise("the queue drains", f"{late:,} messages, {rate:.0f} a second", marks["drained"] > marks["online"]),
        Promise(
            f"draining slows no answer: p99 at most {RATIO:g} of before",
            f"{ratio:.2f}",
            ratio <= RATIO,
            wide=draining["p50"] <= WIDE_RATIO * calm["p50"],
        ),
        Promise("it ends when asked to", f"exit code {outage.code}", outage.code == 0),
    ]
    facts = {
        "seconds": outage.seconds,
        "broker": outage.broker.name,
        "fps": SHORT_FPS if asked.short else FPS,
        "messages": dict(kinds),
        "told_late": late,
        "back_online_s": round(marks["online"] - marks["back"], 1),
        "drain_s": round(marks["drained"] - marks["online"], 1),
        "rss_growth_mb": round(growth, 3),
        "rss_mb": [round(mb, 2) for _, mb in outage.rss[:: max(1, len(outage.rss) // 30)]],
        "answers_ms": {"before": calm, "away": gone, "draining": draining, "p99_ratio": round(ratio, 3)},
    }
    return finish("outage", asked, promises, facts)


if __name__ == "__main__":
    sys.exit(main())
