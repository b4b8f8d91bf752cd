"""Export in INT8: two forms of graph, what is refused, what the manifest says; real networks keep their accuracy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from benchmarks.contract.tiny import TINY_INPUT, tiny_images
from benchmarks.latency import CASES, INT8_CASES, latency
from edge_adapt.bundle import FULL_INT8, Bundle, InputSpec, Quantised
from edge_adapt.cli import run
from edge_adapt.delta import Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ArtifactError, ConfigError, DataError, EngineError
from edge_adapt.graph import initializers, producers
from edge_adapt.merge import Merger
from edge_adapt.methods.moments import Moments
from edge_adapt.methods.protocol import Context
from edge_adapt.preprocess import Preprocess
from edge_adapt.runtime.loop import adapt
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.streams.data import load_data
from edge_adapt.tail import Tail
from exporters.export import check, export, from_module, from_spec
from exporters.parity import random_ports
from exporters.quantise import CHANGED, FEWEST, LOSS, QuantisePlan, check_calibration, gate, split
from exporters.zoo.vit import VisionTransformer

TARGETS = ("cpu", "tensorrt")


@pytest.fixture(scope="module", params=TARGETS)
def bundle(request, tiny_net, tiny_data, tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("int8") / request.param
    plan = QuantisePlan(request.param, tiny_data.labels, max_loss=10)
    model = from_module(tiny_net, "tiny", TINY_INPUT)
    return Bundle.load(export(model, folder, calibration=tiny_data.images, cut="block", int8=plan))


def test_the_manifest_says_what_int8_costs_and_gains(bundle, capsys):
    facts = bundle.manifest.quantised
    assert bundle.manifest.precision == "int8"
    assert facts.layers == 5 and facts.frames == 64 and facts.held_out == 64
    assert min(facts.agreement) > 90
    for top1 in (facts.float_top1, facts.int8_top1):
        assert len(top1) == 2 and all(0 < value <= 100 for value in top1)
    assert facts.speed > 0
    assert FULL_INT8 in bundle.manifest.files
    assert bundle.manifest.calibration_samples == 128
    assert run(["info", str(bundle.path)]) == 0
    text = capsys.readouterr().out
    assert f"int8 for {facts.target}: 5 layers" in text
    assert "int8 top-1" in text


def test_each_target_has_the_form_that_it_takes(bundle):
    """As found: ONNX Runtime fuses uint8 with int32 biases, TensorRT's parser wants symmetric int8 and float biases."""
    graph = onnx.load(bundle.path / FULL_INT8).graph
    weights, made_by = initializers(graph), producers(graph)
    cpu = bundle.manifest.quantised.target == "cpu"
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 5
    for node in convolutions:
        (frame, weight), bias = (made_by[name] for name in node.input[:2]), made_by.get(node.input[2])
        assert weights[weight.input[0]].dtype == np.int8
        assert weights[weight.input[1]].shape == weights[weight.input[0]].shape[:1]
        assert not weights[weight.input[2]].any()
        assert weights[frame.input[2]].dtype == (np.uint8 if cpu else np.int8)
        assert (bias is not None) == cpu
    zero_points = [weights[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert any(point.any() for point in zero_points) == cpu
    gemm = next(node for node in graph.node if node.op_type == "Gemm")
    assert gemm.input[1] in weights and weights[gemm.input[1]].dtype == np.float32


def test_the_graph_for_tensorrt_is_built_by_its_builder(bundle):
    from edge_adapt.engines.tensorrt_build import build, library

    try:
        library()
    except EngineError as reason:
        pytest.skip(str(reason))
    if bundle.manifest.quantised.target != "tensorrt":
        pytest.skip("the graph for the CPU is not meant for it")
    assert build(onnx.load(bundle.path / FULL_INT8), precision="int8")


def test_source_statistics_are_of_the_engine_that_runs(bundle, tiny_data):
    """Taps are those of its float32 looks; features and answers are those of its INT8 answers."""
    engine, frames = OnnxRuntimeEngine(bundle), Preprocess(TINY_INPUT)(tiny_data.images)
    features = engine.observe(frames, features=True).features
    assert np.allclose(bundle.source["features.mean"], features.mean(axis=0), rtol=1e-4, atol=1e-5)
    plain = OnnxRuntimeEngine(bundle, quantised=False).observe(frames, features=True).features
    assert not np.allclose(bundle.source["features.mean"], plain.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_check_verifies_an_int8_bundle(bundle):
    assert max(check(bundle.path).values()) < 1e-4


def test_bench_latency_times_the_bare_int8_session_too(bundle):
    figures = latency(bundle, rounds=2)
    assert figures["ratios"].keys() == {*CASES, *INT8_CASES}
    assert figures["ratios"]["bare"] == 1


def test_a_damaged_int8_graph_is_not_loaded(bundle):
    file = bundle.path / FULL_INT8
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ArtifactError, match=r"full\.int8\.onnx is damaged"):
            Bundle.load(bundle.path)
    finally:
        file.write_bytes(whole)


# Refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 500])
def test_one_image_is_refused_however_often_it_is_there(tiny_net, tmp_path, copies):
    model = from_module(tiny_net, "tiny", TINY_INPUT)
    with pytest.raises(DataError, match=f"1 different frame, INT8 needs {2 * FEWEST}"):
        export(
            model, tmp_path / "b", calibration=tiny_images(1).repeat(copies, 0), cut="block", int8=QuantisePlan("cpu")
        )
    assert not list(tmp_path.iterdir())


def test_too_few_frames_are_refused_and_enough_are_not():
    with pytest.raises(DataError, match="31 different frames"):
        check_calibration(tiny_images(2 * FEWEST - 1))
    check_calibration(tiny_images(2 * FEWEST))
    with pytest.raises(ConfigError, match="--calibration"):
        check_calibration(None)


def test_a_transformer_is_refused_and_nothing_is_left(tmp_path):
    net = VisionTransformer(image=16, patch=4, dim=16, depth=1, heads=2, classes=5).eval()
    model = from_module(net, "tokens", InputSpec(shape=(3, 16, 16)), cut="blocks.0", prompt_width=16)
    frames = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
    with pytest.raises(ConfigError, match="transformer"):
        export(model, tmp_path / "b", calibration=frames, cut="blocks.0", int8=QuantisePlan("cpu"))
    assert not list(tmp_path.iterdir())


def test_more_than_the_stated_loss_is_refused_unless_forced(tiny_net, tiny_data, tmp_path):
    model = from_module(tiny_net, "tiny", TINY_INPUT)
    plan = QuantisePlan("cpu", tiny_data.labels, max_loss=-100)
    with pytest.raises(ArtifactError, match=r"points of accuracy on 64 held-out frames, -100 are allowed"):
        export(model, tmp_path / "b", calibration=tiny_data.images, cut="block", int8=plan)
    assert not list(tmp_path.iterdir())
    told: list[str] = []
    export(
        model,
        tmp_path / "b",
        calibration=tiny_data.images,
        cut="block",
        int8=plan,
        force=True,
        report=told.append,
    )
    assert any(line.startswith("forced: INT8 costs") for line in told)
    assert Bundle.load(tmp_path / "b").manifest.quantised is not None


def facts(**changes) -> Quantised:
    values = {"target": "cpu", "frames": 64, "held_out": 100, "agreement": (97.0, 60.0), "speed": 2.0, "layers": 5}
    return Quantised(**values | changes)


def test_the_gate_goes_by_labels_where_there_are_some():
    right = {"float_top1": (90.0, 50.0)}
    assert gate(facts(**right, int8_top1=(90 - LOSS, 50.0)), None) is None
    assert "1.6 points" in gate(facts(**right, int8_top1=(88.4, 50.0)), None)
    assert "2.0 points" in gate(facts(**right, int8_top1=(90.0, 48.0)), None)
    assert gate(facts(**right, int8_top1=(90.0, 48.0)), 2.0) is None
    assert gate(facts(agreement=(100 - CHANGED, 60.0)), None) is None
    assert "6.0 % of the answers" in gate(facts(agreement=(94.0, 99.0)), None)


def test_ranges_and_comparison_share_no_frame():
    frames = np.arange(3000)
    measured, held_out = split(frames)
    assert not set(measured) & set(held_out)
    assert len(measured) == 128 and len(held_out) == 512
    assert max(held_out) > 2900 and max(measured) > 2800


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--precision", "int4"], "int4"),
        (["--precision", "int8"], "--calibration"),
        (["--precision", "int8", "--target", "tpu"], "tpu"),
        (["--target", "cpu"], "--target without"),
        (["--max-loss", "2"], "--max-loss without"),
    ],
)
def test_wrong_options_are_named(tmp_path, capsys, arguments, expected):
    assert run(["export", "zoo:mlperf-resnet8", "--out", str(tmp_path / "b"), *arguments]) != 0
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


