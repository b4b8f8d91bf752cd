"""Stages that hang, fail or die in a whole agent: rows 28, 29 and 35."""

from __future__ import annotations

import threading
import time

import pytest
from agents import (
    ROOT,
    calm_board,
    check_source_answers,
    command,
    degraded,
    goes_on,
    learned,
    mqtt_to,
    running,
    sabotaged,
    settings,
    stream,
    told,
    until,
)
from brokers import mosquitto, observer

from device_agents import stages
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine

__all__ = ["calm_board", "mosquitto", "observer", "running", "sabotaged", "settings", "stream"]
pytestmark = pytest.mark.usefixtures("calm_board")
PLENTY = {"learn_ms_per_s": 1000.0}
IMPATIENT = {"stuck_s": 1.0, "restarts": 2, "restart_window_s": 60.0}


@pytest.mark.fault(28)
def test_a_step_that_never_ends_is_left_alone_and_learning_begins_anew(running, sabotaged):
    """R1, R7: within 10 s another learner is at work; answers never stop."""
    release, calls = threading.Event(), []

    def hang_once(real, *given):
        calls.append(1)
        if len(calls) == 5:
            release.wait(60)
        return real(*given)

    sabotaged(step=hang_once)
    agent = running(supervisor=IMPATIENT, budget=PLENTY)
    until(lambda: len(calls) >= 5)
    start = time.monotonic()
    goes_on(agent)
    until(lambda: told(agent, "learning was restarted"))
    learned(agent)
    assert time.monotonic() - start < 10
    assert agent.board.status.restarts == 1 and agent.board.status.state == "ready"
    release.set()


@pytest.mark.fault(28)
def test_a_learner_that_hangs_always_is_given_up_and_source_answers(running, sabotaged, tiny_data, device_bundle):
    """R1, R7: `safe`: the model as exported answers, nothing is learned, commands are obeyed."""
    release, hang = threading.Event(), threading.Event()

    def hang_later(real, *given):
        if hang.is_set():
            release.wait(60)
        return real(*given)

    sabotaged(step=hang_later)
    agent = running(supervisor=IMPATIENT, budget=PLENTY)
    learned(agent)
    assert agent.core.loop.predictor.delta
    hang.set()
    until(lambda: agent.board.status.state == "safe", timeout_s=15)
    assert agent.board.status.why == ("learning was given up",)
    assert agent.board.status.restarts == IMPATIENT["restarts"]
    check_source_answers(agent, tiny_data, device_bundle)
    assert command(agent, "ping")["result"]["state"] == "safe"
    assert command(agent, "set-config", config={"telemetry.interval_s": 3.0})["status"] == "done"
    started = time.monotonic()
    assert command(agent, "freeze", on=True)["status"] == "done"
    assert time.monotonic() - started < 3, "what concerns the learner is still done"
    assert agent.board.status.slot == "source" and not agent.core.loop.predictor.delta
    release.set()


@pytest.mark.fault(28)
def test_an_engine_run_that_never_ends_is_left_alone_and_another_engine_answers(running, monkeypatch):
    """R1, R7: within 10 s the next frames are answered, by a new engine."""
    release, real, hang = threading.Event(), OnnxRuntimeEngine.observe, threading.Event()

    def observe(self, frames, **needs):
        if hang.is_set() and threading.current_thread().name == stages.ANSWERING:
            hang.clear()
            release.wait(60)
        return real(self, frames, **needs)

    monkeypatch.setattr(OnnxRuntimeEngine, "observe", observe)
    agent = running(supervisor=IMPATIENT)
    goes_on(agent)
    start = time.monotonic()
    hang.set()
    until(lambda: told(agent, "answering was restarted"))
    goes_on(agent)
    assert time.monotonic() - start < 10 and agent.core.rebuilds == 1
    release.set()


@pytest.mark.fault(28)
@pytest.mark.parametrize("how", ["hangs", "fails"])
def test_a_method_that_spoils_every_answer_is_put_out_of_the_way(
    running, sabotaged, monkeypatch, how, tiny_data, device_bundle
):
    """R1: what a method does to answers, in the thread that answers, cannot end the answers."""
    release, spoil = threading.Event(), threading.Event()

    def watch(real, *given):
        if spoil.is_set() and threading.current_thread().name == stages.ANSWERING:
            if how == "fails":
                raise ValueError("spoiled")
            release.wait(60)
        return real(*given)

    sabotaged(watch=watch)
    agent = running(supervisor=IMPATIENT)
    goes_on(agent)
    spoil.set()
    if how == "hangs":
        until(lambda: agent.board.status.state == "safe", timeout_s=15)
        check_source_answers(agent, tiny_data, device_bundle)
    goes_on(agent)
    release.set()


@pytest.mark.fault(29)
def test_a_learner_that_always_fails_is_switched_off_for_good(running, sabotaged):
    """R1, R7: three tries, then learning is off, which is told; no restart, no loop, answers go on."""
    calls = []

    def fail(real, *given):
        calls.append(1)
        raise RuntimeError("broken for good")

    sabotaged(step=fail)
    agent = running(budget=PLENTY)
    degraded(agent, "learning is off")
    goes_on(agent, 300)
    assert len(calls) == 3 and agent.board.status.restarts == 0
    assert told(agent, "broken for good") and told(agent, "learning is off: 3 steps in a row failed")


@pytest.mark.fault(29)
def test_a_stage_whose_thread_dies_again_and_again_is_not_restarted_for_ever(running, monkeypatch):
    """R1, R7: waits between restarts grow, then it is given up: `safe`, and answers go on."""
    monkeypatch.setattr(threading, "excepthook", lambda facts: None)
    moments = []

    def turn(self):
        moments.append(time.monotonic())
        raise SystemExit

    monkeypatch.setattr(stages.LearnStage, "turn", turn)
    agent = running(supervisor={**IMPATIENT, "restarts": 3})
    until(lambda: agent.board.status.state == "safe")
    goes_on(agent, 100)
    assert len(moments) <= 5 and agent.board.status.restarts == 3


@pytest.mark.fault(28)
def test_a_bug_in_what_watches_and_tells_ends_no_answer(running, monkeypatch):
    """R1: the main thread goes on looking; when the bug is over, so is the trouble."""
    agent = running()
    with monkeypatch.context() as patch:
        patch.setattr(agent.lookout, "look", lambda uptime_s: 1 // 0)
        uptime = agent.board.status.uptime_s
        goes_on(agent, 300)
        time.sleep(0.6)  # at least one tick
        assert agent.board.status.uptime_s == uptime
        goes_on(agent)
    until(lambda: agent.board.status.uptime_s > uptime)


@pytest.mark.fault(35)
def test_a_step_that_never_ends_does_not_hold_up_the_stop(running, sabotaged, mosquitto, observer):
    """R7: asked to stop it says `draining`, and `offline` when its time is over, whatever hangs."""
    release, stuck = threading.Event(), threading.Event()

    def hang(real, *given):
        stuck.set()
        release.wait(60)
        raise RuntimeError("released")

    sabotaged(step=hang)
    broker = mosquitto()
    watcher = observer(broker)
    agent = running(**mqtt_to(broker), budget=PLENTY, supervisor={"drain_s": 1.0})
    until(lambda: stuck.is_set() and watcher.of(f"{ROOT}/state"))
    agent.stopping.set()
    try:
        until(lambda: watcher.of(f"{ROOT}/state")[-1]["d"]["s"] == "offline")
    finally:
        release.set()
    states = [each["d"]["s"] for each in watcher.of(f"{ROOT}/state")]
    assert "draining" in states and "lost" not in states
