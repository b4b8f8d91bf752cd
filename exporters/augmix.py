"""AugMix: images mixed from chains of operations that are no corruption of any benchmark; a whole batch at once.

Source: Hendrycks et al., "AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty", ICLR 2020.
The operations are those of the paper's experiments: nothing like noise, blur, weather, brightness, contrast, elastic
deformation, pixelation or compression. Images are float32 [N, C, H, W] from 0 to 1; every image has its own draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from edge_adapt.errors import ConfigError

Operation = Callable[[Tensor, Tensor], Tensor]
"""Images [N, C, H, W] and levels [N] from -1 to 1 -> images. Operations without a sign take the absolute value."""


def autocontrast(images: Tensor, levels: Tensor) -> Tensor:
    """Stretch every channel to the range 0 to 1; it has no level, and a channel of one value stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp_min(1e-6), images)


def equalize(images: Tensor, levels: Tensor) -> Tensor:
    """Make the histogram of every channel flat, in 256 steps; it has no level."""
    count, channels, height, width = images.shape
    values = _bytes(images).long().reshape(count * channels, height * width)
    ones = torch.ones_like(values)
    histogram = torch.zeros(count * channels, 256, dtype=torch.long).scatter_add_(1, values, ones)
    highest = histogram.gather(1, values.amax(1, keepdim=True))
    step = (values.shape[1] - highest) // 255
    below = histogram.cumsum(1) - histogram
    table = ((below + step // 2) // step.clamp_min(1)).clamp_max(255)
    made = torch.where(step > 0, table.gather(1, values), values)
    return made.reshape(images.shape).to(images.dtype) / 255


def posterize(images: Tensor, levels: Tensor) -> Tensor:
    """Keep 4 bits of every value at level 0, fewer with the level, 1 at least."""
    bits = (4 - (4 * levels.abs()).floor()).clamp_min(1)
    step = torch.exp2(8 - bits)[:, None, None, None]
    return (_bytes(images) / step).floor() * step / 255


def solarize(images: Tensor, levels: Tensor) -> Tensor:
    """Invert values from a threshold on: 256 at level 0, 0 at level 1."""
    threshold = (256 - (256 * levels.abs()).floor())[:, None, None, None]
    return torch.where(_bytes(images) < threshold, images, 1 - images)


def rotate(images: Tensor, levels: Tensor) -> Tensor:
    """By up to 30 degrees about the centre; what comes in is black."""
    angle = math.radians(30) * levels
    return _warped(images, {(0, 0): angle.cos(), (0, 1): angle.sin(), (1, 0): -angle.sin(), (1, 1): angle.cos()})


def shear_x(images: Tensor, levels: Tensor) -> Tensor:
    """Rows move sideways by up to 0.3 of their distance from the middle one."""
    return _warped(images, {(0, 1): 0.3 * levels})


def shear_y(images: Tensor, levels: Tensor) -> Tensor:
    """As `shear_x`, for columns."""
    return _warped(images, {(1, 0): 0.3 * levels})


def translate_x(images: Tensor, levels: Tensor) -> Tensor:
    """By up to a third of the width."""
    return _warped(images, {(0, 2): 2 / 3 * levels})


def translate_y(images: Tensor, levels: Tensor) -> Tensor:
    """By up to a third of the height."""
    return _warped(images, {(1, 2): 2 / 3 * levels})


OPERATIONS: dict[str, Operation] = {
    function.__name__: function
    for function in (
        *(autocontrast, equalize, posterize, solarize),
        *(rotate, shear_x, shear_y, translate_x, translate_y),
    )
}


@dataclass(frozen=True, kw_only=True)
class AugMix:
    """A random convex mix of an image and of chains of operations on it."""

    severity: float = 3.0
    """Levels are drawn up to so many tenths of each operation's range."""
    width: int = 3
    """Chains that are mixed."""
    depth: int = 3
    """Operations in a chain, at most; 1 at least."""

    def __post_init__(self) -> None:
        if not 0 < self.severity <= 10:
            raise ConfigError(f"severity is {self.severity}, outside (0, 10]", remedy="3 is the paper's for 32 x 32")

    def __call__(self, images: Tensor, generator: Generator, *, shared: bool = False) -> Tensor:
        """Mixed images, of the same shape.

        Args:
            images: [N, C, H, W], 0 to 1; not modified.
            shared: the same draw for all images, which makes the batch a domain of its own.
        """
        count = len(images)

        def draw(*shape: int) -> Tensor:
            made = torch.rand(1 if shared else count, *shape, generator=generator)
            return made.expand(count, *shape)

        # Dirichlet(1, ..., 1) is normalised exponentials; Beta(1, 1) is uniform.
        weights = -draw(self.width).clamp_min(1e-12).log()
        weights = weights / weights.sum(1, keepdim=True)
        share = draw(1, 1, 1)
        mixed = torch.zeros_like(images)
        for chain in range(self.width):
            made = images.clone()
            depths = (draw() * self.depth).floor() + 1
            for place in range(self.depth):
                chosen = (draw() * len(OPERATIONS)).long().masked_fill(depths <= place, -1)
                size = 0.01 + draw() * (self.severity / 10 - 0.01)
                levels = torch.where(draw() < 0.5, -size, size)
                _apply(made, chosen, levels)
            mixed += weights[:, chain, None, None, None] * made
        return (1 - share) * images + share * mixed


def flipped_and_cropped(images: Tensor, generator: Generator) -> Tensor:
    """Half of the images mirrored, each moved by up to an eighth of its side; what comes in is its own reflection.

    A black border would change the statistics of the norms, which on a device are those of whole images.
    """
    count, channels, height, width = images.shape
    mirrored = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, images.flip(3), images)
    pads = height // 8, width // 8
    padded = F.pad(mirrored, (pads[1], pads[1], pads[0], pads[0]), mode="reflect")
    top, left = (torch.randint(2 * pad + 1, (count,), generator=generator) for pad in pads)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None], rows, columns]


def _apply(images: Tensor, chosen: Tensor, levels: Tensor) -> None:
    """Each image through its chosen operation, -1 for none, in place."""
    for index, operation in enumerate(OPERATIONS.values()):
        (places,) = torch.where(chosen == index)
        if len(places):
            images[places] = operation(images[places], levels[places])


def _bytes(images: Tensor) -> Tensor:
    """Values as a camera has them, 0 to 255, still float."""
    return (images * 255).round()


def _warped(images: Tensor, entries: dict[tuple[int, int], Tensor]) -> Tensor:
    """Images seen through the identity with some entries of its 2 x 3 matrix replaced; bilinear, black outside."""
    theta = torch.eye(2, 3).repeat(len(images), 1, 1)
    for (row, column), values in entries.items():
        theta[:, row, column] = values
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
