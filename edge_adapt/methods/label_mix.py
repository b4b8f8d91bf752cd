"""Which labels a stream showed lately, as far as the answers tell, and whether they come in runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.probabilities import perplexity

Array = NDArray[Any]

DOUBT = 0.05
"""Added to agreement beyond chance and to its most: while one class alone was seen, runs are assumed, not denied."""


@dataclass(frozen=True)
class LabelMix:
    """A few numbers a class, whatever the length of the stream."""

    share: Array
    """[K], mean answer over the last frames that were looked at."""
    last: Array
    """[K], the newest answer."""
    agreement: float = 0.0
    """How likely two frames that follow each other have the same label, over the same frames."""
    frames: int = 0

    @classmethod
    def unseen(cls, classes: int) -> LabelMix:
        """Before the first frame."""
        return cls(np.zeros(classes), np.zeros(classes))


def noticed(mix: LabelMix, answers: Array, memory: int) -> LabelMix:
    """Take in more answers, probabilities [N, K] in order of arrival; `memory` frames are remembered."""
    frames = len(answers)
    pairs = np.sum(np.concatenate([mix.last[None], answers[:-1]]) * answers, axis=1)
    pairs = pairs if mix.frames else pairs[1:]
    rate = frames / min(mix.frames + frames, memory) if frames < memory else 1.0
    agreement = mix.agreement
    if len(pairs):
        agreement += (rate if mix.frames > 1 else 1.0) * (float(pairs.mean()) - agreement)
    return LabelMix(
        share=mix.share + rate * (answers.mean(axis=0) - mix.share),
        last=answers[-1],
        agreement=agreement,
        frames=min(mix.frames + frames, memory),
    )


def runs(mix: LabelMix) -> float:
    """0 where labels follow each other by chance, 1 where each is the one before: agreement beyond that of chance.

    A stream that is shifted so far that one class swallows the others agrees as often by chance, so it shows no runs.
    """
    if mix.frames < 2:
        return 1.0
    chance = float(np.sum(np.square(mix.share)))
    return float(np.clip((mix.agreement - chance + DOUBT) / (1 - chance + DOUBT), 0.0, 1.0))


def breadth(mix: LabelMix, prior: Array) -> float:
    """How many classes were seen, of those that source has, both as perplexity; 1 at most."""
    return min(1.0, perplexity(mix.share) / perplexity(prior))
