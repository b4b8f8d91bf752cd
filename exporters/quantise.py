"""full.onnx -> the same with its convolutions in INT8, static QDQ, in one of two forms; and what that costs and gains.

`cpu` is what ONNX Runtime fuses on a CPU: uint8 activations with a zero point, int8 weights, int32 biases. `tensorrt`
is what its parser takes: int8 activations and weights, both symmetric, float biases. Each is slow or refused elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from edge_adapt.bundle import FULL, Bundle, Quantised
from edge_adapt.delta import Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine, make_session
from edge_adapt.engines.quantised import quantised_layers
from edge_adapt.engines.refold import refolded
from edge_adapt.errors import ArtifactError, ConfigError, DataError
from edge_adapt.graph import float_info, initializers, set_initializers
from edge_adapt.merge import Merger
from exporters.parity import random_ports

Array = NDArray[Any]
Target = Literal["cpu", "tensorrt"]
Ranges = dict[str, tuple[float, float]]

TARGETS: tuple[Target, ...] = ("cpu", "tensorrt")
OPERATORS = ("Conv", "Add", "Relu", "Clip", "MaxPool", "Concat", "Pad", "Slice")
"""The head and whatever pools for it stay float32: they cost little, and answers gain."""
FEWEST = 16
"""Different frames that ranges of activations are measured on, at least; as many again are compared."""
RANGE_FRAMES, HELD_OUT = 128, 512
BATCH = 8
PORTS = (1, 2)
"""Seeds of the ports that ranges are measured with besides source's."""
OTHER_PORTS = 3
"""Seed of those that answers are compared with."""
LOSS = 1.5
"""Points of accuracy that may be lost, where there are labels."""
CHANGED = 5.0
"""% of answers that may be others, where there are none."""
ROUNDS = 30


@dataclass(frozen=True)
class QuantisePlan:
    """What `--precision int8` asks for."""

    target: Target
    labels: Array | None = None
    """Of the calibration frames, [N]."""
    max_loss: float | None = None
    """Points of accuracy with labels, % of answers that change without; None is `LOSS` or `CHANGED`."""


def named_target(name: str) -> Target:
    """Raises: ConfigError if there is none of that name."""
    for target in TARGETS:
        if target == name:
            return target
    raise ConfigError(f"target {name!r} is not known", remedy=f"use {' or '.join(TARGETS)}")


def check_calibration(images: Array | None) -> None:
    """Raises: ConfigError without any frames, DataError with fewer different ones than it takes."""
    if images is None:
        raise ConfigError("INT8 needs frames of the source domain", remedy="add --calibration DATA")
    different = len({image.tobytes() for image in images[: 64 * FEWEST]})
    if different < 2 * FEWEST:
        raise DataError(
            f"the calibration data has {different} different frame{'s' * (different != 1)}, INT8 needs {2 * FEWEST}: "
            f"{FEWEST} to measure the ranges of activations on, {FEWEST} to compare the answers of",
            remedy="give some hundred frames of the source domain",
        )


def split(frames: Array) -> tuple[Array, Array]:
    """Frames to measure ranges on, and others to compare answers on, both from all places of the data."""
    return _spread(frames[::2], RANGE_FRAMES), _spread(frames[1::2], HELD_OUT)


def _spread(frames: Array, count: int) -> Array:
    if len(frames) <= count:
        return frames
    made: Array = frames[np.linspace(0, len(frames) - 1, count).astype(int)]
    return made


def quantise(bundle: Bundle, frames: Array, target: Target) -> onnx.ModelProto:
    """The INT8 graph of a bundle.

    Args:
        frames: preprocessed source frames, [N, ...]; all of them are used.
    Raises: ConfigError if there is no convolution, or a transformer; ArtifactError if the tools refuse the graph.
    """
    if bundle.manifest.prompts or any(site.kind == "layer_norm" for site in bundle.manifest.sites):
        raise ConfigError(
            f"{bundle.manifest.name} is a transformer; INT8 is for convolutional networks", remedy="use fp32"
        )
    model = onnx.load(bundle.path / FULL)
    try:
        made = _with_qdq(model, _ranges(bundle, model, frames), target)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ArtifactError(
            f"onnxruntime cannot quantise {bundle.manifest.name}: {str(error).splitlines()[0]}", remedy="use fp32"
        ) from error
    if not quantised_layers(made, bundle):
        raise ConfigError(f"{bundle.manifest.name} has no convolution for INT8", remedy="use fp32")
    return made


