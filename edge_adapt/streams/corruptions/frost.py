"""Patterns of frost, drawn without photographs."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import fft

FROST_TILE = 512  # side in pixels of a pattern, which repeats without a seam
FROST_CHOICES = 5

# What the frost photographs of the reference are like, measured on them in levels of 0..255: mean colour;
# deviation of the light across the picture, for each channel; deviation of the crystals; longest wavelength
# of the crystals in pixels. The crystals' deviation was then set so that ResNet-20 does as well under each
# look as under the photograph (CIFAR-10, severity 5). Two of the five photographs are the same one.
_TEAL = ((78, 149, 166), (25, 13, 12), 11.2, 60)
_WHITE = ((201, 205, 214), (15, 16, 17), 16, 60)
_GRAINS = ((138, 153, 165), (18, 18, 19), 23.5, 30)
_FEATHERS = ((112, 123, 135), (28, 27, 26), 30, 80)
_LOOKS = (_TEAL, _WHITE, _WHITE, _GRAINS, _FEATHERS)
assert len(_LOOKS) == FROST_CHOICES


@lru_cache(maxsize=FROST_CHOICES)
def frost_tile(choice: int) -> npt.NDArray[np.float32]:
    """Frost pattern number `choice`, [FROST_TILE, FROST_TILE, 3] in 0..1, the same at every call.

    Crystals are noise narrowed to one direction, for six directions, each strong in patches of its own.
    Light is smooth noise. Both are filtered by Fourier transform and therefore periodic.
    """
    colour, light, crystals, longest = _LOOKS[choice]
    generator = np.random.Generator(np.random.Philox(key=choice))
    down, right = fft.fftfreq(FROST_TILE)[:, None], fft.rfftfreq(FROST_TILE)[None]
    frequency = np.maximum(np.hypot(down, right), 1 / FROST_TILE)  # cycles a pixel
    direction = np.arctan2(down, right)

    def field(response: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Noise of mean 0 and deviation 1 with this amplitude at each frequency."""
        noise = fft.rfft2(generator.standard_normal((FROST_TILE, FROST_TILE)))
        made: npt.NDArray[np.float64] = fft.irfft2(noise * response, (FROST_TILE, FROST_TILE))
        made = made - made.mean()
        return np.asarray(made / made.std(), np.float64)

    patches = np.exp(-((frequency * 40) ** 2))
    grain = (1 - np.exp(-((frequency * longest) ** 2))) * frequency**-0.7 * np.exp(-((frequency / 0.8) ** 2))
    needles = np.zeros((FROST_TILE, FROST_TILE))
    for towards in np.arange(6) * math.pi / 6:
        narrow = np.exp(-((np.sin(direction - towards) / 0.3) ** 2))
        needles += field(grain * narrow) * np.exp(0.7 * field(patches))
    needles *= crystals / needles.std()
    shade = field(np.exp(-((frequency * 220) ** 2)))
    levels = np.array(colour) + shade[..., None] * np.array(light) + needles[..., None]
    return np.asarray(np.clip(levels / 255, 0, 1), np.float32)
