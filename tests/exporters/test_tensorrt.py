"""Every graph of every bundle, through NVIDIA's parser and builder. It says that they are taken, not how they run."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from benchmarks.contract.tiny import TINY_INPUT
from edge_adapt.bundle import FULL_INT8, Bundle
from edge_adapt.cli import run
from edge_adapt.delta import Delta
from edge_adapt.engines import tensorrt_build
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine, make_session
from edge_adapt.engines.ported import feeds_of, ported
from edge_adapt.engines.tensorrt_build import Refusal, RefusedError, build, library
from edge_adapt.errors import ArtifactError, EngineError
from edge_adapt.merge import Merger
from exporters import tensorrt
from exporters.export import export, from_module, from_spec
from exporters.parity import random_ports
from exporters.quantise import QuantisePlan
from exporters.tensorrt import FLOAT, check
from exporters.zoo import ZOO

DEVICE, REFERENCE = 8, 6
"""Plans of a bundle: four graphs in two precisions; cut at the input there is no trunk."""
ACCEPTED = {**dict.fromkeys(ZOO, DEVICE), "vit-tiny": DEVICE // 2}
"""The transformer in float32 alone: each of its graphs takes a minute to build."""


@pytest.fixture(scope="module")
def builder():
    try:
        return library()
    except EngineError as error:
        pytest.skip(error.what)


def counted(bundles: list[Bundle]) -> int:
    """Plans of all bundles; prints what was taken."""
    total = 0
    for bundle in bundles:
        precisions = FLOAT[: ACCEPTED.get(bundle.manifest.name, DEVICE) * len(FLOAT) // DEVICE]
        plans = check(bundle, lambda text: None, precisions)
        print(f"{bundle.manifest.name}: {plans} plans accepted")
        total += plans
    print(f"{len(bundles)} bundles, {total} plans accepted by {library().__name__}")
    return total


def test_small_bundles_of_every_kind_are_taken(builder, device_bundle, reference_bundle, token_bundle):
    """Every kind of norm site, both cuts, prompts."""
    assert counted([device_bundle, reference_bundle, token_bundle]) == 2 * DEVICE + REFERENCE


@pytest.mark.slow
def test_the_whole_zoo_is_taken(builder, tmp_path):
    bundles = [Bundle.load(export(from_spec(f"zoo:{name}", weights=None), tmp_path / name)) for name in ZOO]
    assert len(bundles) == len(ZOO) == 8
    assert counted(bundles) == sum(ACCEPTED.values()) == 60


def test_the_command_names_what_was_taken(builder, reference_bundle, capsys):
    assert run(["check", str(reference_bundle.path), "--tensorrt"]) == 0
    said = capsys.readouterr().err
    assert f"{REFERENCE} plans built by" in said
    assert "full with ports and taps, fp16: accepted" in said


def test_a_refusal_is_an_error_that_names_graph_and_node(device_bundle, monkeypatch):
    def refuse(model, *, precision):
        if precision == "fp16":
            raise RefusedError("TensorRT's parser refuses the graph", Refusal("stem", "Conv", "no such operator"))
        return b"plan"

    monkeypatch.setattr(tensorrt, "library", lambda: SimpleNamespace(__name__="tensorrt", __version__="10"))
    monkeypatch.setattr(tensorrt, "build", refuse)
    with pytest.raises(ArtifactError, match=r"tensorrt 10: full, fp16: .* node 'stem' \(Conv\): no such operator"):
        check(device_bundle, lambda text: None)


@pytest.mark.parametrize(
    "words", [["check", "BUNDLE", "--tensorrt"], ["export", "zoo:mlperf-resnet8", "--check-tensorrt"]]
)
def test_without_a_builder_the_command_says_so_and_ends_with_2(device_bundle, monkeypatch, capsys, tmp_path, words):
    def absent(name: str):
        raise ImportError(name)

    monkeypatch.setattr(tensorrt_build.importlib, "import_module", absent)
    given = [str(device_bundle.path) if word == "BUNDLE" else word for word in words]
    out = tmp_path / "out"
    assert run([*given, "--out", str(out)] if words[0] == "export" else given) == 2
    said = capsys.readouterr().err
    assert "error: no TensorRT builder can be had on this machine" in said
    assert "pip install tensorrt-rtx-cu13" in said
    assert not out.exists(), "it says so before minutes of work"


@pytest.fixture(scope="module", params=["cpu", "tensorrt"])
def int8_bundle(request, tiny_net, tiny_data, tmp_path_factory) -> Bundle:
    model = from_module(tiny_net, "int8", TINY_INPUT)
    plan = QuantisePlan(request.param, max_loss=100.0)
    folder = tmp_path_factory.mktemp("int8") / request.param
    return Bundle.load(export(model, folder, calibration=tiny_data.images, cut="block", int8=plan))


def test_int8_for_tensorrt_is_taken_and_the_form_for_a_cpu_is_not_asked_for(builder, int8_bundle):
    said: list[str] = []
    plans = check(int8_bundle, said.append, ("fp32",))
    facts = int8_bundle.manifest.quantised
    assert facts is not None
    if facts.target == "tensorrt":
        assert plans == DEVICE // 2 + 2
        assert sum("int8: accepted" in line for line in said) == 2
    else:
        assert plans == DEVICE // 2
        assert any("full, int8: not asked, it was made for cpu" in line for line in said)
        with pytest.raises(RefusedError):
            build(onnx.load(int8_bundle.path / FULL_INT8), precision="int8")


@pytest.mark.parametrize("int8_bundle", ["tensorrt"], indirect=True)
def test_int8_with_ports_as_inputs_answers_like_float32(int8_bundle, tiny_frames):
    """The graph that a plan is built of, on ONNX Runtime: what calibration allows for, before and after a change."""
    bundle, merge = int8_bundle, Merger(int8_bundle)
    session = make_session(ported(onnx.load(bundle.path / FULL_INT8), bundle, (False, False, True)), 1)
    engine = OnnxRuntimeEngine(bundle, quantised=False)
    for delta in (Delta.source(), random_ports(bundle, 1)):
        update = merge(delta)
        engine.apply(update)
        expected = engine.run(tiny_frames)
        found = session.run(None, {"image": tiny_frames, **feeds_of(bundle, update)})[0]
        assert np.abs(found - expected).max() < 0.15 * np.abs(expected).max()