def compare(bundle: Bundle, frames: Array, labels: Array | None) -> Quantised:
    """How an INT8 bundle answers beside float32, with source's ports and with others: its facts, completed.

    Args:
        frames: preprocessed, not those that ranges were measured on.
        labels: [N], or None.
    """
    facts = bundle.manifest.quantised
    assert facts is not None
    merger = Merger(bundle)
    plain, int8 = OnnxRuntimeEngine(bundle, quantised=False), OnnxRuntimeEngine(bundle)
    same, right = [], []
    for delta in (Delta.source(), random_ports(bundle, OTHER_PORTS)):
        answers = []
        for engine in (plain, int8):
            engine.apply(merger(delta))
            answers.append(np.concatenate([engine.run(batch) for batch in _batches(frames)]).argmax(axis=1))
        same.append(_percent(answers[0] == answers[1]))
        if labels is not None:
            right.append([_percent(answer == labels) for answer in answers])
    speed = _speed(plain, int8, frames[:1])
    plain.close()
    int8.close()
    return facts.model_copy(
        update={
            "agreement": tuple(same),
            "float_top1": tuple(pair[0] for pair in right) or None,
            "int8_top1": tuple(pair[1] for pair in right) or None,
            "speed": speed,
        }
    )


def gate(facts: Quantised, max_loss: float | None) -> str | None:
    """What is wrong with an INT8 graph: it loses more than it may. None if nothing is."""
    if facts.float_top1 is not None and facts.int8_top1 is not None:
        lost = max(before - after for before, after in zip(facts.float_top1, facts.int8_top1, strict=True))
        allowed, what = LOSS, "points of accuracy"
    else:
        # With other ports it may well be that float32 itself answers at random, and then no two answers agree.
        lost, allowed, what = 100 - facts.agreement[0], CHANGED, "% of the answers"
    allowed = allowed if max_loss is None else max_loss
    if lost <= allowed:
        return None
    return f"INT8 costs {lost:.1f} {what} on {facts.held_out} held-out frames, {allowed:g} are allowed"


def _speed(plain: OnnxRuntimeEngine, int8: OnnxRuntimeEngine, frame: Array) -> float:
    """Time of one frame in float32 as a multiple of INT8's, measured in turns."""
    ratios = []
    for _ in range(ROUNDS):
        spent = []
        for engine in (plain, int8):
            started = time.perf_counter()
            engine.run(frame)
            spent.append(time.perf_counter() - started)
        ratios.append(spent[0] / spent[1])
    return round(float(np.median(ratios)), 2)


def _percent(flags: Array) -> float:
    return round(100 * float(flags.mean()), 2)


def _batches(frames: Array) -> Iterator[Array]:
    return (frames[start : start + BATCH] for start in range(0, len(frames), BATCH))


def _ranges(bundle: Bundle, model: onnx.ModelProto, frames: Array) -> Ranges:
    """Smallest and largest value of every activation, with source's ports and with others."""
    weights, merger = initializers(model.graph), Merger(bundle)
    found: Ranges = {}
    for delta in (Delta.source(), *(random_ports(bundle, seed) for seed in PORTS)):
        moved = onnx.ModelProto()
        moved.CopyFrom(model)
        set_initializers(moved.graph, refolded(bundle, weights, merger(delta)))
        for name, (low, high) in _measured(moved, frames).items():
            before = found.get(name, (low, high))
            found[name] = min(low, before[0]), max(high, before[1])
    return found


def _measured(model: onnx.ModelProto, frames: Array) -> Ranges:
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    touched = [name for node in graph.node if node.op_type in OPERATORS for name in (*node.input, *node.output)]
    operands = {name for node in graph.node if node.op_type in ("Clip", "Pad", "Slice") for name in node.input[1:]}
    names = [name for name in dict.fromkeys(touched) if name and name not in constants | operands]
    del graph.output[:]
    for index, name in enumerate(names):
        for kind in ("ReduceMin", "ReduceMax"):
            output = f"range/{index}/{kind}"
            graph.node.append(helper.make_node(kind, [name], [output], keepdims=0))
            graph.output.append(float_info(output, []))
    session = make_session(model, 1)
    image = graph.input[0].name
    seen = np.array([session.run(None, {image: batch}) for batch in _batches(frames)], np.float32)
    lowest, highest = seen[:, ::2].min(axis=0), seen[:, 1::2].max(axis=0)
    return {name: (float(low), float(high)) for name, low, high in zip(names, lowest, highest, strict=True)}


def _with_qdq(model: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]], target: Target) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    symmetric = target == "tensorrt"
    quantiser = QDQQuantizer(
        onnx.shape_inference.infer_shapes(model),
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, data),
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=list(OPERATORS),
        extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True, "QuantizeBias": not symmetric},
    )
    quantiser.quantize_model()
    return cast("onnx.ModelProto", quantiser.model.model)
