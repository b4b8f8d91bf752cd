"""NVIDIA's own parser and builder, where one can be had without a GPU; and all that is decided without them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from edge_adapt.bundle import FULL
from edge_adapt.engines import tensorrt, tensorrt_build
from edge_adapt.engines.building import DISK_FULL, REFUSED, Builder, Outcome, Progress, progress_of, remaining_s
from edge_adapt.engines.cache import PlanCache, PlanKey
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.engines.ported import ported
from edge_adapt.engines.ported_engine import key_of
from edge_adapt.engines.tensorrt import (
    Int8TensorRTEngine,
    TensorRTEngine,
    command,
    parts_of,
    precision_of,
    profile_of,
)
from edge_adapt.engines.tensorrt_build import MAX_PROMPTS, RefusedError, build, flags_of, library, profiles
from edge_adapt.errors import EngineError
from edge_adapt.graph import float_info
from edge_adapt.plugins import ENGINES, find

USED = {
    "Builder": ["create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"],
    "IBuilderConfig": ["add_optimization_profile", "set_flag", "clear_flag", "set_memory_pool_limit"],
    "OnnxParser": ["parse", "num_errors", "get_error"],
    "Runtime": ["deserialize_cuda_engine"],
    "ICudaEngine": ["num_io_tensors", "get_tensor_name", "get_tensor_mode", "create_execution_context"],
    "IExecutionContext": [
        *("set_optimization_profile_async", "set_input_shape", "get_tensor_shape"),
        *("set_tensor_address", "execute_async_v3"),
    ],
}
"""Every name of TensorRT's interface that this package calls."""


@pytest.fixture(scope="module")
def builder():
    """The TensorRT that builds on this machine."""
    try:
        return library()
    except EngineError as error:
        pytest.skip(error.what)


@pytest.fixture
def key() -> PlanKey:
    return PlanKey("5eed", "a test", "none", "8.6", "fp32", 4)


def foreign(operator: str = "Sigmoidal") -> onnx.ModelProto:
    """A graph with an operator that nobody has."""
    nodes = [
        helper.make_node("Relu", ["x"], ["y"], name="known"),
        helper.make_node(operator, ["y"], ["z"], name="strange", domain="nobody.knows"),
    ]
    graph = helper.make_graph(nodes, "g", [float_info("x", ["n", 3])], [float_info("z", ["n", 3])])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nobody.knows", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


# With a builder ------------------------------------------------------------------------------------------------------


def test_every_call_that_is_made_exists(builder):
    for kind, names in USED.items():
        assert [name for name in names if not hasattr(getattr(builder, kind), name)] == [], kind


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_plan_is_built_and_progress_is_told(builder, device_bundle, precision):
    key = key_of(device_bundle, looking=True, features=True)
    graph = ported(onnx.load(device_bundle.path / FULL), device_bundle, key)
    told = []
    plan = build(graph, precision=precision, max_batch=4, progress=lambda *facts: told.append(facts))
    assert len(plan) > 10_000
    assert told and all(0 < done <= total for _, done, total in told)


def test_the_first_node_that_is_refused_is_named(builder):
    with pytest.raises(RefusedError, match=r"(?s)parser refuses the graph.*'strange' \(Sigmoidal\)") as caught:
        build(foreign())
    assert caught.value.refusal.node == "strange"


def test_a_graph_that_is_no_graph_is_refused_with_a_reason(builder):
    with pytest.raises(RefusedError) as caught:
        build(onnx.ModelProto())
    assert caught.value.refusal.reason


def test_a_real_child_builds_a_plan_that_is_then_in_the_cache(builder, device_bundle, key, tmp_path):
    """The very program that a device runs, with the TensorRT that is here."""
    data = ported(onnx.load(device_bundle.path / FULL), device_bundle, (False, False, True)).SerializeToString()
    progress: list[Progress] = []
    cache = PlanCache(tmp_path)
    made = Builder(cache, report=progress.append).plan(key, lambda staged, attempt: command(data, key, staged, attempt))
    assert cache.load(key) == made
    assert len(made) > 10_000
    assert progress and progress[-1].left_s is not None
    assert [path.suffix for path in tmp_path.iterdir()] == [".plan"]


