"""The hyperdimensional encoder: what a frame looks like inside the network, as one long vector of unit-length parts.

After Wilson et al., "Hyperdimensional Feature Fusion for Out-of-Distribution Detection", WACV 2023: pooled vectors of
several layers are projected by fixed semi-orthogonal matrices and summed; classes are sums of their frames. Otherwise
than there, each channel's own mean is removed, each layer has unit length before the sum, so that wide and late layers
do not drown the others, and of wide layers some channels are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.errors import ConfigError, DataError

Array = NDArray[Any]

WIDTH = 1024
MOST = 16
"""Channels of a layer that are encoded. On ResNet-20 as good as all (98 to 99 in 100 windows of 16 frames), and what
makes encoding cheap on networks with thousands."""
ENTRIES = "encoder.mean", "encoder.spread", "encoder.source", "encoder.frames"
"""What a bundle holds of it."""


@dataclass(frozen=True)
class Encoder:
    """Moments of every norm site -> one vector of length `width`, the same on every device for the same seed."""

    sizes: tuple[int, ...]
    """Channels of each layer, in the order of the tap vectors."""
    mean: Array
    """[2, chosen channels], source's mean and log standard deviation of each channel."""
    spread: Array
    """[2, chosen channels], how much one frame's differ from that in the source domain, as standard deviation."""
    width: int = WIDTH
    seed: int = 0
    source: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    """[width], mean encoding of the source frames; empty if it was not asked for."""
    frames: int = 0
    """Source frames that it is the mean of."""

    def __post_init__(self) -> None:
        if 2 * max(self.chosen, default=0) > self.width:
            raise ConfigError(
                f"width is {self.width}, less than the {2 * max(self.chosen)} numbers that a layer gives",
                remedy="no fewer dimensions than numbers to project",
            )

    @classmethod
    def fitted(cls, taps: tuple[Array, Array], sizes: Sequence[int], *, width: int = WIDTH, seed: int = 0) -> Encoder:
        """From the taps of source frames: mean and second moment, each [N, channels]."""
        vectors = _vectors(taps, _columns(sizes, seed))
        made = cls(tuple(sizes), vectors.mean(axis=0), vectors.std(axis=0) + 1e-6, width, seed)
        return replace(made, source=made(taps).mean(axis=0), frames=len(vectors))

    @classmethod
    def of(cls, bundle: Bundle) -> Encoder:
        """As it was fitted when the bundle was made. Raises: ConfigError for a bundle without it."""
        stored = [bundle.source.get(name) for name in ENTRIES]
        if any(part is None for part in stored):
            raise ConfigError(
                f"bundle {bundle.manifest.name!r} has no encoder, by which domains are told apart",
                remedy="export it again with --calibration",
            )
        mean, spread, source, frames = (np.asarray(part) for part in stored)
        sizes = tuple(site.channels for site in bundle.manifest.sites)
        return cls(sizes, mean, spread, source.shape[0], source=source, frames=int(frames[0]))

    def stored(self) -> dict[str, Array]:
        """What a bundle keeps, by name."""
        return dict(zip(ENTRIES, (self.mean, self.spread, self.source, np.array([self.frames])), strict=True))

    def __call__(self, taps: tuple[Array, Array]) -> Array:
        """Encodings [N, width] of unit length.

        Args:
            taps: mean and second moment of every site's normalised input, each [N, channels].
        Raises: DataError if the taps are of another network.
        """
        if taps[0].shape[1] != sum(self.sizes):
            raise DataError(
                f"taps have {taps[0].shape[1]} channels, the encoder was made for {sum(self.sizes)}",
                remedy="use taps of the bundle that the encoder was fitted on",
            )
        vectors = (_vectors(taps, self.columns) - self.mean) / self.spread
        # The projection keeps lengths, so that each layer's part may be made one long before it.
        lengths = np.sqrt(np.add.reduceat(np.square(vectors).sum(axis=1), self.starts, axis=1))
        vectors /= np.repeat(np.maximum(lengths, 1e-12), self.chosen, axis=1)[:, None]
        flat = vectors.reshape(len(vectors), -1).astype(np.float32)
        return unit(np.ascontiguousarray((self.stacked @ flat.T).T))

    @property
    def chosen(self) -> tuple[int, ...]:
        """Channels of each layer that are encoded."""
        return tuple(min(size, MOST) for size in self.sizes)

    @cached_property
    def columns(self) -> Array:
        """Their places in the tap vectors, in order."""
        return _columns(self.sizes, self.seed)

    @cached_property
    def starts(self) -> Array:
        """Place of each layer's first channel among those encoded."""
        return np.cumsum((0, *self.chosen))[:-1]

    @cached_property
    def stacked(self) -> Array:
        """[width, 2 * chosen channels], all projections as one: columns of the means, then those of the deviations.

        This way around the product with a few frames takes half the time.
        """
        halves = [projection.reshape(2, -1, self.width) for projection in self.projections]
        made: Array = np.ascontiguousarray(np.concatenate(halves, axis=1).reshape(-1, self.width).T)
        return made

    @cached_property
    def projections(self) -> tuple[Array, ...]:
        """One matrix [2 chosen channels, width] for each layer, with orthonormal rows."""
        made = []
        for index, size in enumerate(self.chosen):
            draws = np.random.default_rng([self.seed, index]).standard_normal((self.width, 2 * size))
            basis, upper = np.linalg.qr(draws)
            made.append((basis * np.sign(np.diag(upper))).T.astype(np.float32))
        return tuple(made)


def descriptors(encodings: Array, labels: Array, classes: int) -> Array:
    """[classes, width] of unit length: the sum of the encodings [N, width] of each class; zero for one without any."""
    sums = np.zeros((classes, encodings.shape[1]), np.float64)
    np.add.at(sums, labels, encodings)
    return unit(sums).astype(np.float32)


def domain_descriptor(encodings: Array) -> Array:
    """[width] of unit length: what the frames of a domain have in common, away from source.

    Source itself has none, for its mean is what the encoder takes off: it shows in a low cosine with every other.
    """
    made: Array = unit(encodings.mean(axis=0, keepdims=True))[0]
    return made


def familiarity(encodings: Array, known: Array) -> Array:
    """[N], the largest cosine of each encoding [N, width] with a descriptor [classes, width]."""
    made: Array = (encodings @ known.T).max(axis=1)
    return made


def ood_score(encodings: Array, known: Array) -> Array:
    """[N], larger is stranger, 0 to 2: one less the familiarity."""
    made: Array = 1 - familiarity(encodings, known)
    return made


def unit(rows: Array) -> Array:
    """Each row [N, D] with length 1; a row of zeros stays."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    made: Array = rows / np.maximum(length, 1e-12)
    return made


def _columns(sizes: Sequence[int], seed: int) -> Array:
    """Places in the tap vectors of the channels that are encoded, drawn once."""
    made, start = [], 0
    for index, size in enumerate(sizes):
        draw = np.random.default_rng([seed, index, size]).permutation(size)[:MOST]
        made.append(start + np.sort(draw))
        start += size
    return np.concatenate(made) if made else np.zeros(0, np.int64)


def _vectors(taps: tuple[Array, Array], columns: Array) -> Array:
    """[N, 2, chosen channels], mean and log standard deviation of every channel that is encoded."""
    mean, second = (part[:, columns] for part in taps)
    deviation = np.sqrt(np.maximum(second - np.square(mean), 1e-6))
    return np.stack([mean, np.log(deviation)], axis=1)
