"""One bit for each number of a matrix: its mean, its spread, and on which side of the mean each number lies.

Jie et al., "Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy", ICCV 2023:
mean -+ 0.6745 sigma, the medians of the two halves of a normal distribution. For storage and transfer of finished
adapters; one that still learns needs its full numbers, for a step is far smaller than the distance of the levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MEDIAN = np.float32(0.6745)
"""Of the absolute value of a standard normal number."""


@dataclass(frozen=True, eq=False)
class OneBit:
    """A packed tensor."""

    shape: tuple[int, ...]
    mean: np.float32
    sigma: np.float32
    signs: Array
    """uint8, eight numbers in each, the first in the highest bit: 1 is at or above the mean."""

    @property
    def nbytes(self) -> int:
        """Of the signs and the two levels."""
        return self.signs.nbytes + self.mean.nbytes + self.sigma.nbytes


def pack(values: Array) -> OneBit:
    """[...] float -> 1 bit each. A constant tensor comes back exactly; an empty one is refused by NumPy's mean."""
    mean = np.float32(values.mean(dtype=np.float64))
    sigma = np.float32(values.std(dtype=np.float64))
    return OneBit(values.shape, mean, sigma, np.packbits((values >= mean).ravel()))


def unpack(packed: OneBit) -> Array:
    """The two levels in the packed shape, float32; the same bits on every machine."""
    count = int(np.prod(packed.shape))
    high = np.unpackbits(packed.signs, count=count).astype(bool).reshape(packed.shape)
    step = packed.sigma * MEDIAN
    return np.where(high, packed.mean + step, packed.mean - step).astype(np.float32)


def worth_packing(values: Array) -> bool:
    """Matrices and kernels; a vector or a scale is small, and every number of it counts."""
    return values.ndim >= 2


def size_bytes(tensors: Mapping[str, Array], *, bits: int) -> int:
    """Of the numbers alone, without names: in float32 (`bits` 32), or with every matrix in one bit (`bits` 1)."""
    return sum(
        -(-value.size // 8) + 8 if bits == 1 and worth_packing(value) else 4 * value.size for value in tensors.values()
    )
