"""Adapters to choose from: kind, rank and place, what each takes, and how the tail answers with it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from edge_adapt.adapters.bottleneck import Bottleneck
from edge_adapt.adapters.conv import ConvAdapter
from edge_adapt.adapters.lora import LoRA
from edge_adapt.adapters.prompt import Prompt
from edge_adapt.adapters.protocol import Adapter, Place, Values, places
from edge_adapt.adapters.ssf import SSF
from edge_adapt.adapters.vida import VidaPair
from edge_adapt.tail import Ports, Tail

SMALL = 1e-2
"""Standard deviation of what stands in for zeros, and of a random move."""
COPIES = 4 * 4
"""Bytes that a parameter takes while it is learned: itself, its gradient, and both moments of Adam."""
EVERYWHERE = "all"


@dataclass(frozen=True)
class Candidate:
    """An adapter on one place of the tail, or on all that can bear it."""

    name: str
    """`<kind>-<rank>@<place>`."""
    adapter: Adapter

    def start(self, seed: int) -> dict[str, Tensor]:
        """Its values before training; they depend on the seed and the name alone."""
        return self.adapter.init(self.generator(seed))

    def generator(self, seed: int) -> Generator:
        """Its own random numbers."""
        return Generator().manual_seed(zlib.crc32(f"{seed} {self.name}".encode()))

    def stirred(self, seed: int) -> dict[str, Tensor]:
        """The same with N(0, 1e-2) in place of zeros, which would hide all that lies before them."""
        generator = self.generator(seed)
        return {
            name: value if value.any() else SMALL * torch.randn(value.shape, generator=generator)
            for name, value in self.adapter.init(generator).items()
        }

    def run(self, tail: Tail, values: Values, h: Tensor, ports: Ports | None = None) -> Tensor:
        """Logits [N, K] with these values, for the tensor at the cut [N, ...]."""
        weights, hooks = self.adapter.weights(values, tail.parameters), self.adapter.hooks(values)
        return tail(self.adapter.cut(values, h), weights, ports=ports, hooks=hooks)


@dataclass(frozen=True)
class Cost:
    """What a candidate takes."""

    parameters: int
    bytes_per_frame: int
    """Activations that learning keeps of one frame, as autograd holds them."""

    def step_bytes(self, frames: int) -> int:
        """Of one learning step on so many frames."""
        return frames * self.bytes_per_frame + COPIES * self.parameters


def candidates(tail: Tail) -> tuple[Candidate, ...]:
    """Every kind of adapter, in a few ranks, on each layer of the tail and on all of them.

    SSF sits on norms and on the last layer; prompts at the cut, where that is a sequence of tokens.
    Raises: ConfigError if the tail has no layer for an adapter.
    """
    layers = places(tail)
    norms = tuple(place for place in places(tail, norms=True) if place.kind == "norm")
    return (
        *(made for where, chosen in _wheres(layers) for made in _on_layers(where, chosen)),
        *(Candidate(f"ssf@{where}", SSF(chosen)) for where, chosen in _wheres((*norms, layers[-1]))),
        *_prompts(tail),
    )


def cost(tail: Tail, candidate: Candidate, h: Tensor, ports: Ports | None = None) -> Cost:
    """What a candidate takes, its activations measured on a frame or two of `h`."""
    values = {name: value.requires_grad_() for name, value in candidate.start(0).items()}
    one, two = (_kept(tail, candidate, values, h[:count], ports) for count in (1, 2))
    return Cost(sum(value.numel() for value in values.values()), two - one)


def _kept(tail: Tail, candidate: Candidate, values: Values, h: Tensor, ports: Ports | None) -> int:
    """Bytes that autograd holds between forward and backward."""
    storages: dict[int, int] = {}

    def pack(kept: Tensor) -> Tensor:
        storage = kept.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return kept

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        alive = candidate.run(tail, values, h, ports)  # until the end, so that no address is given twice
        del alive
    return sum(storages.values())


def _wheres(chosen: tuple[Place, ...]) -> Iterator[tuple[str, tuple[Place, ...]]]:
    """Each place alone, and all together."""
    yield from ((place.name, (place,)) for place in chosen)
    if len(chosen) > 1:
        yield EVERYWHERE, chosen


def _on_layers(where: str, chosen: tuple[Place, ...]) -> Iterator[Candidate]:
    """All kinds that sit on layers, for one choice of places."""
    for rank in (4, 16):
        yield Candidate(f"lora-{rank}@{where}", LoRA(chosen, rank=rank))
    for rank in (4, 8, 16):
        yield Candidate(f"bottleneck-{rank}@{where}", Bottleneck(chosen, rank=rank))
    convolutions = tuple(place for place in chosen if place.kind == "conv")
    for rank in (4, 16) if convolutions else ():
        yield Candidate(f"conv-{rank}@{where}", ConvAdapter(convolutions, rank=rank))
    yield Candidate(f"vida-64@{where}", VidaPair(chosen, low=1, high=64))


def _prompts(tail: Tail) -> Iterator[Candidate]:
    """Where the cut is a sequence of tokens."""
    manifest = tail.bundle.manifest
    if manifest.prompts is not None and manifest.cut.shape[-1:] == (manifest.prompts,):
        for count in (4, 8):
            yield Candidate(f"prompt-{count}@cut", Prompt.at(tail, count=count))
