"""TENT: make the answers certain, by the affine of the norms alone.

Loss: the mean entropy of the answers, H = -sum_k p_k log p_k, p = softmax(logits); trained are the weight and
bias of every norm (Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from edge_adapt.methods.learner import Learned, Learner, LearnerConfig, LearnerState, Lesson
from edge_adapt.methods.optim import Tensors
from edge_adapt.methods.protocol import Context, configured


@dataclass(frozen=True, kw_only=True)
class TentConfig(LearnerConfig):
    """Defaults: CIFAR settings of the paper, and trials on a CIFAR ResNet-20, severity 5."""

    reliable: float = 1.0
    """Device: learn from frames whose entropy is below this share of ln K; 1 takes all, EATA takes 0.4."""


class Tent(Learner):
    """Entropy of the answers, by the weights and biases of the norms."""

    name: ClassVar[str] = "tent"
    device_lr: ClassVar[float] = 3e-4

    def __init__(self, context: Context, config: TentConfig | None = None) -> None:
        self.config: TentConfig = configured(config or TentConfig(), context.settings)
        super().__init__(context, self.config)
        self.most = math.log(context.bundle.manifest.outputs)
        """The largest entropy that there is, in nats."""

    def trained(self) -> Tensors:
        return self.tail.norm_parameters

    def learn(self, state: LearnerState, lesson: Lesson) -> Learned:
        logits, values, moments = self.advance(state, lesson, self._loss, {})
        if not bool(self._reliable(entropy(logits)).any()):
            return state, logits
        return replace(state, student=values, teacher=values, adam=moments), logits

    def _loss(self, logits: Tensor, given: Tensors) -> Tensor:
        """Mean entropy of the reliable frames; 0 if there are none."""
        entropies = entropy(logits)
        kept = self._reliable(entropies).to(entropies.dtype)
        return (kept * entropies).sum() / kept.sum().clamp_min(1)

    def _reliable(self, entropies: Tensor) -> Tensor:
        """Which frames are learned from: all of them in reference mode, and by default."""
        if self.reference or self.config.reliable >= 1:
            return torch.ones_like(entropies, dtype=torch.bool)
        return entropies.detach() < self.config.reliable * self.most


def entropy(logits: Tensor) -> Tensor:
    """H of each row, in nats."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
