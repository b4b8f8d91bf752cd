"""The supervisor: started again while that helps, given up when it does not."""

from __future__ import annotations

import math
from itertools import pairwise

from edge_adapt.runtime.supervisor import Supervisor


class Part:
    name = "part"

    def __init__(self, silent: float = 0.0, *, heals: bool = True) -> None:
        self.silent, self.heals, self.restarts = silent, heals, 0

    def silent_s(self, now: float) -> float:
        return self.silent

    def restart(self) -> None:
        self.restarts += 1
        if self.heals:
            self.silent = 0.0


def made(*parts, restarts: int = 3):
    told = []
    supervisor = Supervisor(
        parts, stuck_s=10, restarts=restarts, window_s=60, tell=lambda *what: told.append(what)
    )
    return supervisor, told


def test_a_part_that_shows_life_is_left_alone():
    part = Part(9.9)
    supervisor, told = made(part)
    for now in range(100):
        supervisor.check(float(now))
    assert part.restarts == 0 and told == []


def test_a_stuck_part_is_started_again_and_said_so():
    part = Part(10.5)
    supervisor, told = made(part)
    supervisor.check(1.0)
    supervisor.check(2.0)
    assert part.restarts == 1 == supervisor.restarts
    assert told == [("part", "no sign of life for 10.5 s", "restarted")]


def test_a_part_that_keeps_dying_is_given_up_within_the_window_and_others_live_on():
    dying, other = Part(math.inf, heals=False), Part()
    other.name = "other"
    supervisor, told = made(dying, other)
    for now in range(60):
        supervisor.check(float(now))
    assert dying.restarts == 3 and other.restarts == 0
    assert supervisor.given_up == ("part",)
    assert told[-1] == ("part", "its thread ended; 3 restarts within 60 s", "given up")


def test_rare_restarts_are_no_reason_to_give_up():
    part = Part()
    supervisor, _ = made(part)
    for hour in range(20):
        part.silent = math.inf
        supervisor.check(3600.0 * hour)
    assert part.restarts == 20 and not supervisor.given_up


def test_restarts_in_a_row_wait_longer_each_time():
    part = Part(math.inf, heals=False)
    supervisor, _ = made(part, restarts=100)
    times = []
    for step in range(600):
        before = part.restarts
        supervisor.check(step / 100)
        if part.restarts > before:
            times.append(step / 100)
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert waits == sorted(waits) and waits[0] < 0.2 and waits[-1] > 1


def test_a_restart_that_fails_counts_and_is_told():
    class Hopeless(Part):
        def restart(self) -> None:
            raise OSError("no memory\nfor another engine")

    supervisor, told = made(Hopeless(math.inf))
    supervisor.check(0.0)
    assert told == [("part", "its thread ended; its restart failed: no memory", "restarted")]
