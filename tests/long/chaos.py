"""Chaos: kill -9 at random instants, again and again, of an agent that learns, checkpoints, tells and is commanded.

Usage: chaos.py [--count 1000] [--short] [--seed 0]. The broker stays up; a controller keeps asking, and asks again
what was not answered. After each life what it left on disk is looked at; at the end one life may finish in peace.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
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
    written,
)

from edge_adapt.bundle import Bundle
from edge_adapt.runtime.snapshots import SnapshotStore

LONGEST_S = 1.0
"""A life after its first answer."""
EARLY = 0.15
"""Share of the lives that end before their first answer."""
ASK_EVERY_S, AGAIN, UNANSWERED = 0.13, 0.3, 12
"""Between commands; share of them that ask once more for an answer; most that are open at a time."""
EVENTS_PER_S = 12.0
PEACE_S = 60.0
START_S, WIDE_START_S = 2.0, 10.0
FINAL = ("done", "failed", "rejected")
VERBS: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("ping", {}), ("snapshot", {}), ("freeze", {"on": False}), ("label-reveal", {"labels": [[1, 0], [2, 1]]})),
    *(("set-config", {"config": {"budget.learn_ms_per_s": 240.0}}), ("rebirth", {})),
)


class Desk:
    """What the controller saw and asked."""

    def __init__(self, port: int, rng: random.Random) -> None:
        self.arrived: dict[str, int] = {}
        """Id of an event or reply -> its place in the order of first arrival."""
        self.asked: dict[str, tuple[str, dict[str, Any]]] = {}
        self.replies: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._rng = rng
        self._controller = Controller(port, self._came)

    @property
    def open(self) -> list[str]:
        """Commands without a final answer."""
        return [key for key in self.asked if not any(one["status"] in FINAL for one in list(self.replies[key]))]

    def ask(self) -> None:
        """Something new, or something again."""
        left = self.open
        if left and (len(left) >= UNANSWERED or self._rng.random() < AGAIN):
            self._send(self._rng.choice(left))
            return
        key = f"k{len(self.asked)}"
        self.asked[key] = self._rng.choice(VERBS)
        self._send(key)

    def ask_again(self) -> None:
        for key in self.open:
            self._send(key)

    def close(self) -> None:
        self._controller.close()

    def _send(self, key: str) -> None:
        verb, given = self.asked[key]
        self._controller.ask(verb, key, given)

    def _came(self, topic: str, body: dict[str, Any], retained: bool) -> None:
        if topic == REPLIES or topic.startswith((f"{TOPICS.root}/event/", f"{TOPICS.root}/ack/")):
            self.arrived.setdefault(body["id"], len(self.arrived))
        if topic == REPLIES:
            self.replies[body["d"]["id"]].append(body["d"])


class Chaos:
    """Lives, one after the other, and what was found in between."""

    def __init__(self, folder: Path, port: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.desk = Desk(port, self.rng)
        self.kept: dict[str, list[str]] = {"event": [], "ack": []}
        """Ids of what was on disk before a kill, in the order in which it came there."""
        self.ran: Counter[str] = Counter()
        self.starts: list[dict[str, float]] = []
        self.faults: list[str] = []
        self.early = 0
        self._folder, self._bundle = folder, Bundle.load(folder / "bundle")
        self._config = written(
            folder,
            port,
            source={"fps": 100.0},
            snapshots={"every_s": 0.15},
            budget={"learn_ms_per_s": 400.0},
            telemetry={"interval_s": 1.0, "minimum_s": 0.5},
        )
        self._generation = 0
        self.rehearse()

    def rehearse(self) -> None:
        """A life that does not count: it leaves Python's bytecode behind, as an installation does."""
        life = Life(self._config, self._folder / "rehearsal.notes")
        life.wait_first()
        life.kill()
        self._read(life)

    def live(self, number: int) -> None:
        """One life and its violent end."""
        life = Life(self._config, self._folder / f"life-{number}.notes", "--events", str(EVENTS_PER_S))
        if self.starts and self.rng.random() < EARLY:
            self.early += 1
            time.sleep(self.rng.uniform(0.0, self.starts[-1]["first"]))
        else:
            self._started(life)
            end = time.monotonic() + self.rng.uniform(0.0, LONGEST_S)
            while (left := end - time.monotonic()) > 0:
                self.desk.ask()
                time.sleep(min(left, ASK_EVERY_S))
        life.kill()
        self._read(life)
        self._inspect(f"life {number}")

    def end_in_peace(self) -> None:
        """A life in which everything is answered and sent, and that is asked to stop."""
        life = Life(self._config, self._folder / "peace.notes", "--events", "1")
        self._started(life)
        end = time.monotonic() + PEACE_S
        while self.desk.open and time.monotonic() < end:
            self.desk.ask_again()
            time.sleep(2.0)
        code = life.stop()
        if code:
            self.faults.append(f"the last life ended with {code}")
        self._read(life)
        time.sleep(1.0)
        self._inspect("the last life")
        self.desk.close()

    def _started(self, life: Life) -> None:
        first = life.wait_first()
        imported = life.notes("imported")[0]
        self.starts.append(
            {
                "first": first["t"] - life.began,
                "imports": imported["t"] - life.began,
                "agent": first["t"] - imported["t"],
                "cpu": first["cpu"],
                "torch": imported["torch"],
            }
        )

    def _read(self, life: Life) -> None:
        """What a life noted."""
        for note in life.notes("kept"):
            self.kept[note["store"]] += note["ids"]
        self.ran.update(note["by"] for note in life.notes("ran"))
        life.notes_path.unlink(missing_ok=True)

    def _inspect(self, when: str) -> None:
        """What lies on disk: snapshots that load, databases that are whole, nothing set aside."""
        state = self._folder / "state"
        self.faults += [f"after {when}: {path.name} was set aside" for path in state.rglob("*.bad*")]
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name) / "state"
            if not state.exists():
                return
            shutil.copytree(state, copy)
            store = SnapshotStore.of(copy / "snapshots", self._bundle)
            found = store.load_latest()
            generation = found.generation if found is not None else 0
            if generation < self._generation:
                self.faults.append(f"after {when}: snapshot {generation}, there was {self._generation} already")
            self._generation = max(generation, self._generation)
            self.faults += [f"after {when}: {report}" for report in store.take_reports()]
            for base in ("outbox.db", "commands.db"):
                problem = damage(copy / base)
                if problem:
                    self.faults.append(f"after {when}: {base}: {problem}")

    def lost(self, store: str) -> list[str]:
        """What was on disk and never arrived."""
        return [one for one in self.kept[store] if one not in self.desk.arrived]

    @property
    def misplaced(self) -> int:
        """Events that first arrived after a later one."""
        places = [self.desk.arrived[one] for one in self.kept["event"] if one in self.desk.arrived]
        return sum(later < earlier for earlier, later in pairwise(places))

    @property
    def contradictions(self) -> list[str]:
        """Commands whose answers do not fit each other, or what was done."""
        found = []
        for key, replies in self.desk.replies.items():
            finals = {(one["status"], one["code"]) for one in replies if one["status"] in FINAL}
            text = " ".join(one.get("text", "") for one in replies)
            if len(finals) > 1:
                found.append(f"{key}: {sorted(finals)}")
            elif ("done", "ok") in finals and not self.ran[key]:
                found.append(f"{key} is done and never ran")
            elif "had not begun" in text and self.ran[key]:
                found.append(f"{key} had not begun, and ran")
        return found


