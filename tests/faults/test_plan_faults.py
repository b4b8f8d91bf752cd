"""Plans of engines: rows 26 and 27. The builder is a child that is really killed; what it builds here is no plan."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from agents import WAIT_S, calm_board, degraded, goes_on, running, settings, stream, until

from device_agents import core
from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.building import ATTEMPTS, DISK_FULL, REFUSED, Builder, Progress
from edge_adapt.engines.cache import KEPT, LIFE, PlanCache, PlanKey, sealed
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.engines.switching import SwitchingEngine, settled
from edge_adapt.engines.torch import TorchEngine
from edge_adapt.errors import EngineError
from edge_adapt.merge import Merger

__all__ = ["calm_board", "running", "settings", "stream"]

KEY = PlanKey("5eed", "tensorrt 10.3.0", "Orin", "8.7", "fp16", 16)
OTHERS = {
    "another graph": replace(KEY, graph="0ther"),
    "another TensorRT": replace(KEY, library="tensorrt 10.4.0"),
    "another GPU": replace(KEY, gpu="Xavier"),
    "another capability": replace(KEY, capability="7.2"),
    "another precision": replace(KEY, precision="fp32"),
    "other shapes": replace(KEY, max_batch=8),
    "other flags": replace(KEY, flags=("REFIT",)),
}
PLAN = bytes(range(256)) * 64
FAKE_BUILDER = """
import json, resource, signal, sys, time
from pathlib import Path
from edge_adapt.engines.cache import PlanKey, sealed, write_staged

staged, what, attempt = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
key = PlanKey(**{**json.loads(sys.argv[4]), "flags": tuple(json.loads(sys.argv[4])["flags"])})
print(json.dumps({"phase": "building", "done": 1, "total": 4}), flush=True)
if what == "hang" or (what == "hang once" and attempt == 0):
    staged.write_bytes(b"half a plan")
    print("half is written", flush=True)
    time.sleep(60)
if what == "memory":
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    bytearray(1 << 31)
if what == "refuse":
    print("no such operator")
    sys.exit(3)
if what == "half":
    staged.write_bytes(sealed(bytes(range(256)) * 64, key)[:-100])
    sys.exit(0)
if what == "large":
    try:
        write_staged(staged, bytes(1 << 20))
    except OSError as error:
        print(error.strerror)
        sys.exit(4)