# Real networks -------------------------------------------------------------------------------------------------------

CIFAR = {"cifar-resnet20": "cifar10_resnet20.safetensors", "cifar-resnet56": "cifar10_resnet56.safetensors"}


def answers(engine: OnnxRuntimeEngine, frames: np.ndarray) -> np.ndarray:
    return np.concatenate([engine.run(frames[at : at + 25]) for at in range(0, len(frames), 25)]).argmax(axis=1)


def lost(bundle: Bundle, frames: np.ndarray, labels: np.ndarray) -> list[float]:
    """Points of accuracy that INT8 costs with source's ports, and with two others."""
    plain, int8, merge = OnnxRuntimeEngine(bundle, quantised=False), OnnxRuntimeEngine(bundle), Merger(bundle)
    made = []
    for delta in (Delta.source(), random_ports(bundle, 11), random_ports(bundle, 12)):
        for engine in (plain, int8):
            engine.apply(merge(delta))
        right = [(answers(engine, frames) == labels).mean() for engine in (plain, int8)]
        made.append(100 * float(right[0] - right[1]))
    return made


@pytest.fixture(scope="module", params=list(CIFAR))
def cifar_bundle(request, shared_data, tmp_path_factory) -> Bundle:
    data = load_data(str(shared_data / "cifar10_train_10k.npz"))
    model = from_spec(f"zoo:{request.param}", weights=shared_data / "models" / CIFAR[request.param])
    folder = tmp_path_factory.mktemp("int8") / request.param
    plan = QuantisePlan("cpu", data.labels[::10])
    return Bundle.load(export(model, folder, calibration=data.images[::10], int8=plan))


