"""LoRA: a low-rank change of a weight, W + s U D (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
ICLR 2022). On a convolution D is a convolution with r output channels, and U is one of 1 x 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from edge_adapt.adapters.protocol import Adapter, Values
from edge_adapt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """`down` [r, in / groups, ...] is drawn, `up` [out, r] is zero."""

    kind: ClassVar[str] = "lora"
    rank: int = 4
    scale: float = 1.0
    """s."""

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)

    def init(self, generator: Generator) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for place in self.places:
            made[place.tensor("down")] = kaiming(place.receptive, self.rank, generator)
            made[place.tensor("up")] = torch.zeros(place.outputs, self.rank)
        return made

    def weights(self, values: Values, source: Values) -> dict[str, Tensor]:
        return {
            f"{place.name}.weight": source[f"{place.name}.weight"]
            + self.scale * place.low_rank(values[place.tensor("down")], values[place.tensor("up")])
            for place in self.places
        }


def kaiming(receptive: tuple[int, ...], rank: int, generator: Generator) -> Tensor:
    """[r, *receptive], uniform as Kaiming's with a = sqrt 5: within 1 / sqrt(fan in)."""
    bound = 1 / math.sqrt(math.prod(receptive))
    return (2 * torch.rand(rank, *receptive, generator=generator) - 1) * bound


def check_rank(name: str, rank: int) -> None:
    """Raises: ConfigError if the rank is not positive."""
    if rank < 1:
        raise ConfigError(f"{name} is {rank}, expected 1 or more", remedy="use the default")