write_staged(staged, sealed(bytes(range(256)) * 64, key))
"""


class Foreman:
    """Gives the commands of a builder, and remembers what came of them."""

    def __init__(self, folder: Path, what: str) -> None:
        self.cache, self.what = PlanCache(folder), what
        self.attempts: list[int] = []
        self.told: list[str] = []
        self.progress: list[Progress] = []
        self.builder = Builder(self.cache, tell=self.told.append, report=self.progress.append)

    def command(self, staged: Path, attempt: int, key: PlanKey = KEY) -> Sequence[str]:
        self.attempts.append(attempt)
        return [sys.executable, "-c", FAKE_BUILDER, str(staged), self.what, str(attempt), json.dumps(asdict(key))]

    def plan(self, key: PlanKey = KEY) -> bytes:
        return self.builder.plan(key, lambda staged, attempt: self.command(staged, attempt, key))

    def left(self) -> list[str]:
        """Files in the cache that are no plans."""
        return sorted(path.name for path in self.cache.folder.iterdir() if path.suffix != ".plan")


@pytest.fixture
def foreman(tmp_path) -> Callable[[str], Foreman]:
    return lambda what: Foreman(tmp_path / "engines", what)


def kill_each(foreman: Foreman, times: int = ATTEMPTS) -> threading.Thread:
    """SIGKILL for so many builders, each once half a plan is there."""

    def watch() -> None:
        killed: set[int] = set()
        for _ in range(times):

            def victim() -> int | None:
                child = foreman.builder._child
                half = list(foreman.cache.folder.glob("*.part"))
                return child.pid if child is not None and child.pid not in killed and half else None

            with suppress(AssertionError):
                pid = until(victim, timeout_s=WAIT_S)
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


# Row 26 --------------------------------------------------------------------------------------------------------------


@pytest.mark.fault(26)
@pytest.mark.parametrize("part", np.linspace(0, 1, 9))
def test_a_damaged_plan_is_built_again(foreman, part):
    """R1, R9: one bit, anywhere, and nothing of it is used."""
    boss = foreman("well")
    assert boss.plan() == PLAN
    path = boss.cache.path(KEY)
    good = path.read_bytes()
    place = int(part * (len(good) - 1))
    path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
    assert boss.plan() == PLAN
    assert boss.attempts == [0, 0]
    assert path.read_bytes() == good
    assert boss.plan() == PLAN
    assert boss.attempts == [0, 0], "the good one is used"
    assert boss.told and "built again" in boss.told[0]


@pytest.mark.fault(26)
@pytest.mark.parametrize("data", [b"", b"{}", b"[]\n", b'{"key": 5, "sha256": ""}\n', b"\x00" * 9000])
def test_a_file_that_is_no_plan_is_built_again(foreman, data):
    """R1"""
    boss = foreman("well")
    boss.cache.folder.mkdir(parents=True)
    boss.cache.path(KEY).write_bytes(data)
    assert boss.plan() == PLAN
    assert boss.attempts == [0]


@pytest.mark.fault(26)
@pytest.mark.parametrize("what", OTHERS)
def test_a_plan_of_something_else_is_not_used(foreman, what):
    """R9: by its name it is another one; put under this name it is known for what it is, and built again."""
    other, boss = OTHERS[what], foreman("well")
    assert other.digest != KEY.digest
    assert boss.plan(other) == PLAN
    assert boss.plan() == PLAN
    assert boss.attempts == [0, 0]
    boss.cache.path(KEY).write_bytes(sealed(b"foreign", other))
    assert boss.plan() == PLAN
    assert boss.attempts == [0, 0, 0]
    assert "was built for" in boss.told[-1]


@pytest.mark.fault(26)
def test_old_plans_go_when_new_ones_come(foreman):
    """R4: the cache does not grow for ever."""
    boss = foreman("well")
    boss.cache.folder.mkdir(parents=True)
    for number in range(KEPT + 4):
        path = boss.cache.path(replace(KEY, graph=str(number)))
        path.write_bytes(b"old")
        os.utime(path, (number, number))
    assert boss.plan() == PLAN
    kept = {path.name for path in boss.cache.folder.iterdir()}
    assert len(kept) == KEPT
    assert {boss.cache.path(key).name for key in (KEY, replace(KEY, graph=str(KEPT + 3)))} <= kept


def ported_delta(bundle: Bundle) -> Delta:
    rng = np.random.default_rng(1)
    return Delta.of_ports(rng.uniform(0.8, 1.2, bundle.channels), rng.normal(0, 0.1, bundle.channels))


@pytest.mark.fault(26)
def test_answers_come_meanwhile_and_the_switch_carries_the_ports_over(foreman, device_bundle, tiny_frames):
    """R1, R9: the first engine answers while the plan is built; what was applied holds in the other one."""
    boss, go = foreman("well"), threading.Event()

    def make() -> TorchEngine:
        assert go.wait(WAIT_S)
        boss.plan()
        return TorchEngine(device_bundle)

    engine = SwitchingEngine(device_bundle, OnnxRuntimeEngine(device_bundle), make, tolerance=1e-3)
    delta = ported_delta(device_bundle)
    source = engine.run(tiny_frames)
    engine.apply(Merger(device_bundle)(delta), "tag")
    before = engine.observe(tiny_frames)
    assert "onnxruntime" in engine.description and not engine.switched
    go.set()
    assert engine.wait(WAIT_S)
    after = engine.observe(tiny_frames)
    assert "torch" in engine.description and engine.trouble is None
    assert before.tag == after.tag == "tag"
    np.testing.assert_allclose(after.logits, before.logits, atol=1e-4)
    assert np.abs(after.logits - source).max() > 1e-2
    engine.close()


@pytest.mark.fault(26)
def test_every_answer_around_the_switch_is_of_one_state(device_bundle, tiny_frames):
    """R9: a change of ports that falls on the switch is neither lost nor torn."""
    merge, go = Merger(device_bundle), threading.Event()
    deltas = [Delta.source(), ported_delta(device_bundle)]
    reference = OnnxRuntimeEngine(device_bundle)
    expected = [reference.rehearse(merge(delta), tiny_frames[:4]).logits for delta in deltas]

    def make() -> TorchEngine:
        go.wait(WAIT_S)
        return TorchEngine(device_bundle)

    engine = SwitchingEngine(device_bundle, OnnxRuntimeEngine(device_bundle), make, tolerance=1e-3)
    engine.apply(merge(deltas[0]), 0)
    seen = []
    for number in range(1, 400):
        engine.apply(merge(deltas[number % 2]), number % 2)
        seen.append((number % 2, engine.observe(tiny_frames[:4])))
        if number == 20:
            go.set()
        if number > 60 and engine.wait(0):
            break
    assert engine.wait(WAIT_S)
    for number, each in seen:
        assert each.tag == number
        np.testing.assert_allclose(each.logits, expected[number], atol=1e-4)
    engine.close()


@pytest.mark.fault(26)
def test_an_engine_that_answers_otherwise_does_not_take_over(device_bundle, tiny_frames):
    """R1, R7: a plan may be whole, and wrong."""

    class Wrong(TorchEngine):
        def rehearse(self, update, frames, **asked):
            seen = super().rehearse(update, frames, **asked)
            return replace(seen, logits=seen.logits * 1.5)

    engine = SwitchingEngine(
        device_bundle, OnnxRuntimeEngine(device_bundle), lambda: Wrong(device_bundle), tolerance=1e-3
    )
    assert not engine.wait(WAIT_S)
    assert "off; onnxruntime answers" in (engine.trouble or "")
    assert len(engine.run(tiny_frames)) == len(tiny_frames)
    with pytest.raises(EngineError, match="does not answer: torch answers"):
        settled(engine)  # whoever measures must not take one for the other


@pytest.mark.fault(26)
@pytest.mark.parametrize("when", ["answering", "applying"])
def test_an_engine_that_fails_later_hands_back(device_bundle, tiny_frames, when):
    """R1, R7: no answer is lost, and the ports that were in force still are."""
    failing = threading.Event()

    class Failing(TorchEngine):
        def run(self, frames):
            return self._or_fail(super().run, frames)

        def apply(self, update, tag=None):
            self._or_fail(super().apply, update, tag)

        def _or_fail(self, real, *given):
            if failing.is_set():
                raise EngineError("CUDA failed: out of memory", remedy="none")
            return real(*given)

    reference, merge = OnnxRuntimeEngine(device_bundle), Merger(device_bundle)
    update = merge(ported_delta(device_bundle))
    reference.apply(update)
    engine = SwitchingEngine(
        device_bundle, OnnxRuntimeEngine(device_bundle), lambda: Failing(device_bundle), tolerance=1e-3
    )
    assert engine.wait(WAIT_S)
    if when == "answering":
        engine.apply(update)
    failing.set()
    if when == "applying":
        engine.apply(update)
    np.testing.assert_allclose(engine.run(tiny_frames), reference.run(tiny_frames), atol=1e-4)
    assert not engine.switched
    assert engine.trouble == "CUDA failed: out of memory; onnxruntime answers again"
    engine.close()


# Row 27 --------------------------------------------------------------------------------------------------------------


@pytest.mark.fault(27)
def test_a_builder_that_is_killed_is_begun_twice_more(foreman):
    """R1: then it is over, in words, and nothing half-written is left."""
    boss = foreman("hang")
    killer = kill_each(boss)
    with pytest.raises(EngineError, match="no plan could be built: killed by SIGKILL"):
        boss.plan()
    killer.join(WAIT_S)
    assert boss.attempts == [0, 1, 2]
    assert len(boss.told) == ATTEMPTS and all("killed by SIGKILL" in line for line in boss.told)
    assert list(boss.cache.folder.iterdir()) == []
    assert boss.progress and boss.progress[0].total == 4


@pytest.mark.fault(27)
def test_one_kill_is_only_a_delay(foreman):
    """R1"""
    boss = foreman("hang once")
    kill_each(boss, times=1)
    assert boss.plan() == PLAN
    assert boss.attempts == [0, 1]
    assert boss.left() == []


@pytest.mark.fault(27)
def test_a_builder_without_memory_is_begun_twice_more(foreman):
    """R1, R4: each attempt is told its number, so that it may ask for less."""
    boss = foreman("memory")
    with pytest.raises(EngineError, match="MemoryError"):
        boss.plan()
    assert boss.attempts == [0, 1, 2]
    assert boss.left() == []


@pytest.mark.fault(27)
def test_a_refused_graph_is_not_tried_again(foreman):
    """R1: it would be refused again."""
    boss = foreman("refuse")
    with pytest.raises(EngineError, match=rf"no such operator \(exit code {REFUSED}\)"):
        boss.plan()
    assert boss.attempts == [0]


@pytest.mark.fault(27)
def test_half_a_plan_is_never_published(foreman):
    """R1: a builder that says it is done is not believed."""
    boss = foreman("half")
    with pytest.raises(EngineError, match="checksum"):
        boss.plan()
    assert list(boss.cache.folder.iterdir()) == []


@pytest.fixture
def small_cache(tmp_path) -> Iterator[Path]:
    """A file system of 128 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    words = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    mounted = subprocess.run(words, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.fault(27)
def test_a_full_disk_ends_the_build_and_leaves_the_other_plans(small_cache):
    """R1: told as such, nothing half-written, no further attempt; what was there is whole."""
    other = Foreman(small_cache, "well")
    assert other.plan(OTHERS["another GPU"]) == PLAN
    boss = Foreman(small_cache, "large")
    with pytest.raises(EngineError, match=rf"No space left on device \(exit code {DISK_FULL}\)"):
        boss.plan()
    assert boss.attempts == [0]
    assert boss.left() == []
    assert boss.cache.load(OTHERS["another GPU"]) == PLAN


@pytest.mark.fault(27)
def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    """R1"""
    (tmp_path / "engines").write_bytes(b"a file")
    boss = Foreman(tmp_path / "engines", "well")
    with pytest.raises(EngineError, match="no plan could be built"):
        boss.plan()
    assert boss.attempts == []


@pytest.mark.fault(27)
def test_what_a_dead_agent_left_is_cleared(foreman):
    """R4: a builder that went with its agent leaves half a plan, which the next one removes; a living one's stays."""
    boss = foreman("well")
    boss.cache.folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    folder = boss.cache.folder
    dead, before = folder / f"aa.{gone.pid}.0123-0.part", folder / f"bb.{os.getpid()}.0123-0.part.onnx"
    alive, own = folder / f"cc.{os.getppid()}.0123-0.part", folder / f"dd.{os.getpid()}.{LIFE}-99.part"
    for path in (dead, before, alive, own):
        path.write_bytes(b"half")
    assert boss.plan() == PLAN
    assert not dead.exists()
    assert not before.exists(), "of an earlier process with this number, as in a container"
    assert alive.exists()
    assert own.exists()


@pytest.mark.fault(27)
def test_a_build_that_is_given_up_ends_at_once(foreman):
    """R1: a stopping agent does not wait for minutes."""
    boss = foreman("hang")

    def build() -> None:
        with pytest.raises(EngineError, match="no plan could be built"):
            boss.plan()

    thread = threading.Thread(target=build)
    thread.start()
    until(lambda: boss.progress)
    boss.builder.cancel()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert boss.attempts == [0]
    assert boss.left() == []


@pytest.mark.fault(27)
@pytest.mark.usefixtures("calm_board")
def test_an_agent_whose_builder_is_killed_answers_on_and_raises_an_alert(running, foreman, monkeypatch):
    """R1, R7: ONNX Runtime stays, the state is `degraded`, and its reason is the alert."""
    boss = foreman("hang")

    class Planned(SwitchingEngine):
        name = "planned"

        def __init__(self, bundle: Bundle, *, threads: int = 1) -> None:
            super().__init__(bundle, OnnxRuntimeEngine(bundle, threads=threads), boss.plan, tolerance=1e-3)

        @classmethod
        def probe(cls) -> str | None:
            return None

    real = core.find
    monkeypatch.setattr(core, "find", lambda group, name: Planned if group == core.ENGINES else real(group, name))
    agent = running()
    goes_on(agent)
    assert agent.board.status.why == ()
    kill_each(boss)
    degraded(agent, "engine: no plan could be built: killed by SIGKILL", within_s=WAIT_S)
    goes_on(agent)
    assert boss.attempts == [0, 1, 2]
