"""Faults inside the device, and what the whole agent makes of them: rows 5 to 7, 18, 20 to 22, 24, 25, 28, 29."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from agents import (
    answered,
    command,
    degraded,
    goes_on,
    ready,
    running,
    sabotaged,
    settings,
    stream,
    told,
    until,
)

from benchmarks import demo
from device_agents import looking, stages
from device_agents.agent import Agent
from device_agents.host import read_host
from edge_adapt.bundle import Bundle
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.methods import tent
from edge_adapt.preprocess import Preprocess
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.streams.data import Dataset
from edge_adapt.streams.live.protocol import Frame, SourceLostError
from exporters.export import export, from_module

__all__ = ["running", "sabotaged", "settings", "stream"]
PLENTY = {"learn_ms_per_s": 1000.0}
IMPATIENT = {"stuck_s": 1.0, "restarts": 2, "restart_window_s": 60.0}


@pytest.fixture(autouse=True)
def calm_board(monkeypatch):
    """A board that is neither hot nor short of power, whatever this machine measures; returns what it tells."""
    facts: dict[str, float] = {"temperature_c": 40.0}
    monkeypatch.setattr(looking, "read_host", lambda: {**read_host(), **facts})
    return facts


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


def learned(agent: Agent, versions: int = 2) -> None:
    """It goes on learning, and what it learns takes force."""
    version = agent.board.status.version
    until(lambda: agent.board.status.version >= version + versions, "it learns no more")


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


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[Bundle, Dataset]:
    """A trained network and images that it has not seen; the weights are those of `edge-adapt demo`."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    train, test = demo._halves()
    net = demo._trained(train, lambda what, done, total: None, lambda line: None)
    model = from_module(net, "digits", demo.INPUT, classes=[str(digit) for digit in range(10)])
    folder = export(model, tmp_path_factory.mktemp("digits") / "bundle", calibration=train.images, cut="blocks.2")
    return Bundle.load(folder), test


def source_share(bundle: Bundle, images: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of the model as exported, in per cent."""
    with closing(OnnxRuntimeEngine(bundle)) as engine:
        best = Predictor(bundle, engine).answer(Preprocess(bundle.manifest.input)(images)).logits.argmax(1)
    return 100 * float((best == labels).mean())


def noisy(images: np.ndarray, seed: int) -> np.ndarray:
    """The same pictures, never the same bytes."""
    noise = np.random.default_rng(seed).normal(0, 4, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


NOTICED = 200
"""Frames after which it has noticed that the scene is another one; here they come as fast as they can be answered."""


def unharmed_by(between: np.ndarray, digits, settings, tmp_path, method: str) -> Agent:
    """R8: play clean images, `between`, clean images; these are answered at most a point worse than by source."""
    bundle, data = digits
    first, last = noisy(data.images, 1), noisy(data.images, 2)
    np.savez(tmp_path / "all.npz", a=first, b=between, c=last)
    source = {"path": tmp_path / "all.npz", "loop": False, "batch": 4}
    agent = Agent(settings(bundle=bundle.path, source=source, budget=PLENTY, method={"name": method}))
    best: list[np.ndarray] = []
    agent.listen(lambda frames, reply: best.append(reply.logits.argmax(1)))
    assert agent.run() == 0
    classes = np.concatenate(best)
    assert len(classes) == len(first) + len(between) + len(last), "every frame was answered"
    again, labels = last[NOTICED:], data.labels[NOTICED:]
    share = 100 * float((classes[-len(again) :] == labels).mean())
    assert share >= source_share(bundle, again, labels) - 1
    return agent


@pytest.mark.fault(20)
@pytest.mark.parametrize("method", ["auto", "tent"])
def test_five_thousand_frames_of_one_class_do_no_harm(settings, tmp_path, digits, method):
    """R8: after a long burst of one class it is at most a point worse than source."""
    _, data = digits
    ones = data.images[data.labels == 1]
    agent = unharmed_by(noisy(ones[np.arange(5000) % len(ones)], 3), digits, settings, tmp_path, method)
    assert agent.board.status.learn["steps"] > 0


@pytest.mark.fault(21)
@pytest.mark.parametrize("kind", ["in between", "all at once"])
def test_a_flood_of_noise_is_told_and_does_no_harm(settings, tmp_path, digits, kind):
    """R7, R8: a flood of noise is told as another domain, noise in between is borne; neither does harm."""
    _, data = digits
    noise = np.random.default_rng(4).integers(0, 256, (2000, *data.images.shape[1:]), np.uint8)
    if kind == "in between":
        plain = np.arange(len(noise)) % 8 != 0
        noise[plain] = noisy(data.images[np.arange(plain.sum()) % len(data.images)], 5)
    agent = unharmed_by(noise, digits, settings, tmp_path, "auto")
    flags = agent.lookout.guards["domain change"] + agent.lookout.guards["guard: strange frame"]
    assert flags or kind == "in between"


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


# Stages.


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


def check_source_answers(agent: Agent, data, bundle) -> None:
    """The next answers are those of the model as exported, to the last bit that matters."""
    taken = []
    agent.listen(lambda frames, reply: taken.append((frames[0].image, reply.logits[0])))
    until(lambda: len(taken) >= 30)
    images = np.stack([image for image, _ in taken[:30]])
    with closing(OnnxRuntimeEngine(bundle)) as engine:
        expected = Predictor(bundle, engine).answer(Preprocess(bundle.manifest.input)(images)).logits
    np.testing.assert_allclose(np.stack([logits for _, logits in taken[:30]]), expected, atol=1e-4)


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
