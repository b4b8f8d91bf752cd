"""Somebody else's .onnx -> the same kind of graph that a torch export gives: opset 20, dynamic batch, float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import version_converter

from edge_adapt.errors import ArtifactError
from edge_adapt.graph import initializers, set_initializers
from exporters.onnx_from_torch import OPSET


def import_network(path: Path) -> onnx.ModelProto:
    """Read, check, convert, and free the batch dimension. Raises: ArtifactError naming the node that is in the way."""
    from onnxscript import optimizer

    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and checker errors share no base
        raise ArtifactError(
            f"{path} is no valid ONNX file: {str(error).splitlines()[0]}", remedy="check it with onnx.checker"
        ) from error
    _inputs_are_not_weights(model)
    _refuse_foreign(model, path)
    _free_batch(model)
    try:
        model = version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter raises RuntimeError and its own
        raise ArtifactError(
            f"{path} cannot be brought from opset {model.opset_import[0].version} to {OPSET}: "
            f"{str(error).splitlines()[0]}",
            remedy="export it again with a newer opset",
        ) from error
    for _ in range(2):
        optimizer.fold_constants(model)
        optimizer.remove_unused_nodes(model)
    return model


def _inputs_are_not_weights(model: onnx.ModelProto) -> None:
    """Old files list every weight among the inputs."""
    model.ir_version = max(model.ir_version, 8)  # before version 4 a weight had to be an input
    names = {tensor.name for tensor in model.graph.initializer}
    kept = [info for info in model.graph.input if info.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def _refuse_foreign(model: onnx.ModelProto, path: Path) -> None:
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise ArtifactError(
                f"{path}: node {node.name!r} is {node.domain}::{node.op_type}, which is no standard ONNX operator",
                remedy="export the model without vendor operators",
            )
    if len(model.graph.input) != 1 or len(model.graph.output) != 1:
        raise ArtifactError(
            f"{path} has {len(model.graph.input)} inputs and {len(model.graph.output)} outputs, one of each is needed",
            remedy="cut the graph down to image -> logits with onnx.utils.extract_model",
        )


def _free_batch(model: onnx.ModelProto) -> None:
    """A fixed batch of 1 becomes `N`, also in reshapes that start with 1."""
    graph = model.graph
    dims = graph.input[0].type.tensor_type.shape.dim
    fixed = dims[0].dim_value == 1 if dims else False
    if not dims:
        raise ArtifactError("the input has no shape", remedy="give the input a shape before exporting")
    dims[0].ClearField("dim_value")
    dims[0].dim_param = "N"
    del graph.value_info[:]
    out = graph.output[0].type.tensor_type.shape.dim
    if out:
        out[0].ClearField("dim_value")
        out[0].dim_param = "N"
    if not fixed:
        return
    known, fresh = initializers(graph), {}
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[0] in known:
            continue
        target = known.get(node.input[1])
        if target is not None and target.size > 1 and target[0] == 1 and -1 not in target:
            name = f"{node.input[1]}/free"
            fresh[name] = np.concatenate([[-1], target[1:]]).astype(np.int64)
            node.input[1] = name
    set_initializers(graph, fresh)


