"""Round trip: how long a command takes from the controller to the agent and back, while the agent answers a camera.

Usage: roundtrip.py [--count 500] [--short] [--verb ping]. At most 8 commands a second, one at a time: 10 is what an
agent takes.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from stand import (
    REPLIES,
    TOPICS,
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
P50_MS, P99_MS, WIDE, ANSWER_S = 5.0, 50.0, 20.0, 15.0


class Timer:
    """When each command left, was accepted, and was done."""

    def __init__(self) -> None:
        self.left: dict[str, float] = {}
        self.came: dict[tuple[str, str], float] = {}
        """(id, status) -> when."""
        self.ready = False

    def answered(self, topic: str, body: dict[str, Any], retained: bool) -> None:
        if topic == TOPICS.state:
            self.ready = body["d"]["s"] == "ready"
        elif topic == REPLIES:
            self.came.setdefault((body["d"]["id"], body["d"]["status"]), time.perf_counter())

    def wait_for(self, key: str) -> None:
        """Until a command was done. Raises: RuntimeError with the answers that came instead."""
        try:
            wait_for(lambda: (key, "done") in self.came, ANSWER_S, f"{key} was not done")
        except RuntimeError as error:
            raise RuntimeError(f"{error}; {[status for other, status in list(self.came) if other == key]}") from error

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
            wait_for(lambda: timer.ready, 30, "the agent did not say that it is ready")
            for number in range(WARM_UP + count):
                timer.left[f"r{number}"] = time.perf_counter()
                controller.ask(asked.verb, f"r{number}", {})
                time.sleep(PACE_S)
                timer.wait_for(f"r{number}")
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
        *(
            Promise(
                f"round trip {name} at most {most:g} ms",
                f"{done[name]:.2f} ms",
                done[name] <= most,
                wide=done[name] <= WIDE * most,
            )
            for name, most in (("p50", P50_MS), ("p99", P99_MS))
        ),
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
