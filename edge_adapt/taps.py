"""What a tap says, in the units that methods use: the normalised input of each norm."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.delta import PORT_SCALE, PORT_SHIFT, Delta

Array = NDArray[Any]

FLAT = 1e-5
"""A channel whose norm weight is smaller than this share of its bias says nothing; it is taken as undisturbed."""


def normalised(bundle: Bundle, taps: Array, delta: Delta | None = None) -> tuple[Array, Array]:
    """Undo each site's own affine and port, so that the numbers do not depend on the delta in force at the site.

    Args:
        taps: [N, 2, channels] as the engine gives them.
        delta: what was in force when they were taken; None for source.
    Returns: mean and second moment of (input - source mean) / source std, each [N, channels].
    """
    weight, bias = bundle.packed("weight"), bundle.packed("bias")
    scale, shift = np.ones_like(weight), np.zeros_like(weight)
    if delta:
        scale, shift = delta.get(PORT_SCALE, scale), delta.get(PORT_SHIFT, shift)
        for name, value in delta.tail.items():
            site, _, role = name.rpartition(".")
            if site in bundle.slices and role in ("weight", "bias"):
                target = weight if role == "weight" else bias
                target[bundle.slices[site]] = value
    return undo(taps, weight, bias, scale, shift)


def undo(taps: Array, weight: Array, bias: Array, scale: Array, shift: Array) -> tuple[Array, Array]:
    """The arithmetic of `normalised`, on packed vectors [channels]."""
    alive = np.abs(weight) > FLAT * np.maximum(np.abs(bias), 1e-3)
    gain = np.where(alive, weight * scale, 1.0).astype(np.float64)
    output_mean, output_second = taps[:, 0].astype(np.float64), taps[:, 1].astype(np.float64)
    # What is not finite stays so, and is refused by whoever is shown it.
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.maximum(output_second - np.square(output_mean), 0) / np.square(gain)
    mean = ((output_mean - bias) / np.where(alive, weight, 1.0) - shift) / scale
    mean, variance = np.where(alive, mean, 0.0), np.where(alive, variance, 1.0)
    return mean, variance + np.square(mean)
