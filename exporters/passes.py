"""Passes that bring any ONNX graph, exported or found, into the one form that the rest of the exporter reads.

After `tidy`: dynamic first dimension `N`, no shape arithmetic on the batch, every parameter private to one node and
named after its module, constants as initialisers, linear layers over [N, C] as Gemm with weight [out, in].
"""

from __future__ import annotations

import json
import re
from collections import Counter

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edge_adapt.graph import Array, attributes, consumers, initializers, producers, set_initializers, shapes

SCOPES = "pkg.torch.onnx.name_scopes"
PARAMETERS = {
    "Conv": (None, "weight", "bias"),
    "Gemm": (None, "weight", "bias"),
    "MatMul": (None, "weight"),
    "BatchNormalization": (None, "weight", "bias", "running_mean", "running_var"),
    "LayerNormalization": (None, "weight", "bias"),
}


def tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """All passes, in order. The model given is not modified."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    constants_to_initializers(made.graph)
    name_batch(made.graph)
    static_reshapes(made)
    drop_identities(made.graph)
    explicit_pads(made)
    conv_biases(made.graph)
    linear_to_gemm(made)
    name_parameters(made.graph)
    drop_unused(made.graph)
    return made


def without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph as it is written: what the exporter noted about source files and modules stays on its machine."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for node in made.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for part in (*made.graph.value_info, *made.graph.input, *made.graph.output, *made.graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    del made.graph.metadata_props[:]
    del made.metadata_props[:]
    return made


def constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Constant nodes become initialisers."""
    constants = {}
    for node in list(graph.node):
        if node.op_type != "Constant":
            continue
        value = next(iter(attributes(node).values()))
        array = numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        constants[node.output[0]] = array
        graph.node.remove(node)
    set_initializers(graph, constants)


