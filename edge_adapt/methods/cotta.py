"""CoTTA: a student learns from a teacher that is its own average, and forgets a little of it at random.

A batch that the source model is not sure of is shown to the teacher in many augmented views, whose logits are
averaged (Wang et al., "Continual Test-Time Domain Adaptation", CVPR 2022). Modes as in `learner`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from edge_adapt.methods.augment import Augment, Augmentation
from edge_adapt.methods.learner import Learned, Learner, LearnerConfig, LearnerState, Lesson
from edge_adapt.methods.optim import Tensors, mix
from edge_adapt.methods.protocol import GRADIENTS, IMAGES, Context, configured

PUBLISHED_VIEWS, PUBLISHED_MOMENTUM = 32, 0.999
DEVICE_VIEWS, DEVICE_MOMENTUM = 2, 0.99


@dataclass(frozen=True, kw_only=True)
class CoTTAConfig(LearnerConfig):
    """Defaults: CIFAR10-C settings of the paper for reference mode, trials on a ResNet-20 for the device."""

    views: int | None = None
    """Augmented views for batches that source is not sure of; None: 32 in reference mode, 2 on the device."""
    confident: float = 0.92
    """p_th: from this mean confidence of source on, no views are made."""
    momentum: float | None = None
    """m, the share of itself that the teacher keeps; None: 0.999 in reference mode, 0.99 on the device."""
    restore: float = 0.01
    """r, the share of numbers set back to source after each step."""


class CoTTA(Learner):
    """Every weight and bias of the tail; on the device, those that the engine can change while it runs."""

    name: ClassVar[str] = "cotta"
    requires: frozenset[str] = frozenset({GRADIENTS, IMAGES})

    def __init__(
        self, context: Context, config: CoTTAConfig | None = None, *, augment: Augmentation | None = None
    ) -> None:
        """
        Args:
            augment: another source of views; None for those of the paper, which need images.
        """
        self.config: CoTTAConfig = configured(config or CoTTAConfig(), context.settings)
        self.bundle = context.bundle
        super().__init__(context, self.config)
        given = self.config
        self.views = (
            given.views if given.views is not None else PUBLISHED_VIEWS if self.reference else DEVICE_VIEWS
        )
        default = PUBLISHED_MOMENTUM if self.reference else DEVICE_MOMENTUM
        self.momentum = given.momentum if given.momentum is not None else default
        self.augment = augment or Augment(self.bundle.manifest.input)

    def trained(self) -> Tensors:
        manifest = self.bundle.manifest
        live = {site.name for site in manifest.sites} | {layer.name for layer in manifest.layers}
        return {name: value for name, value in self.tail.parameters.items() if self._learns(name, live)}

    def _learns(self, name: str, live: set[str]) -> bool:
        owner, _, role = name.rpartition(".")
        return role in ("weight", "bias") and (self.reference or owner in live)

    def learn(self, state: LearnerState, lesson: Lesson) -> Learned:
        """Steps (1) to (7) of the paper's algorithm; the answer is the teacher's, of before step (6)."""
        generator = Generator().manual_seed((self.seed * 1_000_003 + state.updates) % 2**63)
        with torch.no_grad():
            confidence = lesson.tail(lesson.cut, self.source).softmax(1).amax(1).mean()  # (2)
            unsure = self.views > 0 and not confidence >= self.config.confident
            target = (self._averaged if unsure else self._plain)(state.teacher, lesson, generator)  # (3)
        _, values, moments = self.advance(state, lesson, against_teacher, {"target": target})  # (1), (4), (5)
        teacher = mix(state.teacher, values, 1 - self.momentum)  # (6)
        values = restored(values, self.source, self.config.restore, generator)  # (7)
        return replace(state, student=values, teacher=teacher, adam=moments), target

    def _plain(self, teacher: Tensors, lesson: Lesson, generator: Generator) -> Tensor:
        return lesson.tail(lesson.cut, teacher)

    def _averaged(self, teacher: Tensors, lesson: Lesson, generator: Generator) -> Tensor:
        """Mean over the views of the teacher's logits, not of its probabilities.

        On the device the frames themselves count as one more view: few views alone are a worse teacher than none.
        """
        frames = torch.tensor(lesson.frames)
        views = [] if self.reference else [lesson.tail(lesson.cut, teacher)]
        for _ in range(self.views):
            view = self.augment(frames, generator)
            views.append(lesson.tail(torch.tensor(lesson.trunk(view.numpy())), teacher))
        return torch.stack(views).mean(0)


def against_teacher(logits: Tensor, given: Tensors) -> Tensor:
    """Mean cross-entropy of the student against the teacher's probabilities."""
    return -(given["target"].softmax(1) * logits.log_softmax(1)).sum(1).mean()


def restored(values: Tensors, source: Tensors, share: float, generator: Generator) -> Tensors:
    """Every number is set back to source with probability `share`, independently."""
    return {
        name: torch.where(torch.rand(value.shape, generator=generator) < share, source[name], value)
        for name, value in values.items()
    }
