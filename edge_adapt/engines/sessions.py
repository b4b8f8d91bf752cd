"""ONNX Runtime sessions: how they are made, and the set of them that shares one state of the weights."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from edge_adapt.engines.twin import Key
from edge_adapt.errors import EngineError
from edge_adapt.merge import LiveUpdate

Array = NDArray[Any]

CPU = "CPUExecutionProvider"


class Session(Protocol):
    """What is asked of ONNX Runtime's."""

    def run(self, outputs: None, feeds: Mapping[str, Array | None]) -> list[Array]: ...


Answering = Callable[[Key, LiveUpdate], Session]
"""Makes the session that answers with an update, where another graph than the float one does (`quantised.py`)."""


class Sessions(ABC):
    """Sessions that share one state of the weights."""

    def __init__(self, inputs: Sequence[str], answering: Answering | None = None) -> None:
        self.lock = threading.Lock()
        self.prompts: Array | None = None
        """[P, width], for a network that takes them."""
        self.tag: object = None
        """What the weights came with."""
        self.holds: LiveUpdate | None = None
        """What was written last: the same again need not be."""
        self._inputs, self._answering = inputs, answering
        self._made: dict[Key, Session] = {}

    def run(self, key: Key, frames: Array) -> list[Array]:
        """All outputs of the session with those outputs, which is made when first asked for."""
        self.prepare([key])
        return self._made[key].run(None, dict(zip(self._inputs, (frames, self.prompts), strict=False)))

    def prepare(self, keys: Iterable[Key]) -> None:
        """Make these sessions now, so that no answer waits for them."""
        for key in keys:
            if key not in self._made:
                self._made[key] = self._make(key)

    def write(self, update: LiveUpdate) -> None:
        """Change the weights of every session."""
        self._write(update)
        self.holds, self.prompts = update, update.prompts
        if self._answering is not None:
            self._made = {key: made for key, made in self._made.items() if not answers(key)}

    def clear(self) -> None:
        self._made.clear()

    def _make(self, key: Key) -> Session:
        if self._answering is not None and answers(key):
            assert self.holds is not None
            return self._answering(key, self.holds)
        return self._make_float(key)

    @abstractmethod
    def _write(self, update: LiveUpdate) -> None: ...

    @abstractmethod
    def _make_float(self, key: Key) -> Session: ...


def answers(key: Key) -> bool:
    """True for what only answers, with features or without; False for a look, from which something is learned."""
    cut, taps, _ = key
    return not cut and not taps


class RebuiltSessions(Sessions):
    """Ordinary sessions, of a graph whose weights were folded beforehand. Works with every provider."""

    def __init__(
        self,
        inputs: Sequence[str],
        graph: Callable[[Key], onnx.ModelProto],
        threads: int,
        provider: str,
        answering: Answering | None = None,
    ) -> None:
        super().__init__(inputs, answering)
        self._graph, self._threads, self._provider = graph, threads, provider

    def _write(self, update: LiveUpdate) -> None:
        """The graph holds the weights already."""

    def _make_float(self, key: Key) -> Session:
        made: Session = make_session(self._graph(key), self._threads, self._provider)
        return made


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
    model: onnx.ModelProto | Path,
    threads: int,
    provider: str = CPU,
    *,
    optimised: Path | None = None,
    entries: Mapping[str, str] | None = None,
    provider_options: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """An ordinary session. Raises: EngineError if the graph is refused or the provider is not the one asked for."""
    options = session_options(threads)
    for name, value in (entries or {}).items():
        options.add_session_config_entry(name, value)
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        session = ort.InferenceSession(source, options, providers=[(provider, dict(provider_options or {}))])
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
