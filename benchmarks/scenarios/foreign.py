"""Scenarios with foreign frames: images of another kind come in between, and are not scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.scenarios.domains import corrupted
from benchmarks.scenarios.stream import Array, Frames, Shift
from edge_adapt.errors import DataError
from edge_adapt.streams.data import Dataset

POOL = 1024
"""Foreign frames that there are at most; then they come again."""
NOISE = "noise"


def contaminated(
    data: Dataset,
    severity: int,
    seed: int,
    corruptions: Sequence[str],
    *,
    share: float,
    foreign: Array | None = None,
) -> Iterator[Shift]:
    """Each corruption over all frames in order, as in `continual`, with foreign frames at random places.

    Args:
        share: part of the stream that is foreign.
        foreign: images [M, H, W] or [M, H, W, C] of any size; None: noise.
    Raises: DataError if the images cannot be made like the frames.
    """
    pool: Array | None = None
    for number, shift in enumerate(corrupted(data, severity, seed, corruptions)):
        images = shift.images[:]
        if pool is None:
            pool = foreign_like(images, foreign, np.random.default_rng(seed))
        rng = np.random.default_rng([seed, number])
        count = len(images) + round(len(images) * share / (1 - share))
        genuine = np.ones(count, bool)
        genuine[rng.permutation(count)[: count - len(images)]] = False
        place = np.where(genuine, np.cumsum(genuine) - 1, rng.integers(len(pool), size=count))
        labels = None
        if shift.labels is not None:
            labels = np.full(count, -1)
            labels[genuine] = shift.labels
        yield Shift(shift.name, Frames((images, pool), np.where(genuine, 0, 1), place), labels, counts=genuine)


def foreign_images(data: Dataset) -> Array:
    """All images of a data set that are of one size; of several sizes, those of the first [M, ...]."""
    arrays = [data.images] if data.images is not None else list(data.shifts.values())
    return np.concatenate([array for array in arrays if array.shape[1:] == arrays[0].shape[1:]])


def foreign_like(images: Array, foreign: Array | None, rng: np.random.Generator) -> Array:
    """Foreign frames of the shape and type of `images` [N, ...]: at most `POOL`, drawn, and resized as needed.

    Raises: DataError if `foreign` cannot be made like them.
    """
    shape = images.shape[1:]
    if foreign is None:
        if images.dtype == np.uint8:
            return rng.integers(0, 256, (POOL, *shape), np.uint8)
        return rng.normal(images.mean(), images.std(), (POOL, *shape)).astype(images.dtype)
    if images.dtype != np.uint8 or foreign.dtype != np.uint8 or foreign.ndim not in (3, 4) or not len(foreign):
        raise DataError(
            f"foreign frames are {foreign.dtype} {foreign.shape}, genuine ones {images.dtype} {images.shape}; "
            "expected uint8 images on both sides",
            remedy="leave --foreign out for generated noise",
        )
    chosen = foreign[rng.permutation(len(foreign))[:POOL]]
    return np.stack([_resized(image, shape) for image in chosen])


def _resized(image: Array, shape: tuple[int, ...]) -> Array:
    """A grey or colour image in another size, with as many channels as `shape` [H, W] or [H, W, C] has."""
    from PIL import Image

    channels = shape[2] if len(shape) == 3 else 1
    picture = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    picture = picture.convert("RGB" if channels == 3 else "L")
    if picture.size != (shape[1], shape[0]):
        picture = picture.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    made: Array = np.asarray(picture).reshape(shape)
    return made
