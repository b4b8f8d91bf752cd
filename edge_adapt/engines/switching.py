"""Two engines as one: the first answers at once, the other one when it is ready, and the first again if that fails.

The state of the weights is carried over: who applies and who answers never notices which of the two it is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.protocol import Engine, Observed
from edge_adapt.errors import EngineError
from edge_adapt.merge import LiveUpdate, Merger

Array = NDArray[Any]
T = TypeVar("T")
log = logging.getLogger(__name__)

BUILD_S = 1800.0
CHECKED = 2
"""Frames that both engines answer before the switch."""


def settled(engine: Engine, timeout_s: float = BUILD_S) -> Engine:
    """For whoever measures: the engine once it is the one that its name says.

    Raises: EngineError if another one answers in its place, or still does after that time; it is closed then.
    """
    if isinstance(engine, SwitchingEngine) and not engine.wait(timeout_s):
        reason = engine.trouble or f"no plan after {timeout_s:g} s"
        engine.close()
        raise EngineError(f"{engine.name} does not answer: {reason}", remedy="measure the onnxruntime engine")
    return engine


class SwitchingEngine:
    """`first` until `make` has given another engine that answers alike."""

    name: ClassVar[str] = "switching"

    def __init__(self, bundle: Bundle, first: Engine, make: Callable[[], Engine], *, tolerance: float) -> None:
        """
        Args:
            make: called in a thread of its own; may take minutes. EngineError from it means that `first` stays.
            tolerance: how far the other one's answers may be off, as a share of the output's scale.
        """
        self.bundle = bundle
        self.trouble: str | None = None
        """Why `first` answers although another engine was wanted; None while all is well."""
        self._first, self._make, self._tolerance = first, make, tolerance
        self._current: Engine = first
        self._latest: tuple[LiveUpdate, object] | None = None
        self._changing = threading.Lock()
        """Held to change weights or the engine, never to answer."""
        self._closed = False
        self._thread = threading.Thread(target=self._switch, name="engine", daemon=True)
        self._thread.start()

    @property
    def switched(self) -> bool:
        """True while the other engine answers."""
        return self._current is not self._first

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is decided which engine answers; True if it is the other one."""
        self._thread.join(timeout_s)
        return self.switched

    @property
    def description(self) -> str:
        return self._current.description

    def run(self, frames: Array) -> Array:
        return self._asked(lambda engine: engine.run(frames))

    def observe(self, frames: Array, *, cut: bool = False, taps: bool = False, features: bool = False) -> Observed:
        return self._asked(lambda engine: engine.observe(frames, cut=cut, taps=taps, features=features))

    def rehearse(
        self, update: LiveUpdate, frames: Array, *, cut: bool = False, taps: bool = False, features: bool = False
    ) -> Observed:
        return self._asked(lambda engine: engine.rehearse(update, frames, cut=cut, taps=taps, features=features))

    def apply(self, update: LiveUpdate, tag: object = None) -> None:
        """Raises: what `first` raises; weights that only the first engine can take bring it back."""
        with self._changing:
            try:
                self._current.apply(update, tag)
            except EngineError as error:
                if self._current is self._first:
                    raise
                self._first.apply(update, tag)
                self._go_back(error)
            self._latest = update, tag

    def close(self) -> None:
        with self._changing:
            self._closed = True
            engines = {id(engine): engine for engine in (self._current, self._first)}
        self._thread.join()
        for engine in engines.values():
            engine.close()

    def _asked(self, question: Callable[[Engine], T]) -> T:
        """Ask the current engine; if the other one fails, the first one answers, from now on."""
        engine = self._current
        try:
            return question(engine)
        except EngineError as error:
            if engine is self._first:
                raise
            with self._changing:
                if self._current is engine:
                    if self._latest is not None:
                        self._first.apply(*self._latest)
                    self._go_back(error)
            return question(self._first)

    def _go_back(self, error: EngineError) -> None:
        self._current = self._first
        self._complain(f"{error.what}; {self._first.name} answers again")

    def _switch(self) -> None:
        try:
            other = self._make()
        except EngineError as error:
            if not self._closed:
                self._complain(f"{error.what}; {self._first.name} answers")
            return
        except Exception as error:  # whatever a driver raises: answers go on
            self._complain(f"{type(error).__name__}: {error}; {self._first.name} answers")
            return
        try:
            self._compare(other)
        except EngineError as error:
            other.close()
            self._complain(f"{error.what}; {self._first.name} answers")
            return
        with self._changing:
            if self._closed:
                other.close()
                return
            try:
                if self._latest is not None:
                    other.apply(*self._latest)
            except EngineError as error:
                other.close()
                self._complain(f"{error.what}; {self._first.name} answers")
                return
            self._current = other
        log.info("the engine is now %s", other.description)

    def _compare(self, other: Engine) -> None:
        """Raises: EngineError if it answers otherwise than the first, at source."""
        rng = np.random.default_rng(0)
        frames = rng.standard_normal((CHECKED, *self.bundle.manifest.input.shape), np.float32)
        source = Merger(self.bundle)(Delta.source())
        expected = self._first.rehearse(source, frames).logits
        found = other.rehearse(source, frames).logits
        error = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12))
        if not error < self._tolerance:
            raise EngineError(f"{other.name} answers {error:.1e} off", remedy="use the onnxruntime engine")

    def _complain(self, text: str) -> None:
        self.trouble = text
        log.warning("engine: %s", text)
