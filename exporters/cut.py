"""Where the trunk ends: resolve a name to a tensor that separates the graph, or choose one."""

from __future__ import annotations

from math import prod

import onnx

from edge_adapt.bundle import INPUT_CUT
from edge_adapt.errors import ConfigError, did_you_mean
from edge_adapt.graph import consumers, float_info, initializers, shapes, subgraph
from exporters.passes import module_scopes

TAIL_SHARE = 0.35
"""Share of the multiply-adds that an automatically chosen tail may have."""


def resolve_cut(model: onnx.ModelProto, name: str | None) -> str:
    """Name of a module, of a tensor, `input`, or None to choose -> name of the tensor at the cut.

    Raises: ConfigError if there is no such tensor, or if it does not separate the graph.
    """
    graph = model.graph
    image: str = graph.input[0].name
    if name is None:
        return _choose(model)
    if name in (INPUT_CUT, image):
        return image
    tensors = {output for node in graph.node for output in node.output}
    tensor = name if name in tensors else _module_output(model, name)
    if tensor is None:
        modules = {scope for node in graph.node for scope in module_scopes(node)}
        known = modules or {node.output[0] for node in graph.node}
        raise ConfigError(
            f"the cut {name!r} is no tensor and no module of the graph", remedy=did_you_mean(name, known)
        )
    if not separates(model, tensor):
        raise ConfigError(
            f"the cut {name!r} (tensor {tensor!r}) does not separate the graph: something goes around it",
            remedy="cut at the output of a whole block, where no shortcut passes",
        )
    return tensor


def separates(model: onnx.ModelProto, tensor: str) -> bool:
    """True if the output can be computed from this tensor and the weights alone."""
    try:
        tail_of(model, tensor, None)
    except ValueError:
        return False
    return True


def tail_of(model: onnx.ModelProto, tensor: str, dims: list[int | str | None] | None) -> onnx.ModelProto:
    """The graph from the cut to the output. Raises: ValueError if it needs anything else from the trunk."""
    image = model.graph.input[0].name
    source = float_info(tensor, dims or ["N"])
    if tensor == image:
        source = model.graph.input[0]
    return subgraph(model, [source], list(model.graph.output)[:1])


def _module_output(model: onnx.ModelProto, module: str) -> str | None:
    """The tensor that leaves a module; of several, the last one that separates the graph."""
    inside = [node for node in model.graph.node if module in module_scopes(node)]
    readers = consumers(model.graph)
    names = {node.output[0] for node in inside}
    outputs = {info.name for info in model.graph.output}
    leaving = [
        name
        for node in inside
        for name in node.output
        if name in outputs or any(reader.output[0] not in names for reader in readers.get(name, []))
    ]
    apart = [name for name in leaving if separates(model, name)]
    return apart[-1] if apart else (leaving[-1] if leaving else None)


def _choose(model: onnx.ModelProto) -> str:
    """The earliest separating tensor whose tail has at most a third of the work, and a norm to adapt if any has."""
    graph = model.graph
    dims, weights = shapes(model), initializers(graph)
    work: dict[str, float] = {}
    for node in graph.node:
        weight = weights.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type in ("Conv", "Gemm", "MatMul") and weight is not None:
            spatial = [dim for dim in (dims.get(node.output[0]) or [])[2:] if isinstance(dim, int)]
            work[node.output[0]] = float(weight.size * (prod(spatial) if node.op_type == "Conv" else 1))
    total = sum(work.values()) or 1.0
    for node in graph.node:
        tensor: str = node.output[0]
        if node.op_type in ("Conv", "BatchNormalization") or len(dims.get(tensor) or ()) < 2:
            continue
        try:
            tail = tail_of(model, tensor, None)
        except ValueError:
            continue
        if sum(work.get(step.output[0], 0.0) for step in tail.graph.node) <= TAIL_SHARE * total:
            return tensor
    image: str = graph.input[0].name
    return image
