"""INT8 answers: folded weights against plain arithmetic, sessions against ones optimised anew, looks in float32."""

from __future__ import annotations

import itertools
import logging
import threading

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.contract.tiny import TINY_INPUT
from edge_adapt.bundle import FULL_INT8, Bundle, LiveLayer
from edge_adapt.delta import Delta
from edge_adapt.engines import quantised
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine, make_session
from edge_adapt.engines.quantised import (
    LARGEST,
    ROOM,
    QuantisedLayer,
    QuantisedNetwork,
    folded,
    has_dot_products,
    quantised_weight,
)
from edge_adapt.engines.torch import TorchEngine
from edge_adapt.errors import ArtifactError, StateError
from edge_adapt.graph import set_initializers
from edge_adapt.merge import Merger
from edge_adapt.tail import Tail
from exporters.export import export, from_module
from exporters.parity import random_ports
from exporters.quantise import QuantisePlan

LOGGERS = "edge_adapt.engines"


def int8_bundle(net, data, folder, target: str, cut: str) -> Bundle:
    model = from_module(net, "tiny", TINY_INPUT)
    plan = QuantisePlan(target, data.labels, max_loss=10)
    return Bundle.load(export(model, folder, calibration=data.images, cut=cut, int8=plan))


@pytest.fixture(scope="module")
def bundle(tiny_net, tiny_data, tmp_path_factory) -> Bundle:
    return int8_bundle(tiny_net, tiny_data, tmp_path_factory.mktemp("int8") / "cpu", "cpu", "input")


@pytest.fixture(scope="module")
def tensorrt_bundle(tiny_net, tiny_data, tmp_path_factory) -> Bundle:
    return int8_bundle(tiny_net, tiny_data, tmp_path_factory.mktemp("int8") / "tensorrt", "tensorrt", "block")


