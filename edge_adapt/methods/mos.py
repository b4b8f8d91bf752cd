"""MOS: a bank of adapters, merged a little while one learns, and found again by the answers themselves.

Merging: after each step the active adapter is pulled towards the mean of the bank, never while answering. Retrieval:
answer with the adapter of a task, see which task that answer belongs to, and try again with its adapter until both
agree (Sun et al., "MOS: Model Surgery for Pre-Trained Model-Based Class-Incremental Learning", AAAI 2025).

With labels, however late, an entry is a task, and `predict` retrieves. With none, an entry is a domain: `Moments`
tells of a change, the mean of its taps is the domain's prototype, and the nearest entry comes back. A bundle cut at
its input has no `Moments`, so all is one domain there. The engine always answers with the active adapter, merged.

Not as published: LoRA, which the engine can merge, for the bottleneck; prototypes of the tail without adapter, which
stay true while adapters move; the head is re-trained on Gaussian samples of old classes at each step, with the rest,
for a stream does not tell when a task is over; no contrastive term.
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
from edge_adapt.errors import ConfigError
from edge_adapt.methods.lae import adapted, head_of
from edge_adapt.methods.late_labels import (
    CLOSED,
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
from edge_adapt.tail import batch_statistics

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class MOSConfig(LearnerConfig):
    """Defaults: the paper's where it has one."""

    rank: int = 8
    merge: float | None = None
    """Share of the way to the bank's mean after each step; None: 0.1 with labels, 0.01 without."""
    slots: int = 8
    """Entries of the bank."""
    rounds: int = 4
    """Retrieval gives up after so many answers."""
    alike: float = 0.8
    """Without labels: cosine of two domains' prototypes from which they are one."""
    reliable: float = 0.4
    """Without labels: learn from frames whose entropy is below this share of ln K."""
    known: tuple[int, ...] | None = None
    """Classes that the head knows before any label came; None: all, and frames without labels are learned from."""
    labelled_lr: float = 0.003
    samples: int = 5
    """With labels: Gaussian samples of each class seen, at each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "slots", "rounds", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more", remedy="use the default")


class MOS(Learner):
    """LoRA on the layers of the tail, and with labels the head.

    What it remembers besides, all of constant size: `bank/<tensor>` [slots, ...], `keys` [slots, channels] and
    `filled` [slots]; `key` and `slot` of the domain at hand, -1 for one that has no entry yet; of each class its task,
    its `prototype` [K, D], and `mean`, `variance` [K, D] and `count` of its features under the adapter of its time.
    """

    name: ClassVar[str] = "mos"
    requires: frozenset[str] = frozenset({GRADIENTS, HEAD})
    device_lr: ClassVar[float] = 1e-3

    def __init__(self, context: Context, config: MOSConfig | None = None) -> None:
        self.config: MOSConfig = configured(config or MOSConfig(), context.settings)
        self.bundle, self.outputs = context.bundle, context.bundle.manifest.outputs
        self.labelled = self.config.known is not None
        self.merge = self.config.merge if self.config.merge is not None else 0.1 if self.labelled else 0.01
        super().__init__(context, self.config)

    def trained(self) -> Tensors:
        self.adapter, self.head_layer = LoRA(adapted(self.tail), rank=self.config.rank), head_of(self.tail)
        head = closed(self.tail.parameters, members(self.config.known, self.outputs), self.head_layer)
        fresh = self.adapter.init(Generator().manual_seed(self.seed))
        self.head, self.adapters = tuple(head), tuple(fresh)
        return {**fresh, **head}

    def weights(self, values: Tensors) -> Tensors:
        return {
            **self.adapter.weights(values, self.tail.parameters),
            **{name: values[name] for name in self.head},
        }

    def init(self) -> LearnerState:
        slots, channels = self.config.slots, self.bundle.channels
        head = self.bundle.manifest.head
        assert head is not None
        own = {
            **{f"bank/{name}": torch.zeros(slots, *self.source[name].shape) for name in self.adapters},
            **beginning(members(self.config.known, self.outputs)),
            **dict.fromkeys(("prototype", "mean", "variance"), torch.zeros(self.outputs, head.width)),
            "count": torch.zeros(self.outputs),
            "task_of": torch.zeros(self.outputs, dtype=torch.int64),
            "keys": torch.zeros(slots, channels),
            "filled": torch.zeros(slots, dtype=torch.bool),
            "key": torch.zeros(channels),
            "slot": torch.tensor(-1),
        }
        state = replace(super().init(), own=own)
        if not self.labelled:
            return state
        return self._in_force(state, dict(self.source))

    def learn(self, state: LearnerState, lesson: Lesson) -> Learned:
        """Without labels: the entropy of sure answers goes down, the adapter alone moves, and is merged softly."""
        student = leaves({name: state.student[name] for name in self.adapters})
        logits = lesson.tail(lesson.cut, self.weights({**state.student, **student}))
        entropies = entropy(logits)
        sure = entropies.detach() < self.config.reliable * math.log(self.outputs)
        if self.labelled or not sure.any():
            return state, logits.detach()
        moved, moments = self.descend(state, student, entropies[sure].mean(), int(sure.sum()))
        values = {**state.student, **self._merged(state.own, moved)}
        own = state.own
        if state.moments is not None:
            own = {**own, "key": torch.tensor(state.moments.mean, dtype=torch.float32)}
        return replace(state, student=values, teacher=values, adam=moments, own=own), logits.detach()

    def learn_from(self, state: LearnerState, labelled: Labelled) -> Step[LearnerState]:
        """With labels: one step on the cross-entropy among this task's classes, and of the head on samples of all."""
        if not np.isfinite(labelled.cut).all():
            return Step(state, events=("refused: frames are not finite",))
        labels = checked(labelled.labels, len(labelled.cut), self.outputs)
        old, state = state, self._at_task(state, labels, labelled.task)
        h, online = torch.tensor(labelled.cut), leaves(state.student)
        logits, features = self._tail(state, h, self.weights(online))
        loss = cross_entropy_among(logits, labels, state.own["local"]) + self._on_samples(state, online)
        moved, moments = adam(
            online, gradients_of(loss, online), state.adam, lr=self.config.labelled_lr, betas=self.settings.betas
        )
        adapters = self._merged(state.own, {name: moved[name] for name in self.adapters})
        with torch.no_grad():
            plain = self._tail(state, h, {})[1]
        own = classes_noted(state.own, labels, features.detach(), plain)
        values = {**moved, **adapters}
        state, events = accepted(old, replace(state, student=values, teacher=values, adam=moments, own=own))
        return Step(state if state is old else self._in_force(state, values), events=events)

    def predict(self, state: LearnerState, cut: Array) -> Array:
        """With labels: the retrieved answer and the prototypes' together; without: the active adapter's."""
        h = torch.tensor(cut)
        with torch.no_grad():
            if int(state.own["task"]) < 0:
                return self._tail(state, h, self.weights(state.student))[0].log_softmax(1).numpy()
            prototypes = cosines(self._tail(state, h, {})[1], state.own["prototype"], state.own["count"] > 0)
            logits, _ = retrieve(
                state.own["task_of"][prototypes.argmax(1)],
                lambda rows, task: self._tail(state, h[rows], self.weights(self._entry(state, task)))[0],
                state.own["task_of"],
                rounds=self.config.rounds,
            )
            tasks = int(state.own["task"]) + 1
            both = logits.softmax(1) + (prototypes * tasks).softmax(1)
            return both.clamp_min(1e-12).log().numpy()

    def _tail(self, state: LearnerState, h: Tensor, values: Tensors) -> tuple[Tensor, Tensor]:
        """Logits and features under the statistics that answers are given with now."""
        if self.moments is None or state.moments is None:
            return self.tail.with_features(h, dict(values), norm=batch_statistics)
        return self.tail.with_features(h, dict(values), ports=self.moments.delta(state.moments))

    def _in_force(self, state: LearnerState, values: Tensors) -> LearnerState:
        state = replace(state, student=values, teacher=values)
        if self.moments is None or state.moments is None:
            return state
        return replace(state, delta=self._delta(state, self.moments.delta(state.moments)))

    def _merged(self, own: Tensors, adapter: Tensors) -> Tensors:
        """Merging: once per step, towards the mean of the entries; nothing to do while there are none."""
        filled = own["filled"]
        if not filled.any():
            return adapter
        return mix(adapter, {name: own[f"bank/{name}"][filled].mean(0) for name in self.adapters}, self.merge)

    def _entry(self, state: LearnerState, task: int) -> Tensors:
        """The head with the adapter of a task; the newest is the active one."""
        if task == int(state.own["task"]):
            return state.student
        return {**state.student, **{name: state.own[f"bank/{name}"][task] for name in self.adapters}}

    def _at_task(self, state: LearnerState, labels: Tensor, task: int) -> LearnerState:
        """A new task: the adapter that was active goes into the bank, and learns on as the new one."""
        if task >= self.config.slots:
            raise ConfigError(
                f"task {task} has no place in a bank of {self.config.slots} (tasks count from 0)",
                remedy="set mos.slots to the number of tasks",
            )
        before = int(state.own["task"])
        own, fresh, begins = noted(state.own, labels, task)
        own["task_of"] = torch.where(fresh, int(own["task"]), own["task_of"])
        values = opened(state.student, fresh, self.head_layer)
        if begins and before >= 0:
            own = self._stored(own, values, before)
        return replace(
            state, student=values, teacher=values, own=own, adam=AdamState() if begins else state.adam
        )

    def _on_samples(self, state: LearnerState, online: Tensors) -> Tensor:
        """Cross-entropy of the head on samples of every class that has been measured, before this task or in it."""
        own = state.own
        measured = own["count"] > 1
        if int(own["task"]) < 1 or not measured.any():
            return torch.zeros(())
        generator = Generator().manual_seed((self.seed * 1_000_003 + state.updates) % 2**63)
        labels = measured.nonzero()[:, 0].repeat(self.config.samples)
        noise = torch.randn(len(labels), own["mean"].shape[1], generator=generator)
        features = own["mean"][labels] + noise * own["variance"][labels].sqrt()
        weight, bias = (online[f"{self.head_layer}.{role}"] for role in ("weight", "bias"))
        return cross_entropy_among(nn.functional.linear(features, weight, bias), labels, own["seen"])

    def _stored(self, own: Tensors, values: Tensors, slot: int) -> dict[str, Tensor]:
        """The bank with an adapter in one of its slots."""
        made = dict(own)
        for name in self.adapters:
            made[f"bank/{name}"] = put(own[f"bank/{name}"], slot, values[name])
        made["filled"] = put(own["filled"], slot, torch.tensor(True))
        return made

    def _forgotten(self, state: LearnerState) -> LearnerState:
        """Without labels, another domain: keep the adapter of the old one, and take the nearest, or source.

        A full bank merges the newcomer half and half with its nearest.
        """
        state = replace(state, frames=None, cut=None)
        if self.labelled or state.moments is None:
            return state
        own, slot = dict(state.own), int(state.own["slot"])
        if state.student is not self.source:
            values: Tensors = {name: state.student[name] for name in self.adapters}
            if slot < 0 and own["filled"].all():
                slot, _ = nearest(own["key"], own["keys"], own["filled"])
                values = mix(values, {name: own[f"bank/{name}"][slot] for name in self.adapters}, 0.5)
            elif slot < 0:
                slot = int((~own["filled"]).nonzero()[0])
            own = self._stored(own, values, slot)
            own["keys"] = put(own["keys"], slot, own["key"])
        key = torch.tensor(state.moments.mean, dtype=torch.float32)
        slot, likeness = nearest(key, own["keys"], own["filled"])
        known = likeness >= self.config.alike
        own |= {"key": key, "slot": torch.tensor(slot if known else -1)}
        back: Tensors = self.source
        if known:
            back = {**self.source, **{name: own[f"bank/{name}"][slot] for name in self.adapters}}
        return replace(state, student=back, teacher=back, adam=AdamState(), own=own)


