"""The intake: pace, losses, ends, and a heartbeat all the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from edge_adapt.runtime.intake import WAIT_S, Intake, next_due
from edge_adapt.runtime.ring import Ring
from edge_adapt.streams.live import BrokenFrameError, Frame, SourceEnded, SourceLostError


class Script:
    """A source that does what a list says: a number of frames, or something to raise; then nothing comes any more."""

    def __init__(self, *acts: int | Exception, paced: bool = False, every_s: float = 0.0) -> None:
        self.paced, self.every_s, self.acts = paced, every_s, list(acts)
        self.opened = self.closed = self.number = 0
        self.refuse: Exception | None = None

    def open(self) -> None:
        self.opened += 1
        if self.refuse is not None:
            raise self.refuse

    def read(self, timeout_s: float) -> Frame | None:
        while self.acts and self.acts[0] == 0:
            self.acts.pop(0)
        if not self.acts:
            time.sleep(min(timeout_s, 0.002))
            return None
        if isinstance(self.acts[0], Exception):
            raise self.acts.pop(0)
        self.acts[0] -= 1
        time.sleep(self.every_s)
        self.number += 1
        return Frame(self.number - 1, time.monotonic(), np.zeros((2, 2), np.uint8), str(self.number - 1))

    def close(self) -> None:
        self.closed += 1


def lost(text: str = "unplugged") -> SourceLostError:
    return SourceLostError(text, remedy="plug it in")


@pytest.fixture
def running():
    """Starts intakes and stops them."""
    started: list[Intake] = []

    def run(source, ring: Ring[Frame] | None = None, **facts) -> tuple[Intake, Ring[Frame], list[tuple[str, str]]]:
        told: list[tuple[str, str]] = []
        ring = Ring(10_000) if ring is None else ring
        intake = Intake(source, ring, tell=lambda *what: told.append(what), retry_s=(0.01, 0.05), **facts)
        intake.start()
        started.append(intake)
        return intake, ring, told

    yield run
    assert all(intake.stop(5) for intake in started)


def until(true: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def test_frames_arrive_in_order_and_the_end_is_told_once(running):
    source = Script(50, SourceEnded())
    intake, ring, told = running(source)
    until(lambda: intake.ended)
    assert [frame.number for frame in ring.take(99)] == list(range(50))
    assert told == [("ended", "the source ended after 50 frames")] and source.closed
    before = intake.beat
    until(lambda: intake.beat > before)  # it ended, it is not stuck
    assert intake.alive and not ring.closed


def test_a_lost_source_is_told_once_and_read_on_when_it_is_back(running):
    source = Script(3, lost(), 4)
    source_refuses_from = threading.Event()

    class Unplugged(Script):
        def open(self) -> None:
            super().open()
            if source_refuses_from.is_set():
                raise lost("still unplugged")

        def read(self, timeout_s: float) -> Frame | None:
            try:
                return super().read(timeout_s)
            except SourceLostError:
                source_refuses_from.set()
                raise

    source = Unplugged(3, lost(), 4)
    intake, ring, told = running(source)
    until(lambda: source.opened >= 4)
    assert intake.lost and [what for what, _ in told] == ["lost"] and len(ring) == 3
    before = intake.beat
    until(lambda: intake.beat > before)
    source_refuses_from.clear()
    until(lambda: intake.frames == 7)
    assert not intake.lost and intake.losses == 1
    assert [what for what, _ in told] == ["lost", "back"] and told[0][1] == "unplugged"


def test_the_source_is_opened_again_less_and_less_often():
    waits: list[float] = []
    intake = Intake(Script(), Ring(1), retry_s=(0.5, 10.0))
    intake._pause = lambda seconds: bool(waits.append(seconds))  # type: ignore[method-assign]
    for _ in range(50):
        intake._lose(lost())
    assert waits[:6] == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0] and set(waits[6:]) == {10.0}


def test_whatever_a_driver_raises_counts_as_a_loss(running, caplog):
    intake, _, told = running(Script(1, ValueError("driver"), 1))
    until(lambda: intake.frames == 2)
    assert told[0] == ("lost", "the source failed: ValueError('driver')") and told[1][0] == "back"
    assert "driver" in caplog.text


def test_broken_frames_are_skipped_counted_and_told(running):
    intake, _, told = running(Script(2, BrokenFrameError("image a.jpg", remedy="send it again"), 2))
    until(lambda: intake.frames == 4)
    assert intake.broken == 1 and told == [("broken", "image a.jpg")] and intake.losses == 0


def test_recordings_are_read_at_the_pace_that_is_asked_for(running):
    started = time.monotonic()
    intake, _, _ = running(Script(1000), fps=100.0)
    until(lambda: intake.frames >= 30)
    assert 0.25 < time.monotonic() - started < 3


def test_a_camera_is_read_dry_and_thinned_out(running):
    source = Script(100, paced=True, every_s=0.004)
    intake, ring, _ = running(source, fps=50.0)
    until(lambda: source.number == 100)
    intake.stop(5)
    assert intake.frames + intake.thinned == 100
    assert 10 <= intake.frames < 60 and len(ring) == intake.frames  # 0.4 s or more, at 50 a second


def test_a_camera_at_the_pace_that_is_asked_for_loses_nothing_to_jitter():
    clock, rng = [0.0], np.random.default_rng(0)
    intake = Intake(Script(paced=True), Ring(10_000), fps=15.0, clock=lambda: clock[0])
    for number in range(1000):
        clock[0] = number / 15 + rng.uniform(-0.02, 0.02)
        intake._arrived(Frame(number, clock[0], np.zeros(1), ""))
    assert intake.thinned == 0 and intake.frames == 1000


def test_the_next_frame_is_due_on_schedule_and_a_pause_is_not_made_up_for():
    assert next_due(10.0, 10.02, 0.1) == pytest.approx(10.1)
    assert next_due(10.0, 9.96, 0.1) == pytest.approx(10.1)
    assert next_due(10.0, 15.0, 0.1) == pytest.approx(15.1)
    assert next_due(10.0, 12.0, 0.0) == 12.0


def test_a_ring_that_blocks_holds_the_source_back_and_loses_nothing(running):
    ring: Ring[Frame] = Ring(2, "block")
    source = Script(20, SourceEnded())
    intake, _, _ = running(source, ring)
    until(lambda: len(ring) == 2)
    time.sleep(0.02)
    assert source.number == 3
    before = intake.beat
    until(lambda: intake.beat > before, 2 + 4 * WAIT_S)  # it waits, it is not stuck
    got = []
    until(lambda: bool(got.extend(frame.number for frame in ring.take(5, 0.1))) or len(got) == 20)
    assert got == list(range(20)) and ring.dropped == 0


@pytest.mark.parametrize("policy", ["newest", "oldest", "block"])
def test_it_stops_at_once_with_a_full_or_a_closed_ring(policy):
    ring: Ring[Frame] = Ring(1, policy)
    intake = Intake(Script(10**9), ring, fps=None)
    intake.start()
    until(lambda: intake.frames >= 1)
    ring.close()
    assert intake.stop(2) and intake.stop(2) and not intake.alive


def test_stopping_tells_when_a_driver_holds_the_thread():
    let_go = threading.Event()

    class Stuck(Script):
        def read(self, timeout_s: float) -> Frame | None:
            let_go.wait(10)
            return None

    intake = Intake(Stuck(), Ring(1))
    intake.start()
    until(lambda: intake.source.opened == 1)
    assert not intake.stop(0.05)
    let_go.set()
    assert intake.stop(5)
    assert Intake(Script(), Ring(1)).stop()  # never started
