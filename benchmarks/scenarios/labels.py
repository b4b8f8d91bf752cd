"""Scenarios of labels: which classes are frequent, and which come in runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from benchmarks.scenarios.domains import corrupted
from benchmarks.scenarios.stream import Array, Shift, joined, labels_of
from edge_adapt.streams.data import Dataset

Order = Literal["forward", "uniform", "backward"]

RUN = 40
"""Frames of one class in a row, in `bursts`."""
BURST = 2000
"""Frames of one class in a row, in `burst`."""
DELTA, SLOTS = 0.1, 100
"""Concentration of the Dirichlet distribution in the `correlated` scenarios, and in how many parts it divides the
stream at most; below that, as many as there are classes."""
DRIFT = 100.0
"""How many times as often the most frequent class comes as the rarest one, at any time of `label_shift`."""


def long_tailed(
    data: Dataset, severity: int, seed: int, corruptions: Sequence[str], *, imbalance: float, order: Order
) -> Iterator[Shift]:
    """Each corruption over a part of the frames, drawn so that some classes are frequent and some are rare.

    Class k of K has a share in proportion to imbalance^(-k / (K - 1)), as in CIFAR-10-LT (Cao et al., NeurIPS 2019):
    `forward` as it is, `backward` with the classes reversed, `uniform` with as many frames, all classes alike.
    Every shift has the same profile, with other frames, in random order.
    """
    for number, shift in enumerate(corrupted(data, severity, seed, corruptions)):
        labels = labels_of(data, shift)
        present, counts = np.unique(labels, return_counts=True)
        profile = imbalance ** (-np.arange(len(present)) / max(1, len(present) - 1))
        if order == "backward":
            profile = profile[::-1]
        if order == "uniform":
            profile = np.full(len(present), profile.mean())
        rng = np.random.default_rng([seed, number])
        wanted = np.maximum(1, np.round(profile * counts.min())).astype(int)
        chosen = [
            rng.permutation(np.flatnonzero(labels == label))[:frames]
            for label, frames in zip(present, wanted, strict=True)
        ]
        yield shift.taken(rng.permutation(np.concatenate(chosen)))


def bursts(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """Each corruption over all frames, in runs of `RUN` frames of one class; the classes take turns at random."""
    for number, shift in enumerate(corrupted(data, severity, seed, corruptions)):
        labels = labels_of(data, shift)
        rng = np.random.default_rng([seed, number])
        runs: list[Array] = []
        for label in np.unique(labels):
            frames = rng.permutation(np.flatnonzero(labels == label))
            runs.extend(frames[start : start + RUN] for start in range(0, len(frames), RUN))
        yield shift.taken(np.concatenate([runs[index] for index in rng.permutation(len(runs))]))


def correlated(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """Each corruption over all frames, whose labels come in runs as a Dirichlet distribution draws them."""
    for number, shift in enumerate(corrupted(data, severity, seed, corruptions)):
        yield shift.taken(dirichlet_order(labels_of(data, shift), np.random.default_rng([seed, number])))


def mixed_domains_correlated(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """All frames of all corruptions, every frame of a random domain, and the labels in runs."""
    whole = joined("mixed", list(corrupted(data, severity, seed, corruptions)))
    yield whole.taken(dirichlet_order(labels_of(data, whole), np.random.default_rng(seed)))


def dirichlet_order(labels: Array, rng: np.random.Generator) -> Array:
    """An order of frames whose labels are correlated in time, as indices [N].

    The stream has as many slots as classes; each class spreads its frames over the slots by its own draw from a
    Dirichlet distribution, and within a slot the classes follow each other in random order.
    Source: the streams of NOTE (Gong et al., NeurIPS 2022) and RoTTA (Yuan et al., CVPR 2023), with delta 0.1.
    """
    present = np.unique(labels)
    slots: list[list[Array]] = [[] for _ in range(min(len(present), SLOTS))]
    for label in present:
        frames = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet([DELTA] * len(slots))
        for slot, part in zip(slots, np.split(frames, (np.cumsum(shares)[:-1] * len(frames)).astype(int)), strict=True):
            slot.append(part)
    return np.concatenate([slot[index] for slot in slots for index in rng.permutation(len(slot))])


def label_shift(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """Each corruption over all frames, while the frequencies of the classes drift.

    Every class is the most frequent one once in every shift, in random order. At its time it comes `DRIFT` times as
    often as half a shift before or after, and in between in proportion to DRIFT^(-2 distance), with the distance in
    shifts and around the end of the shift.
    """
    for number, shift in enumerate(corrupted(data, severity, seed, corruptions)):
        labels = labels_of(data, shift)
        rng = np.random.default_rng([seed, number])
        present, classes = np.unique(labels, return_inverse=True)
        peaks = rng.permutation(len(present))[classes] / len(present)
        # The inverse of the distribution of that density, cut off at half a shift.
        aside = -np.log1p(-rng.random(len(labels)) * (1 - 1 / DRIFT)) / (2 * np.log(DRIFT))
        times = (peaks + aside * rng.choice((-1, 1), len(labels))) % 1
        yield shift.taken(np.argsort(times, kind="stable"))


def burst(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """Each corruption over all frames in random order; halfway, `BURST` frames of one class come in between.

    Where the class has fewer frames, they come again. The burst is a shift of its own, of the same domain.
    """
    for number, shift in enumerate(corrupted(data, severity, seed, corruptions)):
        labels = labels_of(data, shift)
        rng = np.random.default_rng([seed, number])
        order = rng.permutation(len(labels))
        of_one = rng.permutation(np.flatnonzero(labels == rng.choice(np.unique(labels))))
        yield shift.taken(order[: len(order) // 2])
        run = shift.taken(np.resize(of_one, BURST))
        yield Shift(f"{shift.name} burst", run.images, run.labels, np.full(BURST, shift.name))
        yield shift.taken(order[len(order) // 2 :])