def retrieve(
    first: Tensor, answer: Callable[[Tensor, int], Tensor], task_of: Tensor, *, rounds: int = 4
) -> tuple[Tensor, Tensor]:
    """Self-refined retrieval: answer, and answer again with the adapter of the class that was answered.

    Args:
        first: [N], task to begin with, for each frame.
        answer: rows [M] and a task -> logits [M, K] with its adapter.
        task_of: [K], task of each class.
    Returns: logits [N, K], and [N] the task whose adapter gave them.
    """
    logits, tasks = torch.empty(0), first.clone()
    wanted, rows = first.clone(), torch.arange(len(first))
    for _ in range(rounds):
        for task in sorted(set(wanted[rows].tolist())):
            these = rows[wanted[rows] == task]
            found = answer(these, task)
            if not len(logits):
                logits = found.new_zeros(len(first), found.shape[1])
            logits[these], tasks[these] = found, task
        wanted[rows] = task_of[logits[rows].argmax(1)]
        rows = rows[wanted[rows] != tasks[rows]]
        if not len(rows):
            break
    return logits, tasks


def cosines(features: Tensor, prototypes: Tensor, measured: Tensor) -> Tensor:
    """[N, D], [K, D] -> cosines [N, K]; a class without a prototype is never the nearest."""
    made = nn.functional.normalize(features) @ nn.functional.normalize(prototypes).T
    return made.masked_fill(~measured, CLOSED)