@pytest.fixture(scope="module")
def engine(bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(bundle)


@pytest.fixture(scope="module")
def merge(bundle) -> Merger:
    return Merger(bundle)


def every_delta(bundle: Bundle) -> dict[str, Delta]:
    """One of each kind: ports; norms, one of them with its sign turned; a convolution, the head."""
    rng = np.random.default_rng(0)
    parameters = {name: value.numpy() for name, value in Tail(bundle).parameters.items()}
    turned = parameters["point_bn.weight"] * np.where(np.arange(16) % 3, 1, -1).astype(np.float32)
    noise = rng.normal(0, 0.05, parameters["point.weight"].shape).astype(np.float32)
    made = {
        "source": Delta.source(),
        "ports": random_ports(bundle),
        "norm": Delta({"tail/point_bn.weight": turned, "tail/point_bn.bias": parameters["point_bn.bias"] + 0.3}),
        "convolution": Delta({"tail/point.weight": parameters["point.weight"] + noise}),
        "head": Delta({"tail/head.weight": parameters["head.weight"] * 1.3, "tail/head.bias": np.ones(5, np.float32)}),
    }
    return made | {"all": made["ports"] | made["norm"].tensors | made["convolution"].tensors | made["head"].tensors}


KINDS = ("source", "ports", "norm", "convolution", "head", "all")


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_answers_bit_for_bit_as_the_whole_graph_optimised_anew(bundle, engine, merge, tiny_frames, kind):
    update = merge(every_delta(bundle)[kind])
    engine.apply(update)
    assert isinstance(engine._quantised, QuantisedNetwork)
    assert not any(isinstance(graph, onnx.ModelProto) for graph in engine._quantised._graphs.values())
    model = onnx.load(bundle.path / FULL_INT8)
    set_initializers(model.graph, engine._quantised.edits(update))
    expected = make_session(model, 1).run(None, {model.graph.input[0].name: tiny_frames})[0]
    assert np.array_equal(engine.run(tiny_frames), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_stay_close_to_torch_in_float32(bundle, engine, merge, tiny_frames, kind):
    update, plain = merge(every_delta(bundle)[kind]), TorchEngine(bundle)
    for each in (engine, plain):
        each.apply(update)
    found, expected = engine.run(tiny_frames), plain.run(tiny_frames)
    assert np.abs(found - expected).mean() < 0.05 * np.abs(expected).mean()
    assert not np.array_equal(found, expected)


def test_back_to_source_is_bit_for_bit_source(bundle, engine, merge, tiny_frames):
    engine.apply(merge(Delta.source()))
    before = engine.run(tiny_frames)
    for kind in ("all", "ports"):
        engine.apply(merge(every_delta(bundle)[kind]))
        assert not np.array_equal(engine.run(tiny_frames), before)
        engine.apply(merge(Delta.source()))
        assert np.array_equal(engine.run(tiny_frames), before)


def test_looks_are_the_float_network_and_answers_are_not(bundle, engine, merge, tiny_frames):
    plain, update = OnnxRuntimeEngine(bundle, quantised=False), merge(random_ports(bundle))
    for each in (engine, plain):
        each.apply(update)
    look, expected = (each.observe(tiny_frames, cut=True, taps=True, features=True) for each in (engine, plain))
    for role in ("logits", "cut", "taps", "features"):
        assert np.array_equal(getattr(look, role), getattr(expected, role)), role
    answer = engine.observe(tiny_frames, features=True)
    assert np.array_equal(answer.logits, engine.run(tiny_frames))
    assert not np.array_equal(answer.logits, look.logits)
    assert answer.features.shape == look.features.shape
    assert not np.array_equal(answer.features, look.features)


def test_a_rehearsal_answers_in_int8_and_changes_nothing(bundle, engine, merge, tiny_frames):
    update = merge(every_delta(bundle)["all"])
    engine.apply(merge(Delta.source()))
    before = engine.run(tiny_frames)
    rehearsed = engine.rehearse(update, tiny_frames).logits
    assert np.array_equal(engine.run(tiny_frames), before)
    engine.apply(update)
    assert np.array_equal(engine.run(tiny_frames), rehearsed)


def test_who_applies_makes_the_sessions_and_no_answer_does(bundle, merge, tiny_frames, monkeypatch):
    engine = OnnxRuntimeEngine(bundle)
    engine.run(tiny_frames)
    engine.observe(tiny_frames, features=True)
    makers, made = [], ort.InferenceSession

    def noted(*arguments, **options):
        makers.append(threading.current_thread().name)
        return made(*arguments, **options)

    monkeypatch.setattr(ort, "InferenceSession", noted)
    for seed in range(3):
        learner = threading.Thread(target=engine.apply, args=[merge(random_ports(bundle, seed))], name="learner")
        learner.start()
        learner.join()
        engine.run(tiny_frames)
        engine.observe(tiny_frames, features=True)
    assert makers == ["learner"] * 6, "two sessions for each change"


def test_weights_that_nobody_answered_with_cost_no_session(bundle, merge, tiny_frames, monkeypatch):
    """While every frame is looked at, ports change often and nothing is answered in INT8."""
    engine = OnnxRuntimeEngine(bundle)
    for seed in (0, 1):  # both banks have been made, and looked through
        engine.apply(merge(random_ports(bundle, seed)))
        engine.observe(tiny_frames, taps=True)
    made, count = ort.InferenceSession, []

    def counted(*arguments, **options):
        count.append(arguments)
        return made(*arguments, **options)

    monkeypatch.setattr(ort, "InferenceSession", counted)
    for seed in range(2, 6):
        engine.apply(merge(random_ports(bundle, seed)))
        engine.observe(tiny_frames, taps=True)
    assert not count
    engine.run(tiny_frames)
    assert len(count) == 1


def test_an_answer_is_never_a_mixture_of_two_deltas(bundle, merge, tiny_frames):
    engine = OnnxRuntimeEngine(bundle)
    updates = [merge(random_ports(bundle, seed)) for seed in (0, 1)]
    frames, expected = tiny_frames[:8], set()
    for update in updates:
        engine.apply(update)
        expected.add(engine.run(frames).tobytes())
    stop = threading.Event()
    failed: list[BaseException] = []

    def change() -> None:
        try:
            for update in itertools.cycle(updates):
                if stop.is_set():
                    return
                engine.apply(update)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        found = {engine.run(frames).tobytes() for _ in range(500)}
    finally:
        stop.set()
        thread.join()
    assert not failed
    assert len(expected) == 2
    assert found <= expected


def test_a_weight_of_another_shape_is_refused(bundle, engine, merge):
    with pytest.raises(StateError, match=r"point\.weight"):
        engine.apply(merge(Delta({"tail/point.weight": np.ones((16, 9, 1, 1), np.float32)})))


def test_the_graph_for_tensorrt_answers_on_the_cpu_and_the_log_says_that_it_is_slow(
    tensorrt_bundle, tiny_frames, caplog
):
    with caplog.at_level(logging.WARNING, LOGGERS):
        engine = OnnxRuntimeEngine(tensorrt_bundle)
    assert "slower than float32" in caplog.text
    plain, merge = OnnxRuntimeEngine(tensorrt_bundle, quantised=False), Merger(tensorrt_bundle)
    for delta in (random_ports(tensorrt_bundle), Delta.source()):
        for each in (engine, plain):
            each.apply(merge(delta))
        found, expected = engine.run(tiny_frames), plain.run(tiny_frames)
        assert np.abs(found - expected).mean() < 0.1 * np.abs(expected).mean()


def test_without_int8_dot_products_weights_become_uint8(bundle, engine, merge, tiny_frames, monkeypatch, caplog):
    monkeypatch.setattr(quantised, "has_dot_products", lambda: False)
    with caplog.at_level(logging.INFO, LOGGERS):
        other = OnnxRuntimeEngine(bundle)
    assert "optimises it anew" in caplog.text
    for kind in ("all", "source"):
        for each in (engine, other):
            each.apply(merge(every_delta(bundle)[kind]))
        found, expected = other.run(tiny_frames), engine.run(tiny_frames)
        assert np.abs(found - expected).mean() < 0.01 * np.abs(expected).mean()


@pytest.mark.parametrize(
    ("machine", "text", "expected"),
    [
        ("x86_64", "flags : sse avx512f avx512_vnni", True),
        ("x86_64", "flags : sse avx2 avx_vnni", True),
        ("x86_64", "flags : sse avx2", False),
        ("x86_64", None, False),
        ("aarch64", None, True),
    ],
)
def test_which_processors_have_dot_products(monkeypatch, tmp_path, machine, text, expected):
    monkeypatch.setattr("platform.machine", lambda: machine)
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert has_dot_products(tmp_path / "cpuinfo") is expected


def test_a_convolution_quantised_otherwise_is_refused_by_name(bundle):
    model = onnx.load(bundle.path / FULL_INT8)
    layer = quantised.quantised_layers(model, bundle)[0]
    set_initializers(model.graph, {layer.scale: layer.scales[:1]})
    with pytest.raises(ArtifactError, match=r"stem\.0.*1 scales"):
        quantised.quantised_layers(model, bundle)


# Folding -------------------------------------------------------------------------------------------------------------


@st.composite
def layers(draw):
    """A layer, a factor and a bias for each of its channels: from dead to huge, of either sign."""
    channels = draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=(channels, 3, 2, 2)) * 10.0 ** rng.uniform(-9, 2, (channels, 1, 1, 1))).astype(np.float32)
    values, scales = quantised_weight(weight)
    float_bias = draw(st.booleans())
    layer = QuantisedLayer(
        LiveLayer(name="conv", op="Conv", weight="w", bias="b"),
        *("w8", "ws", "b32", None if float_bias else "bs"),
        float(10.0 ** rng.uniform(-4, 1)),
        values,
        scales,
    )
    number = st.floats(-1e3, 1e3, width=32)
    factor = np.array([draw(number) for _ in range(channels)], np.float32)
    bias = np.array([draw(number) for _ in range(channels)], np.float32)
    return layer, factor, bias, weight if draw(st.booleans()) else None