def name_batch(graph: onnx.GraphProto) -> None:
    """The exporter's symbol for the batch (`s77`) becomes `N` everywhere."""
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for info in (*graph.input, *graph.output, *graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if symbol and dim.dim_param == symbol:
                dim.dim_param = "N"


def static_reshapes(model: onnx.ModelProto) -> None:
    """Reshapes whose target is computed from the batch size get a constant target with 0 and -1 instead.

    Without this the tail would need the shape of the image, and no cut would separate the graph.
    """
    dims, known = shapes(model), initializers(model.graph)
    targets: dict[str, Array] = {}
    for node in model.graph.node:
        if node.op_type != "Reshape" or node.input[1] in known:
            continue
        shape, before = dims.get(node.output[0]), dims.get(node.input[0])
        if not shape or not before:
            continue
        target: list[int] = []
        for place, dim in enumerate(shape):
            if isinstance(dim, int):
                target.append(dim)
            elif place < len(before) and dim == before[place] and dim is not None:
                target.append(0)
            else:
                target.append(-1)
        if target.count(-1) > 1:
            continue
        name = f"{node.output[0]}/shape"
        targets[name] = np.array(target, np.int64)
        node.input[1] = name
        kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
        del node.attribute[:]
        node.attribute.extend(kept)
    set_initializers(model.graph, targets)


def drop_identities(graph: onnx.GraphProto) -> None:
    """Identity and inference-mode Dropout disappear, except where they name a graph output."""
    outputs = {info.name for info in graph.output}
    renamed: dict[str, str] = {}
    for node in list(graph.node):
        if node.op_type in ("Identity", "Dropout") and node.output[0] not in outputs:
            renamed[node.output[0]] = renamed.get(node.input[0], node.input[0])
            graph.node.remove(node)
            continue
        for place, name in enumerate(node.input):
            if name in renamed:
                node.input[place] = renamed[name]


def explicit_pads(model: onnx.ModelProto) -> None:
    """Convolutions get their padding as numbers: `auto_pad` is worked out, a Pad of zeros before them is taken in."""
    graph, dims = model.graph, shapes(model)
    known, made_by, readers = initializers(graph), producers(graph), consumers(graph)
    for node in list(graph.node):
        if node.op_type != "Conv" or node.input[1] not in known:
            continue
        facts, rank = attributes(node), known[node.input[1]].ndim - 2
        pads = list(facts.get("pads", [0] * 2 * rank))
        mode = facts.get("auto_pad", b"NOTSET")
        sizes = (dims.get(node.input[0]) or [])[2:]
        if mode in (b"SAME_UPPER", b"SAME_LOWER"):
            if not all(isinstance(size, int) for size in sizes):
                continue
            kernel, strides = known[node.input[1]].shape[2:], facts.get("strides", [1] * rank)
            for axis, (size, width, step) in enumerate(zip(sizes, kernel, strides, strict=True)):
                total = max((-(-int(size or 0) // step) - 1) * step + width - int(size or 0), 0)
                small, large = total // 2, total - total // 2
                pads[axis], pads[rank + axis] = (small, large) if mode == b"SAME_UPPER" else (large, small)
        before = made_by.get(node.input[0])
        if before is not None and before.op_type == "Pad" and len(readers[node.input[0]]) == 1:
            amounts = _zero_pad(before, known, rank + 2)
            if amounts is not None:
                pads = [have + more for have, more in zip(pads, amounts, strict=True)]
                node.input[0] = before.input[0]
                graph.node.remove(before)
        kept = [attribute for attribute in node.attribute if attribute.name not in ("auto_pad", "pads")]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("pads", pads)])


def _zero_pad(node: onnx.NodeProto, known: dict[str, Array], rank: int) -> list[int] | None:
    """Spatial amounts [before..., after...] of a constant Pad with zeros that leaves batch and channels alone."""
    if attributes(node).get("mode", b"constant") != b"constant" or node.input[1] not in known:
        return None
    if len(node.input) > 2 and node.input[2] and (node.input[2] not in known or float(known[node.input[2]]) != 0):
        return None
    if len(node.input) > 3 and node.input[3]:
        return None
    amounts = [int(amount) for amount in known[node.input[1]]]
    if any(amounts[place] for place in (0, 1, rank, rank + 1)) or min(amounts) < 0:
        return None
    return amounts[2:rank] + amounts[rank + 2 :]


def conv_biases(graph: onnx.GraphProto) -> None:
    """An Add of one number a channel behind a convolution becomes its bias.

    ONNX Runtime would merge the two, and the bias could not be edited while it runs.
    """
    known, readers = initializers(graph), consumers(graph)
    outputs = {info.name for info in graph.output}
    fresh: dict[str, Array] = {}
    for node in list(graph.node):
        after = readers.get(node.output[0], [])
        if node.op_type != "Conv" or node.output[0] in outputs or [add.op_type for add in after] != ["Add"]:
            continue
        add, weight = after[0], known.get(node.input[1])
        amounts = known.get(add.input[1] if add.input[0] == node.output[0] else add.input[0])
        if weight is None or amounts is None or amounts.ndim > weight.ndim:
            continue
        shape = (*(1,) * (weight.ndim - amounts.ndim), *amounts.shape)
        if shape != (1, weight.shape[0], *(1,) * (weight.ndim - 2)):
            continue
        bias = amounts.reshape(-1)
        if len(node.input) > 2 and node.input[2]:
            if node.input[2] not in known:
                continue
            bias = bias + known[node.input[2]]
        name = f"{add.output[0]}/bias"
        fresh[name] = bias
        inputs = [*node.input[:2], name]
        del node.input[:]
        node.input.extend(inputs)
        node.output[0] = add.output[0]
        graph.node.remove(add)
    set_initializers(graph, fresh)


def linear_to_gemm(model: onnx.ModelProto) -> None:
    """[N, C] MatMul + Add, and Gemm with an untransposed weight, become Gemm with weight [out, in] and a bias."""
    graph, dims = model.graph, shapes(model)
    known, readers = initializers(graph), consumers(graph)
    fresh: dict[str, Array] = {}
    for node in list(graph.node):
        weight = known.get(node.input[1]) if len(node.input) > 1 else None
        if weight is None or weight.ndim != 2:
            continue
        if node.op_type == "MatMul" and len(dims.get(node.input[0]) or ()) == 2:
            output, bias = node.output[0], np.zeros(weight.shape[1], np.float32)
            after = readers.get(output, [])
            if len(after) == 1 and after[0].op_type == "Add":
                add = after[0]
                other = add.input[1] if add.input[0] == output else add.input[0]
                if other in known and known[other].size == weight.shape[1]:
                    output, bias = add.output[0], known[other].reshape(-1)
                    graph.node.remove(add)
            transposed = weight.T
        elif node.op_type == "Gemm":
            facts = attributes(node)
            scale = np.float32(facts.get("alpha", 1.0))
            transposed = (weight if facts.get("transB", 0) else weight.T) * scale
            given = known.get(node.input[2]) if len(node.input) > 2 else np.zeros(1, np.float32)
            if facts.get("transA", 0) or given is None:
                continue
            bias = np.broadcast_to(given.reshape(-1) * np.float32(facts.get("beta", 1.0)), transposed.shape[:1])
            output = node.output[0]
        else:
            continue
        names = [f"{output}/weight", f"{output}/bias"]
        fresh |= {names[0]: np.ascontiguousarray(transposed), names[1]: np.ascontiguousarray(bias)}
        gemm = helper.make_node("Gemm", [node.input[0], *names], [output], name=node.name or output, transB=1)
        gemm.metadata_props.extend(node.metadata_props)
        place = list(graph.node).index(node)
        graph.node.remove(node)
        graph.node.insert(place, gemm)
    set_initializers(graph, fresh)


def name_parameters(graph: onnx.GraphProto) -> None:
    """Give every layer its own copy of its parameters, called `<layer>.weight` and so on.

    Exporters merge equal tensors (two fresh layer norms share one), so an edit to one layer would change another.
    """
    known = initializers(graph)
    fresh: dict[str, Array] = {}
    taken: Counter[str] = Counter()
    for node in graph.node:
        roles = PARAMETERS.get(node.op_type)
        if roles is None or len(node.input) < 2 or node.input[1] not in known:
            continue
        layer = layer_name(node)
        taken[layer] += 1
        if taken[layer] > 1:
            layer = f"{layer}_{taken[layer]}"
        node.name = layer
        for place, role in enumerate(roles):
            if role and place < len(node.input) and node.input[place] in known:
                fresh[f"{layer}.{role}"] = known[node.input[place]]
                node.input[place] = f"{layer}.{role}"
    set_initializers(graph, fresh)


def layer_name(node: onnx.NodeProto) -> str:
    """The torch module that a node came from, else the node's own name made safe for a file and a parameter."""
    for item in node.metadata_props:
        if item.key == SCOPES:
            scopes: list[str] = json.loads(item.value.replace("'", '"'))
            if len(scopes) > 1 and scopes[-2]:
                return scopes[-2]
    raw = (node.name or node.output[0]).split(":")[0]
    return re.sub(r"[^A-Za-z0-9_]+", "_", raw).strip("_") or "layer"


def module_scopes(node: onnx.NodeProto) -> list[str]:
    """Qualified names of the torch modules around a node, outermost first; empty for a graph from elsewhere."""
    for item in node.metadata_props:
        if item.key == SCOPES:
            scopes: list[str] = json.loads(item.value.replace("'", '"'))
            return [scope for scope in scopes[:-1] if scope]
    return []


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and initialisers that no output depends on."""
    made_by = producers(graph)
    needed: set[str] = set()
    used: set[str] = set()
    stack = [info.name for info in graph.output]
    while stack:
        name = stack.pop()
        used.add(name)
        node = made_by.get(name)
        if node is not None and node.output[0] not in needed:
            needed.add(node.output[0])
            stack.extend(item for item in node.input if item)
    nodes = [node for node in graph.node if node.output[0] in needed]
    weights = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, kept in ((graph.node, nodes), (graph.initializer, weights)):
        del field[:]
        field.extend(kept)
    names = {tensor.name for tensor in weights}
    inputs = [info for info in graph.input if info.name not in names]
    del graph.input[:]
    graph.input.extend(inputs)
