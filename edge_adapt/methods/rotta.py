"""RoTTA: learn from a small memory that holds all classes alike and prefers what is new and sure.

Made for streams in which one class follows itself: the norms normalise by a slow mix of source and stream, the memory
is balanced by the teacher's answers, and what is old weighs less in the loss (Yuan, Xie & Li, "Robust Test-Time
Adaptation in Dynamic Scenarios", CVPR 2023). Reference mode remembers frames; the device remembers the tensor at the
cut, in half precision, and no frame. Modes as in `learner`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from edge_adapt.errors import ConfigError
from edge_adapt.methods.augment import Augment, Augmentation
from edge_adapt.methods.learner import Learned, Learner, LearnerConfig, LearnerState, Lesson
from edge_adapt.methods.optim import Tensors, leaves, mix
from edge_adapt.methods.protocol import Context, configured
from edge_adapt.methods.tent import entropy
from edge_adapt.tail import Norm, NormCall

PUBLISHED_MOMENTUM, DEVICE_MOMENTUM = 0.999, 0.99
ITEMS, LABEL, UNSURE, AGE, COUNTED = (f"memory/{part}" for part in ("items", "label", "unsure", "age", "counted"))
STUDENT, TEACHER = "student/", "teacher/"
"""Whose running statistics."""
FREE = -1
"""Label of a free place in the memory."""

Forward = Callable[[Tensor, Tensors], Tensor]


@dataclass(frozen=True, kw_only=True)
class RoTTAConfig(LearnerConfig):
    """Defaults: those of the paper in reference mode, trials on a ResNet-20 on the device."""

    store: int = 64
    """Items in the memory. In reference mode, also how many frames go by between two steps. On the device the memory
    takes as many times the tensor at the cut, two bytes a number."""
    momentum: float | None = None
    """1 - nu, the share of itself that the teacher keeps; None: 0.999 in reference mode, 0.99 on the device."""
    rate: float = 0.05
    """Reference: alpha, the share of the memory in the running statistics of the norms, at each step."""
    timeliness: float = 1.0
    """lambda_t, weight of age in what gives way to something new."""
    uncertainty: float = 1.0
    """lambda_u, weight of entropy in it."""
    noise: float = 0.1
    """Device, and where frames are no images: the student's strong view is this much noise, in deviations of the
    tensor."""

    def __post_init__(self) -> None:
        LearnerConfig.__post_init__(self)
        if self.store < 1:
            raise ConfigError(f"rotta.store is {self.store}, expected 1 or more", remedy="use the default, 64")


class Memory:
    """Category-balanced sampling with timeliness and uncertainty (CSTU). Written in place: works on a copy of `own`.

    No class holds more than `store` / K items, rounded up. Every item has a score, from its age and its entropy; the
    worst of a class that has its share, or of the largest classes, gives way to a newcomer with a better one.
    """

    def __init__(self, own: Tensors, config: RoTTAConfig, classes: int, like: Tensor) -> None:
        """
        Args:
            own: what `tensors` gave, or nothing for an empty memory.
            like: an item, for its shape and type.
        """
        self.config, self.classes, size = config, classes, config.store
        if ITEMS in own:
            self.items, self.label, self.unsure, self.age, self.counted = (
                own[name].clone() for name in (ITEMS, LABEL, UNSURE, AGE, COUNTED)
            )
        else:
            self.items = torch.zeros((size, *like.shape), dtype=like.dtype)
            self.label, self.unsure = torch.full((size,), FREE), torch.zeros(size)
            self.age, self.counted = torch.zeros(size), torch.zeros((), dtype=torch.int64)

    def tensors(self) -> dict[str, Tensor]:
        return {
            ITEMS: self.items,
            LABEL: self.label,
            UNSURE: self.unsure,
            AGE: self.age,
            COUNTED: self.counted,
        }

    def offer(self, item: Tensor, label: Tensor, unsure: Tensor) -> bool:
        """Take an item in, if it is worth a place. True with every `store`-th item that was offered.

        Args:
            label: [], the answer for it.
            unsure: [], entropy of that answer as a share of ln K.
        """
        place = self._place(label, self.scores(torch.zeros(()), unsure))
        if place is not None:
            self.items[place] = item
            self.label[place], self.unsure[place], self.age[place] = label, unsure, 0
        self.age += self.taken
        self.counted.add_(1).remainder_(len(self.label))
        return not self.counted

    @property
    def taken(self) -> Tensor:
        """[store], True where there is an item."""
        return self.label != FREE

    def scores(self, age: Tensor, unsure: Tensor) -> Tensor:
        """The larger, the less worth keeping: timeliness / (1 + exp(-age / store)) + uncertainty H / ln K."""
        config = self.config
        return config.timeliness * torch.sigmoid(age / config.store) + config.uncertainty * unsure

    def _place(self, label: Tensor, score: Tensor) -> int | None:
        """Where a newcomer goes; None if nothing there is worse than it."""
        same = self.label == label
        if same.sum() >= self.config.store / self.classes:
            rivals = same
        elif not self.taken.all():
            return int(self.taken.int().argmin())
        else:
            counts = torch.bincount(self.label, minlength=self.classes)
            rivals = counts[self.label] == counts.max()
        scores = self.scores(self.age, self.unsure).masked_fill(~rivals, -math.inf)
        worst = int(scores.argmax())
        return worst if scores[worst] > score else None


class RoTTA(Learner):
    """Agreement with the teacher on the memory, by the weights and biases of the norms."""

    name: ClassVar[str] = "rotta"
    device_lr: ClassVar[float] = 3e-4

    def __init__(
        self, context: Context, config: RoTTAConfig | None = None, *, augment: Augmentation | None = None
    ) -> None:
        """
        Args:
            augment: another source of strong views of what the memory holds.
        """
        self.config: RoTTAConfig = configured(config or RoTTAConfig(), context.settings)
        super().__init__(context, self.config)
        default = PUBLISHED_MOMENTUM if self.reference else DEVICE_MOMENTUM
        self.momentum = self.config.momentum if self.config.momentum is not None else default
        spec = context.bundle.manifest.input
        images = spec.layout != "NCW" and len(spec.shape) == 3 and spec.channels in (1, 3)
        self.augment = augment or (Augment(spec) if self.reference and images else self._noisy)

    def trained(self) -> Tensors:
        return self.tail.norm_parameters

    def learn(self, state: LearnerState, lesson: Lesson) -> Learned:
        generator = Generator().manual_seed((self.seed * 1_000_003 + state.updates) % 2**63)
        with torch.no_grad():
            answers = self._forward(state, lesson, TEACHER)(lesson.cut, state.teacher)
        labels, unsure = answers.argmax(1), entropy(answers) / math.log(answers.shape[1])
        items = lesson.cut if self.reference else lesson.cut.half()
        memory = Memory(state.own, self.config, answers.shape[1], items[0])
        for item, label, doubt in zip(items, labels, unsure, strict=True):
            if memory.offer(item, label, doubt) and self.reference:
                state = self._taught(state, lesson, memory, generator)
        if not self.reference:  # a window of frames came in; they are few and far between
            state = self._taught(state, lesson, memory, generator)
        return replace(state, own={**state.own, **memory.tensors()}), answers

    def _taught(self, state: LearnerState, lesson: Lesson, memory: Memory, generator: Generator) -> LearnerState:
        """One step on the whole memory."""
        items, ages = memory.items[memory.taken].float(), memory.age[memory.taken]
        statistics: dict[str, Tensor] = {}
        with torch.no_grad():
            target = self._forward(state, lesson, TEACHER, statistics)(items, state.teacher).softmax(1)
        student = leaves(state.student)
        logits = self._forward(state, lesson, STUDENT, statistics)(self.augment(items, generator), student)
        losses = -(target * logits.log_softmax(1)).sum(1)
        loss = (torch.sigmoid(-ages / self.config.store) * losses).mean()  # e^-a / (1 + e^-a)
        values, moments = self.descend(state, student, loss, len(items))
        teacher = mix(state.teacher, values, 1 - self.momentum)
        return replace(state, student=values, teacher=teacher, adam=moments, own={**state.own, **statistics})

    def _forward(
        self, state: LearnerState, lesson: Lesson, who: str, updated: dict[str, Tensor] | None = None
    ) -> Forward:
        """The network under this mode's statistics; in reference mode `updated`, if given, gets the new ones."""
        if not self.reference:
            return lesson.tail
        norm = robust(state.own, who, self.config.rate, updated)
        return lambda h, values: self.tail(h, dict(values), norm=norm)

    def _noisy(self, items: Tensor, generator: Generator) -> Tensor:
        return items + self.config.noise * items.std() * torch.randn(items.shape, generator=generator)

    def _forgotten(self, state: LearnerState) -> LearnerState:
        """Another domain: the trunk's ports will move, and what was remembered is not what it would now give."""
        state = super()._forgotten(state)
        return replace(state, own={})


def robust(statistics: Mapping[str, Tensor], who: str, rate: float, updated: dict[str, Tensor] | None) -> Norm:
    """Robust batch norm: by running statistics, source's at first, which are in `statistics` under `who`/site.

    With `updated`, a share `rate` of this batch is mixed in before, gradients flow through that share, and the mix is
    written to `updated`; the student's and the teacher's go each their own way.
    """

    def norm(call: NormCall) -> Tensor:
        mean_name, variance_name = f"{who}{call.site}.mean", f"{who}{call.site}.variance"
        mean = statistics.get(mean_name, call.mean)
        variance = statistics.get(variance_name, call.variance)
        if updated is not None:
            dims = [0, *range(2, call.x.ndim)]
            mean = (1 - rate) * mean + rate * call.x.mean(dims)
            variance = (1 - rate) * variance + rate * call.x.var(dims, correction=0)
            updated[mean_name], updated[variance_name] = mean.detach(), variance.detach()
        shape = [1, -1, *[1] * (call.x.ndim - 2)]
        scale = call.weight * torch.rsqrt(variance + call.epsilon)
        return call.x * scale.reshape(shape) + (call.bias - mean * scale).reshape(shape)

    return norm
