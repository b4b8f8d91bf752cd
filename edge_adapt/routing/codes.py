"""Signs of encodings, eight to a byte, and how alike two such codes are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.errors import DataError

Array = NDArray[Any]

_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1).astype(np.uint8)
_AT_ONCE = 2**22
"""Bytes of differences that are counted in one go."""


def packed(encodings: Array) -> Array:
    """[N, width] of any float type -> uint8 [N, ceil(width / 8)]: 1 where above 0, the first number in the top bit."""
    made: Array = np.packbits(encodings > 0, axis=1)
    return made


def similarity(codes: Array, known: Array, width: int) -> Array:
    """[N, M] float32, 1 for equal codes, -1 for opposite ones, about 0 for unrelated ones.

    Args:
        codes: uint8 [N, bytes].
        known: uint8 [M, bytes].
        width: signs of a code; bits of the last byte beyond them are 0 in all of them.
    Raises: DataError if the codes are of another length.
    """
    if codes.shape[1] != known.shape[1] or codes.shape[1] != -(-width // 8):
        raise DataError(
            f"codes have {codes.shape[1]} and {known.shape[1]} bytes, {width} signs take {-(-width // 8)}",
            remedy="compare codes of one encoder",
        )
    apart = np.empty((len(codes), len(known)), np.int64)
    rows = max(1, _AT_ONCE // max(known.size, 1))
    for start in range(0, len(codes), rows):
        differing = codes[start : start + rows, None] ^ known[None]
        apart[start : start + rows] = ones(differing).sum(axis=-1, dtype=np.int64)
    made: Array = (1 - 2 * apart / width).astype(np.float32)
    return made


def ones(values: Array) -> Array:
    """How many bits of each uint8 are 1, same shape."""
    made: Array = np.bitwise_count(values) if hasattr(np, "bitwise_count") else _ONES[values]
    return made
