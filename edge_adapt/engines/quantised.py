"""The INT8 graph of a bundle, with live weights.

Ports and whatever else an update changes are folded into the quantised weights: the factor of a channel into its
weight scale, the bias into the int32 bias of the convolution. The int8 numbers themselves stay, but for a weight that
is new as a whole. ONNX Runtime packs bias and weight when a session is made, where the processor has INT8 dot products,
so that an edit in place would have no effect there: the session is made anew instead, from a graph that was optimised
once. Whoever applies waits for that, never another thread's answer.

Ranges of activations stay as calibrated. What a port moves out of them saturates; calibration has ports moved for that.
"""

from __future__ import annotations

import logging
import platform
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from edge_adapt.bundle import FULL_INT8, Bundle, LiveLayer
from edge_adapt.delta import Delta
from edge_adapt.engines.refold import refolded
from edge_adapt.engines.sessions import CPU, Session, make_session, session_options
from edge_adapt.engines.twin import Key, twin
from edge_adapt.errors import ArtifactError
from edge_adapt.graph import initializers, producers, set_initializers
from edge_adapt.merge import LiveUpdate, Merger

Array = NDArray[Any]

log = logging.getLogger(__name__)

LARGEST = 127
"""Of an int8 weight; -128 is not used, so that a sign can change."""
ROOM = 2.0**30
"""Largest int32 bias: as much again is left for the sum of the products."""
WIDE = {"session.x64quantprecision": "1"}
"""An x86 processor without INT8 dot products adds pairs of products in 16 bits, which overflow; with this setting
ONNX Runtime makes the weights uint8, which is slower and right."""


@dataclass(frozen=True)
class QuantisedLayer:
    """A convolution of the INT8 graph, and the names of its parts there."""

    layer: LiveLayer
    weight: str
    scale: str
    bias: str
    bias_scale: str | None
    """None: the bias is float32."""
    input_scale: float
    values: Array
    """[O, I, ...] int8, at source."""
    scales: Array
    """[O], at source."""


def quantised_layers(model: onnx.ModelProto, bundle: Bundle) -> list[QuantisedLayer]:
    """The live layers that are INT8 in this graph. Raises: ArtifactError if a convolution is quantised otherwise."""
    graph = model.graph
    weights, made_by = initializers(graph), producers(graph)
    nodes = {node.name: node for node in graph.node}
    found = []
    for layer in bundle.manifest.layers:
        node = nodes.get(layer.name)
        parts = [made_by.get(name) for name in node.input] if node is not None and node.op_type == "Conv" else []
        if not parts or (first := parts[0]) is None or (second := parts[1]) is None:
            continue
        if (first.op_type, second.op_type) != ("DequantizeLinear",) * 2:
            continue
        assert node is not None
        last = parts[2]
        values, scales = weights[second.input[0]], weights[second.input[1]]
        if values.dtype != np.int8 or values.min() < -LARGEST or scales.shape != values.shape[:1]:
            raise ArtifactError(
                f"{FULL_INT8}: {layer.name} is {values.dtype} with {scales.size} scales, expected int8 above -128 "
                f"with one for each of {len(values)} channels",
                remedy="export the bundle again",
            )
        bias, bias_scale = (node.input[2], None) if last is None else (last.input[0], last.input[1])
        scale = float(weights[first.input[1]].reshape(-1)[0])
        found.append(QuantisedLayer(layer, second.input[0], second.input[1], bias, bias_scale, scale, values, scales))
    return found


def quantised_weight(weight: Array) -> tuple[Array, Array]:
    """[O, I, ...] float32 -> int8 of the same shape, and [O] scales; symmetric, channel by channel."""
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    scales = np.maximum(largest / LARGEST, np.finfo(np.float32).tiny).astype(np.float32)
    return _rounded(weight, scales), scales


def _rounded(weight: Array, scales: Array) -> Array:
    column = scales.reshape(-1, *(1,) * (weight.ndim - 1))
    return np.clip(np.rint(weight / column), -LARGEST, LARGEST).astype(np.int8)


def folded(layer: QuantisedLayer, factor: Array, bias: Array, weight: Array | None = None) -> dict[str, Array]:
    """Initialiser name -> value of a layer with another factor for each channel, and another bias.

    A scale is positive: a negative factor changes the sign of the int8 weights. A channel whose scale is so small that
    its bias would leave the int32 range gets a larger scale, and its weights fewer steps.

    Args:
        factor: [O].
        bias: [O], in units of the output.
        weight: what replaces the source's weight, before the factor; None keeps its int8 values.
    """
    column = (-1, *(1,) * (layer.values.ndim - 1))
    scales = layer.scales * np.abs(factor) if weight is None else quantised_weight(weight * factor.reshape(column))[1]
    least = np.full(len(bias), np.finfo(np.float32).tiny)
    if layer.bias_scale is not None:
        least = np.maximum(least, np.abs(bias) / (layer.input_scale * ROOM))
    coarser = scales < least
    scales = np.maximum(scales, least).astype(np.float32)
    if weight is not None:
        values = _rounded(weight * factor.reshape(column), scales)
    elif coarser.any() or (factor < 0).any():
        real = layer.values * (layer.scales * factor).reshape(column)
        kept = layer.values * np.where(factor < 0, -1, 1).astype(np.int8).reshape(column)
        values = np.where(coarser.reshape(column), _rounded(real, scales), kept)
    else:
        values = layer.values
    made = {layer.weight: values, layer.scale: scales}
    if layer.bias_scale is None:
        return made | {layer.bias: bias.astype(np.float32)}
    units = (layer.input_scale * scales.astype(np.float64)).astype(np.float32)
    steps = np.clip(np.rint(bias / units.astype(np.float64)), -ROOM, ROOM)
    return made | {layer.bias: steps.astype(np.int32), layer.bias_scale: units}


