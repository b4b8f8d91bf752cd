"""Faults of disk, memory, heat, clock, camera and files, in a whole agent: rows 5 to 7, 18, 22, 24, 25."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from agents import (
    answered,
    calm_board,
    check_source_answers,
    command,
    degraded,
    goes_on,
    learned,
    ready,
    running,
    sabotaged,
    settings,
    stream,
    told,
    until,
)

from device_agents.agent import Agent
from edge_adapt import far
from edge_adapt.methods import tent
from edge_adapt.streams.live.protocol import Frame, SourceLostError

__all__ = ["calm_board", "running", "sabotaged", "settings", "stream"]
pytestmark = pytest.mark.usefixtures("calm_board")
PLENTY = {"learn_ms_per_s": 1000.0}
IMPATIENT = {"stuck_s": 1.0, "restarts": 2, "restart_window_s": 60.0}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB of its own, for `state_dir`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = subprocess.run(words, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


# Keeping.


@pytest.mark.fault(5)
def test_with_every_snapshot_corrupt_it_starts_from_source_and_says_so(running, tmp_path):
    """R1, R2, R7: source answers, both bad files are told of, and learning begins again."""
    agent = running(snapshots={"every_s": 0.5})
    until(lambda: len(list((tmp_path / "state/snapshots").glob("?.safetensors"))) == 2)
    agent.stopping.set()
    until(lambda: agent.board.status.state == "offline")
    for path in (tmp_path / "state/snapshots").iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    again = running(mode="shadow")
    goes_on(again)
    assert again.board.status.slot == "source" and again.board.status.version == 0
    assert told(again, "snapshot A") and told(again, "snapshot B")
    assert len(list((tmp_path / "state/snapshots").glob("*.bad"))) >= 2
    command(again, "set-mode", mode="bounded_auto")
    learned(again)


def fill(folder: Path) -> Path:
    """Not a byte is left."""
    filler = folder / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


@pytest.mark.fault(6)
def test_a_full_disk_stops_neither_answers_nor_learning_and_is_over_when_space_is_freed(running, small_disk):
    """R1, R2, R7: it goes on from memory, says so within 5 s, keeps the old snapshot, and recovers by itself."""
    agent = running(state_dir=small_disk / "state", snapshots={"every_s": 0.5}, budget=PLENTY)
    until(lambda: agent.board.status.snapshot_age_s is not None)
    filler = fill(small_disk)
    degraded(agent, "snapshots cannot be saved")
    goes_on(agent)
    learned(agent)
    assert agent.store.load_latest() is not None
    assert command(agent, "snapshot")["status"] == "failed"
    assert command(agent, "ping")["status"] == "done"
    filler.unlink()
    ready(agent)
    assert command(agent, "snapshot")["status"] == "done"


@pytest.mark.fault(7)
def test_a_disk_that_becomes_read_only_stops_neither_answers_nor_learning(running, small_disk):
    """R1, R2, R7: as with a full disk; when it can be written again, it is."""
    agent = running(state_dir=small_disk / "state", snapshots={"every_s": 0.5}, budget=PLENTY)
    until(lambda: agent.board.status.snapshot_age_s is not None)
    # Open databases forbid a remount, so the folder of the snapshots becomes read-only by itself.
    snapshots = small_disk / "state/snapshots"
    subprocess.run(["mount", "--bind", str(snapshots), str(snapshots)], check=True)
    try:
        remount(snapshots, "bind,ro")
        degraded(agent, "snapshots cannot be saved")
        goes_on(agent)
        learned(agent)
        assert agent.store.load_latest() is not None
        remount(snapshots, "bind,rw")
        ready(agent)
        assert told(agent, "snapshots can be saved again")
    finally:
        subprocess.run(["umount", "-l", str(snapshots)], check=True)


# Learning.


def sound(agent: Agent) -> bool:
    """Everything in force is finite."""
    tensors = agent.core.loop.predictor.delta.tensors.values()
    return all(np.isfinite(value).all() for value in tensors)


@pytest.mark.fault(18)
@pytest.mark.parametrize("ill", ["nan loss", "rate of a million"])
def test_a_step_that_would_poison_the_weights_is_discarded_and_counted(running, monkeypatch, ill):
    """R1, R6: weights stay finite, the guard is counted, and answers are those of a sound model."""
    method = {"name": "tent", "settings": {}}
    if ill == "nan loss":
        monkeypatch.setattr(tent, "entropy", lambda logits: logits.sum(1) * torch.nan)
    else:
        method["settings"] = {"lr": 1e6}
    agent = running(method=method, budget=PLENTY)
    until(lambda: agent.board.status.learn["steps"] > 20 and sum(agent.board.status.guards.values()) > 0)
    assert sound(agent)
    replies = []
    agent.listen(lambda frames, reply: replies.append(reply.logits))
    until(lambda: len(replies) > 100)
    assert np.isfinite(np.concatenate(replies)).all()
    assert not agent.board.status.frozen or told(agent, "learning is off")


@pytest.mark.fault(24)
def test_short_of_memory_it_stops_learning_and_answers_on(running, calm_board):
    """R1, R4, R7: above the limit nothing is learned, which is told; below it learning goes on."""
    agent = running(budget={**PLENTY, "memory_mb": 4000.0})
    learned(agent)
    calm_board["rss_mb"] = 4001.0
    degraded(agent, "memory")
    steps = until(lambda: agent.core.loop.waiting == 0 and agent.core.loop.counts["steps"])
    goes_on(agent, 200)
    assert agent.core.loop.counts["steps"] <= steps + 1 and agent.core.loop.counts["shed"] > 0
    calm_board["rss_mb"] = 3900.0
    goes_on(agent)
    assert "memory" in agent.board.status.why, "it has to fall clearly below the limit"
    calm_board["rss_mb"] = 3700.0
    ready(agent)
    learned(agent)


@pytest.mark.fault(24)
def test_a_learner_that_gets_no_memory_is_switched_off_and_answers_go_on(running, sabotaged):
    """R1, R7: MemoryError in a step costs no answer; after three in a row learning is off, and that is told."""
    sabotaged(step=lambda real, *given: np.empty(1 << 56, np.uint8))
    agent = running(budget=PLENTY)
    degraded(agent, "learning is off")
    assert told(agent, "MemoryError") or told(agent, "ArrayMemoryError")
    goes_on(agent, 200)
    assert agent.board.status.version == 0 and agent.board.status.restarts == 0


@pytest.mark.fault(24)
@pytest.mark.parametrize("times", [2, 1000])
def test_a_gpu_without_memory_costs_learning_and_no_answer(running, monkeypatch, times):
    """R1, R4, R7: the tail finds the GPU full; a moment of it is got over, and for good means that learning is off."""
    raised = []

    class Starved(far.FarTail):
        def __init__(self, bundle, device, memory_mb):
            super().__init__(bundle, device="cpu")
            self._far.with_features = self._or_starve(self._far.with_features)

        def _or_starve(self, real):
            def asked(*given, **facts):
                if len(raised) < times:
                    raised.append(1)
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return real(*given, **facts)

            return asked

    monkeypatch.setattr(far, "tail_on", Starved)
    agent = running(budget=PLENTY, method={"name": "tent", "settings": {"window": 4}})
    until(lambda: told(agent, "OutOfMemoryError"))
    if times == 1000:
        degraded(agent, "learning is off", within_s=20)
    else:
        until(lambda: len(raised) == times)
        learned(agent)
    goes_on(agent, 200)
    assert agent.board.status.restarts == 0


@pytest.mark.fault(25)
def test_a_hot_board_stops_learning_until_it_is_clearly_cooler(running, calm_board):
    """R1, R7: at 95 degrees nothing is learned, which is told; just below the limit still not; well below it is."""
    agent = running(budget={**PLENTY, "temperature_c": 85.0})
    learned(agent)
    calm_board["temperature_c"] = 95.0
    degraded(agent, "thermal")
    steps = until(lambda: agent.core.loop.waiting == 0 and agent.core.loop.counts["steps"])
    calm_board["temperature_c"] = 83.0
    since = agent.board.status.uptime_s
    until(lambda: agent.board.status.uptime_s > since + 1)
    goes_on(agent, 100)
    assert agent.board.status.why == ("thermal",) and agent.core.loop.counts["steps"] <= steps + 1
    calm_board["temperature_c"] = 79.0
    ready(agent)
    learned(agent)


# Clock, camera, bundle.


@pytest.mark.fault(22)
def test_a_wall_clock_that_jumps_by_years_disturbs_nothing(running, monkeypatch):
    """R1, R7: no stage is taken for stuck, snapshots keep their pace, commands are obeyed."""
    real, offset = time.time_ns, [0]
    monkeypatch.setattr(time, "time_ns", lambda: real() + offset[0])
    monkeypatch.setattr(time, "time", lambda: (real() + offset[0]) / 1e9)
    agent = running(supervisor=IMPATIENT, snapshots={"every_s": 0.5}, budget=PLENTY)
    until(lambda: agent.board.status.snapshot_age_s is not None)
    for years in (2, -2, -56, 60, 0):
        offset[0] = int(years * 365.25 * 86_400 * 1e9)
        goes_on(agent)
        learned(agent)
        assert command(agent, "ping")["status"] == "done"
        until(lambda: (agent.board.status.snapshot_age_s or 9) < 0.6)
    assert agent.board.status.restarts == 0 and agent.board.status.state == "ready"


class Camera:
    """A source that can be unplugged."""

    paced = True

    def __init__(self, images: np.ndarray) -> None:
        self.images, self.plugged, self.number = images, True, 0

    def open(self) -> None:
        if not self.plugged:
            raise SourceLostError("camera 0 cannot be opened", remedy="plug it in")

    def read(self, timeout_s: float) -> Frame | None:
        self.open()
        time.sleep(0.002)
        self.number += 1
        return Frame(self.number, time.monotonic(), self.images[self.number % len(self.images)], "camera")

    def close(self) -> None:
        pass


def test_a_camera_that_is_unplugged_and_back_is_told_and_used_again(running, monkeypatch, tiny_data):
    """R1, R7: `degraded` while there are no frames; commands are obeyed; the next frame is answered."""
    camera = Camera(tiny_data.images)
    monkeypatch.setattr("device_agents.agent.open_source", lambda *given, **facts: camera)
    agent = running()
    goes_on(agent)
    camera.plugged = False
    degraded(agent, "source: camera 0 cannot be opened")
    count = answered(agent)
    assert command(agent, "ping")["result"]["state"] == "degraded"
    camera.plugged = True
    ready(agent)
    until(lambda: answered(agent) > count + 20)
    assert agent.board.status.restarts == 0 and told(agent, "the source is back")


def test_a_bundle_that_is_replaced_while_it_runs_changes_no_answer(
    running, tmp_path, device_bundle, reference_bundle, tiny_data, sabotaged
):
    """R1, R9: what was loaded goes on; a new engine is not made of files that are another model's."""
    folder, release, hang = tmp_path / "bundle", threading.Event(), threading.Event()
    shutil.copytree(device_bundle.path, folder)

    def step(real, *given):
        if hang.is_set():
            release.wait(60)
        return real(*given)

    sabotaged(step=step)
    agent = running(bundle=folder, supervisor=IMPATIENT, mode="shadow")
    shutil.rmtree(folder)
    shutil.copytree(reference_bundle.path, folder)
    goes_on(agent)
    check_source_answers(agent, tiny_data, device_bundle)
    hang.set()
    until(lambda: agent.board.status.state == "safe", timeout_s=15)
    assert told(agent, "was replaced")
    check_source_answers(agent, tiny_data, device_bundle)
    release.set()
