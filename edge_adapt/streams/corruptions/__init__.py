"""The common image corruptions, in five severities, for anything from 8x8 digits to camera frames.

Names, order and constants are those of D. Hendrycks and T. Dietterich, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", ICLR 2019. Images whose shorter side is under 64 pixels
get the constants of CIFAR-10-C, larger ones those of ImageNet-C, which would destroy a small image. The
code is new and needs only numpy, scipy and Pillow. It keeps what decides how a network fares: the order of
the steps, the treatment of borders, and cutting (not rounding) to 8 bits.

It departs from the published generator in two places: frost is drawn instead of cut from photographs, and
lengths follow the size of the image below 224 pixels where that is not 32.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

from edge_adapt.errors import ConfigError, DataError, did_you_mean
from edge_adapt.streams.corruptions.constants import (
    CIFAR_C,
    CORRUPTIONS,
    EXTRA,
    IMAGENET_C,
    LARGE_SIDE,
    SMALL_BELOW,
    SMALL_SIDE,
    SMALLEST_SIDE,
)

if TYPE_CHECKING:
    from edge_adapt.streams.corruptions.effects import Bytes

__all__ = ["CORRUPTIONS", "EXTRA", "corrupt"]

LAST_FRAME = 2**63 - 1
VALUES_AT_ONCE = 2**18  # a block that fits the cache is faster than a long batch


def corrupt(images: Bytes, name: str, severity: int, *, seed: int, first_frame: int = 0) -> Bytes:
    """Corrupt a batch of images.

    Image i draws its random numbers from (seed, name, severity, first_frame + i) alone, so a stream may be
    cut into batches of any size and comes out the same.

    Args:
        images: uint8 [N, H, W, C], C of 1 or 3, sides of at least 8 pixels; not changed.
        name: one of `CORRUPTIONS` or `EXTRA`.
        severity: 1 (slight) to 5 (strong); 0 returns a copy.
        seed: 0 or more.
        first_frame: number of the first image in its stream, 0 or more.

    Returns:
        uint8 [N, H, W, C].

    Raises:
        ConfigError: unknown name, or a severity, seed or frame number out of range.
        DataError: images of another type or shape.
    """
    from edge_adapt.streams.corruptions.effects import EFFECTS, to_bytes, to_floats  # brings scipy, which takes seconds

    _check_setting(name, severity, seed, first_frame)
    _check_images(images)
    if severity == 0 or images.size == 0:
        return images.copy()
    count, height, width, channels = images.shape
    side = min(height, width)
    small = side < SMALL_BELOW
    setting = (CIFAR_C if small else IMAGENET_C)[name][severity - 1]
    scale = side / SMALL_SIDE if small else min(1.0, side / LARGE_SIDE)
    entropy = int(seed), zlib.crc32(name.encode()), int(severity)
    key = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
    result = np.empty_like(images)
    at_once = max(1, VALUES_AT_ONCE // (height * width * channels))
    for start in range(0, count, at_once):
        block = slice(start, min(start + at_once, count))
        # The frame number is the counter's highest word, so each frame has 2**192 draws of its own.
        counters = [int(first_frame) + i << 192 for i in range(block.start, block.stop)]
        generators = [np.random.Generator(np.random.Philox(key=key, counter=counter)) for counter in counters]
        result[block] = to_bytes(EFFECTS[name](to_floats(images[block]), setting, scale, generators))
    return result


def _check_setting(name: str, severity: int, seed: int, first_frame: int) -> None:
    if name not in (*CORRUPTIONS, *EXTRA):
        raise ConfigError(f"unknown corruption {name!r}", remedy=did_you_mean(str(name), (*CORRUPTIONS, *EXTRA)))
    _check_whole(f"severity of {name}", severity, 5, "0 leaves the image as it is, 1 is slight, 5 strong")
    _check_whole(f"seed of {name}", seed, None, "any plain int that is not negative will do")
    _check_whole(f"first_frame of {name}", first_frame, LAST_FRAME, "count the stream's frames from 0")


def _check_whole(what: str, value: object, top: int | None, remedy: str) -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < 0 or (top is not None and value > top):  # type: ignore[operator]
        wanted = "0 or more" if top is None else f"from 0 to {top}"
        raise ConfigError(f"{what} is {value!r}; expected a whole number, {wanted}", remedy=remedy)


def _check_images(images: object) -> None:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        kind = f"array of {images.dtype}" if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(
            f"images to corrupt are of type {kind}; expected a numpy array of uint8",
            remedy="pass the raw frames in 0..255, before any normalisation, as np.asarray(frames, np.uint8)",
        )
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise DataError(
            f"images to corrupt have shape {images.shape}; expected [frames, height, width, 1 or 3 channels]",
            remedy="add a missing axis with frame[None] or frames[..., None]; move channels with np.moveaxis",
        )
    height, width = images.shape[1:3]
    if min(height, width) < SMALLEST_SIDE:
        raise DataError(
            f"images to corrupt are {height} x {width} pixels; expected {SMALLEST_SIDE} or more on each side",
            remedy="enlarge them first, for example with np.repeat along both sides",
        )
