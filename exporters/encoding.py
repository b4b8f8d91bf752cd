"""The encoder as the last nodes of a tapped graph: frames in, packed signs out, for any ONNX client."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edge_adapt.errors import ConfigError
from edge_adapt.graph import TAPS, set_initializers
from edge_adapt.routing.encoder import Encoder
from edge_adapt.taps import FLAT

Array = NDArray[Any]

CODE = "code"
"""Output, uint8 [N, width / 8]: the signs of the encoding, as `routing.codes.packed` gives them."""


def with_code(model: onnx.ModelProto, encoder: Encoder, weight: Array, bias: Array) -> onnx.ModelProto:
    """Add the output `code` to a graph that has the output `taps`; it holds for source weights.

    Args:
        encoder: fitted on the sites of these taps, in their order.
        weight: [channels], of the sites' norms; bias likewise.
    Raises: ConfigError for a graph without taps, taps of other channels, or a width that fills no bytes.
    """
    if TAPS not in {info.name for info in model.graph.output}:
        raise ConfigError("the graph has no output `taps` to encode", remedy="export it with norm sites before the cut")
    if len(weight) != sum(encoder.sizes) or encoder.width % 8:
        raise ConfigError(
            f"{len(weight)} channels of taps and a width of {encoder.width}, the encoder was made for "
            f"{sum(encoder.sizes)} channels",
            remedy="fit an encoder on the sites of this graph, with a width that is a multiple of 8",
        )
    made = onnx.ModelProto()
    made.CopyFrom(model)
    set_initializers(made.graph, _constants(encoder, weight, bias))
    made.graph.node.extend(_nodes())
    made.graph.output.append(helper.make_tensor_value_info(CODE, TensorProto.UINT8, [None, encoder.width // 8]))
    return made


def _constants(encoder: Encoder, weight: Array, bias: Array) -> dict[str, Array]:
    """Channels in the order of the encoder: layer by layer, all means and then all log deviations of each."""
    columns, chosen = encoder.columns, encoder.chosen
    weight, bias = (part[columns].astype(np.float64) for part in (weight, bias))
    alive = np.abs(weight) > FLAT * np.maximum(np.abs(bias), 1e-3)
    starts = np.cumsum((0, *chosen))
    total = int(starts[-1])
    order = np.concatenate(
        [np.concatenate([np.arange(a, b), total + np.arange(a, b)]) for a, b in pairwise(starts)]
    )
    member = np.repeat(np.eye(len(chosen), dtype=np.float32), [2 * size for size in chosen], axis=0)
    return {
        f"{CODE}/columns": columns.astype(np.int64),
        f"{CODE}/alive": alive.astype(np.float64),
        f"{CODE}/dead": (~alive).astype(np.float64),
        f"{CODE}/weight": np.where(alive, weight, 1.0),
        f"{CODE}/gain": np.square(np.where(alive, weight, 1.0)),
        f"{CODE}/bias": bias,
        f"{CODE}/zero": np.array(0.0),
        f"{CODE}/least": np.array(1e-6),
        f"{CODE}/mean": encoder.mean.reshape(-1).astype(np.float64),
        f"{CODE}/spread": encoder.spread.reshape(-1).astype(np.float64),
        f"{CODE}/order": order.astype(np.int64),
        f"{CODE}/member": member,
        f"{CODE}/members": np.ascontiguousarray(member.T),
        f"{CODE}/short": np.array(1e-12, np.float32),
        f"{CODE}/projection": np.concatenate(encoder.projections),
        f"{CODE}/none": np.array(0, np.float32),
        f"{CODE}/bytes": np.array([0, encoder.width // 8, 8], np.int64),
        f"{CODE}/powers": (2.0 ** np.arange(7, -1, -1)).astype(np.float32)[:, None],
        f"{CODE}/flat": np.array([0, encoder.width // 8], np.int64),
        f"{CODE}/first": np.array(0, np.int64),
        f"{CODE}/second": np.array(1, np.int64),
    }


def _nodes() -> list[onnx.NodeProto]:
    """In double as far as moments are subtracted from each other, in float from where the encoder is."""
    made: list[onnx.NodeProto] = []

    def node(kind: str, inputs: str, output: str, **facts: Any) -> None:
        names = [name if name == TAPS else f"{CODE}/{name}" for name in inputs.split()]
        target = output if output == CODE else f"{CODE}/{output}"
        made.append(helper.make_node(kind, names, [target], name=f"{target}/made", **facts))

    node("Gather", "taps columns", "some", axis=2)
    node("Cast", "some", "exact", to=TensorProto.DOUBLE)
    node("Gather", "exact first", "out", axis=1)
    node("Gather", "exact second", "squares", axis=1)
    node("Mul", "out out", "out2")
    node("Sub", "squares out2", "raw")
    node("Max", "raw zero", "positive")
    node("Div", "positive gain", "scaled")
    node("Mul", "scaled alive", "live")
    node("Add", "live dead", "variance")
    node("Max", "variance least", "bounded")
    node("Sqrt", "bounded", "deviation")
    node("Log", "deviation", "log")
    node("Sub", "out bias", "moved")
    node("Div", "moved weight", "undone")
    node("Mul", "undone alive", "input")
    node("Concat", "input log", "vectors", axis=1)
    node("Sub", "vectors mean", "centred")
    node("Div", "centred spread", "units")
    node("Gather", "units order", "ordered", axis=1)
    node("Cast", "ordered", "parts", to=TensorProto.FLOAT)
    node("Mul", "parts parts", "parts2")
    node("MatMul", "parts2 member", "lengths2")
    node("Sqrt", "lengths2", "lengths")
    node("Max", "lengths short", "long")
    node("MatMul", "long members", "wide")
    node("Div", "parts wide", "each")
    node("MatMul", "each projection", "encoding")
    node("Greater", "encoding none", "signs")
    node("Cast", "signs", "bits", to=TensorProto.FLOAT)
    node("Reshape", "bits bytes", "grouped")
    node("MatMul", "grouped powers", "sums")
    node("Reshape", "sums flat", "row")
    node("Cast", "row", CODE, to=TensorProto.UINT8)
    return made
