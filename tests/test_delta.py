"""A delta is a value: it cannot be changed, and comes back from disk as it was, or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from edge_adapt.delta import PORT_SCALE, PORT_SHIFT, Delta, write_atomically
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ArtifactError, StateError
from edge_adapt.runtime.predictor import Predictor


@pytest.fixture
def delta() -> Delta:
    rng = np.random.default_rng(0)
    return Delta.of_ports(rng.uniform(0.5, 2, 48), rng.normal(size=48)) | {"tail/head.bias": np.arange(5.0)}


def test_nothing_in_a_delta_can_be_changed(delta):
    with pytest.raises(TypeError):
        delta.tensors["x"] = np.zeros(1)
    with pytest.raises(ValueError, match="read-only"):
        delta[PORT_SCALE][0] = 1
    with pytest.raises(AttributeError):
        delta.tensors = {}
    assert not hasattr(delta, "__setitem__")


def test_a_delta_does_not_follow_the_array_it_was_made_of():
    scale = np.ones(3, np.float32)
    delta = Delta.of_ports(scale, np.zeros(3))
    scale[:] = 7
    assert delta[PORT_SCALE].tolist() == [1, 1, 1]
    assert delta[PORT_SHIFT].dtype == np.float32


def test_a_delta_on_top_of_another(delta):
    made = delta | {"tail/head.bias": np.zeros(5), "tail/x.weight": np.ones(2)}
    assert delta["tail/head.bias"].tolist() == [0, 1, 2, 3, 4]
    assert set(made.tail) == {"head.bias", "x.weight"}
    assert made.nbytes == 4 * (48 + 48 + 5 + 2)
    assert not Delta.source()
    assert (Delta.source() | delta).same_as(delta)
    assert not made.same_as(delta)
    assert not Delta({"a": np.zeros(2)}).same_as(Delta({"a": np.zeros(3)}))


def test_a_saved_delta_comes_back(delta, tmp_path):
    for each in (delta, Delta.source(), Delta({"tail/scalar": np.float32(3)})):
        each.save(tmp_path / "delta", bundle_id="abc")
        assert Delta.load(tmp_path / "delta", bundle_id="abc").same_as(each)
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


def test_a_delta_of_another_bundle_is_refused(delta, tmp_path):
    delta.save(tmp_path / "delta", bundle_id="abc")
    with pytest.raises(StateError, match="'abc', not 'xyz'"):
        Delta.load(tmp_path / "delta", bundle_id="xyz")


def test_a_truncated_file_is_refused_at_every_length(delta, tmp_path):
    delta.save(tmp_path / "delta", bundle_id="abc")
    data = (tmp_path / "delta").read_bytes()
    for length in (0, 1, 7, 8, 9, 60, len(data) // 2, len(data) - 1):
        (tmp_path / "delta").write_bytes(data[:length])
        with pytest.raises(ArtifactError, match="cannot be read"):
            Delta.load(tmp_path / "delta", bundle_id="abc")


def test_a_file_that_is_no_delta_or_is_not_there_is_refused(tmp_path):
    (tmp_path / "delta").write_bytes(b"\xff" * 500)
    for name in ("delta", "absent"):
        with pytest.raises(ArtifactError, match=name):
            Delta.load(tmp_path / name, bundle_id="abc")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", b"new and longer")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [PORT_SCALE, PORT_SHIFT, "tail/head.bias"])
def test_numbers_that_are_not_finite_are_refused(name, bad, delta, device_bundle):
    device_bundle.check_delta(delta)
    value = delta[name].copy()
    value[-1] = bad
    assert not (delta | {name: value}).is_finite()
    with pytest.raises(StateError, match="NaN or infinite"):
        device_bundle.check_delta(delta | {name: value})


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_is_not_positive_is_refused(scale, delta, device_bundle):
    value = delta[PORT_SCALE].copy()
    value[3] = scale
    with pytest.raises(StateError, match="positive"):
        device_bundle.check_delta(delta | {PORT_SCALE: value})


def test_ports_of_another_width_are_refused(device_bundle):
    for name in (PORT_SCALE, PORT_SHIFT):
        with pytest.raises(StateError, match="48 channels"):
            device_bundle.check_delta(Delta({name: np.ones(47)}))


def test_tail_parameters_of_another_shape_are_refused(device_bundle, tiny_frames):
    """What fits nowhere must not get as far as the memory that sessions read."""
    for live in (True, False):
        predictor = Predictor(device_bundle, OnnxRuntimeEngine(device_bundle, live=live))
        before = predictor.answer(tiny_frames).logits
        for name in ("head.bias", "head.weight", "alone.weight", "alone.bias", "point.weight"):
            with pytest.raises(StateError, match=name):
                predictor.apply(Delta({f"tail/{name}": np.ones(1)}))
        assert np.array_equal(predictor.answer(tiny_frames).logits, before)
        assert not predictor.delta
