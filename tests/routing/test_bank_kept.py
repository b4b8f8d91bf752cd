"""A bank is part of the router's state, and is kept as snapshots are: whole or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import EdgeAdaptError
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import Context
from edge_adapt.preprocess import Preprocess
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.runtime.snapshot_file import Facts
from edge_adapt.runtime.snapshots import SnapshotStore
from edge_adapt.tail import Tail


@pytest.fixture(scope="module")
def router(device_bundle):
    return build("moments", Context(device_bundle, lambda: Tail(device_bundle), settings={"router": "hdc"}))


@pytest.fixture(scope="module")
def grown(device_bundle, tiny_data, router):
    """A state with one domain beside source, and frames of that domain."""
    engine = OnnxRuntimeEngine(device_bundle)
    predictor, shape = Predictor(device_bundle, engine), Preprocess(device_bundle.manifest.input)
    dark = shape((tiny_data.images[:96] * 0.25).astype(np.uint8))
    state = router.init()
    for start in range(0, 96, 8):
        state = router.step(state, predictor.look_for(router, dark[start : start + 8])).state
        predictor.apply(router.delta(state))
    yield state
    engine.close()


@pytest.fixture
def store(tmp_path, device_bundle, router, grown):
    made = SnapshotStore.of(tmp_path, device_bundle)
    made.save(router.delta(grown), Facts(method="moments"), method=router, state=grown)
    return made


def reopened(store, bundle):
    return SnapshotStore.of(store.folder, bundle)


def test_a_bank_comes_back_as_it_was(store, device_bundle, router, grown):
    state = reopened(store, device_bundle).load_latest().state(router)
    bank, kept = state.own.bank, grown.own.bank
    assert [entry.name for entry in bank.entries] == [entry.name for entry in kept.entries] == ["source", "domain-1"]
    for entry, before in zip(bank.entries, kept.entries, strict=True):
        assert np.array_equal(entry.mean, before.mean)
        assert router.host.delta(entry.state).same_as(router.host.delta(before.state))
    assert state.own.active == 1


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_byte_is_noticed_and_the_file_set_aside(store, device_bundle, place):
    path = next(store.folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 4
    path.write_bytes(data)
    again = reopened(store, device_bundle)
    assert again.load_latest() is None  # source answers
    assert not path.exists()
    assert any(path.stem in report for report in again.take_reports())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_half_written_bank_is_refused(store, device_bundle, share):
    path = next(store.folder.glob("*.safetensors"))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert reopened(store, device_bundle).load_latest() is None


def test_a_bank_of_another_bundle_is_refused_with_the_reason(store):
    other = SnapshotStore(store.folder, "0" * 16)
    with pytest.raises(EdgeAdaptError, match="bundle"):
        other.load("A")
    assert other.load_latest() is None
