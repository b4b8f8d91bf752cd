"""A frame as a small PNG, made when somebody asks."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]
SIDE = 512
"""Longest side in pixels; a larger frame is made smaller, a smaller one is left for the browser to enlarge."""


def png(frame: Array) -> bytes | None:
    """Encode [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; None if it is no picture."""
    if frame.ndim == 3 and frame.shape[2] == 1:
        frame = frame[:, :, 0]
    if frame.size == 0 or frame.ndim not in (2, 3) or (frame.ndim == 3 and frame.shape[2] not in (3, 4)):
        return None
    stride = -(-max(frame.shape[:2]) // (4 * SIDE))  # a huge frame is first made smaller the cheap way
    image = Image.fromarray(_bytes(frame[::stride, ::stride]))
    image.thumbnail((SIDE, SIDE))
    kept = BytesIO()
    image.save(kept, "PNG", compress_level=1)
    return kept.getvalue()


def _bytes(frame: Array) -> Array:
    """As uint8: values other than bytes are stretched from their lowest to their highest."""
    if frame.dtype == np.uint8:
        return np.ascontiguousarray(frame)
    values = np.nan_to_num(frame.astype(np.float32), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    return ((values - low) * (255.0 / (high - low) if high > low else 0.0)).astype(np.uint8)
