"""ONNX Runtime engine whose weights are live.

On the CPU the optimised graph is kept and its weights stay in our buffers (`live.py`), so that a change of ports costs
one multiplication per weight: no rebuild, no graph input, no slower kernel. There are two banks of buffers from the
first change on: one is read while the other is written, so that an answer never waits for a change. Where editing in
place cannot be had (another provider, an unknown layout) sessions are rebuilt, and the reason is logged.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from edge_adapt.bundle import FULL, Bundle, LiveLayer
from edge_adapt.delta import Delta
from edge_adapt.engines.live import Bank, Group, Layout, LiveTensor, find_layout, grouped
from edge_adapt.engines.protocol import Observed
from edge_adapt.engines.twin import PLAIN, Key, observed, twin
from edge_adapt.errors import EngineError, StateError
from edge_adapt.graph import initializers, set_initializers
from edge_adapt.merge import LiveUpdate, Merger

Array = NDArray[Any]

log = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
VERIFY_TOLERANCE = 1e-4



class OnnxRuntimeEngine:
    """Answering sessions, and tapped twins of them over the same weights, made when first asked for."""

    name: ClassVar[str] = "onnxruntime"

    def __init__(self, bundle: Bundle, *, threads: int = 1, provider: str = CPU, live: bool = True) -> None:
        """
        Args:
            threads: intra-operator threads of every session.
            provider: execution provider; it must be one that is really used, there is no silent fallback.
            live: edit weights in place where possible; False always rebuilds (slow, used as a reference).
        Raises: EngineError if ONNX Runtime refuses the graph or the provider.
        """
        self.bundle = bundle
        self._threads, self._provider = threads, provider
        self._model = onnx.load(bundle.path / FULL)
        self._weights = initializers(self._model.graph)
        self._inputs = [info.name for info in self._model.graph.input]
        self._sites = {site.layer: bundle.slices[site.name] for site in bundle.manifest.sites}
        self._identity = Merger(bundle)(Delta.source())
        self._plan = self._try_live() if live else None
        self._applying = threading.Lock()
        self._active: _Sessions = self._fresh()
        self._idle: _Sessions | None = None
        self._active.run(PLAIN, np.zeros((1, *bundle.manifest.input.shape), np.float32))

    @classmethod
    def probe(cls) -> str | None:
        return None

    @property
    def description(self) -> str:
        how = "weights edited in place" if self._plan else "sessions rebuilt at each change"
        return f"onnxruntime {ort.__version__}, {self._provider}, {self._threads} thread(s), {how}"

    @property
    def is_live(self) -> bool:
        """True if a change of weights rebuilds nothing."""
        return self._plan is not None

    def run(self, frames: Array) -> Array:
        logits: Array = self._run(PLAIN, frames)[0][0]
        return logits

    def observe(self, frames: Array, *, cut: bool = False, taps: bool = False, features: bool = False) -> Observed:
        key = (cut and not self.bundle.is_reference, taps, features)
        made, tag = self._run(key, frames)
        return replace(observed(self.bundle, key, frames if cut else None, made), tag=tag)

    def apply(self, update: LiveUpdate, tag: object = None) -> None:
        """Write into the bank that nobody reads, then swap: a run never waits for it, and never sees a mixture."""
        self._check(update)
        with self._applying:
            if self._plan is None:
                rebuilt = self._rebuilt(update)
                rebuilt.tag = tag
                self._active = rebuilt
                return
            idle = self._written(update)
            idle.tag = tag
            self._active, self._idle = idle, self._active

    def rehearse(
        self, update: LiveUpdate, frames: Array, *, cut: bool = False, taps: bool = False, features: bool = False
    ) -> Observed:
        """`observe` with other weights, in the bank that nobody reads: those in force stay, and answers go on."""
        self._check(update)
        key = (cut and not self.bundle.is_reference, taps, features)
        with self._applying:
            if self._plan is None:
                made = self._rebuilt(update).run(key, frames)
            else:
                self._idle = self._written(update)
                made = self._idle.run(key, frames)
        return observed(self.bundle, key, frames if cut else None, made)

    def _written(self, update: LiveUpdate) -> _Sessions:
        """The bank that nobody reads, with these weights. Raises: EngineError if one of them is not live."""
        assert self._plan is not None
        changed = self._plan.fixed & update.weights.keys()
        if changed:
            raise EngineError(
                f"the matrix weight of {min(changed)} cannot change while the engine runs",
                remedy="adapt norms and biases, or build the engine with live=False",
            )
        idle = self._idle or self._fresh()
        if idle.holds is not update:
            with idle.lock:  # a run that began before the last swap may still read it
                idle.write(update)
            idle.holds = update
        return idle

    def _check(self, update: LiveUpdate) -> None:
        """Raises: StateError if a weight has another shape than in full.onnx; NumPy would stretch it in silence."""
        for layer in self.bundle.manifest.layers:
            parts = ("weight", layer.weight, update.weights), ("bias", layer.bias, update.biases)
            for role, name, values in parts:
                given = values.get(layer.name)
                if given is not None and name and given.shape != self._weights[name].shape:
                    raise StateError(
                        f"{layer.name}.{role} has shape {given.shape}, the engine's has {self._weights[name].shape}",
                        remedy="use a delta that was learned on this bundle",
                    )

    def close(self) -> None:
        with self._applying:
            self._active.clear()
            self._idle = None

    def _run(self, key: Key, frames: Array) -> tuple[list[Array], object]:
        """Outputs, and the tag of the weights that gave them."""
        while True:
            sessions = self._active
            with sessions.lock:
                if sessions is self._active:
                    return sessions.run(key, frames), sessions.tag

    def _fresh(self) -> _Sessions:
        if self._plan is None:
            return self._rebuilt(self._identity)
        made = _LiveSessions(self._inputs, self._graph, self._plan)
        made.write(self._identity)  # so that going back to source later is bit for bit where it began
        return made

    def _rebuilt(self, update: LiveUpdate) -> _Sessions:
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        set_initializers(model.graph, self._refolded(update))
        made = _RebuiltSessions(self._inputs, lambda key: self._graph(key, model), self._threads, self._provider)
        made.prompts = update.prompts
        return made

    def _graph(self, key: Key, model: onnx.ModelProto | None = None) -> onnx.ModelProto:
        return twin(model or self._model, self.bundle, key)

    def _try_live(self) -> _LivePlan | None:
        """In-place weights, verified against a rebuilt session with other weights; None with a logged reason."""
        if self._provider != CPU:
            log.info("weights cannot be edited in place on %s; sessions will be rebuilt", self._provider)
            return None
        plan = _LivePlan(self.bundle.manifest.layers, self._weights, self._sites, self._threads)
        sessions = _LiveSessions(self._inputs, self._graph, plan)
        frames = np.random.default_rng(0).standard_normal((2, *self.bundle.manifest.input.shape), np.float32)
        probe = self._random_update(plan.fixed)
        sessions.write(probe)
        try:
            found = sessions.run(PLAIN, frames)[0]
        except _NotLiveError as reason:
            log.warning("weights cannot be edited in place: %s; sessions will be rebuilt", reason.what)
            return None
        expected = self._rebuilt(probe).run(PLAIN, frames)[0]
        error = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12))
        if not error < VERIFY_TOLERANCE:
            log.warning("weights edited in place answer %.1e off; sessions will be rebuilt", error)
            return None
        return plan

    def _random_update(self, fixed: set[str]) -> LiveUpdate:
        """A change of every site, and of every layer without one."""
        rng = np.random.default_rng(1)
        scale = rng.uniform(0.8, 1.25, self.bundle.channels).astype(np.float32)
        bias = self._identity.bias + rng.normal(0, 0.05, self.bundle.channels).astype(np.float32)
        weights, biases = {}, {}
        for layer in self.bundle.manifest.layers:
            if layer.name not in self._sites:
                if layer.name not in fixed:
                    weights[layer.name] = self._weights[layer.weight] * np.float32(1.1)
                if layer.bias:
                    biases[layer.name] = self._weights[layer.bias] + np.float32(0.1)
        return replace(self._identity, scale=scale, bias=bias, weights=weights, biases=biases)

    def _refolded(self, update: LiveUpdate) -> dict[str, Array]:
        """Initialiser name -> value, for all layers, in the layout of full.onnx."""
        made: dict[str, Array] = {}
        for layer in self.bundle.manifest.layers:
            base = update.weights.get(layer.name, self._weights[layer.weight])
            place = self._sites.get(layer.name)
            if place is None:
                made[layer.weight] = base
                if layer.bias:
                    made[layer.bias] = update.biases.get(layer.name, self._weights[layer.bias])
            else:
                made[layer.weight] = base * update.scale[place].reshape(-1, *(1,) * (base.ndim - 1))
                if layer.bias:
                    made[layer.bias] = update.bias[place]
        return made


class _Sessions(ABC):
    """Sessions that share one state of the weights."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self.lock = threading.Lock()
        self.prompts: Array | None = None
        """[P, width], for a network that takes them."""
        self.tag: object = None
        """What the weights came with."""
        self.holds: LiveUpdate | None = None
        """What was written last: the same again need not be."""
        self._inputs = inputs
        self._made: dict[Key, ort.InferenceSession] = {}

    def run(self, key: Key, frames: Array) -> list[Array]:
        """All outputs of the session with those outputs, which is made when first asked for."""
        if key not in self._made:
            self._made[key] = self._make(key)
        made: list[Array] = self._made[key].run(None, dict(zip(self._inputs, (frames, self.prompts), strict=False)))
        return made

    @abstractmethod
    def write(self, update: LiveUpdate) -> None:
        """Change the weights of every session."""

    def clear(self) -> None:
        self._made.clear()

    @abstractmethod
    def _make(self, key: Key) -> ort.InferenceSession: ...


