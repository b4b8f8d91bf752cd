"""LAE: an online adapter learns, an offline one is its moving average, and both answer together.

Learning, Accumulation, Ensemble (Gao et al., "A Unified Continual Learning Framework with General Parameter-Efficient
Tuning", ICCV 2023). Adapters are LoRA on the layers of the tail; the head is learned whole, and shared by both.

Two ways to learn. With labels, however late, through `learn_from`, as published. With none, the offline adapter is
the teacher of the online one. Source counts as the first task then, so both are there from the start.

On the device the engine answers with the offline adapter alone, merged into its weights: the greater of two answers
cannot come from one pass, and an answer must not depend on whether the frame was looked at. `predict` gives both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from edge_adapt.adapters.lora import LoRA
from edge_adapt.adapters.protocol import Place, places
from edge_adapt.errors import ConfigError
from edge_adapt.methods.late_labels import (
    beginning,
    checked,
    closed,
    cross_entropy_among,
    members,
    noted,
    opened,
)
from edge_adapt.methods.learner import Learned, Learner, LearnerConfig, LearnerState, Lesson, accepted
from edge_adapt.methods.optim import AdamState, Tensors, adam, gradients_of, leaves, mix
from edge_adapt.methods.protocol import GRADIENTS, HEAD, Context, Labelled, Step, configured
from edge_adapt.methods.tent import entropy
from edge_adapt.tail import Tail, batch_statistics

Array = NDArray[Any]

PUBLISHED_MOMENTUM = 0.9999
LABELLED_MOMENTUM, DEVICE_MOMENTUM = 0.99, 0.9
"""On the device, with labels and without: few steps are taken before the next task or domain."""
LABELLED_FREEZE, FREEZE = 8, 2


@dataclass(frozen=True, kw_only=True)
class LAEConfig(LearnerConfig):
    """Defaults: the paper's, and for the device trials on CIFAR ResNets."""

    rank: int = 5
    momentum: float | None = None
    """What the offline adapter keeps of itself at each step; None: 0.9999 in reference mode; on the device 0.99 with
    labels, 0.9 without."""
    freeze: int | None = None
    """After a change of task or domain, so many steps change the head alone; None: 8 with labels, 2 without."""
    reliable: float = 0.4
    """Without labels: learn from frames whose entropy is below this share of ln K, as in EATA (ICML 2022)."""
    known: tuple[int, ...] | None = None
    """Classes that the head knows before any label came. None: all, and frames without labels are learned from too;
    otherwise only labels teach, and the head grows by the classes that they name."""
    labelled_lr: float = 0.0028125
    """Of a step on labels: 0.03 for 256 frames, at the paper's batches of 24."""
    local: bool = True
    """Labels of a task are told apart from each other only; False: from all classes seen, as plain fine-tuning does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("rank", 1), ("freeze", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}, expected {least} or more", remedy="use the default")
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise ConfigError(f"momentum is {self.momentum}, outside [0, 1]", remedy="0.99 averages about 100 steps")


class LAE(Learner):
    """LoRA on every layer of the tail that the engine can change, and the head.

    `student` is the online adapter with the head, `teacher` the offline one with the same head. What else it
    remembers: `task`, the number of the newest task, -1 before the first label; `frozen`, steps until the adapter may
    move; `paired`, whether there is an offline adapter; `seen` and `local` [K], classes known and classes of this task.
    """

    name: ClassVar[str] = "lae"
    requires: frozenset[str] = frozenset({GRADIENTS, HEAD})
    device_lr: ClassVar[float] = 3e-3

    def __init__(self, context: Context, config: LAEConfig | None = None) -> None:
        self.config: LAEConfig = configured(config or LAEConfig(), context.settings)
        self.bundle, self.outputs = context.bundle, context.bundle.manifest.outputs
        super().__init__(context, self.config)
        given, labelled = self.config, self.config.known is not None
        default = PUBLISHED_MOMENTUM if self.reference else LABELLED_MOMENTUM if labelled else DEVICE_MOMENTUM
        self.momentum = default if given.momentum is None else given.momentum
        self.freeze = given.freeze if given.freeze is not None else LABELLED_FREEZE if labelled else FREEZE

    def trained(self) -> Tensors:
        self.adapter, self.head_layer = LoRA(adapted(self.tail), rank=self.config.rank), head_of(self.tail)
        known = members(self.config.known, self.outputs)
        head = closed(self.tail.parameters, known, self.head_layer)
        self.head = tuple(head)
        return {**self.adapter.init(Generator().manual_seed(self.seed)), **head}

    def weights(self, values: Tensors) -> Tensors:
        return {**self.adapter.weights(values, self.tail.parameters), **{name: values[name] for name in self.head}}

    def init(self) -> LearnerState:
        labelled = self.config.known is not None
        own = {
            **beginning(members(self.config.known, self.outputs)),
            "frozen": torch.tensor(0 if labelled else self.freeze),
            "paired": torch.tensor(not labelled),
        }
        state = replace(super().init(), own=own)
        if not labelled:
            return state
        # Not source any more: the engine answers with the head that lacks the classes to come.
        state = replace(state, student=dict(self.source), teacher=dict(self.source))
        return self._put_in_force(state)

    def learn(self, state: LearnerState, lesson: Lesson) -> Learned:
        """Without labels: the offline adapter's answers, where they are sure, are the labels of the online one."""
        online = leaves(state.student)
        logits = lesson.tail(lesson.cut, self.weights(online))
        with torch.no_grad():
            offline = lesson.tail(lesson.cut, self.weights(state.teacher))
        answer = ensemble(logits.detach(), offline)
        sure = entropy(offline) < self.config.reliable * math.log(self.outputs)
        if self.config.known is not None or not sure.any():
            return state, answer
        loss = nn.functional.cross_entropy(logits[sure], offline[sure].argmax(1))
        moved, moments = self.descend(state, self._free(state, online), loss, int(sure.sum()))
        return self._accumulated(state, moved, moments), answer

    def learn_from(self, state: LearnerState, labelled: Labelled) -> Step[LearnerState]:
        """With labels: one step of Adam on the cross-entropy among the classes of this task, with its own rate."""
        if not np.isfinite(labelled.cut).all():
            return Step(state, events=("refused: frames are not finite",))
        labels = checked(labelled.labels, len(labelled.cut), self.outputs)
        old, state = state, self._at_task(state, labels, labelled.task)
        online = leaves(state.student)
        logits = self._tail(state)(torch.tensor(labelled.cut), self.weights(online))
        loss = cross_entropy_among(logits, labels, state.own["local" if self.config.local else "seen"])
        free = self._free(state, online)
        moved, moments = adam(
            free, gradients_of(loss, free), state.adam, lr=self.config.labelled_lr, betas=self.settings.betas
        )
        state, events = accepted(old, self._accumulated(state, moved, moments))
        return Step(state if state is old else self._put_in_force(state), events=events)

    def predict(self, state: LearnerState, cut: Array) -> Array:
        """The greater of both softmaxes, as logits; the online one's while there is no offline adapter."""
        tail, h = self._tail(state), torch.tensor(cut)
        with torch.no_grad():
            online = tail(h, self.weights(state.student))
            if not state.own["paired"]:
                return online.log_softmax(1).numpy()
            return ensemble(online, tail(h, self.weights(state.teacher))).numpy()

    def _tail(self, state: LearnerState) -> Callable[[Tensor, Tensors], Tensor]:
        """Tensor at the cut, parameters -> logits, under the statistics that answers are given with now."""
        if self.moments is None or state.moments is None:
            return lambda h, values: self.tail(h, dict(values), norm=batch_statistics)
        ports = self.moments.delta(state.moments)
        return lambda h, values: self.tail(h, dict(values), ports=ports)

    def _put_in_force(self, state: LearnerState) -> LearnerState:
        if self.moments is None or state.moments is None:
            return state
        return replace(state, delta=self._delta(state, self.moments.delta(state.moments)))

    def _at_task(self, state: LearnerState, labels: Tensor, task: int) -> LearnerState:
        """Open the classes that were never seen. A new task: a fresh optimiser, and from the second one on an offline
        adapter, and an online one that waits for the head."""
        own, fresh, begins = noted(state.own, labels, task)
        student, teacher = (opened(values, fresh, self.head_layer) for values in (state.student, state.teacher))
        state = replace(state, student=student, teacher=teacher, own=own)
        if not begins:
            return state
        later = task > 0
        own = {**own, "frozen": torch.tensor(self.freeze if later else 0)}
        if later and not own["paired"]:
            own["paired"], state = torch.tensor(True), replace(state, teacher=student)
        return replace(state, adam=AdamState(), own=own)

    def _free(self, state: LearnerState, values: Tensors) -> Tensors:
        """What this step may change."""
        return {name: values[name] for name in self.head} if state.own["frozen"] > 0 else values

    def _accumulated(self, state: LearnerState, moved: Tensors, moments: AdamState) -> LearnerState:
        """The state after a step: the offline adapter goes a little towards the online one, frozen or not."""
        student = {**state.student, **moved}
        teacher: Tensors = student
        if state.own["paired"]:
            teacher = mix(state.teacher, student, 1 - self.momentum) | {name: student[name] for name in self.head}
        frozen = int(state.own["frozen"])
        if frozen == 1:  # what was still has no gradients to remember
            moments = AdamState()
        own = {**state.own, "frozen": torch.tensor(max(0, frozen - 1))}
        return replace(state, student=student, teacher=teacher, adam=moments, own=own)

    def _forgotten(self, state: LearnerState) -> LearnerState:
        """Another domain: the head goes first. What labels taught is kept, for they will not come again."""
        if self.config.known is not None:
            return replace(state, frames=None, cut=None)
        own = {**state.own, "frozen": torch.tensor(self.freeze)}
        return replace(super()._forgotten(state), own=own)


def ensemble(online: Tensor, offline: Tensor) -> Tensor:
    """Logits [N, K] of both -> the log of the elementwise greater softmax, which is not renormalised."""
    return torch.maximum(online.log_softmax(1), offline.log_softmax(1))


def adapted(tail: Tail) -> tuple[Place, ...]:
    """Every layer of the tail but the head: in device mode, those that the engine can change."""
    head = head_of(tail)
    found = places(tail, live=not tail.bundle.is_reference)
    return tuple(place for place in found if place.name != head)


def head_of(tail: Tail) -> str:
    """Name of the linear layer that makes the logits. Raises: ConfigError if it has no bias."""
    head = tail.bundle.manifest.head
    assert head is not None
    if f"{head.layer}.bias" not in tail.parameters:
        raise ConfigError(
            f"the head of bundle {tail.bundle.manifest.name!r} has no bias, which closes and opens its classes",
            remedy="export the model with a head that has one; zeros will do",
        )
    return head.layer
