"""A trial: is what was learned still better than nothing? Evidence from a few frames, and the verdict, without labels.

Two things are told apart. The learned part of the network (tail, prototypes, answers corrected by hand) may not
contradict what the network, with no more than its ports, is surest of: a collapse does, and garbage does, while a burst
of one class does not, for it is one class to both. Ports may not make activations stranger than source itself has them
on the same frames, by the statistics of the norms, nor answers so much less sure that little is left of them: some
networks, above all those of depthwise convolutions, do not bear the statistics of few frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.monitor.collapse import CONSTANT, class_entropy

Array = NDArray[Any]

FRAMES = 32
"""A verdict needs so many."""
EACH = 16
"""Frames of one look that are used, at most."""
AGREE = 0.6
"""Share of the half that the plain network is surest of, on which the learned one must agree with it."""
STRANGER, SLACK = 1.5, 0.05
"""Distance of the taps from source that is too much: so many times that of source itself, and so much above it."""
UNSURE = 0.7
"""Ports may not leave less than this share of source's certainty, counted from chance. Where ports help it is 0.8 or
more, also under noise that source is too sure about; where they destroy the answers it is 0.1 to 0.5."""
DIVERSE = 0.4
"""Class entropy, as a share of ln K, from which answers are not at all constant."""


@dataclass(frozen=True)
class Trial:
    """Evidence so far; [n] grows to `FRAMES` and a look more."""

    answers: Array
    """[n], classes answered with what was learned."""
    plain: Array
    """[n], classes answered without."""
    certainty: Array
    """[n], largest probability of the latter."""
    ours: Array
    """[2, channels], sums of mean and second moment of the taps with the ports in force; empty without taps."""
    source: Array
    """The same with source weights."""
    tapped: int = 0
    """Frames in these sums."""
    sure: tuple[float, float] = (0.0, 0.0)
    """Sums of the certainty, from chance, with the ports in force and with source weights."""
    votes: Array = field(default_factory=lambda: np.zeros(0))
    """[K], how often source answered each class; empty without ports."""

    @classmethod
    def empty(cls) -> Trial:
        nothing = np.zeros(0, np.int64)
        return cls(nothing, nothing, np.zeros(0), np.zeros((2, 0)), np.zeros((2, 0)))

    def with_taps(self, ours: tuple[Array, Array] | None, source: tuple[Array, Array] | None) -> Trial:
        """With the taps of some more frames."""
        if ours is None or source is None:
            return self
        sums = [np.stack([part.sum(axis=0) for part in taps]) for taps in (ours, source)]
        if self.ours.size:
            sums = [sums[0] + self.ours, sums[1] + self.source]
        return replace(self, ours=sums[0], source=sums[1], tapped=self.tapped + len(ours[0]))

    def with_certainty(self, ours: Array, source: Array) -> Trial:
        """With the logits [N, K] to some more frames, with ports and without."""
        chance = 1 / ours.shape[1]
        votes = np.bincount(source.argmax(axis=1), minlength=source.shape[1])
        return replace(
            self,
            votes=votes + self.votes if self.votes.size else votes,
            sure=(
                self.sure[0] + float((_certainty(ours) - chance).sum()),
                self.sure[1] + float((_certainty(source) - chance).sum()),
            ),
        )

    def with_answers(self, logits: Array, plain: Array) -> Trial:
        """With the answers [N, K] to some more frames."""
        return replace(
            self,
            answers=np.concatenate([self.answers, logits.argmax(axis=1)]),
            plain=np.concatenate([self.plain, plain.argmax(axis=1)]),
            certainty=np.concatenate([self.certainty, _certainty(plain)]),
        )

    def halved(self) -> Trial:
        """With its sums in single precision."""
        return replace(self, ours=self.ours.astype(np.float32), source=self.source.astype(np.float32))

    @property
    def is_complete(self) -> bool:
        return len(self.answers) >= FRAMES

    @property
    def agreement(self) -> float:
        """Share of agreement on the half that the plain network is surest of."""
        surest = np.argsort(-self.certainty, kind="stable")[: max(1, len(self.certainty) // 2)]
        return float((self.answers[surest] == self.plain[surest]).mean())

    @property
    def unsure(self) -> bool:
        """True if ports leave too little of source's certainty, unless that is worth nothing: a network that a shift
        has broken is often very sure of one and the same class."""
        ours, source = self.sure
        return ours < UNSURE * source and 2 * int(self.votes.max()) < int(self.votes.sum())

    def collapsed(self, classes: int) -> bool:
        """True if the answers are near-constant, and the plain ones to the same frames are not."""
        counts, plain = (np.bincount(part, minlength=classes) for part in (self.answers, self.plain))
        top = int(counts.argmax())
        constant = class_entropy(counts) < CONSTANT
        return constant and class_entropy(plain) > DIVERSE and plain[top] < len(self.plain) / 2

    def strange_taps(self, mean: Array, second: Array, starts: Array) -> bool:
        """True if the ports make activations stranger than source has them.

        Args:
            mean, second: [channels], moments of the source domain.
            starts: where each site begins.
        """
        if not self.ours.size:
            return False
        taps = (sums / self.tapped for sums in (self.ours, self.source))
        ours, source = (_distance(moments, mean, second, starts) for moments in taps)
        return ours > max(STRANGER * source, source + SLACK)


def _certainty(logits: Array) -> Array:
    """Largest probability of each row [N]."""
    made: Array = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    return made


def _distance(taps: Array, mean: Array, second: Array, starts: Array) -> float:
    """Mean over the sites of how far they are from source: shifts in standard deviations, and changes of log-variance.

    A site's distance is cut off, so that one broken channel does not hide what happens to all others.
    """
    variance = np.maximum(second - np.square(mean), 1e-6)
    now = np.maximum(taps[1] - np.square(taps[0]), 1e-9)
    moved = np.square(taps[0] - mean) / variance + np.square(np.log(now / variance)) / 2
    sizes = np.diff(np.append(starts, len(mean)))
    return float(np.minimum(np.add.reduceat(moved, starts) / sizes, 100.0).mean())
