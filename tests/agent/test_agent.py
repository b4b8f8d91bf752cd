"""The agent as a whole, in this process: frames in, answers, snapshots, modes and commands out."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from agents import answered, running, settings, stream, until

from device_agents.agent import Agent
from device_agents.rerun import rerun
from edge_adapt.cli import run as edge_adapt
from edge_adapt.delta import Delta
from edge_adapt.errors import ConfigError, EdgeAdaptError, StateError

__all__ = ["running", "settings", "stream"]


def test_it_answers_learns_and_tells(running):
    agent = running()
    until(lambda: agent.board.status.version > 2 and agent.board.status.answered > 500)
    status = agent.board.status
    assert status.mode == "bounded_auto" and status.slot == "own"
    assert status.latency_ms["p50"] > 0 and status.learn["steps"] > 0 and status.host["rss_mb"] > 10
    assert 0 < status.confidence <= 1
    frame, point = agent.board.latest
    assert frame.shape == (16, 16, 3) and point.label.startswith("class-")


def test_a_finite_source_ends_the_agent_with_every_frame_answered(settings):
    agent = Agent(settings(source={"loop": False}))
    replies = []
    agent.listen(lambda frames, reply: replies.append((frames[0].number, reply)))
    assert agent.run() == 0
    assert [number for number, _ in replies] == list(range(256))
    assert agent.board.status.answered == 256


def test_a_stuck_sensor_is_one_after_as_many_frames_as_the_settings_say(running, tmp_path):
    same = tmp_path / "same.npz"
    np.savez(same, images=np.repeat(np.random.default_rng(0).integers(0, 255, (1, 16, 16, 3), np.uint8), 40, 0))
    agent = running(source={"path": same, "loop": False, "frozen_after": 30}, wait=False)
    until(lambda: agent.board.status.answered == 40)
    until(lambda: agent.board.status.frames.get("frozen"))
    assert agent.board.status.frames["frozen"] == 11


def test_shadow_learns_and_answers_from_source(running):
    agent = running(mode="shadow")
    until(lambda: agent.board.status.learn["steps"] > 5)
    status = agent.board.status
    assert status.slot == "source" and status.version == 0
    agent.commands.submit_local("set-mode", {"mode": "bounded_auto"}, "test")
    until(lambda: agent.board.status.version > 0)
    assert agent.settings.mode == "bounded_auto"


def test_in_recommend_a_person_approves(running):
    agent = running(mode="recommend")
    until(lambda: bool(agent.core.method.delta(agent.core.learned.state)))
    assert agent.board.status.version == 0
    told = agent.commands.submit_local("commit-adapter", {}, "test")
    assert told["status"] == "done", told
    until(lambda: agent.board.status.slot == "adapter")
    assert agent.core.loop.predictor.delta is agent.core.learned.given


def test_what_was_learned_survives_a_restart(running, settings):
    agent = running()
    until(lambda: agent.board.status.version > 2)
    agent.commands.submit_local("freeze", {"on": True}, "test")
    before = agent.core.loop.predictor.delta
    agent.stopping.set()
    until(lambda: agent.board.status.state == "offline")
    again = Agent(settings())
    again.keeper.begin()
    assert again.core.loop.predictor.delta.same_as(before)
    again.intake.start()
    again.stop()


def test_reset_is_one_command_away_and_answers_go_on(running):
    agent = running()
    until(lambda: agent.board.status.version > 2)
    agent.commands.submit_local("freeze", {"on": True}, "test")
    told = agent.commands.submit_local("reset", {}, "test")
    assert told["status"] == "done", told
    count = answered(agent)
    until(lambda: answered(agent) > count + 50)
    assert any(event.kind == "reset" for event in agent.board.events())


def test_rollback_without_a_snapshot_says_so_and_restore_takes_one_back(running):
    agent = running(snapshots={"every_s": 600})
    assert agent.commands.submit_local("rollback", {}, "test")["status"] == "failed"
    until(lambda: agent.board.status.version > 2)
    agent.commands.submit_local("freeze", {"on": True}, "test")
    assert agent.commands.submit_local("restore", {"slot": "own"}, "test")["status"] == "failed"
    assert agent.commands.submit_local("snapshot", {}, "test")["result"]["generation"] == 1
    kept = agent.core.loop.predictor.delta
    agent.commands.submit_local("restore", {"slot": "source"}, "test")
    assert not agent.core.loop.predictor.delta
    until(lambda: agent.board.status.slot == "source")
    told = agent.commands.submit_local("restore", {"slot": "own"}, "test")
    assert told["status"] == "done", told
    assert agent.core.loop.predictor.delta.same_as(kept)
    until(lambda: agent.board.status.slot == "own")
    assert "no snapshot of 'adapter'" in agent.commands.submit_local("restore", {"slot": "adapter"}, "test")["text"]


def test_an_adapter_that_was_committed_is_restored_by_its_name(running):
    agent = running(mode="recommend", snapshots={"every_s": 600})
    until(lambda: bool(agent.core.method.delta(agent.core.learned.state)))
    agent.commands.submit_local("freeze", {"on": True}, "test")
    agent.commands.submit_local("snapshot", {}, "test")
    agent.commands.submit_local("commit-adapter", {}, "test")
    given = agent.core.learned.given
    agent.commands.submit_local("restore", {"slot": "source"}, "test")
    assert not agent.core.loop.predictor.delta
    told = agent.commands.submit_local("restore", {"slot": "adapter"}, "test")
    assert told["status"] == "done", told
    assert agent.core.loop.predictor.delta.same_as(given)


def test_labels_that_come_late_give_an_interval(running):
    agent = running()
    until(lambda: answered(agent) > 200)
    labels = [[number, 0] for number in range(100, 150)]
    told = agent.commands.submit_local("label-reveal", {"labels": labels}, "test")
    assert told["result"]["known"] == 50
    estimate = agent.board.status.estimate
    assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 100
    assert estimate["high"] - estimate["low"] > 3
    again = agent.commands.submit_local("label-reveal", {"labels": labels}, "test")
    assert again["result"]["known"] == 0


def test_live_settings_change_and_others_are_refused(running):
    agent = running()
    told = agent.commands.submit_local("set-config", {"config": {"budget.learn_ms_per_s": 7.0}}, "test")
    assert told["status"] == "done", told
    assert agent.core.budget.limits.learn_ms_per_s == 7.0
    told = agent.commands.submit_local("set-config", {"config": {"source.fps": 3}}, "test")
    assert told["status"] == "rejected"


def test_a_reload_with_a_bad_file_keeps_the_old_settings(running, tmp_path):
    agent = running()
    agent.config = tmp_path / "agent.yaml"
    agent.config.write_text("mode: shadwo\n")
    agent.reload()
    until(lambda: any("was not reloaded" in event.text for event in agent.board.events()))
    assert agent.settings.mode == "bounded_auto"


def test_drain_ends_it(running):
    agent = running()
    assert agent.commands.submit_local("drain", {}, "test")["status"] == "done"
    until(lambda: agent.board.status.state == "offline")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"method": {"name": "momentz"}}, "did you mean moments"),
        ({"engine": {"name": "onnxruntine"}}, "did you mean onnxruntime"),
        ({"method": {"name": "foa"}}, "foa cannot run on bundle"),
        ({"bundle": "nowhere"}, "is no bundle"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(settings, facts, said):
    threads = threading.active_count()
    with pytest.raises(EdgeAdaptError, match=said):
        Agent(settings(**facts))
    assert threading.active_count() == threads


def test_a_snapshot_of_another_method_is_not_used(running, settings):
    agent = running()
    until(lambda: agent.board.status.version > 2)
    agent.stopping.set()
    until(lambda: agent.board.status.state == "offline")
    other = Agent(settings(method={"name": "tent"}))
    other.keeper.begin()
    assert not other.core.loop.predictor.delta
    assert any("it was learned by 'moments'" in event.text for event in other.board.events())
    other.intake.start()
    other.stop()


def test_errors_of_wishes_reach_the_one_who_wished(running):
    agent = running()
    with pytest.raises((ConfigError, StateError)):
        agent.commands.execute("restore", {"slot": "adapter"}, by="test")
    assert isinstance(agent.core.loop.predictor.delta, Delta)


def test_a_recorded_run_is_computed_again_bit_for_bit(running, settings, tmp_path, capsys):
    """R9."""
    agent = running(record_mb=50, method={"name": "auto"})
    until(lambda: agent.board.status.version > 2)
    agent.commands.submit_local("reset", {}, "test")
    agent.commands.submit_local("set-mode", {"mode": "shadow"}, "test")
    agent.commands.submit_local("set-mode", {"mode": "bounded_auto"}, "test")
    count = answered(agent)
    until(lambda: answered(agent) > count + 200)
    agent.stopping.set()
    until(lambda: agent.board.status.state == "offline")
    assert agent.recording.lost == 0
    made = rerun(settings(method={"name": "auto"}), tmp_path / "state" / "recording")
    assert made.frames > 200 and made.version > 2 and made.ended == "the record ends"
    config = tmp_path / "agent.yaml"
    again = settings(method={"name": "auto"}).model_dump(mode="json", exclude_unset=True)
    config.write_text(json.dumps(again) + "\n")
    assert edge_adapt(["rerun", str(config), str(tmp_path / "state" / "recording")]) == 0
    assert f"{made.frames} frames" in capsys.readouterr().out
    with pytest.raises(StateError, match="recorded with method"):
        rerun(settings(), tmp_path / "state" / "recording")