def damage(path: Path) -> str | None:
    """What is wrong with a database; None for one that is sound, or not there yet."""
    if not path.exists():
        return None
    try:
        with sqlite3.connect(path) as db:
            verdict = str(db.execute("PRAGMA integrity_check").fetchone()[0])
        db.close()
    except sqlite3.Error as error:
        return str(error)
    return None if verdict == "ok" else verdict


def promises(chaos: Chaos, lives: int) -> list[Promise]:
    """What has to hold."""
    first = percentiles([start["first"] for start in chaos.starts])
    twice = [key for key, times in chaos.ran.items() if times > 1]
    ends = Counter(one["status"] for replies in chaos.desk.replies.values() for one in replies[-1:])
    accepted = [key for key, replies in chaos.desk.replies.items() if replies[0]["status"] == "accepted"]
    odd, unanswered = chaos.contradictions, chaos.desk.open
    for told in (*chaos.faults[:10], *odd[:10]):
        print(told)
    events, lost = len(chaos.kept["event"]), len(chaos.lost("event"))
    told = f"{len(chaos.desk.asked)} asked, {len(accepted)} accepted"
    return [
        Promise(
            f"{lives} kills: first answer within {START_S:g} s, p99",
            f"p50 {first['p50']:.2f}, p99 {first['p99']:.2f} s",
            first["p99"] <= START_S,
            wide=first["p50"] <= WIDE_START_S,
        ),
        Promise("what is on disk is sound, and nothing was set aside", f"{len(chaos.faults)} faults", not chaos.faults),
        Promise("no event that was kept is lost", f"{lost} of {events}", not lost and events > 0),
        Promise("events first arrive in their order", f"{chaos.misplaced} out of it", not chaos.misplaced),
        Promise(
            "no reply that was kept is lost",
            f"{len(chaos.lost('ack'))} of {len(chaos.kept['ack'])}",
            not chaos.lost("ack"),
        ),
        Promise("no command runs twice", f"{len(twice)} of {len(chaos.ran)} that ran", not twice),
        Promise("every command is answered in the end", f"{told}, {len(unanswered)} open", not unanswered),
        Promise("answers fit each other and what was done", f"{len(odd)} do not; {dict(ends)}", not odd),
    ]