@pytest.mark.slow
def test_resnets_keep_their_accuracy_before_and_after_random_ports(cifar_bundle, shared_data):
    data = load_data(str(shared_data / "cifar10_test.npz"))
    frames, labels = Preprocess(cifar_bundle.manifest.input)(data.images[:1000]), data.labels[:1000]
    assert max(lost(cifar_bundle, frames, labels)) <= 1.5


@pytest.mark.slow
def test_efficientnet_keeps_its_accuracy_before_and_after_random_ports(shared_data, tmp_path):
    data = load_data(str(shared_data / "imagenet_1k_samples"))
    model = from_spec("zoo:efficientnet-lite0", weights=None)
    if "random" in model.provenance["weights"]:
        pytest.skip("the package with EfficientNet's weights is not installed")
    plan = QuantisePlan("cpu", data.labels[::5])
    bundle = Bundle.load(export(model, tmp_path / "b", calibration=data.images[::5], int8=plan, force=True))
    frames, labels = Preprocess(bundle.manifest.input)(data.images[1::2]), data.labels[1::2]
    assert max(lost(bundle, frames, labels)) <= 1.5


@pytest.mark.slow
def test_moments_recovers_what_it_does_in_float32(cifar_bundle, shared_data):
    """At least nine tenths of the gain, 100 frames of each corruption, every one answered in INT8 after its batch."""
    data = load_data(str(shared_data / "cifar10_c_sev5.npz"))
    prepare, labels = Preprocess(cifar_bundle.manifest.input), data.labels[:100]
    gains = []
    for quantised in (False, True):
        engine = OnnxRuntimeEngine(cifar_bundle, quantised=quantised)
        frames = {name: prepare(images[:100]) for name, images in data.shifts.items()}
        source = [float((answers(engine, part) != labels).mean()) for part in frames.values()]
        predictor, moments = Predictor(cifar_bundle, engine), Moments(Context(cifar_bundle, lambda: Tail(cifar_bundle)))
        batches = [part[at : at + 20] for part in frames.values() for at in range(0, 100, 20)]
        adapted = []
        for number, _ in enumerate(adapt(predictor, moments, iter(batches))):
            part = number % 5 * 20
            adapted.append(float((engine.run(batches[number]).argmax(axis=1) != labels[part : part + 20]).mean()))
        gains.append(np.mean(source) - np.mean(adapted))
    assert gains[1] >= 0.9 * gains[0] > 0.1
