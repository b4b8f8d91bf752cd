"""ViDA: adapters of low and of high rank on the same layers, whose scales follow how uncertain the network is.

An uncertain batch is taken as another domain, where the high rank shall act and the low rank less; a certain one the
other way round (Liu et al., "ViDA: Homeostatic Visual Domain Adapter for Continual Test Time Adaptation", ICLR 2024).
Student and teacher as in CoTTA. Modes as in `learner`:

Reference: as the published code does, which trains the whole backbone beside the adapters, at a larger rate.
Device: adapters alone, on the layers that the engine can change; noise on the tensor at the cut takes the place of
augmented views, as the dropout of the paper's text does.

A bundle may bring adapters that were trained on source data: `adapters/vida.safetensors`, a file of
`edge_adapt.adapters.storage` with a `VidaPair` on the bundle's tail (`adapter/<layer>/down_low`, `up_low`, `down_high`
and `up_high`), which the weights of the tail already hold at scale 1. Its ranks and layers replace those of the config.
Without such a warm-up U = 0: the first step moves U alone, for D has no gradient yet. Adam makes that step as long as
any other, and D follows from the second on; plain gradient descent at the published rates would not get away from zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from edge_adapt.adapters.protocol import PREFIX, merged, places
from edge_adapt.adapters.storage import load
from edge_adapt.adapters.vida import VidaPair
from edge_adapt.delta import Delta
from edge_adapt.errors import ArtifactError, ConfigError
from edge_adapt.methods.augment import Augment, Augmentation
from edge_adapt.methods.cotta import restored
from edge_adapt.methods.learner import Learned, Learner, LearnerConfig, LearnerState, Lesson
from edge_adapt.methods.optim import AdamState, Tensors, adam, gradients_of, leaves
from edge_adapt.methods.protocol import Context, configured

FILE = "adapters/vida.safetensors"
"""Warm adapters in the folder of a bundle."""
UNCERTAINTY, SCALES = "uncertainty", "scales"
"""In `LearnerState.own`: u [], and the low and the high scale [2]."""


@dataclass(frozen=True, kw_only=True)
class ViDAConfig(LearnerConfig):
    """Where a value is None, the first is for reference mode (the paper's, CIFAR10-C), the second for the device."""

    layers: tuple[str, ...] = ()
    """Names of the layers with adapters; empty: all but depthwise convolutions. The paper: `qkv` and `proj`."""
    rank_low: int = 1
    rank_high: int | None = None
    """128; 16."""
    lr_backbone: float = 1e-4
    """Reference: of all that is no adapter."""
    views: int | None = None
    """Passes that the uncertainty is measured over: 10 augmented views; 2 with noise."""
    noise: float = 0.1
    """Device: share of the numbers at the cut that a noisy pass drops."""
    threshold: float = 0.05
    """Uncertainty from which on the high rank gets the larger scale."""
    smoothing: float = 0.9
    """Device: share of itself that the running uncertainty keeps."""
    hka_compat: Literal["paper", "official"] = "paper"
    """`official`: the high scale stays 1, as in the published code, where its update is never reached."""
    loss: Literal["one_sided", "symmetric"] | None = None
    """Cross-entropy from teacher to student; or the mean of it and of that from student to teacher, which alone has
    a gradient where both agree."""
    momentum: float = 0.999
    """Reference: share of itself that the teacher keeps, of all that is no adapter."""
    momentum_adapters: float | None = None
    """The same, of its adapters: 0.999; 0.9, for few steps are made in a domain."""
    restore: float | None = None
    """Share of numbers set back to source after each step: 0.1; none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hka_compat not in ("paper", "official"):
            raise ConfigError(f"hka_compat is {self.hka_compat!r}", remedy="known: paper, official")
        if self.loss not in (None, "one_sided", "symmetric"):
            raise ConfigError(f"loss is {self.loss!r}", remedy="known: one_sided, symmetric")
        if self.views is not None and self.views < 2:
            raise ConfigError(f"views is {self.views}, a variance needs 2 or more", remedy="use the default")
        if not 0 < self.noise < 1:
            raise ConfigError(f"noise is {self.noise}, outside (0, 1)", remedy="0.1 drops one number in ten")


@dataclass(frozen=True)
class _Mode:
    """What differs between the modes, with the config's own values in place."""

    rank_high: int
    views: int
    loss: str
    momentum_adapters: float
    restore: float


PUBLISHED = _Mode(128, 10, "one_sided", 0.999, 0.1)
DEVICE = _Mode(16, 2, "symmetric", 0.9, 0.0)
PUBLISHED_LR = 1e-5


class ViDA(Learner):
    """Both adapters, and in reference mode every other weight and bias."""

    name: ClassVar[str] = "vida"
    device_lr: ClassVar[float] = 3e-3

    def __init__(
        self, context: Context, config: ViDAConfig | None = None, *, augment: Augmentation | None = None
    ) -> None:
        """
        Args:
            augment: reference: another source of views; None for those of CoTTA, which need images.
        """
        self.config: ViDAConfig = configured(config or ViDAConfig(), context.settings)
        self.bundle = context.bundle
        default = PUBLISHED if context.reference else DEVICE
        given = {name: getattr(self.config, name) for name in default.__dataclass_fields__}
        self.mode = replace(default, **{name: value for name, value in given.items() if value is not None})
        super().__init__(context, self.config)
        if self.reference:
            self.augment = augment or Augment(self.bundle.manifest.input)
            self.lr = PUBLISHED_LR if self.config.lr is None else self.config.lr

    def trained(self) -> Tensors:
        path = self.bundle.path / FILE
        self.adapter, values = self._warmed(path) if path.exists() else self._fresh()
        # The backbone alone: what the tail's weights hold of the adapters is taken out of them.
        bare = self.adapter.scaled(-1.0, -1.0).weights(values, self.tail.parameters)
        self.backbone = {**self.tail.parameters, **bare}
        return {**values, **self.backbone} if self.reference else values

    def init(self) -> LearnerState:
        return replace(super().init(), own={UNCERTAINTY: torch.zeros(()), SCALES: torch.ones(2)})

    def learn(self, state: LearnerState, lesson: Lesson) -> Learned:
        """Allot, answer as the teacher of before the step, step, average, forget a little."""
        generator = Generator().manual_seed((self.seed * 1_000_003 + state.updates) % 2**63)
        mode = self.mode
        with torch.no_grad():
            own = self._allotted(state, lesson, generator)
            target = lesson.tail(lesson.cut, self._weights(state.teacher, own[SCALES]))
        student = leaves(state.student)
        logits = lesson.tail(lesson.cut, self._weights(student, own[SCALES]))
        loss = consistency(logits, target, symmetric=mode.loss == "symmetric")
        values, moments = self.descend(state, student, loss, len(logits))
        teacher = {
            name: value + (1 - self._momentum(name)) * (values[name] - value) for name, value in state.teacher.items()
        }
        if mode.restore:
            values = restored(values, self.source, mode.restore, generator)
        return replace(state, student=values, teacher=teacher, adam=moments, own=own), target

    def descend(
        self, state: LearnerState, student: Tensors, loss: Tensor, frames: int
    ) -> tuple[Tensors, AdamState]:
        """Reference: Adam with a rate for the backbone and one for the adapters."""
        if not self.reference:
            return super().descend(state, student, loss, frames)
        gradients, betas = gradients_of(loss, student), self.config.betas
        backbone, adapters = split(student)
        moved, moments = adam(backbone, gradients, state.adam, lr=self.config.lr_backbone, betas=betas)
        others, more = adam(adapters, gradients, state.adam, lr=self.lr, betas=betas)
        return {**moved, **others}, AdamState(
            {**moments.first, **more.first}, {**moments.second, **more.second}, moments.steps
        )

    def _allotted(self, state: LearnerState, lesson: Lesson, generator: Generator) -> dict[str, Tensor]:
        """Homeostatic allotment: the uncertainty of the teacher about this batch, and the scales that follow."""
        first = state.teacher is self.source  # of all, or of a domain
        weights = self._weights(state.teacher, torch.ones(2) if first else state.own[SCALES])
        passes = [lesson.tail(h, weights) for h in self._views(lesson, generator)]
        found = uncertainty(torch.stack(passes))
        if not self.reference and not first:
            found = torch.lerp(found, state.own[UNCERTAINTY], self.config.smoothing)
        scales = allotment(found, self.config.threshold, both=self.config.hka_compat == "paper")
        return {UNCERTAINTY: found, SCALES: scales}

    def _views(self, lesson: Lesson, generator: Generator) -> Iterator[Tensor]:
        """Other tensors at the cut, of the same frames."""
        for _ in range(self.mode.views):
            if self.reference:
                view = self.augment(torch.tensor(lesson.frames), generator)
                yield torch.tensor(lesson.trunk(view.numpy()))
            else:
                yield dropped(lesson.cut, self.config.noise, generator)

    def _weights(self, values: Tensors, scales: Tensor) -> dict[str, Tensor]:
        """Parameters of the tail, with the adapters merged."""
        backbone, adapters = split(values)
        low, high = scales.tolist()
        return {**backbone, **self.adapter.scaled(low, high).weights(adapters, {**self.backbone, **backbone})}

    def _momentum(self, name: str) -> float:
        return self.mode.momentum_adapters if name.startswith(PREFIX) else self.config.momentum

    def _delta(self, state: LearnerState, ports: Delta) -> Delta:
        if state.teacher is self.source:
            return ports
        low, high = state.own[SCALES].tolist()
        return ports | merged(self.adapter.scaled(low, high), state.teacher, self.backbone)

    def _fresh(self) -> tuple[VidaPair, dict[str, Tensor]]:
        found = places(self.tail, names=self.config.layers or None, live=not self.reference)
        adapter = VidaPair(found, low=self.config.rank_low, high=self.mode.rank_high)
        return adapter, adapter.init(Generator().manual_seed(self.seed))

    def _warmed(self, path: Path) -> tuple[VidaPair, dict[str, Tensor]]:
        """What the bundle brings; on the device, of the layers that the engine can change.

        Raises: ArtifactError if it is no ViDA pair, ConfigError if the engine can change no layer.
        """
        adapter, values = load(path, self.tail)
        if not isinstance(adapter, VidaPair):
            raise ArtifactError(
                f"{path} holds an adapter of kind {adapter.kind!r}, expected {VidaPair.kind!r}",
                remedy="make it again at export, or remove it",
            )
        if self.reference:
            return adapter, values
        alive = places(self.tail, live=True, depthwise=True)
        adapter = replace(adapter, places=tuple(place for place in adapter.places if place in alive))
        names = adapter.init(Generator())
        return adapter, {name: values[name] for name in names}


def uncertainty(logits: Tensor) -> Tensor:
    """u of passes [V, N, K]: a tenth of the variance over the passes, unbiased, mean over frames and classes."""
    return 0.1 * logits.var(0).mean()


def allotment(found: Tensor, threshold: float, *, both: bool = True) -> Tensor:
    """Low and high scale [2], for an uncertainty u []: 1 - u and 1 + u from the threshold on, else 1 + u and 1 - u.

    Beyond 1 u counts as 1: logits of a large scale would turn the sign of an adapter.

    Args:
        both: False leaves the high scale at 1.
    """
    u = found.clamp_max(1.0)
    low, high = (1 - u, 1 + u) if float(found) >= threshold else (1 + u, 1 - u)
    return torch.stack([low, high if both else torch.ones_like(u)])


def consistency(logits: Tensor, target: Tensor, *, symmetric: bool) -> Tensor:
    """Mean cross-entropy of the student's answers with the teacher's, or half of it and half the other way round."""
    forth = -(target.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    if not symmetric:
        return forth
    back = -(logits.softmax(1) * target.log_softmax(1)).sum(1).mean()
    return (forth + back) / 2


def dropped(h: Tensor, share: float, generator: Generator) -> Tensor:
    """Dropout: a share of the numbers is zero, the others are larger by as much."""
    kept = torch.rand(h.shape, generator=generator) >= share
    return h * kept / (1 - share)


def split(values: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is no adapter, and what is."""
    adapters = {name: value for name, value in values.items() if name.startswith(PREFIX)}
    return {name: value for name, value in values.items() if name not in adapters}, adapters
