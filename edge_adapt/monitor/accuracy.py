"""Accuracy without labels, as an interval of 90 %: never a bare number.

Signals over the last frames are weighed by what was fitted at export, to augmented source frames:
- confidence: the mean largest softmax;
- doubt: the share of answers that change under dropout on what the head is given (AETTA, CVPR 2024);
- narrowness: how far the mean softmax is from all classes alike. With the confidence, that is the mutual information of
  frames and answers (Transfer Score): answers that are certain, and all of one class, tell little;
- dissent: the share of answers that differ from those of the source weights, on frames that were given to both;
- distance of the features from the mean of the class that was answered, where the bundle holds such means. Frames that
  lie much farther than most are strangers, of which there is no accuracy to tell: they are left out of all signals.

The estimate is a beta distribution: what was fitted at export is worth a number of labels, and late labels are added.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import exp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.monitor.aetta import COLLAPSED
from edge_adapt.probabilities import entropy, softmax

Array = NDArray[Any]

MEMORY = 256
"""Frames that the signals average over, at most."""
ENOUGH, COMPARED = 64, 32
"""Frames, at least, that an estimate is made from (as AETTA's window), and of these given to the source weights."""
PASSES, RATE, SEED = 10, 0.3, 0
"""Dropout masks, the same ones for all frames, at export and on the device; share of features that they drop."""
LABEL_MEMORY = 1024
"""Answered frames over which late labels fade to a third: the domain may have changed."""
NARROWNESS, DISSENT = 2, 3
"""Places among the signals."""
COVERAGE = 0.9
UNKNOWN = 0.5
"""What an estimate is worth that could be of a collapse, and could be of none."""
STRANGE = 1.85
"""A frame is left out if it lies so many times as far as the median of the last ones."""
LATEST, FEWEST = 64, 16
"""Frames that this median is over, and that it needs."""
EDGE = 0.005
"""Shares are told apart from 0 and 1 by this, before their logit is taken."""
WEIGHTS, WORTH = "accuracy.weights", "accuracy.worth"
"""Entries of source.safetensors: [2, signals + 1], the constant last, and [2, 2]; with dissent, and without it."""


@dataclass(frozen=True)
class Interval:
    """Shares from 0 to 1: the truth lies from `low` to `high` nine times of ten."""

    low: float
    value: float
    high: float

    def per_cent(self) -> dict[str, float]:
        """As the board has it."""
        return {name: round(100 * getattr(self, name), 2) for name in ("value", "low", "high")}


@dataclass(frozen=True)
class Block:
    """Sums over some frames; their size does not depend on how many there were."""

    mean: Array
    """[K], of the softmax."""
    dropped: Array
    """[K], the same under dropout."""
    sums: Array
    """[3], of the largest softmax, of the share of changed answers, of the mean squared distance."""
    count: int = 0
    same: int = 0
    """Answers that were those of the source weights too, of `compared`."""
    compared: int = 0

    def plus(self, other: Block) -> Block:
        """Both together."""
        return Block(
            self.mean + other.mean,
            self.dropped + other.dropped,
            self.sums + other.sums,
            self.count + other.count,
            self.same + other.same,
            self.compared + other.compared,
        )


@dataclass(frozen=True)
class Seen:
    """What is remembered: up to `MEMORY` frames. Older ones are forgotten, half a memory at once."""

    last: Block
    current: Block
    right: float = 0.0
    labelled: float = 0.0
    """Late labels, fading."""
    distances: Array = field(default_factory=lambda: np.zeros(0))
    """[`LATEST` at most], of the last frames, left out or not; 0 where the bundle holds no means of classes."""

    @property
    def whole(self) -> Block:
        return self.last.plus(self.current)


class Accuracy:
    """The estimator of one bundle; what it remembers is a value that the caller keeps."""

    def __init__(self, bundle: Bundle) -> None:
        source = bundle.source
        self.bundle = bundle
        if not offered(bundle):
            raise ConfigError(
                f"bundle {bundle.manifest.name!r} holds nothing to estimate accuracy by",
                remedy="export it again with --estimate and --calibration on images; it has to end in a linear layer",
            )
        self.signals = Signals(bundle)
        self.weights, self.worth = source[WEIGHTS].astype(np.float64), source[WORTH].astype(np.float64)
        if self.weights.shape != (2, self.signals.count + 1) or self.worth.shape != (2, 2):
            raise ConfigError(
                f"bundle {bundle.manifest.name!r} has {WEIGHTS} of shape {self.weights.shape}, expected "
                f"(2, {self.signals.count + 1})",
                remedy="export it again with this version, --estimate and --calibration",
            )

    def init(self) -> Seen:
        """Nothing seen yet."""
        return self.signals.init()

    def after(self, state: Seen, logits: Array, features: Array, source: Array | None = None) -> Seen:
        """With some more frames; arguments as in `Signals.after`."""
        return self.signals.after(state, logits, features, source)

    def estimate(self, state: Seen) -> Interval | None:
        """None before there are frames or labels enough."""
        block, value, worth = state.whole, 0.5, 0.0
        if block.count >= ENOUGH:
            value, worth = self._prior(block)
        elif not state.labelled:
            return None
        right = value * worth + state.right
        wrong = (1 - value) * worth + state.labelled - state.right
        low, high = bounds(np.array([right]), np.array([wrong]))
        middle = right / (right + wrong)
        return Interval(min(float(low[0]), middle), middle, max(float(high[0]), middle))

    def _prior(self, block: Block) -> tuple[float, float]:
        """Accuracy, and how many labels this is worth."""
        known = block.compared >= COMPARED
        signals = self.signals.of(block)
        row = 0 if known else 1
        if not known:
            signals = without_dissent(signals)
        value = share(float(np.append(signals, 1.0) @ self.weights[row]))
        if narrowness(block.dropped) > 1 - COLLAPSED and not (known and 2 * block.same > block.compared):
            # One class alone is a collapse where source says something else; where nobody asked it, it may be a burst.
            return 1 / len(block.mean), float(np.exp(self.worth[row, 0])) if known else UNKNOWN
        return value, worth_of(self.worth[row], signals)


class Signals:
    """From answers to signals. The same arithmetic serves the device and the fit at export."""

    def __init__(self, bundle: Bundle) -> None:
        source = bundle.source
        self.weight = source["head.weight"].astype(np.float32)
        self.classes, width = self.weight.shape
        kept = np.random.default_rng(SEED).random((PASSES, width)) >= RATE
        self.change = (kept / (1 - RATE) - 1).astype(np.float32)
        """[passes, D], what dropout adds to features, as a share of them."""
        self.centres = source.get("class.mean")
        self.spread = np.maximum(source["class.std"], 1e-6) if "class.std" in source else None

        self.nothing = Block(np.zeros(self.classes), np.zeros(self.classes), np.zeros(3))

    @property
    def count(self) -> int:
        """Signals in all."""
        return 4 if self.centres is None else 6

    def init(self) -> Seen:
        """Nothing seen yet."""
        return Seen(self.nothing, self.nothing)

    def after(self, state: Seen, logits: Array, features: Array, source: Array | None = None) -> Seen:
        """With some more frames; an estimate is the finer in time, the fewer come at once.

        Args:
            logits: [N, K], the answers as they left.
            features: [N, D], what the head was given for them.
            source: [N, K], what the source weights give for the same frames; None where nobody asked.
        Returns: another state. Raises: DataError if something is not finite.
        """
        if not len(logits):
            return state
        if not all(np.isfinite(part).all() for part in (logits, features, () if source is None else source)):
            raise DataError("answers or features are not finite", remedy="leave such frames out of the estimate")
        fading = exp(-len(logits) / LABEL_MEMORY)
        state = replace(state, right=state.right * fading, labelled=state.labelled * fading)
        distances = self._distances(logits.argmax(axis=1), features)
        state = replace(state, distances=np.concatenate([state.distances, distances])[-LATEST:])
        if len(state.distances) >= FEWEST:
            near = distances <= STRANGE * np.median(state.distances)
            logits, features, distances = logits[near], features[near], distances[near]
            source = None if source is None else source[near]
        if state.current.count >= MEMORY // 2:
            state = replace(state, last=state.current, current=self.nothing)
        state = replace(state, current=state.current.plus(self._block(logits, features, float(distances.sum()))))
        return state if source is None else compared(state, logits.argmax(axis=1), source.argmax(axis=1))

    def _block(self, logits: Array, features: Array, distance: float) -> Block:
        answers, shares = logits.argmax(axis=1), softmax(logits)
        # The change that dropout makes, added to the answer: whatever else was done to that stays in it.
        changed, dropped = 0.0, np.zeros(self.classes)
        for change in self.change:
            other = logits + (features * change) @ self.weight.T
            changed += float((other.argmax(axis=1) != answers).sum()) / PASSES
            dropped += softmax(other).sum(axis=0) / PASSES
        sums = np.array([shares.max(axis=1).sum(), changed, distance])
        return Block(shares.sum(axis=0), dropped, sums, len(logits))

    def of(self, block: Block) -> Array:
        """[signals], of a block with frames in it."""
        confidence, doubt, distance = block.sums / block.count
        narrow = narrowness(block.mean)
        made = [_logit(confidence), _logit(doubt), narrow, _logit(block.same / block.compared if block.compared else 1)]
        if self.centres is not None:
            made += [np.log(distance + EDGE), narrow * np.log(distance + EDGE)]
        return np.array(made)

    def _distances(self, answers: Array, features: Array) -> Array:
        """[N], mean square in deviations of source features about the mean of the class; 0 where that is not known."""
        if self.centres is None:
            return np.zeros(len(answers))
        made: Array = np.square((features - self.centres[answers]) / self.spread).mean(axis=1, dtype=np.float64)
        return made


def offered(bundle: Bundle) -> bool:
    """True if the bundle holds what an estimate needs."""
    return all(name in bundle.source for name in (WEIGHTS, WORTH, "head.weight"))


def compared(state: Seen, answers: Array, source: Array) -> Seen:
    """With the classes [N] that were answered, and those that the source weights give to the same frames."""
    current = state.current
    same = current.same + int((answers == source).sum())
    return replace(state, current=replace(current, same=same, compared=current.compared + len(answers)))


def labelled(state: Seen, right: int, count: int) -> Seen:
    """With late labels: of `count` answers, so many were right. Raises: DataError if those are more."""
    if not 0 <= right <= count:
        raise DataError(f"{right} of {count} labelled answers are right", remedy="count each label once")
    return replace(state, right=state.right + right, labelled=state.labelled + count)


def bounds(right: Array, wrong: Array) -> tuple[Array, Array]:
    """Ends of the interval, [n] each, for [n] numbers of labels of each kind.

    Jeffreys' intervals: half a label of each kind is added, and where there is none of a kind there is no end.
    """
    from scipy.special import betaincinv  # half a second, which no start of an agent has to wait for

    low, high = (betaincinv(right + 0.5, wrong + 0.5, share) for share in ((1 - COVERAGE) / 2, (1 + COVERAGE) / 2))
    return np.where(right < 0.5, 0.0, low), np.where(wrong < 0.5, 1.0, high)


def worth_of(coefficients: Array, signals: Array) -> float:
    """How many labels an estimate is worth: fewer where it has more than one cause."""
    return float(np.exp(coefficients @ [1.0, ambiguity(signals)]))


def ambiguity(signals: Array) -> Array:
    """Of signals [..., signals]: narrow answers that source gives too are those of a burst, or of a bad source."""
    from scipy.special import expit

    made: Array = signals[..., NARROWNESS] * expit(signals[..., DISSENT])
    return made


def without_dissent(signals: Array) -> Array:
    """Signals [..., signals] where source was not asked."""
    made = signals.copy()
    made[..., DISSENT] = 0.0
    return made


def narrowness(total: Array) -> float:
    """One minus the entropy of a mean softmax, or of a sum [K], as a share of ln K."""
    return float(1 - entropy(total / total.sum()) / np.log(len(total)))


def share(logit: float) -> float:
    """0 to 1."""
    from scipy.special import expit

    return float(expit(np.clip(logit, -9, 9)))


def _logit(part: float) -> float:
    inside = min(max(part, EDGE), 1 - EDGE)
    return float(np.log(inside / (1 - inside)))