def has_dot_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """True if this processor sums products of 8-bit numbers in 32 bits."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i686"):
        return True
    try:
        return "vnni" in cpuinfo.read_text()
    except OSError:
        return False


@dataclass(frozen=True)
class _Held:
    """A session, and the memory that it reads its weights from."""

    session: Session
    values: list[ort.OrtValue]

    def run(self, outputs: None, feeds: Mapping[str, Array | None]) -> list[Array]:
        return self.session.run(outputs, feeds)


@dataclass(frozen=True)
class _Optimised:
    """A graph as ONNX Runtime would run it here, and those of its initialisers that an update may change."""

    graph: bytes
    names: frozenset[str]


class QuantisedNetwork:
    """full.int8.onnx, read once; it makes the sessions that answer."""

    def __init__(self, bundle: Bundle, weights: Mapping[str, Array], threads: int) -> None:
        """
        Args:
            weights: the initialisers of full.onnx.
        Raises: ArtifactError if the graph is not what export writes.
        """
        self.bundle, self._weights, self._threads = bundle, weights, threads
        self._model = onnx.load(bundle.path / FULL_INT8)
        self.layers = quantised_layers(self._model, bundle)
        self._sites = {site.layer: bundle.slices[site.name] for site in bundle.manifest.sites}
        self._stored = {**weights, **{layer.weight: layer.values for layer in self.layers}}
        """What need not be given again where an update leaves it as it is."""
        self._entries = {} if has_dot_products() else WIDE
        self._graphs: dict[Key, _Optimised | onnx.ModelProto] = {}
        """Optimised once; or, where that hides what can change, as in the bundle."""
        self._lock = threading.Lock()

    def session(self, key: Key, update: LiveUpdate) -> Session:
        """A session that answers with an update; nothing else reads its weights."""
        with self._lock:
            if key not in self._graphs:
                self._graphs[key] = self._optimised(key)
            graph = self._graphs[key]
        edits = self.edits(update)
        if isinstance(graph, onnx.ModelProto):
            model = onnx.ModelProto()
            model.CopyFrom(graph)
            set_initializers(model.graph, edits)
            rebuilt: Session = make_session(model, self._threads, entries=self._entries)
            return rebuilt
        options = session_options(self._threads)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        held = []
        for name, value in edits.items():
            if name in graph.names and self._stored.get(name) is not value:
                held.append(ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)))
                options.add_initializer(name, held[-1])
        return _Held(ort.InferenceSession(graph.graph, options, providers=[CPU]), held)

    def edits(self, update: LiveUpdate) -> dict[str, Array]:
        """Initialiser name in full.int8.onnx -> value, of everything that an update may change."""
        made = refolded(self.bundle, self._weights, update, without={layer.layer.name for layer in self.layers})
        for layer in self.layers:
            name, place = layer.layer.name, self._sites.get(layer.layer.name)
            if place is not None:
                factor, bias = update.scale[place], update.bias[place]
            else:
                factor = np.ones(len(layer.values), np.float32)
                own = self._weights[layer.layer.bias] if layer.layer.bias else np.zeros(len(layer.values), np.float32)
                bias = update.biases.get(name, own)
            made |= folded(layer, factor, bias, update.weights.get(name))
        return made

    def _optimised(self, key: Key) -> _Optimised | onnx.ModelProto:
        """The graph as ONNX Runtime would run it here, if all that can change is found in it again."""
        source = twin(self._model, self.bundle, key)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimised.onnx"
            make_session(source, self._threads, optimised=path, entries=self._entries)
            made = onnx.load(path)
        stored, found = initializers(source.graph), initializers(made.graph)
        units = {layer.bias_scale for layer in self.layers}  # a fused convolution works them out itself
        names = {name for name in self.edits(Merger(self.bundle)(Delta.source())) if name not in units}
        missing = [name for name in sorted(names) if name not in found or not np.array_equal(found[name], stored[name])]
        if missing:
            log.info("%s is not in the optimised INT8 graph as it was; each change optimises it anew", missing[0])
            return source
        return _Optimised(made.SerializeToString(), frozenset(names))
