"""Domains that come mixed, and classes that come in runs: what source says of the frames that lie near its own.

Where frames of many domains are mixed, features stay wide apart whatever their classes are, so that ports set from one
class are not told by how close features lie. But some of those domains are mild, and on frames that lie near its own
source is mostly right. If it tells few classes there and the ports many, it is the class that the ports took away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.guards.rows import sound_rows
from edge_adapt.probabilities import entropy, softmax

Array = NDArray[Any]

LEAST = 16
"""Frames from which their spread tells anything."""
MIXED, ALIKE = 1.2, 1.0
"""Frames differ by so many times the variance of source's: their domains may be mixed. Of windows of one domain of
CIFAR-10-C a quarter are so on ResNet-20 and ResNet-56, of fifteen mixed nearly all. The second while ports move."""
NEAR = 1.5
"""Frames near source are at most so many times as far from its middle as its own are, as mean square."""
ENOUGH, MOST = 12, 0.9
"""A verdict needs so many near frames; where nearly all are near, it is one mild domain, which may blur classes."""
SHARE, SHARE_STILL = 0.45, 0.3
"""Near frames, as a share of all that source was asked for, to find it so, and to stay with it."""
BROADER, BROADER_STILL = 1.2, 1.0
"""Ports tell at least so many times as many classes as source."""
FEW, FEW_STILL = 0.5, 0.75
"""Source tells fewer classes than this share of the most that can be. With all this `moments` has 42.5, 44.3 and 46.5 %
on three seeds of fifteen domains mixed, a class at a time; without it 49.5, 47.3 and 48.1, source 45.3."""


@dataclass(frozen=True)
class Near:
    """Sums over the frames of one verdict, and of those before it while it stands, which count half each time."""

    taps: Array
    """[2, channels], sum and sum of squares of the tap means."""
    frames: int
    """Frames in it."""
    ours: Array
    """[K], sum of the softmax of the near frames, as they are answered with the ports."""
    plain: Array
    """[K], the same as source answers them."""
    near: float = 0.0
    """Frames in these two."""
    asked: float = 0.0
    """Frames that source was asked for."""
    mixed: bool = False
    """True once domains looked mixed: from then on source is asked for every frame, until the domain changes."""

    @classmethod
    def none(cls, channels: int, classes: int) -> Near:
        """Before the first frame."""
        return cls(np.zeros((2, channels)), 0, np.zeros(classes), np.zeros(classes))

    def after(self, taps: Array) -> Near:
        """With the tap means [N, channels] of more frames; those that are not finite are left out."""
        values = taps[sound_rows(taps)].astype(np.float64)
        sums = np.stack([values.sum(axis=0), np.square(values).sum(axis=0)])
        return replace(self, taps=self.taps + sums, frames=self.frames + len(values))

    def spread(self, variance: Array) -> float:
        """Variance between the frames, in units of that of source's own [channels]; 0 while there are few."""
        if self.frames < LEAST:
            return 0.0
        mean, second = self.taps / self.frames
        return float(((second - np.square(mean)) / variance).mean()) * self.frames / (self.frames - 1)

    def compared(self, ours: Array, plain: Array, distance: Array) -> Near:
        """With the logits [N, K] to more frames, with ports and of source, and their distance from source [N]."""
        near = (distance < NEAR) & sound_rows(ours, plain)
        return replace(
            self,
            ours=self.ours + softmax(ours[near]).sum(axis=0),
            plain=self.plain + softmax(plain[near]).sum(axis=0),
            near=self.near + int(near.sum()),
            asked=self.asked + len(near),
        )

    def of_few(self, variance: Array, still: bool) -> bool:
        """True if near frames of a mixture are of few classes to source and of more to the ports; easier to stay so.

        variance: [channels], as for `spread`.
        """
        if not still and self.spread(variance) < ALIKE:
            return False
        share, broader, few = (SHARE_STILL, BROADER_STILL, FEW_STILL) if still else (SHARE, BROADER, FEW)
        if self.near < max(ENOUGH, share * self.asked) or (not still and self.near > MOST * self.asked):
            return False
        kinds = float(np.exp(entropy(self.plain / self.near)))
        told = float(np.exp(entropy(self.ours / self.near)))
        return told > broader * kinds and kinds < few * min(len(self.plain), self.near)

    def begun_anew(self, variance: Array, still: bool) -> Near:
        """For the next verdict."""
        kept = 0.5 if still else 0.0
        return replace(
            self,
            taps=np.zeros_like(self.taps),
            frames=0,
            ours=kept * self.ours,
            plain=kept * self.plain,
            near=kept * self.near,
            asked=kept * self.asked,
            mixed=self.mixed or self.spread(variance) > MIXED,
        )
