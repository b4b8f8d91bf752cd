"""Small, pure operations on ONNX graphs: look up, extract, fold norms, graft taps. No session, no torch, no file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]

TAPS = "taps"
"""Output of a tapped graph, [N, 2, channels of all sites]: mean and second moment of every norm site."""

CLS = "cls"
"""Output of a tapped transformer, [N, channels of its sites]: the class token behind every norm, in their order."""

SIDE = 16
"""A sampled tap looks at every second position of a map, and at no more than this along each side. Every second one
holds as large a share of border as the map does: next to padding the moments are others."""


def initializers(graph: onnx.GraphProto) -> dict[str, Array]:
    """Name -> value of every weight and constant stored in the graph."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def set_initializers(graph: onnx.GraphProto, values: Mapping[str, Array]) -> None:
    """Replace (or add) initialisers by name, in place."""
    kept = [tensor for tensor in graph.initializer if tensor.name not in values]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value, order="C"), name) for name, value in values.items()
    )


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Tensor name -> the node that makes it."""
    return {name: node for node in graph.node for name in node.output if name}


def consumers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Tensor name -> the nodes that read it."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            if name:
                found.setdefault(name, []).append(node)
    return found


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Attribute name -> Python value."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def shapes(model: onnx.ModelProto) -> dict[str, list[int | str | None]]:
    """Tensor name -> dims; an unknown dim is its symbol, or None."""
    inferred = onnx.shape_inference.infer_shapes(model)
    found: dict[str, list[int | str | None]] = {}
    graph = inferred.graph
    for info in (*graph.value_info, *graph.input, *graph.output):
        dims = info.type.tensor_type.shape.dim
        found[info.name] = [
            dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in dims
        ]
    return found


def subgraph(
    model: onnx.ModelProto,
    sources: Iterable[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """The part of the graph that computes `outputs` from `sources`, with only the weights it needs.

    Raises: ValueError naming the tensor that would have to come from outside.
    """
    graph = model.graph
    made_by, weights = producers(graph), {tensor.name: tensor for tensor in graph.initializer}
    sources = list(sources)
    given = {info.name for info in sources}
    needed: set[str] = set()
    used: set[str] = set()
    stack = [info.name for info in outputs]
    while stack:
        name = stack.pop()
        if name in given or not name:
            continue
        if name in weights:
            used.add(name)
        elif name in made_by:
            node = made_by[name]
            if node.output[0] not in needed:
                needed.add(node.output[0])
                stack.extend(node.input)
        else:
            raise ValueError(name)
    nodes = [node for node in graph.node if node.output[0] in needed]
    # An initialiser may itself be an output (a constant head); ONNX wants a node there.
    part = helper.make_graph(
        nodes, graph.name, sources, list(outputs), [weights[name] for name in sorted(used)]
    )
    wanted = {name for node in nodes for name in node.output}
    part.value_info.extend(info for info in graph.value_info if info.name in wanted)
    return with_graph(model, part)


def with_graph(model: onnx.ModelProto, graph: onnx.GraphProto) -> onnx.ModelProto:
    """A model with another graph and the same opset and IR version."""
    made = helper.make_model(graph, opset_imports=list(model.opset_import))
    made.ir_version = min(model.ir_version, 10)
    made.producer_name = "edge-adapt"
    return made


def float_info(name: str, dims: Sequence[int | str | None]) -> onnx.ValueInfoProto:
    """Description of a float32 tensor."""
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(dims))


def graft_taps(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    *,
    tokens: Iterable[str] = (),
    extra: Sequence[str] = (),
    side: int = 0,
) -> onnx.ModelProto:
    """Add the output `taps`, and tensors of the graph as further outputs.

    Reading a convolution's output breaks its fusion with the activation, and takes a pass over memory: cheap where the
    convolution is heavy, as much as the network itself where it is light (depthwise ones). A sampled tap runs the same
    convolution again, with the same weights, at some positions only, and leaves the main path as it was.

    Args:
        tensors: what to tap, in the order of the output's channels; [N, C, ...], reduced over positions.
        tokens: those of them that are [N, T, C], reduced over the tokens.
        extra: names of further tensors to return as they are, such as the cut.
        side: positions of a map that are looked at, along each side, at most; 0 looks at all of them.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph, dims, tokens = made.graph, shapes(model), list(tokens)
    if tensors:
        _add_taps(graph, dims, tensors, set(tokens), side)
        batch = dims[graph.input[0].name][0]
        graph.output.append(float_info(TAPS, [batch, 2, None]))
        if tokens:
            _add_class_tokens(graph, tokens)
            graph.output.append(float_info(CLS, [batch, None]))
    present = {info.name for info in graph.output}
    graph.output.extend(float_info(name, dims[name]) for name in extra if name not in present)
    return made


