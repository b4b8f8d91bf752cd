"""Sessions whose weights are edited in place: where the optimised graph keeps each, and the bank that they read."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from edge_adapt.bundle import LiveLayer
from edge_adapt.engines.live import Bank, Group, Layout, LiveTensor, find_layout, grouped
from edge_adapt.engines.sessions import CPU, Answering, Session, Sessions, make_session, session_options
from edge_adapt.engines.twin import Key
from edge_adapt.errors import EngineError
from edge_adapt.graph import initializers, set_initializers
from edge_adapt.merge import LiveUpdate

Array = NDArray[Any]


class LiveSessions(Sessions):
    """Sessions that read their weights from one bank of ours."""

    def __init__(
        self,
        inputs: Sequence[str],
        graph: Callable[[Key], onnx.ModelProto],
        plan: LivePlan,
        answering: Answering | None = None,
    ) -> None:
        super().__init__(inputs, answering)
        self._graph, self._plan = graph, plan
        self._bank = Bank()
        self._groups = 0
        self._values: dict[tuple[str, Layout], ort.OrtValue] = {}

    def _write(self, update: LiveUpdate) -> None:
        self._bank.write(update)

    def clear(self) -> None:
        super().clear()
        self._values.clear()

    def _make_float(self, key: Key) -> Session:
        optimised = self._plan.optimised(key, self._graph)
        for group in self._plan.groups[self._groups :]:
            for name, memory in self._bank.add(group).items():
                self._values[name] = ort.OrtValue.ortvalue_from_numpy(memory)
        self._groups = len(self._plan.groups)
        options = session_options(self._plan.threads)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if not self._plan.pack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        for place, name in optimised.places.items():
            options.add_initializer(place, self._values[name])
        made: Session = ort.InferenceSession(optimised.graph, options, providers=[CPU])
        return made


class NotLiveError(EngineError):
    """Why a graph's weights cannot be edited in place. A twin, made when first asked for, may be the first to tell."""

    def __init__(self, what: str) -> None:
        super().__init__(what, remedy="build the engine with live=False, which rebuilds sessions at each change")


@dataclass(frozen=True)
class _Optimised:
    """A graph as ONNX Runtime would run it on this machine, and which of its weights are live."""

    graph: bytes
    places: dict[str, tuple[str, Layout]]


class LivePlan:
    """Where ONNX Runtime keeps each weight and in what layout: found once per graph, shared by all banks."""

    def __init__(
        self,
        layers: tuple[LiveLayer, ...],
        weights: dict[str, Array],
        sites: dict[str, slice],
        threads: int,
    ) -> None:
        self._layers, self._weights, self._sites, self.threads = layers, weights, sites, threads
        # Packed copies of matrix weights would not see our edits. Convolutions are not packed, so that switching it off
        # costs them nothing; a transformer keeps packing, and only its norms and biases are live.
        self.pack = all(layer.op != "Conv" for layer in layers)
        self.fixed = {layer.name for layer in layers if self.pack and layer.op in ("MatMul", "Gemm")}
        self.groups: list[Group] = []
        self._known: set[tuple[str, Layout]] = set()
        self._graphs: dict[Key, _Optimised] = {}
        self._lock = threading.Lock()

    def optimised(self, key: Key, graph: Callable[[Key], onnx.ModelProto]) -> _Optimised:
        """Raises: NotLiveError naming the weight that was not found again."""
        with self._lock:
            if key not in self._graphs:
                self._graphs[key] = self._optimise(graph(key))
            return self._graphs[key]

    def _optimise(self, model: onnx.ModelProto) -> _Optimised:
        tags = self._tags()
        tagged = onnx.ModelProto()
        tagged.CopyFrom(model)
        set_initializers(tagged.graph, tags)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimised.onnx"
            make_session(tagged, self.threads, CPU, optimised=path)
            optimised = onnx.load(path)
        stored = initializers(optimised.graph)
        places: dict[str, tuple[str, Layout]] = {}
        fresh: list[LiveTensor] = []
        for layer in self._layers:
            for role, name in (("weight", layer.weight), ("bias", layer.bias)):
                if name not in tags:
                    continue
                found = _find(tags[name], stored)
                if not found and name in _read(model.graph):
                    raise NotLiveError(f"{name} of {layer.name} was not found in the optimised graph")
                for place, layout in found.items():
                    places[place] = name, layout
                    if (name, layout) not in self._known:
                        self._known.add((name, layout))
                        site = self._sites.get(layer.name)
                        fresh.append(LiveTensor(name, layer.name, role, layout, self._weights[name], site))
        fixed = {layer.weight: self._weights[layer.weight] for layer in self._layers if layer.name in self.fixed}
        if fixed.keys() - stored.keys():
            raise NotLiveError(f"{min(fixed.keys() - stored.keys())} was rewritten by the optimiser")
        set_initializers(optimised.graph, fixed)
        self.groups.extend(grouped(fresh))
        return _Optimised(optimised.SerializeToString(), places)

    def _tags(self) -> dict[str, Array]:
        """Weights that occur once: no two tensors alike, and no zero that an optimiser could remove."""
        rng = np.random.default_rng(0)
        names = [
            name
            for layer in self._layers
            for name in (None if layer.name in self.fixed else layer.weight, layer.bias)
            if name
        ]
        return {name: rng.uniform(0.5, 1.5, self._weights[name].shape).astype(np.float32) for name in names}


def _read(graph: onnx.GraphProto) -> set[str]:
    return {name for node in graph.node for name in node.input}


def _find(tag: Array, stored: dict[str, Array]) -> dict[str, Layout]:
    """Every place where the optimiser put a tagged weight, and how."""
    places = {}
    for place, array in stored.items():
        if array.dtype == tag.dtype and array.size >= tag.size and array.ndim:
            layout = find_layout(tag, array)
            if layout is not None:
                places[place] = layout
    return places
