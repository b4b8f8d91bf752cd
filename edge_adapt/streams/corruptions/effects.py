"""One function for each corruption.

Each takes float32 images [N, H, W, C] in 0..1 with C of 1 or 3, its row of the constants, the scale of the
images (their shorter side over the side for which the constants were published), and one random generator
for each frame. It returns float32 of the same shape; values may leave 0..1. A frame comes out the same
alone or in a batch: each draws from its own generator, and no sum runs across frames or takes another order
with their count.

"The reference" is the generator that Hendrycks and Dietterich published with their paper (see `constants`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage, signal

from edge_adapt.streams.corruptions.constants import SMALL_BELOW, Setting
from edge_adapt.streams.corruptions.frost import FROST_CHOICES, FROST_TILE, frost_tile

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Coordinates = npt.NDArray[np.float64]
Generators = list[np.random.Generator]
Effect = Callable[[Floats, Setting, float, Generators], Floats]

LUMINANCE = (np.float32(0.299), np.float32(0.587), np.float32(0.114))  # ITU-R BT.601


def to_bytes(x: Floats) -> Bytes:
    """Cut to 8 bits, as the reference does; the small addend keeps k/255 at k."""
    return (np.clip(x, 0, 1) * np.float32(255) + np.float32(1e-3)).astype(np.uint8)


def to_floats(x: Bytes) -> Floats:
    return x.astype(np.float32) / np.float32(255)


def _drawn(generators: Generators, draw: Callable[[np.random.Generator], Any]) -> npt.NDArray[Any]:
    """One draw for each frame, stacked along axis 0."""
    return np.stack([draw(generator) for generator in generators])


# --- noise ----------------------------------------------------------------------------------------


def _gaussian_noise(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    (deviation,) = setting
    noise: Floats = _drawn(generators, lambda g: g.standard_normal(x.shape[1:], np.float32))
    return x + np.float32(deviation) * noise


def _speckle_noise(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    return x + x * _gaussian_noise(np.zeros_like(x), setting, scale, generators)


def _shot_noise(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    (photons,) = setting
    counts = np.stack([g.poisson(photons * frame) for g, frame in zip(generators, x, strict=True)])
    return counts.astype(np.float32) / np.float32(photons)


def _impulse_noise(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    """Salt and pepper in equal parts, each channel on its own."""
    (share,) = setting
    chance: Floats = _drawn(generators, lambda g: g.random(x.shape[1:], np.float32))
    salted = np.where(chance < share / 2, np.float32(1), x)
    return np.where(chance > 1 - share / 2, np.float32(0), salted)


# --- blur -----------------------------------------------------------------------------------------


def _smooth(x: Floats, sigma: float) -> Floats:
    """Gaussian blur of [N, H, W, ...] along H and W; border pixels repeated."""
    sigmas = (0, sigma, sigma) + (0,) * (x.ndim - 3)
    blurred: Floats = ndimage.gaussian_filter(x, sigmas, mode="nearest")
    return blurred


def _gaussian_blur(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    return _smooth(x, setting[0] * scale)


def _defocus_blur(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    """A disk with a softened edge; border mirrored without repeating the border pixel."""
    kernel = _disk(*setting, scale)[..., None]
    reach = len(kernel) // 2
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="reflect")
    blurred = np.empty_like(x)
    for i, frame in enumerate(padded):
        blurred[i] = signal.fftconvolve(frame, kernel, mode="valid", axes=(0, 1))
    return blurred


@lru_cache(maxsize=16)
def _disk(radius: float, edge_sigma: float, scale: float) -> Floats:
    """A kernel [K, K] of sum 1, radius and sigma in pixels at scale 1."""
    radius *= max(1.0, scale)
    taps = 1 if radius <= 8 else 2  # half width of the softening
    line = np.arange(-math.floor(radius) - taps, math.floor(radius) + taps + 1)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).astype(np.float32)
    soft = np.exp(-(np.arange(-taps, taps + 1) ** 2) / (2 * edge_sigma**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, soft / soft.sum(), axis, mode="constant")
    if scale < 1:  # a disk under one pixel would blur nothing: shrink the finished one, weights shared out
        shared = np.clip(1 - np.abs(line[:, None] - line * scale), 0, None).astype(np.float32)
        disk = shared @ disk @ shared.T
    normed: Floats = disk / disk.sum()
    return normed


def _glass_blur(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    """Pixels displaced at random, between two Gaussian blurs.

    The reference walks from the bottom right to the top left and sets each pixel to one drawn from a window
    around it (it means to swap the two, but copies). `copied_from` gives that walk's result without
    walking.
    """
    sigma, wanted, rounds = setting[0] * scale, setting[1] * scale, int(setting[2])
    reach = math.ceil(wanted)
    count, height, width, channels = x.shape
    here = np.arange(height * width).reshape(height, width)
    inner = slice(reach + 1, height - reach + 1), slice(reach + 1, width - reach + 1)
    inside = here[inner]
    x = to_floats(to_bytes(_smooth(x, sigma)))
    pixels = x.reshape(count, height * width, channels)
    for i, generator in enumerate(generators):
        for _ in range(rounds):
            steps = generator.integers(-reach, reach, (2, *inside.shape))
            steps *= generator.random(inside.shape) < wanted / reach  # for a reach between whole pixels
            source = here.copy()
            source[inner] = inside + steps[0] * width + steps[1]
            pixels[i] = pixels[i][copied_from(source.ravel())]
    return _smooth(pixels.reshape(x.shape), sigma)


def copied_from(source: Ints) -> Ints:
    """Where each pixel's value comes from when pixel i copies pixel source[i], the last pixel first.

    A pixel after i has got its own copy by then, so the search goes on from there, two links at a time; a
    pixel before i still has its first value.
    """
    follow = np.maximum(source, np.arange(len(source)))
    while not np.array_equal(follow, further := follow[follow]):
        follow = further
    return source[follow]


def _motion_blur(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    angles = [generator.uniform(-45, 45) for generator in generators]
    return _streaked(x, setting[0] * scale, setting[1] * scale, angles)


def _streaked(x: Floats, radius: float, sigma: float, degrees: Sequence[float]) -> Floats:
    """A one-sided Gaussian trail along whole-pixel steps, border pixels repeated, cut to 8 bits.

    This is the motion blur of ImageMagick, which the reference calls.
    """
    _, height, width, _ = x.shape
    weights = np.exp(-(np.arange(2 * math.ceil(radius) + 1) ** 2) / (2 * sigma**2))
    weights = weights[weights > 1e-5]
    weights /= weights.sum()
    reach = len(weights)
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    trail = np.zeros_like(x)
    for i, angle in enumerate(np.deg2rad(degrees)):
        for step, weight in enumerate(weights.astype(np.float32)):
            top = reach + math.ceil(step * math.sin(angle) - 0.5)
            left = reach + math.ceil(step * math.cos(angle) - 0.5)
            trail[i] += weight * padded[i, top : top + height, left : left + width]
    return to_floats(to_bytes(trail))


def _zoom_blur(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    """Mean of the image and of its enlargements about the centre."""
    largest, step = setting
    zooms = np.arange(1, largest, step)
    total = x.copy()
    for zoom in zooms:
        total += _enlarged(x, zoom)
    return total / np.float32(len(zooms) + 1)


def _enlarged(x: Floats, zoom: float) -> Floats:
    """The middle of [N, H, W, C], enlarged bilinearly to H x W."""
    for axis in (1, 2):
        size = x.shape[axis]
        kept = math.ceil(size / zoom)
        grown = round(kept * zoom)
        if kept == grown == size:
            continue
        where = np.arange(size) + (grown - size) // 2
        position = where * ((kept - 1) / (grown - 1)) + (size - kept) // 2
        low = np.minimum(position.astype(np.int64), size - 2)
        part = (position - low).astype(np.float32).reshape((-1, 1, 1) if axis == 1 else (-1, 1))
        first, second = x.take(low, axis), x.take(low + 1, axis)
        x = first + (second - first) * part
    return x


# --- weather --------------------------------------------------------------------------------------


def _luminance(x: Floats) -> Floats:
    """[..., C] to [..., 1]; no matrix product, whose rounding may depend on the batch."""
    if x.shape[-1] == 1:
        return x
    red, green, blue = (x[..., k, None] * LUMINANCE[k] for k in range(3))
    return np.asarray(red + green + blue, np.float32)


def _snow(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    """A whitened image under streaks, and the same streaks turned by half a circle.

    The streaks are made at the published size and then resized: how many flakes pass the threshold depends on
    their size in pixels.
    """
    mean, deviation, flake, threshold, radius, sigma, kept = setting
    height, width = x.shape[1:3]
    drawn_size = round(height / scale), round(width / scale), 1
    noise: Floats = _drawn(generators, lambda g: g.standard_normal(drawn_size, np.float32))
    flakes = _enlarged(np.float32(mean) + np.float32(deviation) * noise, flake)
    flakes[flakes < threshold] = 0
    angles = [generator.uniform(-135, -45) for generator in generators]
    flakes = _streaked(to_floats(to_bytes(flakes)), radius, sigma, angles)
    if drawn_size[:2] != (height, width):
        layers = [Image.fromarray(layer[..., 0]) for layer in flakes]
        resized = [layer.resize((width, height), Image.Resampling.BILINEAR) for layer in layers]
        flakes = np.stack([np.asarray(layer) for layer in resized])[..., None]
    white = np.maximum(x, _luminance(x) * np.float32(1.5) + np.float32(0.5))
    whitened = np.float32(kept) * x + np.float32(1 - kept) * white
    return np.asarray(whitened + flakes + flakes[:, ::-1, ::-1], np.float32)


def _frost(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    """A random part of a random frost pattern, added.

    A 224-pixel image gets the pattern at its own resolution, a 32-pixel one every fifth pixel of it.
    """
    kept, weight = setting
    _, height, width, channels = x.shape
    stride = 1 / scale if min(height, width) >= SMALL_BELOW else 5 / scale
    rows, columns = (np.arange(size) * stride for size in (height, width))
    result = np.float32(kept) * x
    for i, generator in enumerate(generators):
        tile = frost_tile(int(generator.integers(FROST_CHOICES)))
        top, left = generator.integers(FROST_TILE, size=2)
        part = tile.take((rows + top).astype(np.int64) % FROST_TILE, 0)
        part = part.take((columns + left).astype(np.int64) % FROST_TILE, 1)
        result[i] += np.float32(weight) * (part if channels == 3 else _luminance(part))
    return result


def _fog(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    """Uneven haze added, then the whole pressed back to the old maximum."""
    thickness, smoothness = np.float32(setting[0]), setting[1]
    _, height, width, _ = x.shape
    top = x.max(axis=(1, 2, 3), keepdims=True)
    haze = _plasma(max(height, width), smoothness, generators)[:, :height, :width, None]
    pressed: Floats = (x + thickness * haze) * top / (top + thickness)
    return pressed


def _plasma(side: int, smoothness: float, generators: Generators) -> Floats:
    """Periodic height maps in 0..1 by midpoint displacement, [N, S, S] with S the next power of two.

    The middle of each square, then the middle of each edge, gets the mean of its four neighbours and a
    random move, which at the next finer level is smaller by smoothness**2.
    """
    size = 2 ** math.ceil(math.log2(side))
    plane = np.zeros((len(generators), size, size), np.float32)
    step, height = size, 1.0
    while step >= 2:
        half, shape = step // 2, (3, size // step, size // step)
        moves = height * _drawn(generators, partial(np.random.Generator.uniform, low=-1, high=1, size=shape))
        even = plane[:, ::step, ::step]
        beside = even + np.roll(even, -1, 1)
        middle = (beside + np.roll(beside, -1, 2)) / 4 + moves[:, 0]
        plane[:, half::step, half::step] = middle
        across = middle + np.roll(middle, 1, 1) + even + np.roll(even, -1, 2)
        plane[:, ::step, half::step] = across / 4 + moves[:, 1]
        along = middle + np.roll(middle, 1, 2) + even + np.roll(even, -1, 1)
        plane[:, half::step, ::step] = along / 4 + moves[:, 2]
        step, height = half, height / smoothness**2
    plane -= plane.min(axis=(1, 2), keepdims=True)
    levels: Floats = plane / plane.max(axis=(1, 2), keepdims=True)
    return levels


# --- digital --------------------------------------------------------------------------------------


def _brightness(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    """Adds to the value of HSV (the largest channel) and keeps hue and saturation."""
    value = x.max(axis=3, keepdims=True)
    raised = np.minimum(value + np.float32(setting[0]), np.float32(1))
    raised_colour: Floats = np.where(value > 0, x * (raised / np.maximum(value, np.float32(1e-6))), raised)
    return raised_colour


def _saturate(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    """Scales and shifts the saturation of HSV, where gray counts as red: an offset shows it, as published."""
    factor, offset = setting
    if x.shape[3] == 1:
        return x
    value = x.max(axis=3, keepdims=True)
    depth = value - x
    spread = depth.max(axis=3, keepdims=True)
    red = np.array([0, 1, 1], np.float32)
    relative = np.where(spread > 0, depth / np.maximum(spread, np.float32(1e-6)), red)
    saturation = spread / np.maximum(value, np.float32(1e-6))
    changed = np.clip(saturation * np.float32(factor) + np.float32(offset), 0, 1)
    result: Floats = value * (1 - changed * relative)
    return result


def _contrast(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    """Every channel pressed towards its mean over the frame."""
    means = np.stack([frame.mean(axis=(0, 1), dtype=np.float64) for frame in x])
    level = means.astype(np.float32)[:, None, None]
    return (x - level) * np.float32(setting[0]) + level


def _elastic_transform(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    """A random affine map (three corners moved), then a bumpy one; bilinear both times."""
    # Smoothed noise keeps 1 / sigma of its height, so the height scales twice for bumps that scale once.
    height_of_bumps, sigma, shift = setting[0] * scale**2, setting[1] * scale, setting[2] * scale
    _, height, width, _ = x.shape
    middle, arm = np.array([height // 2, width // 2]), min(height, width) // 3
    corners = middle + arm * np.array([[1, 1], [-1, 1], [-1, -1]])
    moved = corners + _drawn(generators, lambda g: g.uniform(-shift, shift, (3, 2)))
    moved = np.pad(moved, ((0, 0), (0, 0), (0, 1)), constant_values=1)
    # Takes (row, column, 1) of the result to (row, column) of the image.
    back = np.linalg.solve(moved, corners[None].astype(np.float64))
    rows, columns = np.arange(height)[:, None], np.arange(width)
    down, right = (
        back[:, 0, k, None, None] * rows + back[:, 1, k, None, None] * columns + back[:, 2, k, None, None]
        for k in (0, 1)
    )
    x = _sampled(x, down, right, repeat_border=False)
    if height_of_bumps == 0:
        return x
    bumps = _drawn(generators, lambda g: g.uniform(-1, 1, (2, height, width)))
    bumps = height_of_bumps * ndimage.gaussian_filter(bumps, (0, 0, sigma, sigma), mode="reflect", truncate=3)
    return _sampled(x, rows + bumps[:, 0], columns + bumps[:, 1], repeat_border=True)


def _sampled(x: Floats, down: Coordinates, right: Coordinates, *, repeat_border: bool) -> Floats:
    """x [N, H, W, C] at points (down, right), each [N, H, W] in pixels: bilinear, mirrored at the border."""
    count, height, width, channels = x.shape
    top, left = np.floor(down), np.floor(right)
    below, beside = (down - top).astype(np.float32)[..., None], (right - left).astype(np.float32)[..., None]
    rows = [_mirrored(top.astype(np.int64) + k, height, repeat_border) * width for k in (0, 1)]
    columns = [_mirrored(left.astype(np.int64) + k, width, repeat_border) for k in (0, 1)]
    first = np.arange(count)[:, None, None] * (height * width)
    flat = x.reshape(-1, channels)

    def line(row: Ints) -> Floats:
        start, end = (flat.take(first + row + column, axis=0) for column in columns)
        return np.asarray(start + (end - start) * beside, np.float32)

    upper, lower = line(rows[0]), line(rows[1])
    return upper + (lower - upper) * below


def _mirrored(index: Ints, size: int, repeat_border: bool) -> Ints:
    """Indices outside 0..size-1 thrown back: c b | a b c, or with the border pixel repeated b a | a b c."""
    extra = int(repeat_border)
    period = 2 * size - 2 + 2 * extra
    index = index % period
    return np.where(index < size, index, period - extra - index)


def _pixelate(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    """Box average to fewer pixels and back."""
    _, height, width, _ = x.shape
    coarse = max(1, int(width * setting[0])), max(1, int(height * setting[0]))
    box = Image.Resampling.BOX
    return _by_pillow(x, lambda image: image.resize(coarse, box).resize((width, height), box))


def _jpeg_compression(x: Floats, setting: Setting, scale: float, generators: Generators) -> Floats:
    def coded(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(setting[0]))
        return Image.open(file)

    return _by_pillow(x, coded)


def _by_pillow(x: Floats, change: Callable[[Image.Image], Image.Image]) -> Floats:
    """Each frame through 8 bits and Pillow."""
    gray = x.shape[3] == 1
    frames = [change(Image.fromarray(frame[..., 0] if gray else frame)) for frame in to_bytes(x)]
    return to_floats(np.stack([np.asarray(frame) for frame in frames]).reshape(x.shape))


EFFECTS: dict[str, Effect] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "saturate": _saturate,
}
