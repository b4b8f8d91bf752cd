"""A linear adapter parallel to a convolution: two 1 x 1 convolutions, whose product is a change of the centre tap.

As in LAE on convolutional networks (Gao et al., "A Unified Continual Learning Framework with General
Parameter-Efficient Tuning", ICCV 2023), without its nonlinearity, so that it merges. With the whole kernel instead of
the centre, D is a convolution as large as the layer's own, which is LoRA; with a nonlinearity it is `Bottleneck`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from edge_adapt.adapters.lora import check_rank, kaiming
from edge_adapt.adapters.protocol import Adapter, Place, Values
from edge_adapt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ConvAdapter(Adapter):
    """`down` [r, in / groups] for 1 x 1 and [r, in / groups, ...] for the whole kernel; `up` [out, r] is zero.

    The groups of a convolution share one `down`.
    """

    kind: ClassVar[str] = "conv"
    rank: int = 4
    kernel: Literal["point", "whole"] = "point"

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)
        if self.kernel not in ("point", "whole"):
            raise ConfigError(f"kernel is {self.kernel!r}", remedy="known: point, whole")
        for place in self.places:
            if place.kind != "conv":
                raise ConfigError(
                    f"{place.name} is no convolution, but of kind {place.kind!r}",
                    remedy="put lora or a bottleneck on it, and the conv adapter on convolutions",
                )

    def init(self, generator: Generator) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for place in self.places:
            looked = place.receptive if self.kernel == "whole" else place.receptive[:1]
            made[place.tensor("down")] = kaiming(looked, self.rank, generator)
            made[place.tensor("up")] = torch.zeros(place.outputs, self.rank)
        return made

    def weights(self, values: Values, source: Values) -> dict[str, Tensor]:
        found = {}
        for place in self.places:
            down, up = values[place.tensor("down")], values[place.tensor("up")]
            if self.kernel == "point":
                down = around(place, down)
            name = f"{place.name}.weight"
            found[name] = source[name] + place.low_rank(down, up)
        return found


def around(place: Place, down: Tensor) -> Tensor:
    """[r, in] -> [r, in, ...], with zeros around the tap in the middle."""
    kernel = place.shape[2:]
    sides = [side for size in reversed(kernel) for side in (size // 2, size - 1 - size // 2)]
    return torch.nn.functional.pad(down.reshape(*down.shape, *[1] * len(kernel)), sides)
