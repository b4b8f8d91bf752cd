"""SAR: entropy of the sure answers, in flat places of the loss only, and back to source once it is all too certain.

The gradient is taken a small way uphill of where the parameters are (sharpness-aware minimisation), without frames
that are or become unsure; when the running entropy is near zero, the model has collapsed and starts anew (Niu et al.,
"Towards Stable Test-Time Adaptation in Dynamic Wild World", ICLR 2023). Modes as in `learner`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from edge_adapt.errors import ConfigError
from edge_adapt.methods.learner import Learned, Learner, LearnerConfig, LearnerState, Lesson
from edge_adapt.methods.optim import AdamState, Tensors, gradients_of, leaves, mix, sgd
from edge_adapt.methods.protocol import Context, configured
from edge_adapt.methods.tent import entropy

RUNNING = "running entropy"
KEEP = 0.9
"""Share of itself that the running entropy keeps."""


@dataclass(frozen=True, kw_only=True)
class SARConfig(LearnerConfig):
    """Defaults: those of the paper. `lr` is that of SGD; `betas` are not used."""

    momentum: float = 0.9
    reliable: float = 0.4
    """Learn from answers whose entropy is below this share of ln K."""
    radius: float = 0.05
    """rho: length of the way uphill, over all learned parameters together."""
    collapsed: float = 0.2
    """A running entropy below this is a collapse; for 1000 classes, and in proportion to ln K for others."""
    fixed: float = 0.25
    """Share of the tail's norms, those next to the answer, that stay as they are: by the paper, deep ones do harm.
    Rounded up, but one is always learned. A quarter is the last stage of a ResNet-50 and a little of the one before,
    and in a ViT-B exactly what the paper leaves out: three blocks and the last norm."""

    def __post_init__(self) -> None:
        LearnerConfig.__post_init__(self)
        if not 0 <= self.fixed < 1:
            raise ConfigError(f"sar.fixed is {self.fixed}, outside [0, 1)", remedy="use the default, 0.25")


class SAR(Learner):
    """Entropy of the sure answers, by the weights and biases of the earlier norms."""

    name: ClassVar[str] = "sar"
    device_lr: ClassVar[float] = 1e-3

    def __init__(self, context: Context, config: SARConfig | None = None) -> None:
        self.config: SARConfig = configured(config or SARConfig(), context.settings)
        super().__init__(context, self.config)

    def trained(self) -> Tensors:
        norms = self.tail.norms
        kept = norms[: max(1, len(norms) - math.ceil(self.config.fixed * len(norms)))]
        return {
            f"{site}.{role}": self.tail.parameters[f"{site}.{role}"] for site in kept for role in ("weight", "bias")
        }

    def learn(self, state: LearnerState, lesson: Lesson) -> Learned:
        config, student = self.config, leaves(state.student)
        logits = lesson.tail(lesson.cut, student)
        unit = math.log(logits.shape[1])
        margin = config.reliable * unit
        entropies = entropy(logits)
        sure = entropies.detach() < margin
        if not sure.any():
            return state, logits.detach()
        above = leaves(uphill(student, gradients_of(entropies[sure].mean(), student), config.radius))
        entropies = entropy(lesson.tail(lesson.cut, above))[sure]
        still = entropies.detach() < margin
        if not still.any():
            return state, logits.detach()
        loss = entropies[still].mean()
        values, moments = self._descended(state, gradients_of(loss, above), int(still.sum()))
        running = state.own.get(RUNNING, loss.detach())
        running = KEEP * running + (1 - KEEP) * loss.detach()
        if float(running) < config.collapsed * unit / math.log(1000):
            return self.restarted(state), logits.detach()
        own = {**state.own, RUNNING: running}
        return replace(state, student=values, teacher=values, adam=moments, own=own), logits.detach()

    def _forgotten(self, state: LearnerState) -> LearnerState:
        """Another domain: the running entropy starts anew as well."""
        return _without_running(super()._forgotten(state))

    def _descended(self, state: LearnerState, gradients: Tensors, frames: int) -> tuple[Tensors, AdamState]:
        """SGD from where the student is, with the gradient from uphill of it; on the device as `descend`."""
        lr, momentum = self._rate(frames), self.config.momentum
        values, moments = sgd(state.student, gradients, state.adam, lr=lr, momentum=momentum)
        return values if self.reference else mix(values, self.source, self.settings.pull), moments

    def restarted(self, state: LearnerState) -> LearnerState:
        """Back to source, and the running entropy with it: the old one would call for the next restart."""
        return _without_running(replace(state, student=self.source, teacher=self.source, adam=AdamState()))


def _without_running(state: LearnerState) -> LearnerState:
    return replace(state, own={name: value for name, value in state.own.items() if name != RUNNING})


def uphill(values: Tensors, gradients: Tensors, radius: float) -> dict[str, Tensor]:
    """value + radius g / ||g||, with one norm over all parameters; nothing moves where all gradients are zero."""
    length = torch.sqrt(torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum())
    share = radius / (length + 1e-12)
    return {name: value.detach() + share * gradients[name] for name, value in values.items()}
