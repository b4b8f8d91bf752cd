"""The ViDA pair: one adapter of low rank and one of high rank on the same layer, with a scale each.

W + s_low U1 D1 + s_high U2 D2 (Liu et al., "ViDA: Homeostatic Visual Domain Adapter for Continual Test Time
Adaptation", ICLR 2024). The low rank is to hold what domains share, the high rank what is of this one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from edge_adapt.adapters.lora import check_rank
from edge_adapt.adapters.protocol import Adapter, Values


@dataclass(frozen=True, kw_only=True)
class VidaPair(Adapter):
    """`down_low|high` [r, in / groups, ...] ~ N(0, 1 / r^2) in standard deviation, `up_low|high` [out, r] are zero."""

    kind: ClassVar[str] = "vida"
    low: int = 1
    high: int = 128
    scale_low: float = 1.0
    scale_high: float = 1.0

    def __post_init__(self) -> None:
        check_rank("low", self.low)
        check_rank("high", self.high)

    def init(self, generator: Generator) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for place in self.places:
            for role, rank in (("low", self.low), ("high", self.high)):
                drawn = torch.randn(rank, *place.receptive, generator=generator)
                made[place.tensor(f"down_{role}")] = drawn / rank**2
                made[place.tensor(f"up_{role}")] = torch.zeros(place.outputs, rank)
        return made

    def weights(self, values: Values, source: Values) -> dict[str, Tensor]:
        found = {}
        for place in self.places:
            low, high = (
                place.low_rank(values[place.tensor(f"down_{role}")], values[place.tensor(f"up_{role}")])
                for role in ("low", "high")
            )
            name = f"{place.name}.weight"
            found[name] = source[name] + self.scale_low * low + self.scale_high * high
        return found

    def scaled(self, low: float, high: float) -> VidaPair:
        """The same pair with other scales."""
        return replace(self, scale_low=low, scale_high=high)
