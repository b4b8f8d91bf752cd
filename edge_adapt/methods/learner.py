"""What methods with gradients share: everything but the loss.

Two modes. Cut at the input (reference): every batch is normalised by its own statistics, one step per batch, the
logits of before the step are the answer: as published. Cut elsewhere (device): the engine answers, `Moments` holds
the statistics, the tail learns on top from some of the frames.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_adapt.delta import TAIL, Delta
from edge_adapt.errors import ConfigError, EngineError
from edge_adapt.methods.graph_step import GraphStep, Loss
from edge_adapt.methods.moments import Moments, MomentsState
from edge_adapt.methods.optim import AdamState, Tensors, adam, all_finite, gradients_of, leaves, mix
from edge_adapt.methods.protocol import CHANGE, CUT, GRADIENTS, TAPS, Answered, Context, Observation, Step
from edge_adapt.tail import batch_statistics

Array = NDArray[Any]
log = logging.getLogger(__name__)

REFERENCE_LR = 1e-3
SMALL_BATCH = 32
"""Device: the learning rate of a step on fewer frames is smaller in proportion."""


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """What they all have; in reference mode only `lr` and `betas` are used."""

    lr: float | None = None
    """Of Adam; None: 1e-3 in reference mode, `Learner.device_lr` on the device."""
    betas: tuple[float, float] = (0.9, 0.999)
    more: int = 3
    """Device: in quiet times, so many frames are looked at for each one that `Moments` looks at."""
    window: int = 32
    """Device: a step needs so many looked-at frames; fewer are kept until they are enough."""
    statistics: Literal["ports", "batch"] = "ports"
    """Device: what the norms use while learning. `ports`: as in the engine. `batch`: those of the window, which
    bears a larger `lr`, for `Moments` follows what learning moves; wrong if the window is all of one kind."""
    pull: float = 0.01
    """Device: after each step, this share of the way back to source, as in ROID (Marsden et al., WACV 2024)."""
    keep: float = 0.0
    """Device: at a change of domain, the share of what was learned that stays."""
    learner: Literal["eager", "graph"] = "eager"
    """Device: `graph` runs the step as one compiled graph, where the method's step can be; see `graph_step`."""
    moments: dict[str, Any] = field(default_factory=dict)
    """Device: settings of the `Moments` inside."""

    def __post_init__(self) -> None:
        for name, least in (("more", 0), ("window", 1)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value}, expected {least} or more", remedy="use the default")
        if self.statistics not in ("ports", "batch"):
            raise ConfigError(f"statistics is {self.statistics!r}", remedy="known: ports, batch")
        if self.learner not in ("eager", "graph"):
            raise ConfigError(f"learner is {self.learner!r}", remedy="known: eager, graph")


@dataclass(frozen=True)
class LearnerState:
    """A value: tensors in it are replaced, never written."""

    student: Tensors
    """Parameter -> value, of what is learned."""
    teacher: Tensors
    """What answers; TENT's is the student itself."""
    adam: AdamState = field(default_factory=AdamState)
    updates: int = 0
    """Steps taken; with the context's seed it says every random number of the next one."""
    frames: Array | None = None
    """Device: looked-at frames that no step was made on yet."""
    cut: Array | None = None
    """Their tensor at the cut."""
    owed: int = 0
    """Device: frames still to be looked at for learning alone, before `Moments` looks again."""
    unfed: int = 0
    """Device: frames looked at since `Moments` was last given some."""
    own: Tensors = field(default_factory=dict)
    """What else a method remembers, of constant size: a mean answer, a memory of frames."""
    moments: MomentsState | None = None
    delta: Delta = field(default_factory=Delta.source)


@dataclass(frozen=True)
class Lesson:
    """What one step learns from."""

    frames: Array
    cut: Tensor
    tail: Callable[[Tensor, Tensors], Tensor]
    """Tensor at the cut, parameters -> logits, under this mode's statistics."""
    trunk: Callable[[Array], Array]
    """Frames -> tensor at the cut."""
    ports: Delta = field(default_factory=Delta.source)
    """Device: what the norms use."""


Learned = tuple[LearnerState, Tensor]
"""The state after a step, and the logits [N, K] of before it."""


