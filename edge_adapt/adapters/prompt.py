"""Prompt tokens at a cut that is a token sequence: put behind the class token, in front of the patches.

Jia et al., "Visual Prompt Tuning", ECCV 2022. They are not linear in any weight and answer through the tail; prompts
at the input of the whole network are the engine's own, `prompts` of a delta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from edge_adapt.adapters.lora import check_rank
from edge_adapt.adapters.protocol import PREFIX, Adapter, Values
from edge_adapt.errors import ConfigError
from edge_adapt.tail import Tail

TOKENS = f"{PREFIX}cut/tokens"


@dataclass(frozen=True, kw_only=True)
class Prompt(Adapter):
    """`tokens` [count, width], uniform within sqrt(3 / width). Not the identity at the start: no token is zero to all.

    It has no places; `Prompt.at(tail)` makes one that fits.
    """

    kind: ClassVar[str] = "prompt"
    width: int
    count: int = 4

    def __post_init__(self) -> None:
        check_rank("count", self.count)

    @classmethod
    def at(cls, tail: Tail, *, count: int = 4) -> Prompt:
        """Raises: ConfigError if the cut is no token sequence."""
        manifest = tail.bundle.manifest
        if manifest.prompts is None or manifest.cut.shape[-1:] != (manifest.prompts,):
            raise ConfigError(
                f"the cut {manifest.cut.name!r} of bundle {manifest.name!r} is {manifest.cut.shape}, no token sequence",
                remedy="cut a transformer between its blocks, or use lora",
            )
        return cls(width=manifest.prompts, count=count)

    def init(self, generator: Generator) -> dict[str, Tensor]:
        drawn = 2 * torch.rand(self.count, self.width, generator=generator) - 1
        return {TOKENS: drawn * math.sqrt(3 / self.width)}

    def cut(self, values: Values, h: Tensor) -> Tensor:
        """[N, T, width] -> [N, T + count, width]."""
        tokens = values[TOKENS].expand(len(h), -1, -1)
        return torch.cat([h[:, :1], tokens, h[:, 1:]], 1)
