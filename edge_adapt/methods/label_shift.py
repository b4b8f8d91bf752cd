"""Label shift adapter: correct the answers for classes that are more or less frequent than they were at source.

Park et al., "Label Shift Adapter for Test-Time Adaptation under Covariate and Label Shifts", ICCV 2023. A host adapts
to what frames look like, this wrapper to how often classes come; the host never sees an answer that was adjusted.

How often they come is estimated by expectation maximisation (Saerens et al., Neural Computation 2002) over several
horizons at once. Each estimate is believed as far as it foretold the answers better than the source prior did: Bayes'
rule over the horizons and "nothing changed". Damage to the network also makes some answers frequent. Two further
signals tell it from label shift: features that no mixture of the classes explains, and whether neighbours are alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from edge_adapt.adapters.label_shift import LEAST, LabelShiftNet, load, source_prior
from edge_adapt.errors import ConfigError
from edge_adapt.methods.lame import Persistence
from edge_adapt.methods.protocol import FEATURES, HEAD, LOGITS, TAPS, Answered, Context, Method, Step, configured
from edge_adapt.methods.wrapper import Wrapped, Wrapper

Array = NDArray[Any]

GROUP = 16
"""Frames that are weighed at once; then the estimates move on, within a batch too."""
TEMPERATURE = 3.0
"""Of answers, where no hypernetwork says it: under a shift networks are this much too sure (CIFAR ResNets)."""
LABEL_SHIFT, NO_LABEL_SHIFT = "label shift", "no label shift"
LEAST_EVIDENCE = -100.0
"""Nats; less would take long to forget, more would be too soon after a domain with damage."""
USUAL_COUNT = 32
"""Frames that the source counts as in what is usual of a stream."""


@dataclass(frozen=True, kw_only=True)
class LabelShiftConfig:
    """Defaults from trials on a CIFAR ResNet-20, severity 5 and clean; see the README."""

    temperature: float | None = None
    """Logits are divided by it before they count as evidence; None: what the hypernetwork was trained with, or 3."""
    horizons: tuple[int, ...] = (8, 32, 128)
    """Frames that the estimates average over."""
    prior_count: float = 0.5
    """Frames that the source prior counts as in each estimate: the fewer, the faster."""
    patience: float = 2.0
    """Nats by which an estimate must have been better, over the last `memory` frames, to be believed by half."""
    indifference: float = 0.03
    """Nats a frame by which it must be better, all the time: biases of a network that is well weigh so much."""
    memory: int = 64
    """Frames that evidence is kept for."""
    caution: float = 6.0
    """Nats a frame for each unit of damage above `damage`."""
    damage: float = 0.03
    """Squared distance of the mean feature from all mixtures of the classes, in units of their variance."""
    correlated: float = 0.15
    """From this kappa of neighbouring answers on, what fluctuates is the labels, whatever the damage."""
    cap: float = 4.0
    """Largest change of a log-prior, in nats."""
    hypernetwork: bool = True
    """Use the one of the bundle, if there is one."""

    def __post_init__(self) -> None:
        wrong = [name for name in ("prior_count", "memory", "cap") if not getattr(self, name) > 0]
        wrong += [name for name in ("indifference", "caution", "damage") if not getattr(self, name) >= 0]
        if not self.horizons or min(self.horizons) < 2:
            wrong.append("horizons")
        if self.temperature is not None and not self.temperature >= 1:
            wrong.append("temperature")
        for name in wrong:
            raise ConfigError(
                f"label_shift.{name} is {getattr(self, name)}, which is too small", remedy="use the default"
            )


@dataclass(frozen=True)
class Residual:
    """Mean over a sliding horizon of what of the features no mixture of the source classes explains."""

    total: Array
    """[directions], in units of the within-class deviation."""
    power: float = 0.0
    weight: float = 0.0
    squares: float = 0.0
    """Sum of squared weights of the frames; with `weight` it says how many they count as."""

    def after(self, values: Array, horizon: int) -> Residual:
        """With N more frames, [N, directions]."""
        kept = (1 - 1 / horizon) ** len(values)
        return Residual(
            kept * self.total + values.sum(axis=0),
            kept * self.power + float(np.square(values).mean(axis=1).sum()),
            kept * self.weight + len(values),
            kept**2 * self.squares + len(values),
        )

    @property
    def damage(self) -> float:
        """Squared length of the mean, a direction, less what the spread of so many frames makes of nothing."""
        if self.squares == 0 or self.weight**2 < 2 * self.squares:
            return 0.0
        square = float(np.square(self.total / self.weight).mean())
        noise = (self.power / self.weight - square) / (self.weight**2 / self.squares - 1)
        return max(0.0, square - noise)


@dataclass(frozen=True)
class LabelShiftState:
    """A few vectors, whatever the length of the stream."""

    counts: Array
    """[horizons, K], responsibilities of the classes."""
    evidence: Array
    """[horizons], nats by which each foretold the last answers better than no change did."""
    usual: Array
    """[K], sum of answers over about twice the longest horizon."""
    residual: Residual
    persistence: Persistence
    damage: float
    """What `residual` says, as compared with the setting of that name."""
    ratio: Array
    """[K], log-ratio of how often the classes come now to how often they did at source."""
    shifted: bool = False
    """What was told last: that the labels are not distributed as at source."""


class LabelShift(Wrapper[LabelShiftState]):
    """Around a method: its answers, for the classes as they come."""

    name: ClassVar[str] = "label_shift"
    adds: ClassVar[frozenset[str]] = frozenset({LOGITS, FEATURES})
    demands: ClassVar[frozenset[str]] = frozenset({HEAD})

    def __init__(self, context: Context, host: Method[Any], config: LabelShiftConfig | None = None) -> None:
        super().__init__(context, host)
        self.config: LabelShiftConfig = configured(config or LabelShiftConfig(), context.settings)
        bundle = context.bundle
        classes = bundle.manifest.outputs
        self.prior = source_prior(bundle.source.get("prior"), classes)
        self.net: LabelShiftNet | None = load(bundle) if self.config.hypernetwork else None
        default = TEMPERATURE if self.net is None else self.net.temperature
        self.temperature = self.config.temperature if self.config.temperature is not None else default
        self.unexplained = unexplained(bundle.source.get("class.mean"), bundle.source.get("class.std"))
        # Without class statistics damage cannot be seen; then only a host that corrects the statistics is believed.
        self.blind_trust = host.answers or TAPS in host.needs
        if not (self.blind_trust or len(self.unexplained[1])):
            raise ConfigError(
                f"label_shift cannot tell damage from label shift around {host.name}, which leaves statistics alone:"
                f" bundle {bundle.manifest.name!r} has no class statistics",
                remedy="export it with --calibration on frames of all classes, or put it around moments",
            )
        self.horizons = np.array(self.config.horizons, np.float64)

    def start(self) -> LabelShiftState:
        classes, horizons = len(self.prior), len(self.horizons)
        return LabelShiftState(
            counts=np.zeros((horizons, classes)),
            evidence=np.zeros(horizons),
            usual=USUAL_COUNT * self.prior,
            residual=Residual(np.zeros(len(self.unexplained[1]))),
            persistence=Persistence(np.zeros(classes)),
            damage=0.0,
            ratio=np.zeros(classes),
        )

    def watch(self, state: Wrapped[LabelShiftState], answered: Answered) -> Step[Wrapped[LabelShiftState]]:
        """Estimate the prior with these frames, and adjust the answers to it."""
        state, answered, events = self.watched_by_host(state, answered)
        logits, features = answered.logits, answered.features
        if not (np.isfinite(logits).all() and (features is None or np.isfinite(features).all())):
            return Step(state, logits, (*events, "refused: answers are not finite"))
        own = state.own
        for start in range(0, len(logits), GROUP):
            part = slice(start, start + GROUP)
            own = self.estimated(own, logits[part].astype(np.float64), None if features is None else features[part])
        own, told = self.weighed(own)
        return Step(Wrapped(state.host, own), self.adjusted(logits, features, own.ratio), (*events, *told))

    def estimated(self, own: LabelShiftState, logits: Array, features: Array | None) -> LabelShiftState:
        """After some more answers: logits [N, K] and features [N, D]."""
        config, frames = self.config, len(logits)
        residual = own.residual
        if features is not None and len(residual.total):
            residual = residual.after(self._unexplained(features), 2 * config.memory)
        own = replace(
            own,
            residual=residual,
            damage=residual.damage,
            persistence=own.persistence.after(logits.argmax(axis=1), int(self.horizons[-1])),
        )
        answers = softmax(logits / self.temperature, axis=1)
        ratio = self.estimates(own.counts) / self.reference(own)
        weighted = answers[:, None, :] * ratio  # [N, horizons, K]
        likelihood = weighted.sum(axis=2)
        gain = np.log(likelihood).sum(axis=0) - frames * self.price(own)
        horizons = self.horizons[:, None]
        return replace(
            own,
            counts=own.counts * (1 - 1 / horizons) ** frames + (weighted / likelihood[..., None]).sum(axis=0),
            evidence=np.maximum(own.evidence * (1 - 1 / config.memory) ** frames + gain, LEAST_EVIDENCE),
            usual=own.usual * (1 - 0.5 / self.horizons[-1]) ** frames + answers.sum(axis=0),
        )

    def estimates(self, counts: Array) -> Array:
        """[horizons, K], each a distribution over classes."""
        made = counts + self.config.prior_count * self.prior
        shares: Array = made / made.sum(axis=1, keepdims=True)
        return shares

    def reference(self, own: LabelShiftState) -> Array:
        """[K], what the answers are like while the labels are as at source: with damage, what has been usual."""
        trust = float(np.clip(2 - own.damage / max(self.config.damage, 1e-9), 0, 1))
        usual = np.maximum(own.usual / own.usual.sum(), LEAST)
        made: Array = self.prior**trust * usual ** (1 - trust)
        made /= made.sum()
        return made

    def price(self, own: LabelShiftState) -> float:
        """Nats a frame that an estimate must be better by to gain at all."""
        excess = max(0.0, own.damage - self.config.damage)
        if own.persistence.kappa >= self.config.correlated:
            excess = 0.0
        return self.config.indifference + self.config.caution * excess

    def weighed(self, own: LabelShiftState) -> tuple[LabelShiftState, tuple[str, ...]]:
        """What was foretold best, averaged by belief, in the state; and what there is to tell."""
        beliefs = softmax(np.concatenate([[0.0], own.evidence - self.config.patience]))
        reference = self.reference(own)
        mixture = beliefs[0] * reference + beliefs[1:] @ self.estimates(own.counts)
        ratio = np.clip(np.log(mixture / reference), -self.config.cap, self.config.cap)
        changed = bool(beliefs[0] > 0.9 if own.shifted else beliefs[0] < 0.1)
        own = replace(own, ratio=ratio, shifted=own.shifted != changed)
        return own, ((LABEL_SHIFT if own.shifted else NO_LABEL_SHIFT,) if changed else ())

    def adjusted(self, logits: Array, features: Array | None, ratio: Array) -> Array:
        """Logits [N, K] for classes that come exp(ratio) times as often as at source."""
        if self.net is None or features is None:
            change: Array = self.temperature * ratio
        else:
            change = self.net.change(features, softmax(np.log(self.net.source) + ratio))
        made: Array = logits + change.astype(logits.dtype)
        return made

    def _unexplained(self, features: Array) -> Array:
        centre, directions = self.unexplained
        made: Array = (features - centre) @ directions.T
        return made


def unexplained(mean: Array | None, std: Array | None) -> tuple[Array, Array]:
    """Centre [D] and directions [R, D] in which no mixture of the classes differs from another, in units of `std`.

    Args:
        mean: [K, D], the classes' mean features; None gives no direction.
        std: [D], deviation about them.
    """
    if mean is None or std is None:
        return np.zeros(0), np.zeros((0, 0))
    wide, variance = mean.astype(np.float64), np.square(std.astype(np.float64))
    unit = np.sqrt(variance + 0.05 * variance.mean() + 1e-12)
    centre = wide.mean(axis=0)
    orthogonal = np.linalg.svd((wide - centre) / unit, full_matrices=True)[2][len(wide) - 1 :]
    return centre, orthogonal / unit