class Learner:
    """Everything but the step itself: statistics, when to look, when to step, and what not to believe."""

    device_lr: ClassVar[float] = 1e-3
    requires: frozenset[str] = frozenset({GRADIENTS})
    watches: frozenset[str] = frozenset()
    answers: bool
    needs: frozenset[str]

    def __init__(self, context: Context, settings: LearnerConfig) -> None:
        self.settings = settings
        self.seed = context.seed
        self.reference = self.answers = context.reference
        self.needs = frozenset({CUT} if self.reference else {CUT, TAPS})
        default = REFERENCE_LR if self.reference else self.device_lr
        self.lr = settings.lr if settings.lr is not None else default
        self.moments = None if self.reference else Moments(replace(context, settings=dict(settings.moments)))
        self._graph: GraphStep | str | None = None
        """The compiled step, or why there is none."""
        self.tail = context.tail()
        self.source: Tensors = self.trained()
        if not self.source:
            raise ConfigError(
                f"the tail of bundle {context.bundle.manifest.name!r} has nothing to learn",
                remedy="export it with an earlier cut, or `--cut input` for reference mode",
            )

    @property
    def fallback(self) -> str | None:
        """Why `learner: graph` runs eagerly all the same; None if it does not."""
        return self._graph if isinstance(self._graph, str) else None

    def trained(self) -> Tensors:
        """Source values of what is learned."""
        raise NotImplementedError

    def weights(self, values: Tensors) -> Tensors:
        """What is learned -> parameters of the tail that it replaces; adapters are merged here."""
        return values

    def learn(self, state: LearnerState, lesson: Lesson) -> Learned:
        """One step: another student, teacher and Adam. The same state back means that there was no step."""
        raise NotImplementedError

    def init(self) -> LearnerState:
        state = LearnerState(self.source, self.source)
        if self.moments is None:
            return state
        inner = self.moments.init()
        return replace(state, moments=inner, delta=self.moments.delta(inner))

    def delta(self, state: LearnerState) -> Delta:
        """Device: the ports, and the teacher once it is not source. Reference: source; the engine is not used."""
        return state.delta

    def look(self, state: LearnerState, frames: int, passed: int) -> int:
        """Device: whenever `Moments` would look, and in quiet times `more` frames for each that it looked at.

        `Moments` gets the frames that it asks for and no others, so that it works as it does alone: what it
        remembers is measured in frames, and it notices a change best from a few before many are answered.
        """
        if self.moments is None or state.moments is None:
            return frames
        if _feeds(self.moments, state):
            return self.moments.look(state.moments, frames, passed + state.unfed)
        return min(frames, state.owed)

    def watch(self, state: LearnerState, answered: Answered) -> Step[LearnerState]:
        return Step(state)

    def compact(self, state: LearnerState) -> LearnerState:
        """Without the frames that no step was made on yet."""
        if self.moments is not None and state.moments is not None:
            state = replace(state, moments=self.moments.compact(state.moments))
        return replace(state, frames=None, cut=None)

    def step(self, state: LearnerState, seen: Observation) -> Step[LearnerState]:
        if self.moments is None:
            return self._answer(state, seen)
        return self._follow(state, seen, self.moments)

    def _answer(self, state: LearnerState, seen: Observation) -> Step[LearnerState]:
        """Reference: one step on this batch, which it answers."""
        assert seen.cut is not None
        tail = self.tail
        learned, logits = self.learn(
            state,
            Lesson(
                frames=seen.frames,
                cut=torch.tensor(seen.cut),
                tail=lambda h, values: tail(h, dict(values), norm=batch_statistics),
                trunk=lambda frames: frames,
            ),
        )
        state, events = accepted(state, learned)
        return Step(state, logits.numpy(), events)

    def _follow(self, state: LearnerState, seen: Observation, moments: Moments) -> Step[LearnerState]:
        """Device: give `Moments` what it asked for, keep frames until they are enough, and step on them."""
        if seen.cut is None or not (np.isfinite(seen.cut).all() and np.isfinite(seen.frames).all()):
            return Step(state, events=("refused: frames are not finite",))
        old = state
        state, events = self._fed(state, seen, moments)
        if any(event.startswith("refused") for event in events):
            return Step(state, events=events)
        assert state.moments is not None
        assert old.moments is not None
        ports = moments.delta(state.moments)
        state = replace(state, frames=_joined(state.frames, seen.frames), cut=_joined(state.cut, seen.cut))
        state, refusals = self._stepped(state, seen, ports)
        if state.teacher is not old.teacher or ports is not moments.delta(old.moments):
            state = replace(state, delta=self._delta(state, ports))
        assert state.moments is not None
        return Step(state, events=(*events, *refusals), again=moments.again(state.moments))

    def _fed(
        self, state: LearnerState, seen: Observation, moments: Moments
    ) -> tuple[LearnerState, tuple[str, ...]]:
        """Let `Moments` take its step, if this look was made for it."""
        assert state.moments is not None
        count = len(seen.frames)
        if not _feeds(moments, state):
            return replace(state, owed=max(0, state.owed - count), unfed=state.unfed + count), ()
        was_urgent = _urgent(moments, state)
        inner = moments.step(state.moments, seen)
        # After the last look of a hurry nothing is owed, so that what is owed is done within the batch of its cause.
        state = replace(
            state, moments=inner.state, owed=0 if was_urgent else count * self.settings.more, unfed=0
        )
        return self._forgotten(state) if CHANGE in inner.events else state, inner.events

    def _forgotten(self, state: LearnerState) -> LearnerState:
        """Another domain: frames that were kept and old gradients go, and most or all of what was learned."""
        keep = self.settings.keep
        student, teacher = (
            mix(self.source, values, keep) if keep else self.source
            for values in (state.student, state.teacher)
        )
        return replace(state, student=student, teacher=teacher, adam=AdamState(), frames=None, cut=None)

    def _stepped(
        self, state: LearnerState, seen: Observation, ports: Delta
    ) -> tuple[LearnerState, tuple[str, ...]]:
        """One step on the frames that were kept, once they are enough; it uses them up, whatever comes of it."""
        if state.frames is None or len(state.frames) < self.settings.window:
            return state, ()
        assert seen.trunk is not None
        assert state.cut is not None
        tail, norm = self.tail, batch_statistics if self.settings.statistics == "batch" else None
        lesson = Lesson(
            frames=state.frames[-self.settings.window :],
            cut=torch.tensor(state.cut[-self.settings.window :]),
            tail=lambda h, values: tail(h, dict(values), ports=ports, norm=norm),
            trunk=seen.trunk,
            ports=ports,
        )
        state = replace(state, frames=None, cut=None)
        learned, _ = self.learn(state, lesson)
        return accepted(state, learned)

    def _delta(self, state: LearnerState, ports: Delta) -> Delta:
        if state.teacher is self.source:
            return ports
        return ports | {f"{TAIL}{name}": value.numpy() for name, value in self.weights(state.teacher).items()}

    def advance(
        self, state: LearnerState, lesson: Lesson, loss: Loss, given: Tensors
    ) -> tuple[Tensor, Tensors, AdamState]:
        """One step down `loss(logits, given)`: the logits of before it, values and Adam after it.

        Args:
            loss: of tensors alone, without branches on their values, so that it can be compiled.
            given: what else the loss depends on.
        """
        frames = len(lesson.cut)
        if self.settings.learner == "graph" and not self.reference:
            made = self._compiled_step(state, lesson, loss, given, self._rate(frames))
            if made is not None:
                return made
        student = leaves(state.student)
        logits = lesson.tail(lesson.cut, student)
        return logits.detach(), *self.descend(state, student, loss(logits, given), frames)

    def _compiled_step(
        self, state: LearnerState, lesson: Lesson, loss: Loss, given: Tensors, lr: float
    ) -> tuple[Tensor, Tensors, AdamState] | None:
        """The step as a graph; None, with the reason in the log, if it cannot be one."""
        if self._graph is None:
            norm = batch_statistics if self.settings.statistics == "batch" else None
            key = f"{type(self).__name__} {self.settings}"
            self._graph = GraphStep(self.tail.near, state.student, loss, betas=self.settings.betas, norm=norm, key=key)
        if isinstance(self._graph, str):
            return None
        try:
            logits, values, adam_state = self._graph(
                lesson.cut, lesson.ports, state.student, state.adam, lr=lr, given=given
            )
        except EngineError as error:
            log.warning("learner: graph falls back to eager: %s", error.what)
            self._graph = error.what
            return None
        return logits, mix(values, self.source, self.settings.pull), adam_state

    def _rate(self, frames: int) -> float:
        """Device: lr min(1, frames / 32), the rule of SAR for residual networks (Niu et al., ICLR 2023)."""
        return self.lr if self.reference else self.lr * min(1.0, frames / SMALL_BATCH)

    def descend(
        self, state: LearnerState, student: Tensors, loss: Tensor, frames: int
    ) -> tuple[Tensors, AdamState]:
        """One step of Adam down `loss`, and on the device a little back to source."""
        values, moments = adam(
            student, gradients_of(loss, student), state.adam, lr=self._rate(frames), betas=self.settings.betas
        )
        return values if self.reference else mix(values, self.source, self.settings.pull), moments


def _feeds(moments: Moments, state: LearnerState) -> bool:
    """True if the next look is for `Moments`."""
    return not state.owed or _urgent(moments, state)


def _urgent(moments: Moments, state: LearnerState) -> bool:
    """True while `Moments` wants every frame: at the start, and after a change of domain."""
    assert state.moments is not None
    return moments.look(state.moments, 1, 0) > 0


def accepted(old: LearnerState, new: LearnerState) -> tuple[LearnerState, tuple[str, ...]]:
    """Never a NaN: a step that is not finite through and through did not happen."""
    if new is old:
        return old, ()
    if not all_finite(new.student, new.teacher, new.adam.first, new.adam.second, new.own):
        return old, ("refused: the step is not finite",)
    return replace(new, updates=old.updates + 1), ()


def _joined(kept: Array | None, new: Array) -> Array:
    return np.array(new) if kept is None else np.concatenate([kept, new])
