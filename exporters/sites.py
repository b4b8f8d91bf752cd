"""Find the norm sites of a tidy graph, and fold them: every site becomes one layer whose parameters are live."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

from edge_adapt.bundle import LiveLayer, Site
from edge_adapt.graph import (
    Array,
    attributes,
    consumers,
    initializers,
    producers,
    set_initializers,
    shapes,
    with_graph,
)

FOLDABLE = ("Conv", "Gemm")


@dataclass(frozen=True)
class Folded:
    """A graph with its norms folded, and what is needed to fold them anew with other values.

    `constants` maps `<site>.mean|std|weight|bias|offset` to arrays [C]: the statistics that the norm subtracts and
    divides by, its affine parameters, and the normalised value of the bias before it.
    """

    model: onnx.ModelProto
    sites: list[Site]
    layers: list[LiveLayer]
    constants: dict[str, Array] = field(default_factory=dict)


def conv_outputs_without_norm(model: onnx.ModelProto) -> list[str]:
    """Outputs of convolutions, if the graph has no norm at all; these will be given one. Else empty."""
    kinds = {node.op_type for node in model.graph.node}
    if kinds & {"BatchNormalization", "LayerNormalization"}:
        return []
    weights = initializers(model.graph)
    return [
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Conv" and node.input[1] in weights and node.output[0]
    ]


def insert_norms(model: onnx.ModelProto, moments: dict[str, tuple[Array, Array]]) -> onnx.ModelProto:
    """Put a batch norm that changes nothing behind each tensor: it subtracts and restores the measured moments.

    Args:
        moments: tensor name -> (mean, std), each [C], measured on calibration data.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    made_by = producers(made.graph)
    fresh: dict[str, Array] = {}
    for name, (mean, std) in moments.items():
        node = made_by[name]
        raw = f"{name}/raw"
        norm = f"{node.name}_norm"
        node.output[0] = raw
        roles = ("weight", "bias", "running_mean", "running_var")
        for role, value in zip(roles, (std, mean, mean, np.square(std)), strict=True):
            fresh[f"{norm}.{role}"] = value.astype(np.float32)
        inserted = helper.make_node(
            "BatchNormalization", [raw, *(f"{norm}.{role}" for role in roles)], [name], name=norm, epsilon=0.0
        )
        made.graph.node.insert(list(made.graph.node).index(node) + 1, inserted)
    set_initializers(made.graph, fresh)
    return made


def fold(model: onnx.ModelProto) -> Folded:
    """Fold every batch norm into the layer before it, or into a depthwise 1 x 1 convolution of its own."""
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    weights, made_by, readers = initializers(graph), producers(graph), consumers(graph)
    dims = shapes(model)
    outputs = {info.name for info in graph.output}
    sites: list[Site] = []
    constants: dict[str, Array] = {}
    fresh: dict[str, Array] = {}
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        if any(name not in weights for name in norm.input[1:5]):
            continue
        gamma, beta, mean, variance = (weights[name].astype(np.float64) for name in norm.input[1:5])
        std = np.sqrt(variance + attributes(norm).get("epsilon", 1e-5))
        before = made_by.get(norm.input[0])
        alone = before is None or (
            before.op_type not in FOLDABLE
            or len(readers[norm.input[0]]) > 1
            or norm.input[0] in outputs
            or before.input[1] not in weights
        )
        rank = len(dims.get(norm.input[0]) or ())
        if alone and rank < 3:
            continue
        if alone:
            kernel = np.ones((len(gamma), 1, *(1,) * (rank - 2)))
            old_bias = np.zeros(len(gamma))
            layer = helper.make_node(
                "Conv", [norm.input[0], "", ""], [norm.output[0]], name=f"{norm.name}_conv", group=len(gamma)
            )
            place = list(graph.node).index(norm)
            graph.node.insert(place, layer)
            layer = graph.node[place]  # protobuf stored a copy
        else:
            assert before is not None
            layer = before
            kernel = weights[layer.input[1]].astype(np.float64)
            has_bias = len(layer.input) > 2 and layer.input[2]
            old_bias = weights[layer.input[2]].astype(np.float64) if has_bias else np.zeros(len(gamma))
            layer.output[0] = norm.output[0]
        offset = (old_bias - mean) / std
        names = [f"{layer.name}.folded.weight", f"{layer.name}.folded.bias"]
        fresh[names[0]] = (kernel * (gamma / std).reshape(-1, *(1,) * (kernel.ndim - 1))).astype(np.float32)
        fresh[names[1]] = (gamma * offset + beta).astype(np.float32)
        inputs = [layer.input[0], *names]
        del layer.input[:]
        layer.input.extend(inputs)
        graph.node.remove(norm)
        site = norm.name
        for role, value in (
            *(("mean", mean), ("std", std), ("weight", gamma)),
            *(("bias", beta), ("offset", offset)),
        ):
            constants[f"{site}.{role}"] = value.astype(np.float32)
        sites.append(
            Site(name=site, kind="batch_norm", channels=len(gamma), tensor=norm.output[0], layer=layer.name)
        )
    set_initializers(graph, fresh)
    layers, token_sites = _live_layers(graph, dims, constants)
    order = {node.name: place for place, node in enumerate(graph.node)}
    sites = sorted([*sites, *token_sites], key=lambda site: order[site.layer])
    made = with_graph(model, graph)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    return Folded(made, sites, layers, constants)


def _live_layers(
    graph: onnx.GraphProto, dims: dict[str, list[int | str | None]], constants: dict[str, Array]
) -> tuple[list[LiveLayer], list[Site]]:
    """Every layer whose parameters may change at run time; convolutions are given a bias. Layer norms are sites."""
    weights = initializers(graph)
    layers: list[LiveLayer] = []
    sites: list[Site] = []
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul", "LayerNormalization") or node.input[1] not in weights:
            continue
        weight = weights[node.input[1]]
        bias: str | None = node.input[2] if len(node.input) > 2 else None
        if node.op_type == "Conv" and not bias:
            bias = f"{node.name}.bias"
            set_initializers(graph, {bias: np.zeros(weight.shape[0], np.float32)})
            inputs = [*node.input[:2], bias]
            del node.input[:]
            node.input.extend(inputs)
        layers.append(LiveLayer(name=node.name, op=node.op_type, weight=node.input[1], bias=bias or None))
        if node.op_type == "LayerNormalization" and bias and len(dims.get(node.input[0]) or ()) == 3:
            sites.append(
                Site(
                    name=node.name, kind="layer_norm", channels=weight.size, tensor=node.output[0], layer=node.name
                )
            )
            zero, one = np.zeros(weight.size, np.float32), np.ones(weight.size, np.float32)
            values = {"mean": zero, "std": one, "weight": weight, "bias": weights[bias], "offset": zero}
            constants |= {f"{node.name}.{role}": value for role, value in values.items()}
    return layers, sites
