"""SSF: scale and shift what a layer or a norm gives, y = gamma x + beta for every channel.

Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", NeurIPS 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from edge_adapt.adapters.protocol import Adapter, Values


@dataclass(frozen=True)
class SSF(Adapter):
    """`scale` [out] is one and `shift` [out] zero, exactly: without labels a random start is a loss for nothing.

    A place without a bias of its own has nothing that could hold the shift, so that it gets a scale alone; the norm
    behind a convolution without bias holds both (`places(tail, norms=True)`).
    """

    kind: ClassVar[str] = "ssf"

    def init(self, generator: Generator) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for place in self.places:
            made[place.tensor("scale")] = torch.ones(place.outputs)
            if place.bias:
                made[place.tensor("shift")] = torch.zeros(place.outputs)
        return made

    def weights(self, values: Values, source: Values) -> dict[str, Tensor]:
        found = {}
        for place in self.places:
            scale, weight = values[place.tensor("scale")], source[f"{place.name}.weight"]
            rows = scale if place.kind == "matmul" else scale.reshape(-1, *[1] * (len(place.shape) - 1))
            found[f"{place.name}.weight"] = rows * weight
            if place.bias:
                shift = values[place.tensor("shift")]
                found[f"{place.name}.bias"] = scale * source[f"{place.name}.bias"] + shift
        return found
