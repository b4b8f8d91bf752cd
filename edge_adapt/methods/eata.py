"""EATA: TENT on the answers that are sure and new, without going far in what source needs; ETA is EATA with `alpha` 0.

Learned from are answers of low entropy that do not look like the running mean answer; surer ones weigh more. What
moves the parameters that carry much Fisher information on source is held back (Niu et al., "Efficient Test-Time
Model Adaptation without Forgetting", ICML 2022). The batch is not passed a second time. Modes as in `learner`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from edge_adapt.errors import ConfigError
from edge_adapt.methods.learner import Learned, Learner, LearnerConfig, LearnerState, Lesson
from edge_adapt.methods.optim import Tensors, leaves
from edge_adapt.methods.protocol import Context, Observation, Step, configured
from edge_adapt.methods.tent import entropy

FISHER = "fisher/"
"""In the bundle: the Fisher information of a parameter on source, in the parameter's shape."""
MEAN = "mean answer"
KEEP = 0.9
"""Share of itself that the mean answer keeps."""


@dataclass(frozen=True, kw_only=True)
class EATAConfig(LearnerConfig):
    """Defaults: CIFAR10-C settings of the paper."""

    reliable: float = 0.4
    """Learn from answers whose entropy is below this share of ln K."""
    redundant: float = 0.4
    """And whose cosine with the mean answer is below this; 0.1 for 100 classes, 0.05 for 1000."""
    alpha: float = 1.0
    """Weight of the Fisher term, 2000 for ImageNet; 0 is ETA."""

    def __post_init__(self) -> None:
        LearnerConfig.__post_init__(self)
        for name, least in (("reliable", 0.0), ("redundant", 0.0), ("alpha", 0.0)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"eata.{name} is {value}, expected {least} or more", remedy="use the default")


class EATA(Learner):
    """Entropy of chosen answers, by the weights and biases of the norms."""

    name: ClassVar[str] = "eata"
    device_lr: ClassVar[float] = 3e-4

    def __init__(self, context: Context, config: EATAConfig | None = None) -> None:
        self.config: EATAConfig = configured(config or EATAConfig(), context.settings)
        super().__init__(context, self.config)
        source = context.bundle.source
        self.fisher: Tensors = {
            name: torch.tensor(source[FISHER + name]) for name in self.source if FISHER + name in source
        }

    def trained(self) -> Tensors:
        return self.tail.norm_parameters

    def step(self, state: LearnerState, seen: Observation) -> Step[LearnerState]:
        step = super().step(state, seen)
        if self.config.alpha and not self.fisher and not state.updates and step.state.updates:
            step = replace(step, events=(*step.events, "the bundle has no Fisher information: this is ETA"))
        return step

    def learn(self, state: LearnerState, lesson: Lesson) -> Learned:
        student = leaves(state.student)
        logits = lesson.tail(lesson.cut, student)
        entropies, answers = entropy(logits), logits.detach().softmax(1)
        margin = self.config.reliable * math.log(logits.shape[1])
        chosen = entropies.detach() < margin
        mean = state.own.get(MEAN)
        if mean is not None:
            chosen &= functional.cosine_similarity(answers, mean[None]).abs() < self.config.redundant
        if not chosen.any():
            return state, logits.detach()
        newest = answers[chosen].mean(0)
        mean = newest if mean is None else KEEP * mean + (1 - KEEP) * newest
        loss = weighted(entropies[chosen], margin) + self.config.alpha * self.away(student)
        values, moments = self.descend(state, student, loss, int(chosen.sum()))
        own = {**state.own, MEAN: mean}
        return replace(state, student=values, teacher=values, adam=moments, own=own), logits.detach()

    def away(self, student: Tensors) -> Tensor:
        """sum F (value - source)^2 over all parameters; 0 without Fisher information."""
        terms = [
            (self.fisher[name] * (value - self.source[name]).square()).sum()
            for name, value in student.items()
            if name in self.fisher
        ]
        return torch.stack(terms).sum() if terms else torch.zeros(())


def weighted(entropies: Tensor, margin: float) -> Tensor:
    """Mean entropy, each weighted by exp(margin - H); the weights get no gradient."""
    return (torch.exp(margin - entropies.detach()) * entropies).mean()
