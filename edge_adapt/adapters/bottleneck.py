"""The bottleneck adapter: down, a nonlinearity, up, parallel to a layer: y + s (U gelu(D x + d) + u).

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019; parallel, and with a learned scale, as in
LAE (Gao et al., "A Unified Continual Learning Framework with General Parameter-Efficient Tuning", ICCV 2023). Beside a
convolution it is two 1 x 1 convolutions that look at the middle of its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional

from edge_adapt.adapters.lora import check_rank, kaiming
from edge_adapt.adapters.protocol import Adapter, Place, Values
from edge_adapt.tail import Hook


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Adapter):
    """`down` [r, in] is drawn, `up` [out, r] is zero, as are `down_bias` [r] and `up_bias` [out]; `scale` [] is one."""

    kind: ClassVar[str] = "bottleneck"
    rank: int = 5

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)

    def init(self, generator: Generator) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for place in self.places:
            made |= {
                place.tensor("down"): kaiming((place.inputs,), self.rank, generator),
                place.tensor("down_bias"): torch.zeros(self.rank),
                place.tensor("up"): torch.zeros(place.outputs, self.rank),
                place.tensor("up_bias"): torch.zeros(place.outputs),
                place.tensor("scale"): torch.ones(()),
            }
        return made

    def hooks(self, values: Values) -> dict[str, Hook]:
        return {place.name: partial(_beside, place, values) for place in self.places}


def _beside(place: Place, values: Values, x: Tensor, y: Tensor) -> Tensor:
    """The layer's output, with the adapter's added."""
    down, down_bias, up, up_bias, scale = (
        values[place.tensor(name)] for name in ("down", "down_bias", "up", "up_bias", "scale")
    )
    looked = middles(place, x) if place.kind == "conv" else x
    narrow = functional.gelu(functional.linear(looked, down, down_bias))
    wide = scale * functional.linear(narrow, up, up_bias)
    return y + (wide.movedim(-1, 1) if place.kind == "conv" else wide)


def middles(place: Place, x: Tensor) -> Tensor:
    """[N, in, ...] -> [N, ..., in]: for every output of a convolution, what lies under the middle of its kernel."""
    sides: list[int] = []
    for size, padding in zip(reversed(place.shape[2:]), reversed(place.padding), strict=True):
        sides += [padding - size // 2, padding - (size - 1 - size // 2)]  # negative: cut off
    steps = tuple(slice(None, None, step) for step in place.stride)
    return functional.pad(x, sides)[(slice(None), slice(None), *steps)].movedim(1, -1)
