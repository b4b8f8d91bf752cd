"""AugMix: every operation against a plain one of its own for one image, and what a mix may and may not do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edge_adapt.errors import ConfigError
from edge_adapt.streams.corruptions import CORRUPTIONS
from exporters.augmix import OPERATIONS, AugMix, flipped_and_cropped

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (5, 3, 12, 10), dtype=np.uint8)
IMAGES[1] = IMAGES[1] // 4 + 60  # a narrow range
IMAGES[2, 0] = 7  # a channel of one value
LEVELS = np.array([0.3, -0.3, 0.1, -0.65, 1.0])


def one_autocontrast(channel: np.ndarray, level: float) -> np.ndarray:
    low, high = channel.min(), channel.max()
    return channel if high == low else (channel - low) / (high - low) * 255


def one_equalize(channel: np.ndarray, level: float) -> np.ndarray:
    counts = [int((channel == value).sum()) for value in range(256)]
    last = max(value for value in range(256) if counts[value])
    step = (channel.size - counts[last]) // 255
    if step == 0:
        return channel
    table, below = [], step // 2
    for value in range(256):
        table.append(min(below // step, 255))
        below += counts[value]
    return np.array([[table[int(value)] for value in row] for row in channel], float)


def one_posterize(channel: np.ndarray, level: float) -> np.ndarray:
    bits = max(1, 4 - math.floor(4 * abs(level)))
    return np.array([[int(value) >> (8 - bits) << (8 - bits) for value in row] for row in channel], float)


def one_solarize(channel: np.ndarray, level: float) -> np.ndarray:
    threshold = 256 - math.floor(256 * abs(level))
    return np.array([[value if value < threshold else 255 - value for value in row] for row in channel], float)


def warped(channel: np.ndarray, where) -> np.ndarray:
    """`where` maps offsets (right, down) of an output pixel from the centre, in pixels, to those of its source."""
    height, width = channel.shape
    made = np.zeros((height, width))

    def at(row: int, column: int) -> float:
        return float(channel[row, column]) if 0 <= row < height and 0 <= column < width else 0.0

    for row in range(height):
        for column in range(width):
            x, y = where(column - (width - 1) / 2, row - (height - 1) / 2)
            x, y = x + (width - 1) / 2, y + (height - 1) / 2
            left, top = math.floor(x), math.floor(y)
            u, v = x - left, y - top
            made[row, column] = (
                (1 - v) * ((1 - u) * at(top, left) + u * at(top, left + 1))
                + v * ((1 - u) * at(top + 1, left) + u * at(top + 1, left + 1))
            )
    return made


def one_warp(name: str):
    def run(channel: np.ndarray, level: float) -> np.ndarray:
        height, width = channel.shape
        aspect = height / width  # shears and turns are of the square -1..1, whatever the shape of the image
        angle = math.radians(30) * level
        moves = {
            "rotate": lambda x, y: (
                x * math.cos(angle) + y * math.sin(angle) / aspect,
                -x * math.sin(angle) * aspect + y * math.cos(angle),
            ),
            "shear_x": lambda x, y: (x + 0.3 * level * y / aspect, y),
            "shear_y": lambda x, y: (x, y + 0.3 * level * x * aspect),
            "translate_x": lambda x, y: (x + level * width / 3, y),
            "translate_y": lambda x, y: (x, y + level * height / 3),
        }
        return warped(channel, moves[name])

    return run


PLAIN = {
    "autocontrast": one_autocontrast,
    "equalize": one_equalize,
    "posterize": one_posterize,
    "solarize": one_solarize,
    **{name: one_warp(name) for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")},
}


def test_the_family_is_that_of_the_paper_and_shares_nothing_with_the_corruptions():
    assert set(OPERATIONS) == set(PLAIN)
    words = {word for name in CORRUPTIONS for word in name.split("_")} | {"contrast", "noise", "blur", "jpeg"}
    assert not set(OPERATIONS) & (words | set(CORRUPTIONS))


@pytest.mark.parametrize("name", PLAIN)
def test_an_operation_on_a_batch_equals_a_plain_one_on_each_image(name):
    larger = IMAGES.repeat(6, axis=2).repeat(6, axis=3) if name == "equalize" else IMAGES  # 255 pixels or more
    found = OPERATIONS[name](torch.from_numpy(larger).float() / 255, torch.from_numpy(LEVELS).float()) * 255
    for image, level, made in zip(larger.astype(float), LEVELS, found.numpy(), strict=True):
        expected = np.stack([PLAIN[name](channel, float(level)) for channel in image])
        np.testing.assert_allclose(made, expected, atol=2e-2)


def batch(count: int = 64) -> torch.Tensor:
    smooth = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(smooth, size=(16, 16), mode="bilinear")


def test_a_mix_stays_in_range_differs_from_image_to_image_and_leaves_its_input_alone():
    images = batch()
    kept = images.clone()
    made = AugMix(severity=6)(images, torch.Generator().manual_seed(0))
    assert torch.equal(images, kept)
    assert made.shape == images.shape and made.min() >= 0 and made.max() <= 1 + 1e-5
    same = batch(1).expand(64, -1, -1, -1)
    changed = (AugMix(severity=6)(same, torch.Generator().manual_seed(0)) - same).abs().mean((1, 2, 3))
    assert changed.unique().numel() > 32
    assert changed.max() > 0.02


def test_a_shared_draw_treats_equal_images_alike_and_batches_differently():
    same = batch(1).expand(8, -1, -1, -1)
    generator = torch.Generator().manual_seed(3)
    first, second = (AugMix()(same, generator, shared=True) for _ in range(2))
    assert all(torch.equal(image, first[0]) for image in first)
    assert not torch.equal(first, second)


def test_the_same_generator_gives_the_same_mix():
    images = batch()
    first, second = (AugMix()(images, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)


def test_crops_are_windows_of_the_reflected_image_or_of_its_mirror():
    images = batch(20)
    made = flipped_and_cropped(images, torch.Generator().manual_seed(0))
    seen = set()
    for image, found in zip(images, made, strict=True):
        windows = {}
        for flip in (False, True):
            padded = torch.nn.functional.pad((image.flip(2) if flip else image)[None], (2, 2, 2, 2), mode="reflect")[0]
            windows |= {
                (flip, top, left): padded[:, top : top + 16, left : left + 16] for top in range(5) for left in range(5)
            }
        hits = [place for place, window in windows.items() if torch.equal(window, found)]
        assert hits
        seen.add(hits[0])
    assert {flip for flip, _, _ in seen} == {False, True}
    assert len(seen) > 10


@pytest.mark.parametrize("severity", [0, -1, 11])
def test_a_severity_without_meaning_is_refused(severity):
    with pytest.raises(ConfigError, match="severity"):
        AugMix(severity=severity)
