"""full.onnx with its ports as graph inputs: for engines whose weights cannot be edited in place.

What `LiveUpdate` says of a site, weight = base * scale and bias = bias, is said here behind the layer: its output
without a bias, times a scale, plus a bias, each cut from one packed vector. The weights stay constants, so that a plan
is built once and a change of ports is a copy of two small vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from edge_adapt.bundle import Bundle
from edge_adapt.engines.twin import Key, twin
from edge_adapt.errors import EngineError
from edge_adapt.graph import float_info, producers, set_initializers
from edge_adapt.merge import LiveUpdate

Array = NDArray[Any]

SCALE, BIAS = "ports_scale", "ports_bias"
"""Graph inputs, each [channels of all sites]."""


def ported(model: onnx.ModelProto, bundle: Bundle, key: Key) -> onnx.ModelProto:
    """The network with the further outputs of `key`, and ports that are fed.

    Args:
        model: full.onnx of the bundle, or what was made of it with the same tensor names.
    """
    made = twin(model, bundle, key)
    sites = bundle.manifest.sites
    if not sites:
        return made
    graph = made.graph
    made_by = producers(graph)
    constants: dict[str, Array] = {f"{SCALE}/sizes": np.array([site.channels for site in sites], np.int64)}
    slices = {name: [f"{name}/{index}" for index in range(len(sites))] for name in (SCALE, BIAS)}
    fresh = [
        helper.make_node("Split", [name, f"{SCALE}/sizes"], parts, name=f"{name}/split", axis=0)
        for name, parts in slices.items()
    ]
    after: dict[int, list[onnx.NodeProto]] = {}
    for index, site in enumerate(sites):
        weight = made_by[site.tensor].input[1]
        # A sampled tap runs the same layer again, with the same weight: it has the same port.
        for place, node in enumerate(graph.node):
            if len(node.input) > 1 and node.input[1] == weight:
                after[place] = _port(node, index, site.kind == "layer_norm", constants)
    nodes = [*fresh]
    for place, node in enumerate(graph.node):
        nodes += [node, *after.get(place, ())]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    set_initializers(graph, constants)
    graph.input.extend(float_info(name, [bundle.channels]) for name in (SCALE, BIAS))
    _drop_unused(graph)
    return made


def _port(node: onnx.NodeProto, index: int, last: bool, constants: dict[str, Array]) -> list[onnx.NodeProto]:
    """Take the bias from a layer, and put scale and bias behind it. `last`: its channels are the last axis."""
    output, bare = node.output[0], f"{node.output[0]}/bare"
    node.output[0] = bare
    del node.input[2:]
    pair = [f"{SCALE}/{index}", f"{BIAS}/{index}"]
    added: list[onnx.NodeProto] = []
    if not last and node.op_type == "Conv":
        rank = _rank(node)
        shape = f"ports/shape{rank}"
        constants[shape] = np.array([1, -1, *(1,) * rank], np.int64)
        shaped = [f"{output}/scale", f"{output}/bias"]
        added += [
            helper.make_node("Reshape", [flat, shape], [name], name=name)
            for flat, name in zip(pair, shaped, strict=True)
        ]
        pair = shaped
    return [
        *added,
        helper.make_node("Mul", [bare, pair[0]], [f"{output}/scaled"], name=f"{output}/scaled"),
        helper.make_node("Add", [f"{output}/scaled", pair[1]], [output], name=f"{output}/ported"),
    ]


def _rank(node: onnx.NodeProto) -> int:
    """Axes of a convolution behind its channels."""
    for attribute in node.attribute:
        if attribute.name in ("kernel_shape", "strides", "dilations"):
            return len(attribute.ints)
    return 2


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {info.name for info in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def feeds_of(bundle: Bundle, update: LiveUpdate) -> dict[str, Array]:
    """What a ported graph is fed besides frames and prompts.

    Raises: EngineError naming a whole weight that the update replaces: it is a constant of the plan.
    """
    changed = [*update.weights, *update.biases]
    if changed:
        raise EngineError(
            f"the parameters of {changed[0]} are constants of this engine's plan and cannot change while it runs",
            remedy="adapt norms only (moments, tent, eata, sar, roid), or answer with the onnxruntime engine",
        )
    if not bundle.manifest.sites:
        return {}
    return {SCALE: np.ascontiguousarray(update.scale), BIAS: np.ascontiguousarray(update.bias)}


def without_defaults(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with inputs that must be fed: defaults, which a builder would take for constants, are left out."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    inputs: Mapping[str, None] = dict.fromkeys(info.name for info in made.graph.input)
    kept = [tensor for tensor in made.graph.initializer if tensor.name not in inputs]
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    return made
