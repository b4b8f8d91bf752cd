"""Soak: 300,000 frames flat out through one agent with learning, snapshots, MQTT and an open page; does it grow?

Usage: soak.py [--count 300000] [--short]. Memory, open files and threads are read from outside, out of /proc. Where
memory grows too fast, a second, shorter run under tracemalloc prints what grew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stand import Broker, Controller, Life, Promise, arguments, count_of, finish, stand, wait_for, written

from device_agents.broker import free_port

WARM_FRAMES = 30_000
"""Until every ring and cache of the agent is full: the answers that it keeps for late labels are the longest."""
GROWTH_MB = 1.0
"""In 100,000 frames."""
SLACK_MB = 1.0
"""What a short run may grow besides: a page of the allocator here and there."""
ROWS = 16
EVERY_S, STALLED_S = 0.5, 60.0
TRACED = 60_000
"""Frames between the two looks of a trace."""


@dataclass(frozen=True)
class Look:
    """The agent from outside."""

    frames: int
    rss_mb: float
    files: int
    threads: int
    seconds: float


class Soak:
    """An agent with everything switched on, and those who use it."""

    def __init__(self, folder: Path, broker: Broker, *flags: str) -> None:
        self.page = free_port()
        config = written(
            folder,
            broker.port,
            page={"port": self.page},
            snapshots={"every_s": 2.0},
            telemetry={"interval_s": 2.0, "minimum_s": 1.0},
            state_dir=f"state-{self.page}",
        )
        self.messages = 0
        self.controller = Controller(broker.port, self._came)
        self.life = Life(config, folder / f"soak-{self.page}.notes", *flags)
        self.life.wait_first()
        self._began = time.monotonic()
        threading.Thread(target=self._watch_page, daemon=True).start()

    def look(self) -> Look:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.page}/statez", timeout=30) as answer:
            frames = json.load(answer)["status"]["answered"]
        with urllib.request.urlopen(f"http://127.0.0.1:{self.page}/metrics", timeout=30) as answer:
            answer.read()
        life = self.life
        return Look(frames, round(life.rss_mb, 3), life.files, life.threads, round(time.monotonic() - self._began, 1))

    def looks(self, frames: int) -> list[Look]:
        """One twice a second until so many frames were answered. Raises: RuntimeError if no more are."""
        found = [self.look()]
        moved = time.monotonic()
        while found[-1].frames < frames:
            time.sleep(EVERY_S)
            self.controller.ask("ping", f"p{len(found)}-{self.page}", {})
            found.append(self.look())
            moved = time.monotonic() if found[-1].frames > found[-2].frames else moved
            if time.monotonic() - moved > STALLED_S or self.life.process.poll() is not None:
                raise RuntimeError(f"no frame was answered for {STALLED_S:g} s after {found[-1].frames}")
        return found

    def stop(self) -> int:
        code = self.life.stop()
        self.controller.close()
        return code

    def _came(self, topic: str, body: dict[str, Any], retained: bool) -> None:
        self.messages += 1

    def _watch_page(self) -> None:
        """A page that is open all the time."""
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.page}/events") as stream:
            while stream.read(4096):
                pass


def slope(looks: list[Look]) -> float:
    """MB in 100,000 frames: the median of the slopes between looks of the first and of the last third."""
    third = max(1, len(looks) // 3)
    slopes = [
        (late.rss_mb - early.rss_mb) / (late.frames - early.frames)
        for early in looks[:third]
        for late in looks[-third:]
        if late.frames > early.frames
    ]
    return 1e5 * float(np.median(slopes)) if slopes else float("nan")


def table(looks: list[Look]) -> str:
    step = max(1, len(looks) // ROWS)
    rows = ["|   frames |      s |  RSS, MB | files | threads |", "|---------:|-------:|---------:|------:|--------:|"]
    rows += [
        f"| {one.frames:>8,} | {one.seconds:>6.0f} | {one.rss_mb:>8.2f} | {one.files:>5} | {one.threads:>7} |"
        for one in [*looks[:-1:step], looks[-1]]
    ]
    return "\n".join(rows)


def steady(values: list[int]) -> bool:
    """No more at the end than at the beginning: the fewest of a time, since a request in work has a file or two."""
    third = max(1, len(values) // 3)
    return min(values[-third:]) <= min(values[:third])


def trace(folder: Path, broker: Broker, frames: int) -> None:
    """Run again under tracemalloc and print what grew."""
    print(f"what grows? {frames:,} frames under tracemalloc, after {WARM_FRAMES:,}", flush=True)
    soak = Soak(folder, broker, "--trace")
    soak.looks(WARM_FRAMES)
    for kind, until in (("traced", WARM_FRAMES + frames), ("grown", 0)):
        soak.life.process.send_signal(signal.SIGUSR1)
        wait_for(lambda kind=kind: soak.life.notes(kind), 60, "no trace came")
        soak.looks(until)
    print("\n".join(soak.life.notes("grown")[-1]["lines"]))
    soak.stop()


def main() -> int:
    parser = arguments(__doc__ or "", 300_000, 20_000, "frames after the warm-up")
    parser.add_argument("--trace", action="store_true", help="only tell what grows, by tracemalloc")
    asked = parser.parse_args()
    with stand(asked) as folder:
        broker = Broker(folder / "broker", embedded=True).start()
        try:
            if asked.trace:
                trace(folder, broker, count_of(asked))
                return 0
            soak = Soak(folder, broker)
            looks = soak.looks(WARM_FRAMES + count_of(asked))
            code = soak.stop()
            kept = promises(looks, code, asked)
            if not kept[0].kept:
                trace(folder, broker, min(TRACED, count_of(asked)))
        finally:
            broker.stop()
    print(table(looks))
    facts = {
        "frames": looks[-1].frames,
        "warm_up_frames": WARM_FRAMES,
        "seconds": looks[-1].seconds,
        "mb_per_100000_frames": round(slope(warm(looks)), 3),
        "messages": soak.messages,
        "looks": [asdict(one) for one in looks[:: max(1, len(looks) // 60)]],
    }
    return finish("soak", asked, kept, facts)


def warm(looks: list[Look]) -> list[Look]:
    return [one for one in looks if one.frames >= WARM_FRAMES]


def promises(looks: list[Look], code: int, asked: argparse.Namespace) -> list[Promise]:
    """What has to hold."""
    measured = warm(looks)
    grown = slope(measured)
    span = (measured[-1].frames - measured[0].frames) / 1e5
    allowed = GROWTH_MB + (SLACK_MB / span if asked.short else 0.0)
    files, threads = [one.files for one in measured], [one.threads for one in measured]
    rate = looks[-1].frames / looks[-1].seconds
    return [
        Promise(
            f"memory grows less than {allowed:.1f} MB in 100,000 frames after warm-up",
            f"{grown:+.2f} MB, {span * 1e5:,.0f} frames",
            grown < allowed,
        ),
        Promise("open files stay", f"{min(files)} to {max(files)}", steady(files)),
        Promise("threads stay", f"{min(threads)} to {max(threads)}", steady(threads)),
        Promise("it ends when asked to", f"exit code {code}; {rate:,.0f} frames a second", code == 0),
    ]


if __name__ == "__main__":
    sys.exit(main())