@given(layers())
@settings(max_examples=200, deadline=None)
def test_folded_weights_are_what_plain_arithmetic_says(case):
    layer, factor, bias, weight = case
    made = folded(layer, factor, bias, weight)
    values, scales = made["w8"].astype(np.float64), made["ws"].astype(np.float64)[:, None, None, None]
    assert made["w8"].dtype == np.int8 and np.abs(values).max() <= LARGEST
    assert made["ws"].dtype == np.float32 and (made["ws"] > 0).all()
    source = layer.values.astype(np.float64) * layer.scales[:, None, None, None] if weight is None else weight
    expected = source * factor.astype(np.float64)[:, None, None, None]
    # Half a step, and what float32 rounds: a weight that keeps its int8 values is exact but for that.
    assert np.all(np.abs(values * scales - expected) <= 0.5 * scales + 1e-6 * np.abs(expected) + 1e-37)
    if layer.bias_scale is None:
        assert np.array_equal(made["b32"], bias)
        return
    assert made["b32"].dtype == np.int32 and np.abs(made["b32"].astype(np.float64)).max() <= ROOM
    unit = made["bs"].astype(np.float64)
    assert np.all(np.abs(made["b32"] * unit - bias) <= 0.51 * unit + 1e-6 * np.abs(bias))
    assert np.allclose(unit, layer.input_scale * made["ws"], rtol=1e-6)
