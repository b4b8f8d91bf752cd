"""An engine over graphs whose ports are fed: the state of the weights is two vectors, so a change is one reference.

What runs the graphs is left to subclasses: ONNX Runtime on a GPU, or TensorRT plans. Two graphs do: one that answers,
and gives the features with it, for they cost nothing; one that also gives taps and the cut.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_adapt.bundle import FULL, Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.ported import feeds_of, ported
from edge_adapt.engines.protocol import Observed
from edge_adapt.engines.twin import Key, observed
from edge_adapt.merge import LiveUpdate, Merger

Array = NDArray[Any]


class Session(Protocol):
    """Runs one graph. Guards itself where two threads may not run it at once."""

    def run(self, feeds: Mapping[str, Array]) -> Sequence[Array]:
        """Inputs by name -> outputs in the order of the graph; the caller owns them. Raises: EngineError."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class _InForce:
    feeds: Mapping[str, Array]
    tag: object = None


class PortedEngine(ABC):
    """Everything of the protocol but the sessions."""

    name: ClassVar[str]

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._model = onnx.load(bundle.path / FULL)
        self._inputs = [info.name for info in self._model.graph.input]
        self._sessions: dict[Key, Session] = {}
        self._making = threading.Lock()
        self._in_force = _InForce(self._fed(Merger(bundle)(Delta.source())))

    @abstractmethod
    def _session(self, graph: onnx.ModelProto) -> Session:
        """Raises: EngineError if the graph is refused."""

    @property
    @abstractmethod
    def description(self) -> str: ...

    def run(self, frames: Array) -> Array:
        return self._observed(frames, self._in_force, cut=False, taps=False, features=False).logits

    def observe(self, frames: Array, *, cut: bool = False, taps: bool = False, features: bool = False) -> Observed:
        force = self._in_force
        return replace(self._observed(frames, force, cut=cut, taps=taps, features=features), tag=force.tag)

    def rehearse(
        self, update: LiveUpdate, frames: Array, *, cut: bool = False, taps: bool = False, features: bool = False
    ) -> Observed:
        return self._observed(frames, _InForce(self._fed(update)), cut=cut, taps=taps, features=features)

    def apply(self, update: LiveUpdate, tag: object = None) -> None:
        """Raises: EngineError if the update replaces a whole weight, and what was in force stays."""
        self._in_force = _InForce(self._fed(update), tag)

    def close(self) -> None:
        with self._making:
            for session in self._sessions.values():
                session.close()
            self._sessions.clear()

    def prepare(self) -> None:
        """Make both sessions now."""
        for looking in (False, True):
            self._made(key_of(self.bundle, looking=looking, features=False))

    def _observed(self, frames: Array, force: _InForce, *, cut: bool, taps: bool, features: bool) -> Observed:
        key = key_of(self.bundle, looking=taps or (cut and not self.bundle.is_reference), features=features)
        made = self._made(key).run({self._inputs[0]: frames, **force.feeds})
        seen = observed(self.bundle, key, frames if cut else None, list(made))
        return Observed(
            seen.logits,
            seen.cut if cut else None,
            seen.taps if taps else None,
            seen.cls if taps else None,
            seen.features if features else None,
        )

    def _fed(self, update: LiveUpdate) -> dict[str, Array]:
        feeds = feeds_of(self.bundle, update)
        width = self.bundle.manifest.prompts
        if width:
            none = np.zeros((0, width), np.float32)
            feeds[self._inputs[1]] = none if update.prompts is None else np.ascontiguousarray(update.prompts)
        return feeds

    def _made(self, key: Key) -> Session:
        with self._making:
            if key not in self._sessions:
                self._sessions[key] = self._session(self._graph(key))
            return self._sessions[key]

    def _graph(self, key: Key) -> onnx.ModelProto:
        return ported(self._model, self.bundle, key)


def key_of(bundle: Bundle, *, looking: bool, features: bool) -> Key:
    """Which of the two graphs serves: features come with both where there is a head, taps and cut with one."""
    features = features or bundle.manifest.head is not None
    if not looking:
        return False, False, features
    return not bundle.is_reference, bool(bundle.manifest.sites), features
