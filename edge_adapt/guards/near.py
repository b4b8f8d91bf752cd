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
from edge_adapt.probabilities import perplexity, softmax

Array = NDArray[Any]

LEAST = 16
"""Frames from which it can be told how much they differ."""
MIXED, ALIKE = 1.2, 1.0
"""Domains are mixed if frames differ from the one before by so many times as much as those of source, as variance. On
CIFAR-10-C, ResNet-20 and ResNet-56, nine in ten windows of fifteen domains mixed do. Of one domain, or of a change from
one to another, nine in ten stay below 1.1 (`continual`, `correlated`, `bursts`) or 1.3 (`recurring`). Below the second
number domains are not mixed, whatever is answered."""
NEAR = 1.5
"""Frames near source are at most so many times as far from its middle as its own are, as mean square."""
ENOUGH, SHARE, MOST = 12, 0.3, 0.9
"""A verdict needs so many near frames, and this share of all that source was asked for. If nearly all are near, it is
one mild domain, which may blur classes."""
OFTEN = 6
"""Verdicts for which source is asked each time; later ones are asked for at powers of two."""
BROADER, BROADER_STILL = 1.2, 1.0
"""Ports tell at least so many times as many classes as source."""
FEW, FEW_STILL = 0.5, 0.75
"""Source tells fewer classes than this share of the most that can be. With all this `moments` has 44.7, 45.9 and 46.5 %
on three seeds of fifteen domains mixed, a class at a time; without it 49.5, 47.3 and 48.1, source 45.3."""


@dataclass(frozen=True)
class Near:
    """Sums over the frames of one verdict, and of those before it while it stands, which count half each time."""

    last: Array
    """[channels], tap means of the newest frame; empty before the first."""
    ours: Array
    """[K], sum of the softmax of the near frames, as they are answered with the ports."""
    plain: Array
    """[K], the same as source answers them."""
    near: float = 0.0
    """Frames in these two."""
    asked: float = 0.0
    """Frames that source was asked for."""
    apart: float = 0.0
    """Sum over frames of half their squared distance from the one before."""
    frames: int = 0
    """Frames in that."""
    verdicts: int = 1
    """This one's number, since the domain changed or few classes were found."""
    known: bool = False
    """True if domains were mixed at the verdict before this one."""

    @classmethod
    def none(cls, classes: int) -> Near:
        """Before the first frame."""
        return cls(np.zeros(0), np.zeros(classes), np.zeros(classes))

    def after(self, taps: Array, variance: Array) -> Near:
        """With the tap means [N, channels] of more frames; variance: [channels], of source's own."""
        values = taps[sound_rows(taps)]
        if not len(values):
            return self
        before = np.concatenate([self.last[None], values[:-1]]) if len(self.last) else values[:-1]
        apart = np.square(values[len(values) - len(before) :] - before) / (2 * variance)
        return replace(
            self,
            last=values[-1].copy(),
            apart=self.apart + float(apart.mean(axis=1).sum()),
            frames=self.frames + len(before),
        )

    @property
    def mixed(self) -> bool:
        """True if frames differ from one another as those of many domains do."""
        return self.frames >= LEAST and self.apart > MIXED * self.frames

    @property
    def asks(self) -> bool:
        """True if source is worth asking: in mixed domains, the more seldom the more often it found nothing."""
        return (self.mixed or self.known) and (self.verdicts <= OFTEN or not self.verdicts & (self.verdicts - 1))

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

    def of_few(self, still: bool) -> bool:
        """True if near frames of a mixture are of few classes to source and of more to the ports; easier to stay so."""
        broader, few = (BROADER_STILL, FEW_STILL) if still else (BROADER, FEW)
        if self.near < max(ENOUGH, SHARE * self.asked):
            return False
        if not still and (self.apart < ALIKE * self.frames or self.near > MOST * self.asked):
            return False
        kinds, told = perplexity(self.plain / self.near), perplexity(self.ours / self.near)
        return told > broader * kinds and kinds < few * min(len(self.plain), self.near)

    def begun_anew(self, still: bool) -> Near:
        """For the next verdict."""
        none = replace(Near.none(len(self.plain)), last=self.last, known=self.mixed)
        if not still:
            return replace(none, verdicts=self.verdicts + 1)
        return replace(none, **{name: 0.5 * getattr(self, name) for name in ("ours", "plain", "near", "asked")})
