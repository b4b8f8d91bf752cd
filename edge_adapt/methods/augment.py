"""The random views of CoTTA: one draw per call for the whole batch, from a generator, without torchvision.

Clip to [0, 1]; brightness, contrast, saturation, hue and gamma in random order; rotation, shift and zoom over
replicated edges; a slight blur; perhaps a mirror; a little noise; clip (Wang et al., "Continual Test-Time
Domain Adaptation", CVPR 2022). Frames go in and come out as the network is fed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn import functional

from edge_adapt.bundle import InputSpec
from edge_adapt.errors import ConfigError

Augmentation = Callable[[Tensor, Generator], Tensor]
"""Network input [N, ...] and a generator -> another view of it, in the same units."""

BRIGHTNESS, CONTRAST, SATURATION = (0.6, 1.4), (0.7, 1.3), (0.5, 1.5)
HUE, GAMMA = (-0.06, 0.06), (0.7, 1.3)
DEGREES, SHIFT, ZOOM = (-15.0, 15.0), 1 / 16, (0.9, 1.1)
SIGMA, NOISE, MIRROR = (0.001, 0.5), 0.005, 0.5
DARKEST = 1e-8
"""Zero has no gamma power with a finite gradient."""
GREY = (0.299, 0.587, 0.114)
"""Luma of ITU-R BT.601."""


class Augment:
    """`augment(frames, generator)` for one kind of network input."""

    def __init__(self, spec: InputSpec) -> None:
        """Raises: ConfigError unless the network is fed images of one or three channels."""
        if spec.layout == "NCW" or len(spec.shape) != 3 or spec.channels not in (1, 3):
            raise ConfigError(
                f"the network takes {spec.shape} ({spec.layout}), which is no image that CoTTA could augment",
                remedy="use `tent` or `moments`, or give CoTTA an `augment` of your own",
            )
        self.last = spec.layout == "NHWC"
        self.scale = spec.scale / 255.0
        self.mean = torch.tensor(spec.mean).reshape(1, -1, 1, 1)
        self.std = torch.tensor(spec.std).reshape(1, -1, 1, 1)

    def __call__(self, frames: Tensor, generator: Generator) -> Tensor:
        return self.fed(view(self.unit(frames), generator))

    def unit(self, frames: Tensor) -> Tensor:
        """Network input -> [N, C, H, W] in [0, 1], where 1 is a raw 255."""
        arranged = frames.permute(0, 3, 1, 2) if self.last else frames
        return (arranged * self.std + self.mean) * self.scale

    def fed(self, unit: Tensor) -> Tensor:
        """The way back."""
        made = (unit / self.scale - self.mean) / self.std
        return made.permute(0, 2, 3, 1).contiguous() if self.last else made


def view(images: Tensor, generator: Generator) -> Tensor:
    """One random view of images [N, C, H, W] in [0, 1]."""
    images = jitter(images.clamp(0, 1), generator)
    images = blur(warp(images, generator, margin=2), _between(SIGMA, generator))
    if _between((0, 1), generator) < MIRROR:
        images = images.flip(-1)
    return (images + NOISE * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def jitter(images: Tensor, generator: Generator) -> Tensor:
    """Five colour changes in random order, two of them for colour images only."""
    draw = partial(_between, generator=generator)
    changes: list[Callable[[Tensor], Tensor]] = [
        partial(brightness, factor=draw(BRIGHTNESS)),
        partial(contrast, factor=draw(CONTRAST)),
        partial(saturation, factor=draw(SATURATION)),
        partial(hue, turn=draw(HUE)),
        partial(gamma, power=draw(GAMMA)),
    ]
    for place in torch.randperm(len(changes), generator=generator).tolist():
        images = changes[place](images)
    return images


def brightness(images: Tensor, factor: float) -> Tensor:
    return (factor * images).clamp(0, 1)


def contrast(images: Tensor, factor: float) -> Tensor:
    """Away from, or towards, the mean grey of each image."""
    middle = grey(images).mean(dim=(1, 2, 3), keepdim=True)
    return (middle + factor * (images - middle)).clamp(0, 1)


def saturation(images: Tensor, factor: float) -> Tensor:
    """Away from, or towards, the grey of each pixel."""
    if images.shape[1] == 1:
        return images
    return torch.lerp(grey(images), images, factor).clamp(0, 1)


def hue(images: Tensor, turn: float) -> Tensor:
    """Turn the colour circle by a share of a full turn, at the same value and chroma."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    safe = chroma.clamp_min(1e-12)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sector = sector + 6 * turn
    corners = ((offset + sector) % 6 for offset in (5, 3, 1))
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in corners], 1)


def gamma(images: Tensor, power: float) -> Tensor:
    return images.clamp(DARKEST, 1).pow(power)


def grey(images: Tensor) -> Tensor:
    """[N, 1, H, W]."""
    if images.shape[1] == 1:
        return images
    return (images * torch.tensor(GREY, dtype=images.dtype).reshape(1, 3, 1, 1)).sum(1, keepdim=True)


def warp(images: Tensor, generator: Generator, margin: int) -> Tensor:
    """Rotate, zoom and shift about the centre, bilinear; `margin` pixels more on every side than came in.

    The published transform works on a canvas of twice the size with replicated edges and keeps the centre of it.
    No pixel that is kept looks beyond that canvas, so reading with clamped coordinates is the same without it.
    The shift is a share of the canvas, not of the image.
    """
    height, width = images.shape[-2:]
    angle, zoom = math.radians(_between(DEGREES, generator)), _between(ZOOM, generator)
    right, down = (_between((-2 * SHIFT, 2 * SHIFT), generator) * size for size in (width, height))
    x = torch.arange(-margin, width + margin) - (width - 1) / 2 - right
    y = (torch.arange(-margin, height + margin) - (height - 1) / 2 - down)[:, None]
    cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
    # Where each pixel comes from, in units of half the image, as grid_sample wants it.
    grid = torch.stack([2 / width * (cosine * x + sine * y), 2 / height * (cosine * y - sine * x)], -1)
    return functional.grid_sample(
        images,
        grid.to(images.dtype).expand(len(images), -1, -1, -1),
        padding_mode="border",
        align_corners=False,
    )


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian over 5 x 5 pixels; two pixels less on every side than came in."""
    kernel = torch.exp(-0.5 * (torch.arange(-2, 3, dtype=images.dtype) / sigma).square())
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    channels = images.shape[1]
    return functional.conv2d(
        functional.conv2d(images, kernel, groups=channels), kernel.transpose(-1, -2), groups=channels
    )


def _between(bounds: tuple[float, float], generator: Generator) -> float:
    low, high = bounds
    return low + (high - low) * float(torch.rand((), generator=generator))