def _add_taps(
    graph: onnx.GraphProto,
    dims: Mapping[str, Sequence[int | str | None]],
    tensors: Sequence[str],
    tokens: set[str],
    side: int,
) -> None:
    made_by = producers(graph)
    parts: list[str] = []
    run: list[str] = []  # neighbours of one map size, so that one pair of reductions serves them all
    size: tuple[object, ...] = ()
    for name in tensors:
        found: tuple[str, tuple[object, ...]] = name, tuple(dims[name][2:])
        if name not in tokens:
            found = _sampled(graph, made_by.get(name), dims[name], name, side)
        if run and (found[1] != size or name in tokens):
            parts.append(_reduced(graph, run, len(parts), maps=bool(size)))
            run = []
        if name in tokens:
            parts.append(_token_moments(graph, name))
            continue
        run.append(found[0])
        size = found[1]
    if run:
        parts.append(_reduced(graph, run, len(parts), maps=bool(size)))
    graph.node.append(helper.make_node("Concat", parts, [TAPS], axis=2, name=TAPS))
    set_initializers(graph, {"tap/axis": np.array([1], np.int64)})


def _sampled(
    graph: onnx.GraphProto,
    node: onnx.NodeProto | None,
    dims: Sequence[int | str | None],
    name: str,
    side: int,
) -> tuple[str, tuple[object, ...]]:
    """A second convolution with the weights of the first and longer strides: its output, and the size of that."""
    sizes = [size for size in dims[2:] if isinstance(size, int)]
    if node is None or node.op_type != "Conv" or len(sizes) != len(dims) - 2:
        return name, tuple(dims[2:])
    facts = attributes(node)
    steps = [max(min(2, size), -(-size // side)) if side else 1 for size in sizes]
    if facts.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or max(steps) < 2:
        return name, tuple(sizes)
    strides = facts.get("strides", [1] * len(sizes))
    facts["strides"] = [stride * step for stride, step in zip(strides, steps, strict=True)]
    sampled = f"tap/{name}/sampled"
    graph.node.append(helper.make_node("Conv", list(node.input), [sampled], name=sampled, **facts))
    return sampled, tuple(-(-size // step) for size, step in zip(sizes, steps, strict=True))


def _reduced(graph: onnx.GraphProto, names: Sequence[str], number: int, *, maps: bool) -> str:
    """[N, C, ...] of several sites -> [N, 2, their channels]."""
    base = f"tap/{number}"
    joined = f"{base}/maps"
    graph.node.append(helper.make_node("Concat", names, [joined], axis=1, name=joined))
    graph.node.append(helper.make_node("Mul", [joined, joined], [f"{base}/squares"], name=f"{base}/squares"))
    rows = [joined, f"{base}/squares"]
    if maps:
        pooled = [f"{base}/mean", f"{base}/second"]
        for source, target in zip(rows, pooled, strict=True):
            graph.node.append(helper.make_node("GlobalAveragePool", [source], [f"{target}/map"], name=target))
            graph.node.append(helper.make_node("Flatten", [f"{target}/map"], [target], name=f"{target}/flat"))
        rows = pooled
    return _stacked(graph, rows, base)


def _token_moments(graph: onnx.GraphProto, name: str) -> str:
    """[N, T, C] -> [N, 2, C]."""
    base = f"tap/{name}"
    graph.node.append(helper.make_node("Mul", [name, name], [f"{base}/squares"], name=f"{base}/squares"))
    rows = [f"{base}/mean", f"{base}/second"]
    for source, target in zip((name, f"{base}/squares"), rows, strict=True):
        graph.node.append(helper.make_node("ReduceMean", [source, "tap/axis"], [target], keepdims=0, name=target))
    return _stacked(graph, rows, base)


def _add_class_tokens(graph: onnx.GraphProto, tensors: Sequence[str]) -> None:
    names = [f"{CLS}/{tensor}" for tensor in tensors]
    for tensor, name in zip(tensors, names, strict=True):
        graph.node.append(helper.make_node("Gather", [tensor, f"{CLS}/first"], [name], axis=1, name=name))
    graph.node.append(helper.make_node("Concat", names, [CLS], axis=1, name=CLS))
    set_initializers(graph, {f"{CLS}/first": np.array(0, np.int64)})


def _stacked(graph: onnx.GraphProto, rows: Sequence[str], base: str) -> str:
    for row in rows:
        graph.node.append(helper.make_node("Unsqueeze", [row, "tap/axis"], [f"{row}/row"], name=f"{row}/row"))
    stacked = f"{base}/moments"
    graph.node.append(helper.make_node("Concat", [f"{row}/row" for row in rows], [stacked], axis=1, name=stacked))
    return stacked
