"""Sensor health: frames that must not be learned from, found before the network sees them."""

from __future__ import annotations

import zlib
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import InputSpec

Array = NDArray[Any]
Reason = Literal["shape", "dtype", "nan", "constant", "frozen"]

FROZEN_AFTER = 8
"""Identical frames in a row; noise makes two frames of a working sensor differ."""
FLAT = 0.01
"""Standard deviation, in units of the network's input, below which a channel shows nothing: 0.6 grey levels of 255 at
a usual `std` of 0.25."""
ABSURD = 100.0
"""Magnitude of the network's input that no correct scale gives: 0..255 fed to a network that takes 0..1. Only told
where the network has a `std` of its own; without one its numbers may be of any size."""
SLIM = 8
"""Long side over short side of an image that is not resized any more: scaled up, it would fill the memory."""
GRID, HASHED = 64, 256 * 1024
"""Positions along each side that are looked at, and bytes that are compared, at most."""


class SensorCheck:
    """Looks at every frame of one stream, in order; remembers a hash and a count."""

    def __init__(self, spec: InputSpec, *, frozen_after: int = FROZEN_AFTER) -> None:
        self.spec, self.frozen_after = spec, frozen_after
        self._scale = np.float32(spec.scale) * np.broadcast_to(np.asarray(spec.std, np.float32), (spec.channels,))
        self._zero = np.float32(spec.scale) * np.broadcast_to(np.asarray(spec.mean, np.float32), (spec.channels,))
        self._absurd = ABSURD if any(value != 1 for value in spec.std) else np.inf
        self._hash: int | None = None
        self._same = 0

    def reason(self, image: Array) -> Reason | None:
        """Why a raw frame is no good, or None.

        `shape`, `dtype`: the network cannot take it, or its values are on another scale. `nan`: NaN or infinite.
        `constant`: nothing to see in any channel. `frozen`: as many identical frames in a row as `frozen_after` says.
        """
        if not fits(self.spec, image):
            return "shape"
        if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
            return "dtype"
        if image.dtype != np.uint8 and not _finite(image):
            return "nan"
        return self._content(image) or self._frozen(image)

    def _content(self, image: Array) -> Reason | None:
        seen = self._grid(image)
        if np.abs((seen - self._zero) / self._scale).max() > self._absurd:
            return "dtype"
        if (seen.std(axis=0) / self._scale).max() >= FLAT:
            return None
        # Values of 0..1 for a network that takes 0..255 look flat, but are not.
        return "dtype" if image.dtype != np.uint8 and seen.std(axis=0).max() >= FLAT else "constant"

    def _grid(self, image: Array) -> Array:
        """[positions, C] float64, every so many of them."""
        channels_first = image.shape == self.spec.shape and self.spec.layout != "NHWC"
        if not channels_first:
            image = np.moveaxis(image, -1, 0) if image.ndim == len(self.spec.shape) else image[None]
        steps = tuple(slice(None, None, max(1, side // GRID)) for side in image.shape[1:])
        return image[(slice(None), *steps)].reshape(len(image), -1).T.astype(np.float64)

    def _frozen(self, image: Array) -> Reason | None:
        rows = max(1, -(-image.nbytes // HASHED))
        found = zlib.crc32(np.ascontiguousarray(image[::rows]).tobytes(), len(image))
        self._same = self._same + 1 if found == self._hash else 1
        self._hash = found
        return "frozen" if self._same >= self.frozen_after else None


def fits(spec: InputSpec, image: Array) -> bool:
    """True for shapes that `Preprocess` takes: the network's own, and images that only need turning or resizing."""
    shape = image.shape
    if shape == spec.shape or (spec.shape[0] == 1 and shape == spec.shape[1:]):
        return True
    if spec.layout != "NCHW" or len(shape) not in (2, 3):
        return False
    height, width, channels = *shape[:2], (shape[2] if len(shape) == 3 else 1)
    wanted = (spec.shape[1], spec.shape[2])
    if channels != spec.shape[0]:
        return False
    if (height, width) == wanted:
        return True
    crop = spec.resize[1] if spec.resize is not None else None
    return image.dtype == np.uint8 and wanted == (crop, crop) and 0 < max(height, width) <= SLIM * min(height, width)


def _finite(image: Array) -> bool:
    """False for NaN, infinite, or too large for the network's float32."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(image.astype(np.float32, copy=False)).all())
