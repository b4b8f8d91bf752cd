"""Answers from one engine with one delta in force. Everything that runs the network on behalf of others is here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.delta import PORT_SCALE, PORT_SHIFT, Delta
from edge_adapt.engines.protocol import Engine, Observed
from edge_adapt.merge import LiveUpdate, Merger
from edge_adapt.methods.protocol import CUT, FEATURES, TAPS, Answered, Method, Observation
from edge_adapt.taps import undo

Array = NDArray[Any]


Affine = tuple[Array, Array, Array, Array]


@dataclass(frozen=True)
class InForce:
    """What answers. It goes into the engine with the weights and comes back with every answer of theirs."""

    delta: Delta
    affine: Affine
    """Norm weight and bias, port scale and shift: what a tap has to be freed of."""
    version: int
    """Counts changes of weights; 0 is the model as exported."""
    update: LiveUpdate
    """The same for the engine."""


class Predictor:
    """Engine, bundle and the delta in force. One thread may answer while another one applies and rehearses."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle, self.engine = bundle, engine
        self.passes = 0
        """Frames that went through the engine so far, looks and views included."""
        self._merge = Merger(bundle)
        self.source = Delta.source()
        self._source = self._in_force = self._given(self.source, 0)

    @property
    def delta(self) -> Delta:
        """What the next answers are given with."""
        return self._in_force.delta

    @property
    def version(self) -> int:
        """Number of the change that put it in force."""
        return self._in_force.version

    @property
    def trouble(self) -> str | None:
        """Why the engine answers in another way than was asked for; None while all is well."""
        found: str | None = getattr(self.engine, "trouble", None)
        return found

    def answer(self, frames: Array, *, features: bool = False) -> Answered:
        """Logits [N, K], and features [N, D] if asked for, with the delta in force."""
        self.passes += len(frames)
        seen = self.engine.observe(frames, features=features)
        return Answered(self._logits(seen.logits), seen.features, self._of(seen).version)

    def look_for(self, method: Method[Any], frames: Array) -> Observation:
        """Answer, and see what the method asks for. One that answers itself at the input needs no pass for it."""
        needs = method.needs | method.watches
        if method.answers and self.bundle.is_reference and method.needs <= {CUT}:
            return Observation(
                frames,
                None,
                frames,
                trunk=self.trunk,
                rehearse=lambda others, delta: self.rehearse(others, delta, needs),
            )
        return self.look(frames, needs)

    def look(self, frames: Array, needs: frozenset[str]) -> Observation:
        """Answer, and see what `needs` asks for."""
        self.passes += len(frames)
        seen = self.engine.observe(frames, cut=CUT in needs, taps=TAPS in needs, features=FEATURES in needs)
        return self._observation(frames, seen, needs, self._of(seen))

    def rehearse(self, frames: Array, delta: Delta, needs: frozenset[str]) -> Observation:
        """What frames would give with another delta, which is not put in force. Raises: StateError."""
        self.passes += len(frames)
        given = self._in_force
        if delta is not given.delta:
            given = self._given(delta, given.version)
        seen = self.engine.rehearse(
            given.update, frames, cut=CUT in needs, taps=TAPS in needs, features=FEATURES in needs
        )
        return self._observation(frames, seen, needs, given)

    def _observation(self, frames: Array, seen: Observed, needs: frozenset[str], given: InForce) -> Observation:
        return Observation(
            frames,
            self._logits(seen.logits),
            seen.cut,
            None if seen.taps is None else undo(seen.taps, *given.affine),
            trunk=self.trunk,
            features=seen.features,
            cls=seen.cls,
            rehearse=lambda others, delta: self.rehearse(others, delta, needs),
            delta=given.delta,
            version=given.version,
        )

    def trunk(self, frames: Array) -> Array:
        """The tensor at the cut, for frames that are not answered."""
        if self.bundle.is_reference:
            return frames
        self.passes += len(frames)
        cut = self.engine.observe(frames, cut=True, taps=False).cut
        assert cut is not None
        return cut

    def trunk_aside(self, frames: Array, delta: Delta) -> Array:
        """The same with the weights of a rehearsal, so that no answer of another thread waits for it."""
        if self.bundle.is_reference:
            return frames
        cut = self.rehearse(frames, delta, frozenset((CUT,))).cut
        assert cut is not None
        return cut

    def apply(self, delta: Delta) -> bool:
        """Put another delta in force; True if it is another one. Raises: StateError, and the old one stays."""
        if delta is self.delta or not (delta or self.delta):
            return False
        given = self._given(delta, self.version + 1)
        self.engine.apply(given.update, given)
        self._in_force = given
        return True

    def _given(self, delta: Delta, version: int) -> InForce:
        return InForce(delta, self._affine(delta), version, self._merge(delta))

    def _of(self, seen: Observed) -> InForce:
        """What an answer was given with, whatever was applied since."""
        return seen.tag if isinstance(seen.tag, InForce) else self._source

    def _affine(self, delta: Delta) -> Affine:
        """Norm weight and bias, port scale and shift of a delta."""
        weight, bias = self._merge.weight, self._merge.bias
        if delta.tail:
            weight, bias = weight.copy(), bias.copy()
            for name, value in delta.tail.items():
                site, _, role = name.rpartition(".")
                if site in self.bundle.slices and role in ("weight", "bias"):
                    (weight if role == "weight" else bias)[self.bundle.slices[site]] = value
        ones, zeros = np.ones_like(weight), np.zeros_like(weight)
        return weight, bias, delta.get(PORT_SCALE, ones), delta.get(PORT_SHIFT, zeros)

    def _logits(self, output: Array) -> Array:
        if self.bundle.manifest.output == "probabilities":
            made: Array = np.log(np.maximum(output, 1e-12))
            return made
        return output
