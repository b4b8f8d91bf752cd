"""Scenarios of domains: which corruption comes when, whether it comes back, and how it sets in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.plans.images import corrupt
from benchmarks.scenarios.stream import Array, Shift, joined
from edge_adapt.errors import DataError
from edge_adapt.streams.corruptions import CORRUPTIONS
from edge_adapt.streams.data import Dataset

FEW = ("gaussian_noise", "fog", "contrast")
"""Domains of `recurring` and `burst` when none are named: of three families, so that they can be told apart."""
RETURNS = 5
"""How often each domain of `recurring` comes back."""
VISIT = 640
"""Frames of a visit in `recurring`, at most: with five returns, each is once among the first 128."""
STRETCH = 512
"""Frames of a stretch in `clean_return`, at most."""
CLEAN = "clean"
"""Name of the domain without corruption, also as a ready-made shift."""


def corrupted(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """Each corruption over all frames, in the field's order; ready-made shifts as they are stored."""
    if data.shifts:
        for name, images in data.shifts.items():
            if name in corruptions or name not in CORRUPTIONS:
                yield Shift(name, images, data.labels_of(name))
        return
    images = images_to_corrupt(data)
    for name in corruptions:
        yield Shift(name, corrupt(images, name, severity, seed=seed), data.labels)


def natural(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """The data as stored, in order, nothing added."""
    if data.images is not None:
        yield Shift(data.name, data.images, data.labels)
    for name, images in data.shifts.items():
        yield Shift(name, images, data.labels_of(name))


def gradual(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """Each corruption over all frames, its severity going from 1 up to the one asked for and down again.

    Every step has an equal part of the frames; in the field's own setting each has all of them.
    """
    images = images_to_corrupt(data)
    ramp = [*range(1, severity), *range(severity, 0, -1)]
    ends = np.linspace(0, len(images), len(ramp) + 1).round().astype(int)
    for name in corruptions:
        made = np.empty_like(images)
        for level, start, end in zip(ramp, ends, ends[1:], strict=False):
            made[start:end] = corrupt(images[start:end], name, level, seed=seed, first_frame=int(start))
        yield Shift(name, made, data.labels)


def recurring(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """A B C A B C ...: each domain comes and returns five times.

    A domain has `VISIT` frames, drawn at random, and shows all of them at every visit, beginning a fifth later each
    time: so what comes first at a visit and what comes later are, over the returns, the same frames.
    """
    domains = list(drawn(data, severity, seed, corruptions, VISIT))
    for visit in range(RETURNS + 1):
        for domain in domains:
            count = len(domain.images)
            yield domain.taken((np.arange(count) + visit * count // RETURNS) % max(1, count))


def clean_return(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """Clean frames, a corruption, clean frames, another corruption, and so on; clean frames come last."""
    clean = _clean(data)
    order = np.random.default_rng([seed, 1]).permutation(len(clean.images))
    stretch = min(STRETCH, len(order))

    def clean_stretch(number: int) -> Shift:
        return clean.taken(order[(number * stretch + np.arange(stretch)) % max(1, len(order))])

    yield clean_stretch(0)
    shifts = (shift for shift in drawn(data, severity, seed, corruptions, STRETCH) if shift.name != CLEAN)
    for number, shift in enumerate(shifts, start=1):
        yield shift
        yield clean_stretch(number)


def mixed_domains(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """All frames of all corruptions in one random order, so that every frame is of a random domain."""
    whole = joined("mixed", list(corrupted(data, severity, seed, corruptions)))
    yield whole.taken(np.random.default_rng(seed).permutation(len(whole.images)))


def mixed_return(data: Dataset, severity: int, seed: int, corruptions: Sequence[str]) -> Iterator[Shift]:
    """Each domain by itself, and then all of them together: other frames, every one of a random domain."""
    domains = list(drawn(data, severity, seed, corruptions, VISIT))
    halves = [len(domain.images) // 2 for domain in domains]
    for domain, half in zip(domains, halves, strict=True):
        yield domain.taken(np.arange(half))
    rest = [domain.taken(np.arange(half, len(domain.images))) for domain, half in zip(domains, halves, strict=True)]
    whole = joined("mixed", rest)
    yield whole.taken(np.random.default_rng([seed, 2]).permutation(len(whole.images)))


def drawn(data: Dataset, severity: int, seed: int, corruptions: Sequence[str], frames: int) -> Iterator[Shift]:
    """Each corruption over at most so many frames, drawn at random; only these are corrupted."""
    if not data.shifts:
        data = data[np.random.default_rng(seed).permutation(len(data))[:frames]]
        yield from corrupted(data, severity, seed, corruptions)
        return
    for number, shift in enumerate(corrupted(data, severity, seed, corruptions)):
        yield shift.taken(np.random.default_rng([seed, number]).permutation(len(shift.images))[:frames])


def images_to_corrupt(data: Dataset) -> Array:
    """[N, H, W, C] uint8. Raises: DataError if the data have none."""
    if data.images is None:
        raise DataError(
            f"{data.name} holds ready-made shifts, which have one severity each",
            remedy="give the images that they were made of, as `images`",
        )
    if data.images.dtype.name != "uint8":
        raise DataError(
            f"{data.name} holds {data.images.dtype} frames; corruptions are defined on uint8 images",
            remedy="use --scenario natural",
        )
    return data.images[..., None] if data.images.ndim == 3 else data.images


def _clean(data: Dataset) -> Shift:
    """The frames without corruption. Raises: DataError if the data have none."""
    if data.images is not None:
        return Shift(CLEAN, images_to_corrupt(data), data.labels)
    if CLEAN in data.shifts:
        return Shift(CLEAN, data.shifts[CLEAN], data.labels_of(CLEAN))
    raise DataError(
        f"{data.name} holds shifts and no clean frames",
        remedy=f"give the images that they were made of, or add them as a shift named {CLEAN!r}",
    )