class _RebuiltSessions(_Sessions):
    """Ordinary sessions, of a graph whose weights were folded beforehand. Works with every provider."""

    def __init__(
        self, inputs: Sequence[str], graph: Callable[[Key], onnx.ModelProto], threads: int, provider: str
    ) -> None:
        super().__init__(inputs)
        self._graph, self._threads, self._provider = graph, threads, provider

    def write(self, update: LiveUpdate) -> None:
        raise TypeError("these sessions are rebuilt, not written to")

    def _make(self, key: Key) -> ort.InferenceSession:
        return make_session(self._graph(key), self._threads, self._provider)


class _LiveSessions(_Sessions):
    """Sessions that read their weights from one bank of ours."""

    def __init__(self, inputs: Sequence[str], graph: Callable[[Key], onnx.ModelProto], plan: _LivePlan) -> None:
        super().__init__(inputs)
        self._graph, self._plan = graph, plan
        self._bank = Bank()
        self._groups = 0
        self._values: dict[tuple[str, Layout], ort.OrtValue] = {}

    def write(self, update: LiveUpdate) -> None:
        self._bank.write(update)
        self.prompts = update.prompts

    def clear(self) -> None:
        super().clear()
        self._values.clear()

    def _make(self, key: Key) -> ort.InferenceSession:
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
        return ort.InferenceSession(optimised.graph, options, providers=[CPU])


