"""Encoded images -> arrays. What is decoded may come from anybody: bounded in bytes and in pixels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.streams.live.protocol import BrokenFrameError

Array = NDArray[Any]

MAX_BYTES, MAX_PIXELS = 16 * 1024 * 1024, 4096 * 4096
FORMATS = ("JPEG", "PNG", "BMP")


def decode(data: bytes, name: str, *, channels: int = 3, max_bytes: int = MAX_BYTES) -> Array:
    """Pixels of a JPEG, PNG or BMP.

    Args:
        name: for errors.
        channels: 1 or 3, what the network takes.
    Returns: uint8, [H, W, 3] RGB, or [H, W] for one channel.
    Raises: BrokenFrameError if it is too large, damaged, cut short, or no image of these formats.
    """
    from PIL import Image  # only where images come in: a start waits for it

    if len(data) > max_bytes:
        raise BrokenFrameError(
            f"image {name} has {len(data)} bytes, at most {max_bytes} are decoded", remedy="send smaller images"
        )
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height <= MAX_PIXELS:  # known from the header; nothing is unpacked before this
                return np.array(image.convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # decoders meet damaged bytes with a dozen types, warnings made errors among them
        raise BrokenFrameError(f"image {name} cannot be decoded: {error}", remedy="send it again") from error
    raise BrokenFrameError(
        f"image {name} has {width} x {height} pixels, at most {MAX_PIXELS} are decoded", remedy="send smaller images"
    )
