"""ROID: sure and diverse answers teach the norms, views must agree, and the answers of late weigh on the answer now.

Loss: a soft likelihood ratio, which unlike entropy still has a gradient at a sure answer, and a symmetric cross
entropy with an augmented view; after each step a little of the way back to source, and a prior on the answers
(Marsden, Doebler & Yang, "Universal Test-time Adaptation through Weight Ensembling, Diversity Weighting, and Prior
Correction", WACV 2024). Modes as in `learner`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional

from edge_adapt.errors import ConfigError
from edge_adapt.methods.augment import Augment, Augmentation
from edge_adapt.methods.learner import Learned, Learner, LearnerConfig, LearnerState, Lesson
from edge_adapt.methods.optim import Tensors, leaves, mix
from edge_adapt.methods.protocol import LOGITS, Answered, Context, Step, configured
from edge_adapt.methods.tent import entropy

MEAN, PRIOR = "mean answer", "prior"
KEEP = 0.9
"""Share of itself that the mean answer keeps at a step."""
TEMPERATURE = 1 / 3
CLIP, EPSILON = 0.99, 1e-5
"""The soft likelihood ratio takes no answer as surer than `CLIP`."""


@dataclass(frozen=True, kw_only=True)
class ROIDConfig(LearnerConfig):
    """Defaults: CIFAR10-C settings of the paper, trials on a ResNet-20 for the device. `pull` holds in both modes."""

    views: bool | None = None
    """Ask for agreement with a view; None: in reference mode. On the device that is one more pass of some frames."""
    correction: Literal["log", "compat", "none"] = "log"
    """How the prior changes the answer: `log` multiplies probabilities, as in the paper; `compat`, in reference mode
    only, multiplies logits, as in the published code."""
    memory: int = 16
    """Device: frames that the prior of the answers averages over. In an unordered stream that changes nothing; where
    one class comes many times in a row, the shorter the better."""

    def __post_init__(self) -> None:
        LearnerConfig.__post_init__(self)
        if self.correction not in ("log", "compat", "none"):
            raise ConfigError(f"roid.correction is {self.correction!r}", remedy="known: log, compat, none")
        if self.memory < 2:
            raise ConfigError(f"roid.memory is {self.memory}, expected 2 or more", remedy="use the default, 16")


class ROID(Learner):
    """Soft likelihood ratio and consistency, by the weights and biases of the norms."""

    name: ClassVar[str] = "roid"
    device_lr: ClassVar[float] = 3e-4

    def __init__(
        self, context: Context, config: ROIDConfig | None = None, *, augment: Augmentation | None = None
    ) -> None:
        """
        Args:
            augment: another source of views; None for CoTTA's, with which the paper does without blur and noise.
        """
        self.config: ROIDConfig = configured(config or ROIDConfig(), context.settings)
        super().__init__(context, self.config)
        given = self.config.views
        self.augment: Augmentation | None = None
        if self.reference if given is None else given:
            self.augment = augment or Augment(context.bundle.manifest.input)
        if not self.reference and self.config.correction != "none":
            self.watches = frozenset({LOGITS})

    def trained(self) -> Tensors:
        return self.tail.norm_parameters

    def learn(self, state: LearnerState, lesson: Lesson) -> Learned:
        student = leaves(state.student)
        logits = lesson.tail(lesson.cut, student)
        answers, count = logits.detach().softmax(1), len(logits)
        mean = state.own.get(MEAN, torch.full_like(answers[0], 1 / logits.shape[1]))
        weights = weighted(answers, entropy(logits.detach()), mean)
        kept = weights > 0
        loss = (weights * likelihood_ratio(logits)).sum() / count
        if self.augment is not None and kept.any():
            generator = Generator().manual_seed((self.seed * 1_000_003 + state.updates) % 2**63)
            views = self.augment(torch.tensor(lesson.frames)[kept], generator)
            seen = lesson.tail(torch.tensor(lesson.trunk(views.numpy())), student)
            loss = loss + (weights[kept] * disagreement(seen, logits[kept])).sum() / count
        values, moments = self.descend(state, student, loss, count)
        if self.reference:  # on the device `descend` did it
            values = mix(values, self.source, self.config.pull)
        own = {**state.own, MEAN: KEEP * mean + (1 - KEEP) * answers.mean(0)}
        learned = replace(state, student=values, teacher=values, adam=moments, own=own)
        return learned, self._corrected(logits.detach(), answers)

    def _corrected(self, logits: Tensor, answers: Tensor) -> Tensor:
        """Reference: the answer under the prior of its batch."""
        prior = smoothed(answers.mean(0), len(answers))
        if self.config.correction == "compat":
            return logits * prior
        return logits + prior.log() if self.config.correction == "log" else logits

    def watch(self, state: LearnerState, answered: Answered) -> Step[LearnerState]:
        """Device: each answer under the prior of those before it, however they are batched."""
        logits = torch.tensor(answered.logits)
        answers = logits.softmax(1)
        if not self.watches or not torch.isfinite(answers).all():
            return Step(state)
        prior = state.own.get(PRIOR, torch.full_like(answers[0], 1 / logits.shape[1]))
        priors = running(answers, prior, 1 / self.config.memory)
        corrected = logits + smoothed(priors[:-1], self.config.memory).log()
        return Step(replace(state, own={**state.own, PRIOR: priors[-1]}), corrected.numpy())


def weighted(answers: Tensor, entropies: Tensor, mean: Tensor) -> Tensor:
    """Weight [N] of answers [N, K] by how sure and how unlike the mean answer [K] they are; 0 for those too like it.

    d = 1 - cosine with the mean, c = -H, both brought to 0..1; exp(d c / temperature) where d is not below its mean.
    """
    unlike = _stretched(1 - functional.cosine_similarity(answers, mean[None]))
    sure = _stretched(-entropies)
    return torch.where(unlike < unlike.mean(), 0.0, torch.exp(unlike * sure / TEMPERATURE))


def _stretched(values: Tensor) -> Tensor:
    """Brought to 0..1; zeros where all are the same, as in a batch of one."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def likelihood_ratio(logits: Tensor) -> Tensor:
    """-sum_k q log(q / (1 - q)) of each row, q the probability, at most `CLIP`."""
    q = logits.softmax(1).clamp(0, CLIP)
    return -(q * torch.log(q / (1 - q) + EPSILON)).sum(1)


def disagreement(logits: Tensor, others: Tensor) -> Tensor:
    """Symmetric cross entropy of each row, half each way; gradients reach both."""
    one, other = logits.log_softmax(1), others.log_softmax(1)
    return -0.5 * (other.exp() * one + one.exp() * other).sum(1)


def smoothed(prior: Tensor, frames: int) -> Tensor:
    """Mean answers [..., K] as priors: the nearer to uniform, the fewer frames they are of. Each sums to 1.

    delta = max(1 / frames, 1 / K) / max prior; (prior + delta) / (1 + delta K).
    """
    classes = prior.shape[-1]
    delta = max(1 / frames, 1 / classes) / prior.amax(-1, keepdim=True)
    made: Tensor = (prior + delta) / (1 + delta * classes)
    return made


def running(values: Tensor, start: Tensor, share: float) -> Tensor:
    """Exponential mean of rows [N, K]: the one before each of them, and the one behind the last, [N + 1, K]."""
    count = len(values)
    age = torch.arange(count + 1)[:, None] - 1 - torch.arange(count)
    weights = torch.where(age >= 0, share * (1 - share) ** age.clamp_min(0), 0.0)
    kept = (1 - share) ** torch.arange(count + 1)[:, None]
    return kept * start + weights @ values
