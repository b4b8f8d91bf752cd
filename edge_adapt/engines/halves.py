"""A float32 graph in half precision, with float32 at its inputs and outputs, and for the moments that taps give."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
MOMENTS = "tap"
"""Nodes of taps are named so; the square of a large activation is no half."""


def in_halves(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network: weights and activations are halves; what is fed and answered is float32 as before."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    kinds = _kinds(made)
    _convert_constants(graph)
    nodes: list[onnx.NodeProto] = []
    names: dict[str, str] = {}  # float32 inputs of the graph -> the same as halves
    for info in graph.input:
        if info.type.tensor_type.elem_type == FLOAT:
            names[info.name] = f"{info.name}/half"
            nodes.append(_cast(info.name, names[info.name], HALF))
    wide: dict[str, str] = {}  # halves -> the same as float32, made when first asked for
    single = {name for node in graph.node if _is_moment(node) for name in node.output}
    for node in graph.node:
        read = [names.get(name, name) for name in node.input]
        if _is_moment(node):
            for place, name in enumerate(read):
                if kinds.get(name) == FLOAT and name not in single:
                    if name not in wide:
                        wide[name] = f"{name}/single"
                        nodes.append(_cast(name, wide[name], FLOAT))
                    read[place] = wide[name]
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.input[:]
        copy.input.extend(read)
        nodes.append(copy)
    narrow = {info.name for info in graph.output if info.type.tensor_type.elem_type == FLOAT} - single
    for node in nodes:
        for field in (node.input, node.output):
            for place, name in enumerate(field):
                if name in narrow:
                    field[place] = f"{name}/half"
    nodes += [_cast(f"{name}/half", name, FLOAT) for name in sorted(narrow)]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return made


def _is_moment(node: onnx.NodeProto) -> bool:
    return node.name.startswith(MOMENTS) and node.op_type != "Conv"


def _kinds(model: onnx.ModelProto) -> dict[str, int]:
    """Tensor -> its type, where inference can tell."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    known = (*inferred.value_info, *inferred.input, *inferred.output)
    return {info.name: info.type.tensor_type.elem_type for info in known}


def _convert_constants(graph: onnx.GraphProto) -> None:
    """Weights, constants, and casts to float become halves; what an operator wants as float32 stays."""
    kept = {
        name for node in graph.node for place, name in enumerate(node.input) if _wants_single(node, place)
    }
    for tensor in graph.initializer:
        if tensor.data_type == FLOAT and tensor.name not in kept:
            tensor.CopyFrom(numpy_helper.from_array(_half(tensor), tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT:
                attribute.i = HALF
            elif attribute.HasField("t") and attribute.t.data_type == FLOAT and node.output[0] not in kept:
                attribute.t.CopyFrom(numpy_helper.from_array(_half(attribute.t)))


def _half(tensor: TensorProto) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    with np.errstate(over="ignore", under="ignore"):
        return numpy_helper.to_array(tensor).astype(np.float16)


def _wants_single(node: onnx.NodeProto, place: int) -> bool:
    """True for inputs that are float32 whatever the rest is, such as the scales of a Resize."""
    if not onnx.defs.has(node.op_type):
        return False
    inputs = onnx.defs.get_schema(node.op_type).inputs
    return bool(inputs) and inputs[min(place, len(inputs) - 1)].type_str == "tensor(float)"


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}/cast", to=to)
