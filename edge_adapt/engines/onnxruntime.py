"""ONNX Runtime engine whose weights are live.

On the CPU the optimised graph is kept and its weights stay in our buffers (`live.py`), so that a change of ports costs
one multiplication per weight: no rebuild, no graph input, no slower kernel. There are two banks of buffers from the
first change on: one is read while the other is written, so that an answer never waits for a change. Where editing in
place cannot be had (another provider, an unknown layout) sessions are rebuilt, and the reason is logged.

A bundle with an INT8 graph answers with that (`quantised.py`); looks, from which methods learn, go through the float32
network with the same weights.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from edge_adapt.bundle import FULL, Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.live_sessions import LivePlan, LiveSessions, NotLiveError
from edge_adapt.engines.protocol import Observed
from edge_adapt.engines.quantised import QuantisedNetwork
from edge_adapt.engines.refold import refolded
from edge_adapt.engines.sessions import CPU, Answering, RebuiltSessions, Sessions, make_session, session_options
from edge_adapt.engines.twin import PLAIN, Key, observed, twin
from edge_adapt.errors import EngineError, StateError
from edge_adapt.graph import initializers, set_initializers
from edge_adapt.merge import LiveUpdate, Merger

__all__ = ["CPU", "OnnxRuntimeEngine", "make_session", "session_options"]

Array = NDArray[Any]

log = logging.getLogger(__name__)

VERIFY_TOLERANCE = 1e-4


class OnnxRuntimeEngine:
    """Answering sessions, and tapped twins of them over the same weights, made when first asked for."""

    name: ClassVar[str] = "onnxruntime"

    def __init__(
        self, bundle: Bundle, *, threads: int = 1, provider: str = CPU, live: bool = True, quantised: bool = True
    ) -> None:
        """
        Args:
            threads: intra-operator threads of every session.
            provider: execution provider; it must be one that is really used, there is no silent fallback.
            live: edit weights in place where possible; False always rebuilds (slow, used as a reference).
            quantised: answer with the INT8 graph of a bundle that has one; False answers in float32.
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
        self._quantised = self._int8() if quantised else None
        self._applying = threading.Lock()
        self._asked_by: dict[Key, int] = {}
        """Which thread last ran each kind of session."""
        self._active: Sessions = self._fresh()
        self._idle: Sessions | None = None
        self._active.run(PLAIN, np.zeros((1, *bundle.manifest.input.shape), np.float32))

    @classmethod
    def probe(cls) -> str | None:
        return None

    @property
    def description(self) -> str:
        how = "weights edited in place" if self._plan else "sessions rebuilt at each change"
        if self._quantised is not None:
            how = f"INT8 answers from a session rebuilt at each change, looks in float32 with {how}"
        return f"onnxruntime {ort.__version__}, {self._provider}, {self._threads} thread(s), {how}"

    @property
    def is_live(self) -> bool:
        """True if a change of weights rebuilds nothing."""
        return self._plan is not None and self._quantised is None

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
            made = self._written(update)
            here = threading.get_ident()
            # Another thread's next answer must not wait for a session; this one's would either way.
            made.prepare([key for key, thread in list(self._asked_by.items()) if thread != here])
            made.tag = tag
            self._active, self._idle = made, None if self._plan is None else self._active

    def rehearse(
        self, update: LiveUpdate, frames: Array, *, cut: bool = False, taps: bool = False, features: bool = False
    ) -> Observed:
        """`observe` with other weights, in the bank that nobody reads: those in force stay, and answers go on."""
        self._check(update)
        key = (cut and not self.bundle.is_reference, taps, features)
        with self._applying:
            written = self._written(update)
            self._idle = None if self._plan is None else written
            made = written.run(key, frames)
        return observed(self.bundle, key, frames if cut else None, made)

    def _written(self, update: LiveUpdate) -> Sessions:
        """Sessions that nobody reads yet, with these weights. Raises: EngineError if one of them is not live."""
        if self._plan is None:
            return self._rebuilt(update, self._answering)
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
        self._asked_by[key] = threading.get_ident()
        while True:
            sessions = self._active
            with sessions.lock:
                if sessions is self._active:
                    return sessions.run(key, frames), sessions.tag

    def _fresh(self) -> Sessions:
        if self._plan is None:
            return self._rebuilt(self._identity, self._answering)
        made = LiveSessions(self._inputs, self._graph, self._plan, self._answering)
        made.write(self._identity)  # so that going back to source later is bit for bit where it began
        return made

    def _rebuilt(self, update: LiveUpdate, answering: Answering | None = None) -> Sessions:
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        set_initializers(model.graph, refolded(self.bundle, self._weights, update))
        made = RebuiltSessions(
            self._inputs, lambda key: self._graph(key, model), self._threads, self._provider, answering
        )
        made.write(update)
        return made

    @property
    def _answering(self) -> Answering | None:
        return None if self._quantised is None else self._quantised.session

    def _int8(self) -> QuantisedNetwork | None:
        """The INT8 graph, if the bundle has one and it can be used here."""
        facts = self.bundle.manifest.quantised
        if facts is None:
            return None
        if self._provider != CPU:
            log.info("the INT8 graph is not used on %s", self._provider)
            return None
        if facts.target != "cpu":
            log.warning(
                "the INT8 graph of %s was made for %s: on ONNX Runtime's CPU it is slower than float32; "
                "export with --target cpu for this device",
                self.bundle.manifest.name,
                facts.target,
            )
        return QuantisedNetwork(self.bundle, self._weights, self._threads)

    def _graph(self, key: Key, model: onnx.ModelProto | None = None) -> onnx.ModelProto:
        return twin(model or self._model, self.bundle, key)

    def _try_live(self) -> LivePlan | None:
        """In-place weights, verified against a rebuilt session with other weights; None with a logged reason."""
        if self._provider != CPU:
            log.info("weights cannot be edited in place on %s; sessions will be rebuilt", self._provider)
            return None
        plan = LivePlan(self.bundle.manifest.layers, self._weights, self._sites, self._threads)
        sessions = LiveSessions(self._inputs, self._graph, plan)
        frames = np.random.default_rng(0).standard_normal((2, *self.bundle.manifest.input.shape), np.float32)
        probe = self._random_update(plan.fixed)
        sessions.write(probe)
        try:
            found = sessions.run(PLAIN, frames)[0]
        except NotLiveError as reason:
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
