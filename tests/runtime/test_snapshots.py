"""Two slots, a pointer, an adapter on probation: what comes back after whatever happened to the files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from edge_adapt.delta import PORT_SCALE, Delta
from edge_adapt.errors import ArtifactError, EdgeAdaptError, StateError
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import Context
from edge_adapt.runtime import snapshot_file
from edge_adapt.runtime.snapshot_file import Facts, decode, encode
from edge_adapt.runtime.snapshots import ADAPTER, ATTEMPTS, KEPT_BAD, SnapshotStore
from edge_adapt.tail import Tail

BUNDLE = "0123456789abcdef"


def delta_of(value: float) -> Delta:
    return Delta({PORT_SCALE: np.full(4, value), "tail/head.weight": np.full((2, 3), value)})


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path / "snapshots", BUNDLE)


def filled(store: SnapshotStore, count: int) -> SnapshotStore:
    for number in range(1, count + 1):
        store.save(delta_of(number), Facts(version=number, ts=1000 + number, method="tent", frames=64, note="täp"))
    return store


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_an_empty_folder_means_source(store):
    assert store.load_latest() is None
    assert store.current == "source"
    assert not store.take_reports()
    assert not store.load("source").delta


def test_what_was_saved_comes_back(store):
    filled(store, 3)
    found = SnapshotStore(store.folder, BUNDLE).load_latest()
    assert found is not None
    assert found.delta.same_as(delta_of(3))
    assert found.facts == Facts(3, 1003, "tent", 64, "täp")
    assert (found.slot, found.generation, store.current) == ("A", 3, "A")
    assert store.load("B").delta.same_as(delta_of(2))
    assert sorted(path.name for path in store.folder.iterdir()) == ["A.safetensors", "B.safetensors", "current.json"]


def test_the_state_of_the_method_comes_back(store, device_bundle):
    tail = Tail(device_bundle)
    first, second = (build("moments", Context(device_bundle, lambda: tail)) for _ in range(2))
    state = first.init()
    own = SnapshotStore.of(store.folder, device_bundle)
    own.save(first.delta(state), Facts(), method=first, state=state)
    found = own.load_latest()
    assert found is not None
    assert second.delta(found.state(second)) is found.delta
    with pytest.raises(StateError, match="refers to init"):
        found.state(build("moments", Context(device_bundle, lambda: tail, 0, {"guards": False})))
    with pytest.raises(StateError, match="holds no state"):
        own.load("source").state(second)


@dataclass(frozen=True)
class One:
    value: int = 0


@dataclass(frozen=True)
class Two:
    one: One | None = None


class Begins:
    """All of a method that a snapshot needs."""

    def __init__(self, state: object) -> None:
        self._state = state

    def init(self) -> object:
        return self._state


@pytest.mark.parametrize("other", [None, One(), Two(One())])
def test_a_state_of_another_method_is_refused(other):
    state = Two()
    found = decode(encode(BUNDLE, 1, delta_of(1), Facts(), Begins(Two()), state), BUNDLE, "A")
    assert found.state(Begins(Two())) == state
    with pytest.raises(StateError, match=r"the state holds (Two|NoneType) where this method has"):
        found.state(Begins(other))


def test_source_can_not_be_written(store):
    filled(store, 3)
    assert not store.load("source").delta
    assert "source" not in {path.name.partition(".")[0] for path in store.folder.iterdir()}
    with pytest.raises(StateError, match="no slot"):
        store.load("../etc")


def test_every_flipped_bit_is_found():
    data = encode(BUNDLE, 1, delta_of(2), Facts(note="x"))
    assert decode(data, BUNDLE, "A").delta.same_as(delta_of(2))
    for at in range(len(data)):
        for bit in range(8):
            wrong = bytearray(data)
            wrong[at] ^= 1 << bit
            with pytest.raises(ArtifactError):
                decode(bytes(wrong), BUNDLE, "A")


def test_every_truncation_and_every_zeroed_tail_is_found():
    data = encode(BUNDLE, 1, delta_of(2), Facts())
    for size in range(len(data)):
        for wrong in (data[:size], data[:size] + bytes(len(data) - size)):
            if wrong != data:
                with pytest.raises(ArtifactError):
                    decode(wrong, BUNDLE, "A")


def signed(**changes: object) -> bytes:
    """A file with a good checksum and other content."""
    tensors, header = dict(delta_of(1).tensors), {}
    tensors = {f"delta/{name}": value for name, value in tensors.items()}
    header = {"kind": snapshot_file.KIND, "schema": "1", "bundle": BUNDLE, "sha256": "0" * 64, "state": "null"}
    header["facts"] = json.dumps({"generation": 1, "version": 0, "ts": 0, "method": "", "frames": 0, "note": ""})
    tensors |= changes.pop("tensors", {})  # type: ignore[arg-type]
    return snapshot_file._signed(save(tensors, metadata={**header, **changes}))  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": "2"}, "format 2"),
        ({"bundle": "another"}, "belongs to bundle 'another'"),
        ({"kind": "photo"}, "no snapshot"),
        ({"facts": "[]"}, "cannot be read"),
        ({"facts": "{}"}, "cannot be read"),
        ({"state": "[" * 20_000}, "cannot be read"),
        ({"schema": "one"}, "cannot be read"),
        ({"tensors": {"delta/tail/x": np.array([np.nan])}}, "NaN"),
        ({"tensors": {"delta/tail/x": np.array([np.inf])}}, "NaN or infinite"),
        ({"tensors": {"state/0": np.array([np.nan])}}, "NaN"),
    ],
)
def test_content_that_does_not_fit_is_refused_and_moved_aside(store, changes, reason):
    filled(store, 2)
    assert decode(signed(), BUNDLE, "A").generation == 1
    (store.folder / "B.safetensors").write_bytes(signed(**changes))
    found = store.load_latest()
    assert found is not None and found.slot == "A"
    told = store.take_reports()
    assert any(reason in line for line in told), told
    assert (store.folder / "B.safetensors.1.bad").exists()
    assert store.current == "A"


def test_a_delta_of_the_wrong_shape_is_refused(tmp_path, device_bundle):
    loose, strict = SnapshotStore(tmp_path, device_bundle.id), SnapshotStore.of(tmp_path, device_bundle)
    loose.save(delta_of(1), Facts())
    assert strict.load_latest() is None
    assert "snapshot A does not fit: ports/scale has shape (4,)" in strict.take_reports()[0]
    with pytest.raises(StateError, match="has shape"):
        strict.save(delta_of(1), Facts())
    with pytest.raises(StateError, match="has shape"):
        strict.put_adapter(delta_of(1), Facts())


def test_nan_is_never_saved(store):
    filled(store, 1)
    with pytest.raises(StateError, match="NaN"):
        store.save(Delta({"tail/x": np.array([np.nan])}), Facts())
    found = store.load_latest()
    assert found is not None and found.delta.same_as(delta_of(1))


def test_the_other_slot_stands_in_and_is_not_overwritten_next(store):
    filled(store, 3)  # A holds 3, B holds 2
    damage(store.folder / "A.safetensors")
    found = store.load_latest()
    assert found is not None and (found.slot, found.facts.version) == ("B", 2)
    assert store.save(delta_of(9), Facts()).slot == "A"
    assert store.load("B").facts.version == 2
    assert any("slot B is used in place of A" in line for line in store.take_reports())


def test_all_bad_means_source_and_saving_goes_on(store):
    filled(store, 2)
    for name in ("A.safetensors", "B.safetensors", "current.json"):
        (store.folder / name).write_bytes(b"")
    assert store.load_latest() is None
    assert len(store.take_reports()) == 3
    assert not store.take_reports()
    filled(store, 1)
    found = store.load_latest()
    assert found is not None and found.facts.version == 1


def test_few_bad_files_are_kept(store):
    for _ in range(KEPT_BAD + 3):
        filled(store, 1)
        damage(store.folder / f"{store.current}.safetensors")
        store.load_latest()
    assert len(list(store.folder.glob("*.bad"))) == KEPT_BAD
    assert (store.folder / f"{'A'}.safetensors.{KEPT_BAD + 3}.bad").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b'{"slot": "C"}', b'{"slot": ["A"], "generation": 1}', None]
)
def test_a_bad_pointer_leads_to_the_newest_good_slot(store, content):
    filled(store, 4)
    pointer = store.folder / "current.json"
    pointer.unlink() if content is None else pointer.write_bytes(content)
    found = store.load_latest()
    assert found is not None and found.facts.version == 4
    assert store.save(delta_of(5), Facts()).generation == 5
    assert store.load("B").facts.version == 4


def test_half_written_files_go(store):
    filled(store, 1)
    for name in ("A.safetensors.tmp", "current.json.tmp", "B.safetensors.tmp"):
        (store.folder / name).write_bytes(b"half")
    assert store.load_latest() is not None
    assert not list(store.folder.glob("*.tmp"))


def test_a_folder_in_place_of_a_file_is_no_end(store):
    filled(store, 1)
    (store.folder / "B.safetensors").mkdir()
    (store.folder / "current.json").unlink()
    (store.folder / "current.json").mkdir()
    found = store.load_latest()
    assert found is not None and found.facts.version == 1
    with pytest.raises(StateError, match="untouched"):
        store.save(delta_of(2), Facts())
    found = store.load_latest()
    assert found is not None and found.facts.version == 1


def test_an_adapter_is_in_force_only_when_it_is_committed(store):
    filled(store, 2)
    assert store.begin_trial() is None and not store.pending
    store.put_adapter(delta_of(7), Facts(note="from outside"))
    assert store.pending
    latest = store.load_latest()
    assert latest is not None and latest.facts.version == 2
    trial = store.begin_trial()
    assert trial is not None and trial.slot == ADAPTER and trial.delta.same_as(delta_of(7))
    made = store.commit()
    assert made.slot == store.current == "A"
    assert not store.pending
    latest = store.load_latest()
    assert latest is not None and latest.delta.same_as(delta_of(7)) and latest.facts.note == "from outside"
    assert store.load("B").facts.version == 2
    with pytest.raises(StateError, match="empty"):
        store.commit()


def test_saving_goes_on_during_probation(store):
    store.put_adapter(delta_of(7), Facts())
    filled(store, 3)
    trial = store.begin_trial()
    assert trial is not None and trial.delta.same_as(delta_of(7))


def test_a_rollback_keeps_the_adapter_aside(store):
    filled(store, 1)
    store.put_adapter(delta_of(7), Facts())
    store.begin_trial()
    store.rollback()
    assert not store.pending
    assert store.begin_trial() is None
    assert [path.name for path in store.folder.glob("*.bad")] == ["adapter.safetensors.1.bad"]
    assert not (store.folder / "trial.json").exists()
    with pytest.raises(StateError, match="no adapter on probation"):
        store.rollback()


def test_an_adapter_that_ends_every_trial_by_a_crash_is_dropped(store):
    store.put_adapter(delta_of(7), Facts())
    for _ in range(ATTEMPTS):
        assert SnapshotStore(store.folder, BUNDLE).begin_trial() is not None
    assert store.begin_trial() is None
    assert not store.pending
    assert "without a verdict" in store.take_reports()[0]
    store.put_adapter(delta_of(8), Facts())  # another one starts to count anew
    assert store.begin_trial() is not None


def test_a_bad_adapter_is_moved_aside(store):
    store.put_adapter(delta_of(7), Facts())
    damage(store.folder / "adapter.safetensors")
    assert store.begin_trial() is None
    assert not store.pending
    assert "damaged" in store.take_reports()[0]


def test_no_larger_file_is_read(store, monkeypatch):
    filled(store, 1)
    monkeypatch.setattr("edge_adapt.runtime.snapshots.LARGEST", 100)
    assert store.load_latest() is None
    assert "larger than 100 bytes" in store.take_reports()[0]


def test_random_bytes_never_raise(store):
    filled(store, 2)
    rng = np.random.default_rng(0)
    good = (store.folder / "B.safetensors").read_bytes()
    for _ in range(200):
        wrong = bytearray(good)
        for at in rng.integers(0, len(wrong), int(rng.integers(1, 9))):
            wrong[at] = int(rng.integers(256))
        (store.folder / "B.safetensors").write_bytes(wrong)
        (store.folder / "current.json").write_bytes(rng.bytes(int(rng.integers(0, 60))))
        found = store.load_latest()
        assert found is not None and found.facts.version in (1, 2)
        store.take_reports()


def test_the_file_is_plain_safetensors(store):
    filled(store, 1)
    tensors = load((store.folder / "A.safetensors").read_bytes())
    assert set(tensors) == {"delta/ports/scale", "delta/tail/head.weight"}


def test_saving_nothing_that_is_too_large(store, monkeypatch):
    monkeypatch.setattr(snapshot_file, "LARGEST", 100)
    with pytest.raises(EdgeAdaptError, match="above 100"):
        filled(store, 1)
