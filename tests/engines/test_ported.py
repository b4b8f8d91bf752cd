"""Ports as graph inputs say the same as weights edited in place; halves stay near; what cannot change is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import ClassVar

import numpy as np
import onnx
import pytest

from benchmarks.contract import parts
from benchmarks.contract.stand import Stand
from benchmarks.contract.tiny import TINY_INPUT
from edge_adapt.bundle import FULL, Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.halves import in_halves
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.engines.onnxruntime_gpu import CudaProviderEngine, ProviderEngine, TensorRTProviderEngine
from edge_adapt.engines.ported import BIAS, SCALE, feeds_of, ported
from edge_adapt.engines.ported_engine import PortedEngine, key_of
from edge_adapt.engines.switching import SwitchingEngine
from edge_adapt.errors import EngineError
from edge_adapt.merge import Merger
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import Context
from edge_adapt.plugins import ENGINES, find
from edge_adapt.tail import Tail
from exporters.export import export, from_module

TOLERANCE, HALF_TOLERANCE = 1e-5, 5e-3
CLOSE = 1e-5


class OnTheProcessor(ProviderEngine):
    """The engine of the GPU providers, on the provider that every machine has."""

    name: ClassVar[str] = "on_the_processor"
    provider: ClassVar[str] = "CPUExecutionProvider"

    @classmethod
    def probe(cls) -> str | None:
        return None


class InHalves(OnTheProcessor):
    tolerance: ClassVar[float] = 0.02

    def _session(self, graph: onnx.ModelProto):
        return super()._session(in_halves(graph))


class Switched(SwitchingEngine):
    """Answers with one engine and then with the other, while it is asked."""

    name: ClassVar[str] = "switched"

    def __init__(self, bundle: Bundle, *, threads: int = 1) -> None:
        super().__init__(bundle, OnnxRuntimeEngine(bundle), lambda: OnTheProcessor(bundle), tolerance=TOLERANCE)

    @classmethod
    def probe(cls) -> str | None:
        return None


def random_ports(bundle: Bundle, seed: int) -> Delta:
    rng = np.random.default_rng(seed)
    return Delta.of_ports(rng.uniform(0.7, 1.4, bundle.channels), rng.normal(0, 0.2, bundle.channels))


def distance(found, expected) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == np.float32
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(params=["device_bundle", "reference_bundle", "token_bundle"])
def bundle(request) -> Bundle:
    return request.getfixturevalue(request.param)


@pytest.fixture
def frames(bundle) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((7, *bundle.manifest.input.shape), np.float32)


@pytest.mark.parametrize("promise", parts.ENGINE_PROMISES, ids=str)
@pytest.mark.parametrize("kind", [OnTheProcessor, InHalves, Switched])
def test_the_promises_of_an_engine_hold_for_fed_ports(device_bundle, tiny_data, monkeypatch, promise, kind):
    """Those that every registered engine is held to; the ones for a GPU are skipped where there is none."""
    monkeypatch.setattr(parts, "find", lambda group, name: kind)
    stand = Stand(device_bundle, tiny_data)
    try:
        promise.check(stand, parts.Subject(ENGINES, kind.name))
    finally:
        stand.close()


@pytest.mark.parametrize(("kind", "tolerance"), [(OnTheProcessor, TOLERANCE), (InHalves, HALF_TOLERANCE)])
def test_everything_that_is_seen_is_the_same_as_with_weights_edited_in_place(bundle, frames, kind, tolerance):
    engine: PortedEngine = kind(bundle)
    live, merge = OnnxRuntimeEngine(bundle), Merger(bundle)
    for delta in (Delta.source(), random_ports(bundle, 1), random_ports(bundle, 2), Delta.source()):
        for each in (engine, live):
            each.apply(merge(delta), delta)
        assert distance(engine.run(frames), live.run(frames)) < tolerance
        found = engine.observe(frames, cut=True, taps=True, features=True)
        expected = live.observe(frames, cut=True, taps=True, features=True)
        assert found.tag is delta
        for name in ("logits", "cut", "taps", "features"):
            assert distance(getattr(found, name), getattr(expected, name)) < tolerance, name
        assert (found.cls is None) == (expected.cls is None)
        if expected.cls is not None:
            assert distance(found.cls, expected.cls) < tolerance
    assert distance(engine.run(frames[:1]), live.run(frames[:1])) < tolerance


def test_only_what_is_asked_for_comes_back(bundle, frames):
    engine = OnTheProcessor(bundle)
    for asked in ({}, {"cut": True}, {"taps": True}, {"features": True}):
        seen = engine.observe(frames, **asked)
        given = {name for name in ("cut", "taps", "features") if getattr(seen, name) is not None}
        assert given == set(asked)
    assert len(engine._sessions) <= 2, "two graphs serve every question"


def test_a_rehearsal_puts_nothing_in_force(bundle, frames):
    engine, merge = OnTheProcessor(bundle), Merger(bundle)
    before = engine.run(frames)
    seen = engine.rehearse(merge(random_ports(bundle, 1)), frames, taps=True)
    assert distance(seen.logits, before) > 1e-3
    np.testing.assert_array_equal(engine.run(frames), before)


def test_a_prompt_reaches_the_graph(token_bundle):
    frames = np.random.default_rng(0).standard_normal((3, 3, 16, 16), np.float32)
    engine, live, merge = OnTheProcessor(token_bundle), OnnxRuntimeEngine(token_bundle), Merger(token_bundle)
    delta = Delta({"prompts": np.random.default_rng(1).standard_normal((2, 16))})
    before = engine.run(frames)
    for each in (engine, live):
        each.apply(merge(delta))
    assert distance(engine.run(frames), live.run(frames)) < TOLERANCE
    assert distance(engine.run(frames), before) > 1e-4


def test_a_whole_weight_is_refused_and_what_was_in_force_stays(device_bundle, tiny_frames):
    engine, merge = OnTheProcessor(device_bundle), Merger(device_bundle)
    engine.apply(merge(random_ports(device_bundle, 1)))
    before = engine.run(tiny_frames)
    head = device_bundle.source["head.weight"]
    with pytest.raises(EngineError, match=r"(?s)head.*constants of this engine's plan.*try: adapt norms only"):
        engine.apply(merge(Delta({"tail/head.weight": head * 2})))
    np.testing.assert_array_equal(engine.run(tiny_frames), before)


def test_a_run_sees_one_state_of_the_ports(device_bundle, tiny_frames):
    """One thread answers while another one changes: every answer is of one of the two, never of both."""
    engine, merge = OnTheProcessor(device_bundle), Merger(device_bundle)
    updates = [merge(random_ports(device_bundle, seed)) for seed in (1, 2)]
    expected = []
    for number, update in enumerate(updates):
        engine.apply(update, number)
        expected.append(engine.run(tiny_frames[:4]))
    done = threading.Event()

    def change() -> None:
        number = 0
        while not done.is_set():
            engine.apply(updates[number % 2], number % 2)
            number += 1

    thread = threading.Thread(target=change)
    thread.start()
    try:
        seen = [engine.observe(tiny_frames[:4]) for _ in range(200)]
    finally:
        done.set()
        thread.join()
    for each in seen:
        np.testing.assert_allclose(each.logits, expected[each.tag], atol=CLOSE)


def test_a_sampled_tap_has_the_port_of_its_layer(tiny_net, tmp_path_factory):
    """Networks with light layers are tapped by a second, sparser convolution with the same weights."""
    path = export(from_module(tiny_net, "sampled", TINY_INPUT), tmp_path_factory.mktemp("sampled") / "b", cut="block")
    bundle = Bundle.load(path)
    manifest = bundle.manifest.model_copy(update={"tap_side": 4})
    object.__setattr__(bundle, "manifest", manifest)
    frames = np.random.default_rng(3).standard_normal((4, 3, 16, 16), np.float32)
    engine, live, merge = OnTheProcessor(bundle), OnnxRuntimeEngine(bundle), Merger(bundle)
    graph = ported(onnx.load(bundle.path / FULL), bundle, key_of(bundle, looking=True, features=False))
    assert any(node.name.endswith("/sampled") for node in graph.graph.node)
    for each in (engine, live):
        each.apply(merge(random_ports(bundle, 1)))
    assert distance(engine.observe(frames, taps=True).taps, live.observe(frames, taps=True).taps) < TOLERANCE


def test_the_graph_is_valid_and_asks_for_ports(bundle):
    graph = ported(onnx.load(bundle.path / FULL), bundle, key_of(bundle, looking=True, features=True))
    onnx.checker.check_model(graph, full_check=True)
    shapes = {info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in graph.graph.input}
    assert shapes[SCALE] == shapes[BIAS] == [bundle.channels]
    assert set(feeds_of(bundle, Merger(bundle)(Delta.source()))) == {SCALE, BIAS}


def test_halves_have_no_float_weights_and_taps_that_cannot_overflow(device_bundle, tiny_frames):
    key = key_of(device_bundle, looking=True, features=True)
    halves = in_halves(ported(onnx.load(device_bundle.path / FULL), device_bundle, key))
    onnx.checker.check_model(halves, full_check=True)
    kinds = {tensor.data_type for tensor in halves.graph.initializer}
    assert onnx.TensorProto.FLOAT not in kinds
    assert onnx.TensorProto.FLOAT16 in kinds
    engine, live, merge = InHalves(device_bundle), OnnxRuntimeEngine(device_bundle), Merger(device_bundle)
    loud = Delta.of_ports(np.full(device_bundle.channels, 3.0), np.zeros(device_bundle.channels))
    for each in (engine, live):
        each.apply(merge(loud))
    found, expected = (each.observe(tiny_frames * 20, taps=True).taps for each in (engine, live))
    assert expected.max() > np.finfo(np.float16).max, "squares that are no halves"
    assert distance(found, expected) < HALF_TOLERANCE


@pytest.mark.parametrize("kind", [CudaProviderEngine, TensorRTProviderEngine])
def test_a_provider_that_is_not_here_is_one_sentence(device_bundle, kind):
    assert find(ENGINES, kind.name) is kind
    reason = kind.probe()
    if reason is None:
        pytest.skip(f"{kind.provider} is here")
    with pytest.raises(EngineError, match=rf"(?s)^{kind.provider} cannot run here: .*try: use the onnxruntime engine"):
        kind(device_bundle)


@pytest.mark.parametrize("method", ["tent", "eata", "sar", "roid"])
def test_what_these_methods_change_are_ports_of_a_plan(bundle, method):
    """The documentation names them; a method that changes whole weights brings ONNX Runtime back."""
    if bundle.is_reference:
        pytest.skip("in reference mode the engine does not answer")
    made = build(method, Context(bundle, lambda: Tail(bundle), 0, {"guards": False}))
    learned = {f"tail/{name}": value.numpy() + 0.01 for name, value in made.source.items()}
    assert learned
    update = Merger(bundle)(random_ports(bundle, 1) | learned)
    assert {SCALE, BIAS} <= feeds_of(bundle, update).keys()


def test_a_cut_right_before_the_head_is_cut_and_features(tiny_net, tmp_path):
    path = export(from_module(tiny_net, "late", TINY_INPUT), tmp_path / "b", cut="point_bn")
    bundle = Bundle.load(path)
    assert bundle.manifest.head is not None
    model, features = from_module(tiny_net, "late", TINY_INPUT), bundle.manifest.head.features
    late = Bundle.load(export(model, tmp_path / "c", cut=features))
    assert late.manifest.cut.tensor == features
    frames = np.random.default_rng(3).standard_normal((4, 3, 16, 16), np.float32)
    found = OnTheProcessor(late).observe(frames, cut=True, taps=True, features=True)
    expected = OnnxRuntimeEngine(late).observe(frames, cut=True, taps=True, features=True)
    for name in ("logits", "cut", "taps", "features"):
        assert distance(getattr(found, name), getattr(expected, name)) < TOLERANCE


def test_the_same_bundle_gives_the_same_graph_in_every_process(device_bundle):
    """A plan is found again by the hash of its graph."""
    code = (
        "import hashlib, onnx, sys; from edge_adapt.bundle import Bundle; "
        "from edge_adapt.engines.ported import ported; bundle = Bundle.load(sys.argv[1]); "
        "graph = ported(onnx.load(bundle.path / 'full.onnx'), bundle, (True, True, True)); "
        "print(hashlib.sha256(graph.SerializeToString()).hexdigest())"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code, str(device_bundle.path)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(hashes) == 1
