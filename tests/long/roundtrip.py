"""Round trip: how long a command takes from the controller to the agent and back, while the agent answers a camera.

Usage: roundtrip.py [--count 500] [--short] [--verb ping]. At 8 commands a second: 10 is what an agent takes.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from stand import (
    REPLIES,
    Broker,
    Controller,
    Life,
    Promise,
    arguments,
    count_of,
    finish,
    percentiles,
    stand,
    wait_for,
    written,
)

PACE_S, WARM_UP, FPS = 0.125, 16, 15.0
P50_MS, P99_MS = 5.0, 50.0


class Timer:
    """When each command left, was accepted, and was done."""

    def __init__(self) -> None:
        self.left: dict[str, float] = {}
        self.came: dict[tuple[str, str], float] = {}
        """(id, status) -> when."""

    def answered(self, topic: str, body: dict[str, Any], retained: bool) -> None:
        if topic == REPLIES:
            self.came.setdefault((body["d"]["id"], body["d"]["status"]), time.perf_counter())

    def taken_ms(self, status: str) -> list[float]:
        """Of all commands after the first few."""
        keys = list(self.left)[WARM_UP:]
        return [1000 * (self.came[key, status] - self.left[key]) for key in keys if (key, status) in self.came]


def main() -> int:
    parser = arguments(__doc__ or "", 500, 50, "commands")
    parser.add_argument("--verb", default="ping", help="one that takes no arguments")
    asked = parser.parse_args()
    count, timer = count_of(asked), Timer()
    with stand(asked) as folder:
        broker = Broker(folder / "broker", embedded=asked.embedded).start()
        life = Life(written(folder, broker.port, source={"fps": FPS}), folder / "trip.notes", "--latencies")
        try:
            controller = Controller(broker.port, timer.answered)
            life.wait_first()
            for number in range(WARM_UP + count):
                key = f"r{number}"
                timer.left[key] = time.perf_counter()
                controller.ask(asked.verb, key, {})
                time.sleep(PACE_S)
            wait_for(lambda: len(timer.taken_ms("done")) == count, 10, f"{count} answers did not come")
            code = life.stop()
            answers = percentiles([ms for note in life.notes("latencies") for _, ms in note["taken"]])
            controller.close()
        finally:
            if life.process.poll() is None:
                life.kill()
            broker.stop()
    accepted, done = (percentiles(timer.taken_ms(status)) for status in ("accepted", "done"))
    slow = sum(ms > 35 for ms in timer.taken_ms("done"))
    print("| round trip, ms   |    p50 |    p99 |    max |\n|------------------|-------:|-------:|-------:|")
    for name, found in (("until accepted", accepted), ("until done", done), ("an answer", answers)):
        print(f"| {name:<16} | {found['p50']:>6.2f} | {found['p99']:>6.2f} | {found['max']:>6.2f} |")
    promises = [
        Promise(f"{asked.verb}, {count} times at {FPS:g} frames a second: all done", f"exit code {code}", code == 0),
        Promise(f"round trip p50 at most {P50_MS:g} ms", f"{done['p50']:.2f} ms", done["p50"] <= P50_MS, timing=True),
        Promise(f"round trip p99 at most {P99_MS:g} ms", f"{done['p99']:.2f} ms", done["p99"] <= P99_MS, timing=True),
    ]
    facts = {
        "commands": count,
        "verb": asked.verb,
        "broker": broker.name,
        "fps": FPS,
        "accepted_ms": accepted,
        "done_ms": done,
        "above_35_ms": slow,
        "answer_ms": answers,
    }
    return finish("roundtrip", asked, promises, facts)


if __name__ == "__main__":
    sys.exit(main())