def main() -> int:
    parser = arguments(__doc__ or "", 1000, 20, "kills")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    lives = count_of(asked)
    with stand(asked) as folder:
        broker = Broker(folder / "broker", embedded=asked.embedded).start()
        try:
            chaos, began = Chaos(folder, broker.port, asked.seed), time.monotonic()
            for number in range(lives):
                chaos.live(number)
                if (number + 1) % 50 == 0:
                    print(f"{number + 1} lives, {time.monotonic() - began:.0f} s", flush=True)
            chaos.end_in_peace()
        finally:
            broker.stop()
        table, facts = start_times(chaos), described(chaos, lives, broker.name, asked)
        print(table)
        return finish("chaos", asked, promises(chaos, lives), facts)


def start_times(chaos: Chaos) -> str:
    """A table of how long a start takes."""
    names = {
        "first": "from exec to the first answer, s",
        "imports": "of it until the agent begins: Python, imports, s",
        "agent": "of it from there: engine, snapshot, first frame, s",
        "cpu": "CPU time until the first answer, s",
    }
    rows = [f"| {'start':<50} |    p50 |    p99 |    max |", f"|{'-' * 52}|-------:|-------:|-------:|"]
    for name, text in names.items():
        found = percentiles([start[name] for start in chaos.starts])
        rows.append(f"| {text:<50} | {found['p50']:>6.2f} | {found['p99']:>6.2f} | {found['max']:>6.2f} |")
    return "\n".join(rows)


def described(chaos: Chaos, lives: int, broker: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Figures for the file."""
    return {
        "kills": lives,
        "before_first_answer": chaos.early,
        "seed": asked.seed,
        "broker": broker,
        "torch_imported": bool(chaos.starts[0]["torch"]),
        "start_s": {
            name: percentiles([start[name] for start in chaos.starts]) for name in ("first", "imports", "agent", "cpu")
        },
        "events_kept": len(chaos.kept["event"]),
        "replies_kept": len(chaos.kept["ack"]),
        "commands_asked": len(chaos.desk.asked),
        "commands_run": len(chaos.ran),
        "snapshots": chaos._generation,
        "faults": chaos.faults,
    }


if __name__ == "__main__":
    sys.exit(main())
