"""trunk.onnx: the frozen trunk for any ONNX client, with ports as optional inputs and taps as outputs."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from edge_adapt.bundle import Site
from edge_adapt.graph import Array, float_info, graft_taps, set_initializers, shapes, subgraph
from exporters.sites import Folded

PORTS = ("ports_scale", "ports_shift")


def ported_trunk(folded: Folded, cut: str, tap_side: int) -> onnx.ModelProto:
    """Image and ports -> the tensor at the cut, and taps.

    A port multiplies and shifts the normalised value of its site: weight * (scale * x + shift) + bias. In the folded
    graph that is `y * scale + (weight * shift + bias * (1 - scale))`. Identity is the default of both inputs.
    """
    dims = shapes(folded.model)
    if cut == folded.model.graph.input[0].name:
        return _empty_trunk(folded.model, dims[cut])
    model = subgraph(folded.model, folded.model.graph.input, [float_info(cut, dims[cut])])
    present = {name for node in model.graph.node for name in node.output}
    sites = [site for site in folded.sites if site.tensor in present]
    if not sites:
        return model
    tokens = [site.tensor for site in sites if site.kind == "layer_norm"]
    model = graft_taps(model, [site.tensor for site in sites], tokens=tokens, side=tap_side)
    _graft_ports(model, sites, folded.constants)
    return model


def _graft_ports(model: onnx.ModelProto, sites: list[Site], constants: dict[str, Array]) -> None:
    graph = model.graph
    total = sum(site.channels for site in sites)
    weights: dict[str, Array] = {
        "ports/weight": np.concatenate([constants[f"{site.name}.weight"] for site in sites]),
        "ports/bias": np.concatenate([constants[f"{site.name}.bias"] for site in sites]),
        "ports/one": np.array(1, np.float32),
        "ports/sizes": np.array([site.channels for site in sites], np.int64),
        PORTS[0]: np.ones(total, np.float32),
        PORTS[1]: np.zeros(total, np.float32),
    }
    head = [
        helper.make_node("Sub", ["ports/one", PORTS[0]], ["ports/rest"]),
        helper.make_node("Mul", ["ports/bias", "ports/rest"], ["ports/kept"]),
        helper.make_node("Mul", ["ports/weight", PORTS[1]], ["ports/moved"]),
        helper.make_node("Add", ["ports/kept", "ports/moved"], ["ports/offset"]),
    ]
    for role, source in (("scale", PORTS[0]), ("offset", "ports/offset")):
        names = [f"ports/{place}/{role}" for place in range(len(sites))]
        if len(sites) == 1:
            head.append(helper.make_node("Identity", [source], names))
        else:
            head.append(helper.make_node("Split", [source, "ports/sizes"], names, axis=0))
    nodes: list[onnx.NodeProto] = []
    by_tensor = {site.tensor: (place, site) for place, site in enumerate(sites)}
    ranks = {tensor: len(dims) for tensor, dims in shapes(model).items()}
    for node in graph.node:
        nodes.append(node)
        hit = by_tensor.get(node.output[0])
        if hit is None:
            continue
        place, site = hit
        raw, scaled = f"{site.tensor}/raw", f"{site.tensor}/scaled"
        names = [f"ports/{place}/scale", f"ports/{place}/offset"]
        if site.kind == "batch_norm":
            shape = f"ports/shape{ranks[site.tensor]}"
            weights[shape] = np.array([1, -1, *(1,) * (ranks[site.tensor] - 2)], np.int64)
            for name in list(names):
                nodes.append(helper.make_node("Reshape", [name, shape], [f"{name}/map"]))
            names = [f"{name}/map" for name in names]
        node.output[0] = raw
        nodes.append(helper.make_node("Mul", [raw, names[0]], [scaled]))
        nodes.append(helper.make_node("Add", [scaled, names[1]], [site.tensor]))
    del graph.node[:]
    graph.node.extend([*head, *nodes])
    graph.input.extend(float_info(name, [total]) for name in PORTS)
    set_initializers(graph, weights)


def _empty_trunk(model: onnx.ModelProto, dims: list[int | str | None]) -> onnx.ModelProto:
    """Cut at the input: the trunk is the identity."""
    image = model.graph.input[0].name
    node = helper.make_node("Identity", [image], ["cut"])
    graph = helper.make_graph([node], "trunk", [model.graph.input[0]], [float_info("cut", dims)])
    made = helper.make_model(graph, opset_imports=list(model.opset_import))
    made.ir_version = model.ir_version
    return made
