"""A method's state through bytes and back: nothing of it is lost, and nothing that is no state comes in."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError, StateError
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import Context
from edge_adapt.methods.source import Source
from edge_adapt.plugins import METHODS, names
from edge_adapt.runtime.loop import adapt
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.runtime.state_io import pack, unpack
from edge_adapt.tail import Tail

HERE = (__name__,)
CHEAP = {"cotta": {"views": 2}, "lae": {"reliable": 1.0}, "mos": {"reliable": 1.0}}
KINDS = [*names(METHODS), "moments+label_shift", "tent+lame", "moments+t3a", "moments+foa_shift"]


@dataclass(frozen=True)
class Inner:
    delta: Delta
    values: Any = None


@dataclass(frozen=True)
class Outer:
    first: Inner
    second: Inner
    made: int = field(default=7, init=False)


@dataclass(frozen=True)
class Changed:
    new: int = 0


class Resumed:
    """A method that begins with a given state."""

    def __init__(self, method: Any, state: Any) -> None:
        self._method, self._state = method, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def init(self) -> Any:
        return self._state

    def step(self, state: Any, seen: Any) -> Any:
        step = self._method.step(state, seen)
        self._state = step.state
        return step

    def watch(self, state: Any, answered: Any) -> Any:
        step = self._method.watch(state, answered)
        self._state = step.state
        return step


def through_bytes(state: Any, shared: Any = None, back: Any = None, allowed=("edge_adapt", *HERE)) -> Any:
    """Pack, write as safetensors and JSON, read, unpack."""
    structure, tensors = pack(state, shared)
    text = json.dumps(structure, allow_nan=False)
    return unpack(json.loads(text), load(save(tensors)), allowed, shared if back is None else back)


def play(bundle: Bundle, engine: Any, method: Any, state: Any, frames: np.ndarray) -> tuple[list[np.ndarray], Any]:
    """Answers to batches of 32, and the state after them."""
    engine.apply(Predictor(bundle, engine)._merge(Delta.source()))
    resumed = Resumed(method, state)
    batches = [frames[at : at + 32] for at in range(0, len(frames), 32)]
    return [answer.logits for answer in adapt(Predictor(bundle, engine), resumed, batches)], resumed._state


@pytest.fixture(scope="module")
def engine(device_bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(device_bundle)


@pytest.mark.parametrize("name", KINDS)
def test_what_was_saved_goes_on_bit_for_bit(device_bundle, engine, tiny_frames, name):
    tail = Tail(device_bundle)

    def made() -> Any:
        return build(name, Context(device_bundle, lambda: tail, 3, dict(CHEAP.get(name.split("+")[0], {}))))

    try:
        method = made()
    except ConfigError as error:
        pytest.skip(error.what)
    frames = np.concatenate([tiny_frames * np.float32(0.5) + np.float32(0.8), tiny_frames[:64] - np.float32(0.4)])
    _, state = play(device_bundle, engine, method, method.init(), frames[:96])
    expected, last = play(device_bundle, engine, method, state, frames[96:])

    other = made()  # after a restart the method is another object, with equal constants
    loaded = through_bytes(
        state,
        {"delta": method.delta(state), "init": method.init()},
        {"delta": Delta(method.delta(state).tensors), "init": other.init()},
    )
    assert other.delta(loaded).same_as(method.delta(state))
    found, left = play(device_bundle, engine, other, loaded, frames[96:])
    for one, two in zip(expected, found, strict=True):
        assert np.array_equal(one, two)
    assert other.delta(left).same_as(method.delta(last))


def test_a_state_of_the_learner_that_is_at_source_stays_at_source(device_bundle):
    tail = Tail(device_bundle)
    first, second = (build("tent", Context(device_bundle, lambda: tail, 0, {"guards": False})) for _ in range(2))
    state = first.init()
    structure, tensors = pack(state, {"init": first.init()})
    loaded = unpack(structure, tensors, shared={"init": second.init()})
    assert loaded.teacher is second.source
    assert loaded.delta is loaded.moments.delta
    assert not any(name.startswith("student") for name in tensors)


def test_one_object_stays_one_object():
    delta, array = Delta({"tail/a": np.ones(3)}), np.arange(4)
    other = Inner(delta, array)
    loaded = through_bytes(Outer(Inner(delta, {"x": array, "y": (array, other)}), other))
    assert loaded.first.delta is loaded.second.delta
    assert loaded.first.values["x"] is loaded.first.values["y"][0] is loaded.second.values
    assert loaded.first.values["y"][1] is loaded.second
    assert loaded.made == 7


def test_what_is_shared_comes_back_as_the_very_object():
    delta, array = Delta({"tail/a": np.ones(3)}), np.arange(4)
    structure, tensors = pack(Inner(delta, [array]), {"delta": delta, "init": {"deep": (1, array)}})
    assert not tensors
    new_delta, new_array = Delta(delta.tensors), array.copy()
    shared = {"delta": new_delta, "init": {"deep": (1, new_array)}}
    loaded = unpack(structure, tensors, HERE, shared)
    assert loaded.delta is new_delta
    assert loaded.values[0] is new_array
    with pytest.raises(StateError, match="'init' beside it"):
        unpack(structure, tensors, HERE, {"delta": new_delta})


@pytest.mark.parametrize(
    "value",
    [
        *(np.arange(6).reshape(2, 3).astype(kind) for kind in ("f4", "f8", "f2", "i8", "i4", "u1", "?", "i2")),
        np.zeros((0, 4), np.float64),
        np.array(3.5),
        np.float32(0.1),
        np.float64(0.1),
        np.int64(2**62),
        np.bool_(True),
        torch.arange(6).reshape(2, 3),
        torch.tensor([True, False]),
        torch.tensor(-1),
        torch.rand(2, 3, dtype=torch.float64),
        np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
        np.arange(24.0)[::2],
        torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ],
    ids=lambda value: f"{type(value).__name__}-{value.dtype}-{tuple(value.shape)}",
)
def test_arrays_keep_type_dtype_shape_and_memory_order(value):
    loaded = through_bytes((value,))[0]
    assert type(loaded) is type(value)
    assert loaded.dtype == value.dtype and loaded.shape == value.shape
    assert bool((loaded == value).all())
    if isinstance(value, torch.Tensor) and value.ndim == 4:
        assert loaded.stride() == value.stride()
    if isinstance(value, np.ndarray) and value.ndim == 3:
        assert loaded.strides == value.strides


def test_plain_values_come_back_exactly():
    state = (None, True, 3, -(2**80), 0.1, 1e-320, float("inf"), "täp", {"a": (), 2: [1.0, 1], (1, "b"): {}})
    loaded = through_bytes(state)
    assert loaded == state
    assert [type(item) for item in loaded] == [type(item) for item in state]
    assert np.isnan(through_bytes([float("nan")])[0])


@pytest.mark.parametrize(
    "value",
    [object(), lambda: 0, {1, 2}, np.array(["a"]), np.array([None]), torch.zeros(2, dtype=torch.bfloat16), Outer, 1j],
    ids=["object", "function", "set", "text", "objects", "bfloat16", "class", "complex"],
)
def test_what_is_no_value_is_refused_by_its_place(value):
    with pytest.raises(StateError, match=r"state\.values\.0"):
        pack(Inner(Delta.source(), [value]))


def test_a_loop_is_refused():
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(StateError, match="nested deeper"):
        pack(loop)


@pytest.mark.parametrize(
    "name", ["os:system", "subprocess:Popen", "edge_adapt.delta:Array", "edge_adapt.plugins:find", "edge_adapt.no:X"]
)
def test_only_dataclasses_of_known_packages_are_made(name):
    structure, tensors = pack(Inner(Delta.source()))
    structure["objects"][-1]["class"] = name
    with pytest.raises(StateError, match="names"):
        unpack(structure, tensors)


def test_a_class_outside_the_allowed_packages_is_refused():
    structure, tensors = pack(Inner(Delta.source()))
    assert isinstance(unpack(structure, tensors, HERE), Inner)
    with pytest.raises(StateError, match="outside edge_adapt"):
        unpack(structure, tensors)


def test_another_version_of_a_class_is_refused():
    structure, tensors = pack(Changed(1))
    structure["objects"][-1]["of"] = {"old": 1}
    with pytest.raises(StateError, match="has fields old, here it has new"):
        unpack(structure, tensors, HERE)


def test_damage_is_one_clear_error():
    structure, tensors = pack(Outer(Inner(Delta({"tail/a": np.ones(2)}), np.ones(3)), Inner(Delta.source())))
    text = json.dumps(structure)
    rng = np.random.default_rng(0)
    for _ in range(400):
        at = int(rng.integers(len(text)))
        wrong = text[:at] + chr(int(rng.integers(32, 127))) + text[at + 1 :]
        try:
            read = json.loads(wrong)
        except ValueError:
            continue
        with suppress(StateError):
            unpack(read, tensors, HERE)
    for wrong in (None, [], {}, {"schema": 2}, {"schema": 1}, {"schema": 1, "objects": [[]], "root": 0}):
        with pytest.raises(StateError):
            unpack(wrong, {}, HERE)


def test_a_method_without_a_state_needs_no_tensors(device_bundle):
    method = Source(Context(device_bundle, lambda: Tail(device_bundle)))
    structure, tensors = pack(method.init())
    assert not tensors
    assert unpack(structure, tensors) == method.init()