def nearest(key: Tensor, keys: Tensor, filled: Tensor) -> tuple[int, float]:
    """Index of the entry whose key [S, C] is most like another [C], and their cosine; -1 from an empty bank."""
    likeness = nn.functional.cosine_similarity(keys, key[None]).masked_fill(~filled, -torch.inf)
    slot = int(likeness.argmax())
    return slot, float(likeness[slot])


def put(values: Tensor, slot: int, value: Tensor) -> Tensor:
    """A copy with one entry replaced."""
    made = values.clone()
    made[slot] = value
    return made


def classes_noted(own: Tensors, labels: Tensor, features: Tensor, plain: Tensor) -> dict[str, Tensor]:
    """Running mean and variance of each class's features, and its prototype, with some frames more.

    The prototype is a mean over all its frames; the others weigh the last hundred or so, for the adapter moves.

    Args:
        features: [N, D] under the active adapter.
        plain: [N, D] without adapter.
    """
    made = dict(own)
    for label in sorted(set(labels.tolist())):
        mine, some = labels == label, int((labels == label).sum())
        count = float(made["count"][label]) + some
        rate, slow = some / count, max(some / count, min(1.0, some / 100))
        mean, old = features[mine].mean(0), made["mean"][label]
        spread = (features[mine] - (mean if count == some else old)).square().mean(0)
        made["prototype"] = put(made["prototype"], label, made["prototype"][label].lerp(plain[mine].mean(0), rate))
        made["variance"] = put(made["variance"], label, made["variance"][label].lerp(spread, slow))
        made["mean"] = put(made["mean"], label, old.lerp(mean, slow))
        made["count"] = put(made["count"], label, torch.tensor(count))
    return made
