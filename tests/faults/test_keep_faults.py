"""What is kept survives kills, power cuts, damage and disks that refuse: rows 1, 2, 4 to 7, 31 and 32 of the table."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from power import Recorder, after_cut
from traced import Saver

from device_agents import package
from edge_adapt.bundle import Bundle
from edge_adapt.delta import PORT_SCALE, PORT_SHIFT, Delta
from edge_adapt.errors import EdgeAdaptError, StateError
from edge_adapt.runtime import snapshots
from edge_adapt.runtime.snapshot_file import Facts
from edge_adapt.runtime.snapshots import SnapshotStore

BUNDLE = "0123456789abcdef"
STEPS = ("openat", "write", "fsync", "rename", "close", "unlink")
MOST_STEPS = 40


def delta_of(version: int) -> Delta:
    return Delta({"tail/w": np.full(300, float(version))})


def filled(folder: Path, count: int = 2) -> SnapshotStore:
    store = SnapshotStore(folder, BUNDLE)
    for version in range(1, count + 1):
        store.save(delta_of(version), Facts(version=version))
    return store


def found_in(store: SnapshotStore) -> int:
    """The version that a restart finds, its content checked; 0 for source."""
    found = store.load_latest()
    if found is None:
        return 0
    assert found.delta.same_as(delta_of(found.facts.version))
    return found.facts.version


@pytest.fixture(scope="module")
def saver() -> Iterator[Saver]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    made = Saver()
    yield made
    made.close()


def killed_at_every_step(saver: Saver, what: str, template: Path, work: Path) -> list[int]:
    """Versions that were found after a kill at each step of each kind, and after none."""
    versions = []
    for call in STEPS:
        for number in range(1, MOST_STEPS):
            folder = work / f"{call}-{number}"
            shutil.copytree(template, folder)
            status = saver.run(what, folder, f"{call}:signal=KILL:when={number}")
            versions.append(found_in(SnapshotStore(folder, BUNDLE)))
            assert not list(folder.glob("*.tmp")) and not list(folder.glob("*.bad"))
            if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
                assert status == 0
                assert versions[-1] == 3
                break
        else:
            pytest.fail(f"{what} still ended by {call} number {MOST_STEPS}")
    return versions


@pytest.mark.fault(1)
def test_a_kill_at_any_step_of_saving_leaves_the_old_snapshot_or_the_new_one(saver, tmp_path):
    """R2: after any kill the last good snapshot loads; half-written files go."""
    filled(tmp_path / "template")
    versions = killed_at_every_step(saver, "save", tmp_path / "template", tmp_path)
    assert set(versions) == {2, 3}
    assert len(versions) >= 15


@pytest.mark.fault(32)
def test_a_kill_at_any_step_of_the_slot_switch_leaves_the_old_slot_or_the_new_one(saver, tmp_path):
    """R2: the pointer says the old slot or the new one, never none."""
    filled(tmp_path / "template").put_adapter(delta_of(3), Facts(version=3))
    versions = killed_at_every_step(saver, "commit", tmp_path / "template", tmp_path)
    assert set(versions) == {2, 3}


@pytest.mark.fault(32)
@pytest.mark.parametrize("kept", range(0, 40, 3))
def test_a_pointer_that_is_cut_short_is_no_end(tmp_path, kept):
    """R2: a pointer file of any length, or none at all, leads to a good snapshot."""
    store = filled(tmp_path, 5)
    pointer = tmp_path / "current.json"
    pointer.write_bytes(pointer.read_bytes()[:kept])
    assert found_in(store) == 5
    store.save(delta_of(6), Facts(version=6))
    assert found_in(SnapshotStore(tmp_path, BUNDLE)) == 6


def cuts(folder: Path, work: Path, patch: pytest.MonkeyPatch, count: int) -> Iterator[tuple[int, int]]:
    """Version that was acknowledged last, and the one that a restart finds, for random power cuts."""
    with patch.context() as inside:
        recorder = Recorder(folder, inside)
        store = SnapshotStore(folder, BUNDLE)
        folder.mkdir()
        for version in range(1, 4):
            store.save(delta_of(version), Facts(version=version))
            recorder.note("done", version)
        store.put_adapter(delta_of(4), Facts(version=4))
        store.commit()
        recorder.note("done", 4)
    rng = np.random.default_rng(0)
    for _ in range(count):
        head = recorder.events[: int(rng.integers(len(recorder.events) + 1))]
        done = max([event[1] for event in head if event[0] == "done"], default=0)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for name, content in after_cut([event for event in head if event[0] != "done"], rng).items():
            (work / name).write_bytes(content)
        yield done, found_in(SnapshotStore(work, BUNDLE))


@pytest.mark.fault(2)
def test_a_power_cut_loses_nothing_that_was_acknowledged(tmp_path, monkeypatch):
    """R2: what was not synced vanishes, empties or is half zeros; what was acknowledged, or newer, is found."""
    seen = set()
    for done, found in cuts(tmp_path / "made", tmp_path / "cut", monkeypatch, 1000):
        assert found in (done, done + 1)
        seen.add((done, found))
    assert {(1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4)} <= seen


@pytest.mark.fault(2)
@pytest.mark.parametrize("careless", ["no sync", "no rename"])
def test_the_power_cut_finds_a_careless_writer(tmp_path, monkeypatch, careless):
    """The test of the test: a writer that does not sync, or writes in place, loses something."""

    def write(path: Path, data: bytes) -> None:
        aside = path.with_name(f"{path.name}.tmp") if careless == "no sync" else path
        with aside.open("wb") as file:
            file.write(data)
            if careless == "no rename":
                file.flush()
                os.fsync(file.fileno())
        if careless == "no sync":
            aside.replace(path)

    monkeypatch.setattr(snapshots, "write_atomically", write)
    lost = sum(found < done for done, found in cuts(tmp_path / "made", tmp_path / "cut", monkeypatch, 300))
    assert lost


def good_delta(bundle) -> Delta:
    return Delta({PORT_SCALE: np.full(bundle.channels, 1.1), PORT_SHIFT: np.zeros(bundle.channels)})


def flip(data: bytes) -> bytes:
    at = len(data) * 2 // 3
    return data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "bit flip": flip,
    "truncation": lambda data: data[:-7],
    "nothing": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: np.random.default_rng(0).bytes(len(data)),
}
UNFIT = {
    "wrong shapes": Delta({PORT_SCALE: np.ones(3)}),
    "NaN": None,
    "scale of zero": Delta({PORT_SCALE: np.zeros(1)}),
}


def break_slot(store: SnapshotStore, slot: str, damage: str, bundle, monkeypatch) -> None:
    path = store.folder / f"{slot}.safetensors"
    if damage in DAMAGE:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
        return
    with monkeypatch.context() as patch:
        if damage == "future version":
            patch.setattr("edge_adapt.runtime.snapshot_file.SCHEMA", 2)
            delta = good_delta(bundle)
        else:
            patch.setattr("edge_adapt.runtime.snapshot_file._check_finite", lambda *given: None)
            delta = UNFIT[damage] or Delta({PORT_SHIFT: np.full(bundle.channels, np.nan)})
        other = SnapshotStore(store.folder / "other", bundle.id)
        other.save(delta, Facts())
    (store.folder / "other" / "A.safetensors").replace(path)
    shutil.rmtree(store.folder / "other")


@pytest.mark.fault(4)
@pytest.mark.parametrize("damage", [*DAMAGE, *UNFIT, "future version"])
def test_a_corrupt_snapshot_is_moved_aside_and_the_one_before_is_used(device_bundle, tmp_path, monkeypatch, damage):
    """R2, R7: quarantine, the next generation, a report; loading never raises."""
    store = SnapshotStore.of(tmp_path, device_bundle)
    store.save(good_delta(device_bundle), Facts(version=1))
    store.save(good_delta(device_bundle), Facts(version=2))
    break_slot(store, "B", damage, device_bundle, monkeypatch)
    found = store.load_latest()
    assert found is not None and (found.slot, found.facts.version) == ("A", 1)
    assert [path.name for path in tmp_path.glob("*.bad")] == ["B.safetensors.1.bad"]
    assert any("snapshot B " in line.replace(":", " ") for line in store.take_reports())
    found = store.load_latest()
    assert found is not None and found.facts.version == 1
    assert not store.take_reports()


@pytest.mark.fault(5)
@pytest.mark.parametrize("damage", [*DAMAGE, *UNFIT, "future version"])
def test_without_any_good_snapshot_there_is_source(device_bundle, tmp_path, monkeypatch, damage):
    """R1, R7: source answers, both files are told of, and saving goes on."""
    store = SnapshotStore.of(tmp_path, device_bundle)
    for version in (1, 2):
        store.save(good_delta(device_bundle), Facts(version=version))
    for slot in ("A", "B"):
        break_slot(store, slot, damage, device_bundle, monkeypatch)
    assert store.load_latest() is None
    told = store.take_reports()
    assert all(any(f"snapshot {slot} " in line.replace(":", " ") for line in told) for slot in "AB")
    assert not store.load("source").delta
    store.save(good_delta(device_bundle), Facts(version=3))
    found = store.load_latest()
    assert found is not None and found.facts.version == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.fault(6)
def test_a_full_disk_costs_no_snapshot_that_was_kept(small_disk):
    """R1, R2: saving is refused with a remedy, nothing partial stands where a good file stood, and it recovers."""
    store = filled(small_disk / "snapshots")
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(512))
            file.flush()
    for _ in range(3):
        with pytest.raises(StateError, match="No space left"):
            store.save(delta_of(3), Facts(version=3))
        assert found_in(SnapshotStore(store.folder, BUNDLE)) == 2
        assert store.load("A").delta.same_as(delta_of(1))
        assert not list(store.folder.glob("*.tmp"))
    filler.unlink()
    store.save(delta_of(3), Facts(version=3))
    assert found_in(store) == 3


@pytest.mark.fault(6)
@pytest.mark.parametrize(("call", "count"), [("fsync", 4), ("write", 2), ("openat", 4), ("rename", 2)])
def test_a_step_that_finds_the_disk_full_costs_nothing(saver, tmp_path, call, count):
    """R2: whichever step of saving is refused, the old snapshot or the new one is found."""
    refused_steps(saver, tmp_path, call, count, "ENOSPC")


@pytest.mark.fault(7)
@pytest.mark.parametrize("error", ["EIO", "EROFS"])
@pytest.mark.parametrize(("call", "count"), [("fsync", 4), ("write", 2), ("rename", 2)])
def test_a_step_that_fails_costs_nothing(saver, tmp_path, call, count, error):
    """R2: as with a full disk."""
    refused_steps(saver, tmp_path, call, count, error)


def refused_steps(saver: Saver, work: Path, call: str, count: int, error: str) -> None:
    """Each step from one on is refused: a clear error, and one of both snapshots."""
    filled(work / "template")
    for number in range(1, count + 1):
        folder = work / str(number)
        shutil.copytree(work / "template", folder)
        status = saver.run("save", folder, f"{call}:error={error}:when={number}+")
        assert os.waitstatus_to_exitcode(status) == 3
        assert found_in(SnapshotStore(folder, BUNDLE)) in (2, 3)
        assert not list(folder.glob("*.bad"))


@pytest.mark.fault(7)
def test_a_disk_that_became_read_only_is_read_and_recovers(small_disk):
    """R1, R2: loading works, saving is refused with a remedy, damage is reported although nothing can be moved."""
    store = filled(small_disk / "snapshots")
    path = store.folder / "B.safetensors"
    good = path.read_bytes()
    path.write_bytes(flip(good))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        assert found_in(store) == 1
        told = store.take_reports()
        assert any("damaged" in line for line in told) and any("Read-only" in line for line in told)
        with pytest.raises(StateError, match="Read-only"):
            store.save(delta_of(3), Facts(version=3))
        assert found_in(store) == 1
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    store.save(delta_of(3), Facts(version=3))
    assert found_in(store) == 3


@pytest.mark.fault(7)
def test_a_snapshot_that_the_disk_will_not_read_is_left_where_it_is(tmp_path, monkeypatch):
    """R1: what could be good another time is not moved aside."""
    store = filled(tmp_path)
    real = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "B.safetensors":
            raise OSError(5, "Input/output error")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        assert found_in(store) == 1
    assert "Input/output error" in store.take_reports()[0]
    assert (tmp_path / "B.safetensors").exists()


SIGNER, STRANGER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def packed(bundle, key: Ed25519PrivateKey = SIGNER) -> bytes:
    return package.pack(good_delta(bundle), bundle, key)


def unsigned(bundle) -> bytes:
    data, start = packed(bundle), len(package.MAGIC)
    manifest, signature, body = package.LENGTHS.unpack_from(data, start)
    head = start + package.LENGTHS.size + manifest
    lengths = package.LENGTHS.pack(manifest, 0, body)
    return data[:start] + lengths + data[start + package.LENGTHS.size : head] + data[head + signature :]


BAD_PACKAGES: dict[str, tuple[Callable[..., bytes], str]] = {
    "unsigned": (unsigned, "not signed"),
    "signed by a stranger": (lambda bundle: packed(bundle, STRANGER), "not trusted"),
    "damaged": (lambda bundle: flip(packed(bundle)), "not the one that was signed"),
    "cut off": (lambda bundle: packed(bundle)[:-1], "damaged"),
    "empty": (lambda bundle: b"", "no package"),
}


@pytest.mark.fault(31)
@pytest.mark.parametrize("bad", [*BAD_PACKAGES, "another backbone"])
def test_a_bad_adapter_is_refused_and_changes_nothing(device_bundle, tmp_path, bad):
    """R6: what is not signed for this model by somebody trusted never reaches the slots."""
    store = SnapshotStore.of(tmp_path, device_bundle)
    store.save(good_delta(device_bundle), Facts(version=1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if bad == "another backbone":
        names = [site.model_copy(update={"name": f"{site.name}.x"}) for site in device_bundle.manifest.sites]
        manifest = device_bundle.manifest.model_copy(update={"sites": tuple(names)})
        data, reason = packed(Bundle(device_bundle.path, manifest, device_bundle.source)), "another backbone"
    else:
        make, reason = BAD_PACKAGES[bad]
        data = make(device_bundle)
    with pytest.raises(EdgeAdaptError, match=reason):
        store.put_adapter(package.verify(data, [SIGNER.public_key()], device_bundle).delta, Facts())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not store.pending


@pytest.mark.fault(31)
def test_an_adapter_that_is_no_good_leaves_the_snapshot_of_before_in_force(device_bundle, tmp_path):
    """R6: whatever becomes of the trial, the slots are as they were until it is passed."""
    store = SnapshotStore.of(tmp_path, device_bundle)
    store.save(Delta({PORT_SCALE: np.full(device_bundle.channels, 1.2)}), Facts(version=1))
    found = package.verify(packed(device_bundle), [SIGNER.public_key()], device_bundle)
    store.put_adapter(found.delta, found.facts(0))
    trial = store.begin_trial()
    assert trial is not None and trial.delta.same_as(good_delta(device_bundle))
    for _ in range(2):  # also after a restart in the middle of it
        latest = SnapshotStore.of(tmp_path, device_bundle).load_latest()
        assert latest is not None and latest.facts.version == 1
    store.rollback()
    latest = store.load_latest()
    assert latest is not None and latest.facts.version == 1
    assert not store.pending