def test_a_real_child_says_what_it_refuses(builder, key, tmp_path):
    told: list[str] = []
    data = foreign().SerializeToString()
    with pytest.raises(EngineError, match=rf"'strange' \(Sigmoidal\).*exit code {REFUSED}"):
        Builder(PlanCache(tmp_path), tell=told.append).plan(key, lambda staged, n: command(data, key, staged, n))
    assert told == [], "no second attempt"
    assert list(tmp_path.iterdir()) == []


def test_a_real_child_on_a_full_disk_says_so(builder, device_bundle, key, tmp_path):
    """As much as may be written to one file stands for the disk."""
    graph = tmp_path / "graph.onnx"
    graph.write_bytes((device_bundle.path / FULL).read_bytes())
    limited = (
        "import resource, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "from edge_adapt.engines.tensorrt_child import main; sys.exit(main(*sys.argv[1:]))"
    )
    words = [sys.executable, "-c", limited, str(graph), str(tmp_path / "staged.part"), json.dumps(asdict(key))]
    ended = subprocess.run(words, check=False, capture_output=True, text=True)
    assert ended.returncode == DISK_FULL
    assert "the plan cannot be written" in ended.stdout.splitlines()[-1]
    assert not (tmp_path / "staged.part").exists()


# Without one ---------------------------------------------------------------------------------------------------------


def test_without_a_builder_there_is_one_sentence_and_a_remedy(monkeypatch):
    def absent(name: str):
        raise ImportError(name)

    monkeypatch.setattr(tensorrt_build.importlib, "import_module", absent)
    with pytest.raises(EngineError, match=r"^no TensorRT builder can be had on this machine\n  try: on an NVIDIA"):
        library()


def test_a_binding_without_its_library_is_no_builder(monkeypatch):
    monkeypatch.setattr(tensorrt_build, "has_driver", lambda: True)
    monkeypatch.setattr(tensorrt_build.importlib, "import_module", lambda name: object())
    with pytest.raises(EngineError, match="no TensorRT builder"):
        library()


def test_asking_for_the_engine_without_a_gpu_is_one_sentence(device_bundle):
    if tensorrt_build.has_driver():
        pytest.skip("a CUDA driver answers here")
    for name in ("tensorrt", "tensorrt_fp16"):
        kind = find(ENGINES, name)
        assert kind.probe() == "no CUDA driver answers"
        with pytest.raises(EngineError, match=r"^TensorRT cannot run here: no CUDA driver answers\n  try: on"):
            kind(device_bundle)