class _NotLiveError(EngineError):
    """Why a graph's weights cannot be edited in place. A twin, made when first asked for, may be the first to tell."""

    def __init__(self, what: str) -> None:
        super().__init__(what, remedy="build the engine with live=False, which rebuilds sessions at each change")


@dataclass(frozen=True)
class _Optimised:
    """A graph as ONNX Runtime would run it on this machine, and which of its weights are live."""

    graph: bytes
    places: dict[str, tuple[str, Layout]]


class _LivePlan:
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
        """Raises: _NotLiveError naming the weight that was not found again."""
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
                    raise _NotLiveError(f"{name} of {layer.name} was not found in the optimised graph")
                for place, layout in found.items():
                    places[place] = name, layout
                    if (name, layout) not in self._known:
                        self._known.add((name, layout))
                        site = self._sites.get(layer.name)
                        fresh.append(LiveTensor(name, layer.name, role, layout, self._weights[name], site))
        fixed = {layer.weight: self._weights[layer.weight] for layer in self._layers if layer.name in self.fixed}
        if fixed.keys() - stored.keys():
            raise _NotLiveError(f"{min(fixed.keys() - stored.keys())} was rewritten by the optimiser")
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


def session_options(threads: int) -> ort.SessionOptions:
    """Options that every session here shares, the bare one of the benchmark too."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A spinning thread beside a busy neighbour costs more than it saves.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def make_session(
    model: onnx.ModelProto | Path, threads: int, provider: str = CPU, *, optimised: Path | None = None
) -> ort.InferenceSession:
    """An ordinary session. Raises: EngineError if the graph is refused or the provider is not the one asked for."""
    options = session_options(threads)
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        session = ort.InferenceSession(source, options, providers=[provider])
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise EngineError(
            f"ONNX Runtime refuses the graph: {str(error).splitlines()[0]}", remedy="run `edge-adapt check` on it"
        ) from error
    used = session.get_providers()
    if provider not in used:
        raise EngineError(
            f"ONNX Runtime was asked for {provider} and would use {used[0]} instead",
            remedy="install the matching onnxruntime build and driver, or ask for CPUExecutionProvider",
        )
    return session