def test_the_package_is_imported_without_tensorrt_and_without_torch():
    """What a device without them imports must not need them, nor load torch before somebody learns."""
    code = (
        "import sys; sys.modules['tensorrt'] = sys.modules['tensorrt_rtx'] = None; "
        "from edge_adapt.engines.tensorrt import TensorRTEngine; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.__version__


def test_a_torch_without_cuda_is_told(monkeypatch):
    monkeypatch.setattr(tensorrt, "has_driver", lambda: True)
    monkeypatch.setattr(tensorrt, "library", object)
    if torch.cuda.is_available():
        pytest.skip("this torch has CUDA")
    assert TensorRTEngine.probe() == f"torch {torch.__version__} was built without CUDA"


def test_where_the_plans_cannot_be_built_onnxruntime_answers_and_says_why(device_bundle, tiny_frames, monkeypatch):
    """The whole engine, on a machine that only seems to have a GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(TensorRTEngine, "probe", classmethod(lambda cls: None))
    engine = TensorRTEngine(device_bundle)
    try:
        assert not engine.wait(60)
        assert (engine.trouble or "").endswith("onnxruntime answers")
        np.testing.assert_array_equal(engine.run(tiny_frames), OnnxRuntimeEngine(device_bundle).run(tiny_frames))
        assert "onnxruntime" in engine.description
    finally:
        engine.close()


def test_int8_of_a_bundle_without_it_is_one_sentence(device_bundle, monkeypatch):
    monkeypatch.setattr(TensorRTEngine, "probe", classmethod(lambda cls: None))
    with pytest.raises(EngineError, match=r"bundle 'tiny' has no INT8 graph for TensorRT\n  try: export it with"):
        Int8TensorRTEngine(device_bundle)


def test_only_a_quantised_graph_is_built_in_int8(device_bundle):
    graph = onnx.load(device_bundle.path / FULL)
    assert precision_of(graph, "int8") == "fp32"
    graph.graph.node.append(helper.make_node("QuantizeLinear", ["a", "b"], ["c"]))
    assert precision_of(graph, "int8") == "int8"
    assert precision_of(graph, "fp16") == "fp16"


def test_profiles_are_for_one_frame_and_for_many():
    one, many = profiles({"image": (-1, 3, 8, 8), "prompts": (-1, 16), "ports_scale": (40,)}, 16)
    assert one.shapes["image"] == ((1, 3, 8, 8),) * 3
    assert many.shapes["image"] == ((1, 3, 8, 8), (16, 3, 8, 8), (16, 3, 8, 8))
    assert one.shapes["prompts"] == many.shapes["prompts"] == ((0, 16), (0, 16), (MAX_PROMPTS, 16))
    assert "ports_scale" not in one.shapes
    assert len(profiles({"image": (-1, 3)}, 1)) == 1


@pytest.mark.parametrize("frames", [0, 1, 2, 15, 16, 17, 40])
@pytest.mark.parametrize("most", [1, 16])
def test_frames_are_cut_into_what_a_plan_takes(frames, most):
    parts = parts_of(frames, most)
    numbers = np.arange(frames)
    assert [number for part in parts for number in numbers[part]] == list(numbers)
    for part in parts:
        batch = part.stop - part.start
        shapes = profiles({"image": (-1, 3)}, most)[profile_of(batch, most)].shapes["image"]
        assert shapes[0][0] <= batch <= shapes[2][0]


def test_flags_follow_what_this_tensorrt_knows():
    old = ["FP16", "INT8", "TF32", "REFIT"]
    assert flags_of("fp32", old) == ([], ["TF32"])
    assert flags_of("fp16", old) == (["FP16"], ["TF32"])
    assert flags_of("int8", old) == (["INT8", "FP16"], ["TF32"])
    assert flags_of("fp16", ["REFIT"]) == ([], [])


def test_each_attempt_may_use_less_memory(key, tmp_path):
    words = [command(b"", key, tmp_path / "staged.part", attempt) for attempt in range(4)]
    assert [len(each) for each in words] == [6, 7, 7, 7]
    assert [int(each[-1]) for each in words[1:]] == [512, 128, 128]


def test_progress_tells_the_time_that_is_left():
    assert remaining_s(10.0, 2, 6) == 20.0
    assert remaining_s(10.0, 0, 6) is None
    found = progress_of('{"phase": "tactics", "done": 2, "total": 6}', 10.0)
    assert str(found) == "tactics 2/6, about 20 s left"
    for line in ("", "text", "[]", "null", "{}", '{"phase": 1, "done": 3, "total": 2}', '{"phase": "x", "done": null}'):
        assert progress_of(line, 1.0) is None


def test_an_outcome_says_how_the_builder_ended():
    assert str(Outcome(-9)) == "killed by SIGKILL"
    assert str(Outcome(1, "why")) == "why (exit code 1)"
    assert str(Outcome(1)) == "no reason given (exit code 1)"
