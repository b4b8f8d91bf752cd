"""What an adapter is: a few named tensors, and a function from them to other weights, or to hooks on layers.

    adapter = LoRA(places(tail), rank=4)
    values = adapter.init(generator)                       # adapter/<layer>/<tensor> -> tensor
    logits = tail(adapter.cut(values, h), adapter.weights(values, tail.parameters), hooks=adapter.hooks(values))

An adapter whose change is linear in the weights says all in `weights`: gradients flow through it into `values`, and
what it returns is the merged form that an engine can take. One with a nonlinearity says all in `hooks`, a prompt in
`cut`; those answer through the tail only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from edge_adapt.delta import TAIL, Delta
from edge_adapt.errors import ConfigError, did_you_mean
from edge_adapt.tail import Hook, Tail, TailLayer

Values = Mapping[str, Tensor]
"""`adapter/<layer>/<tensor>` -> tensor."""
PREFIX = "adapter/"


@dataclass(frozen=True)
class Place:
    """A layer or a norm that an adapter sits on."""

    name: str
    """Its parameters in the tail are `<name>.weight`, and `<name>.bias` if `bias`."""
    kind: Literal["conv", "linear", "matmul", "norm"]
    shape: tuple[int, ...]
    """Of its weight: conv [out, in / groups, ...], linear [out, in], matmul [in, out], norm [channels]."""
    bias: bool = False
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()

    @property
    def outputs(self) -> int:
        return self.shape[1] if self.kind == "matmul" else self.shape[0]

    @property
    def inputs(self) -> int:
        """Channels of what it is given."""
        return self.shape[0] if self.kind in ("matmul", "norm") else self.shape[1] * self.groups

    @property
    def receptive(self) -> tuple[int, ...]:
        """What one output looks at: (in / groups, kh, kw) of a convolution, (in,) of a matrix product."""
        return self.shape[:1] if self.kind == "matmul" else self.shape[1:]

    @property
    def depthwise(self) -> bool:
        """Every output channel has one input channel of its own."""
        return self.kind == "conv" and self.groups > 1 and self.shape[1] == 1

    def tensor(self, name: str) -> str:
        """Full name of an adapter tensor that belongs here."""
        return f"{PREFIX}{self.name}/{name}"

    def low_rank(self, down: Tensor, up: Tensor) -> Tensor:
        """The product U D as a change of the weight, in its layout: down [r, *receptive], up [out, r]."""
        change = up @ down.flatten(1)
        return change.T if self.kind == "matmul" else change.reshape(self.shape)


@dataclass(frozen=True)
class Adapter:
    """One kind of adapter on some places. Without a change at the start: what `init` makes is the identity."""

    kind: ClassVar[str]
    places: tuple[Place, ...] = ()

    def init(self, generator: Generator) -> dict[str, Tensor]:
        """Fresh tensors."""
        raise NotImplementedError

    def weights(self, values: Values, source: Values) -> dict[str, Tensor]:
        """Parameter of the tail -> what replaces it, given the parameters without adapter."""
        return {}

    def hooks(self, values: Values) -> dict[str, Hook]:
        """Layer -> what to make of its input and output."""
        return {}

    def cut(self, values: Values, h: Tensor) -> Tensor:
        """What the tail is given instead of the tensor at the cut."""
        return h


def places(
    tail: Tail,
    *,
    names: Collection[str] | None = None,
    live: bool = False,
    depthwise: bool = False,
    norms: bool = False,
) -> tuple[Place, ...]:
    """Where an adapter may sit, in the order of the network, norms last.

    Args:
        names: these and no others, whatever they are; None for all that the other arguments let through.
        live: only what the engine can change while it runs.
        depthwise: depthwise convolutions too. Each of their channels has a small kernel of its own and shares no
            input with another, so that a low-rank change has nothing to share and more numbers than the kernel.
        norms: the norms of the tail too, for adapters that scale and shift.
    Raises: ConfigError for a name that the tail does not have, or if nothing is left.
    """
    every = _every(tail)
    if names is not None:
        for name in names:
            if name not in every:
                raise ConfigError(f"the tail has no layer {name!r}", remedy=did_you_mean(name, every))
        return tuple(place for place in every.values() if place.name in names)
    manifest = tail.bundle.manifest
    alive = {site.name for site in manifest.sites} | {layer.name for layer in manifest.layers}
    found = tuple(
        place
        for place in every.values()
        if (norms or place.kind != "norm")
        and (depthwise or not place.depthwise)
        and (not live or place.name in alive)
    )
    if not found:
        raise ConfigError(
            f"the tail of bundle {manifest.name!r} has no layer for an adapter",
            remedy="export it with an earlier cut, or use a method that needs no adapter, such as moments",
        )
    return found


def merged(adapter: Adapter, values: Values, source: Values) -> Delta:
    """The adapter as plain weights, `tail/<parameter>`, that an engine can take.

    Raises: ConfigError for an adapter that is no change of weights.
    """
    with torch.no_grad():
        weights = adapter.weights(values, source)
    if values and not weights:
        raise ConfigError(
            f"an adapter of kind {adapter.kind!r} is no change of weights and cannot be merged",
            remedy="answer through the tail, or use lora, vida, conv or ssf",
        )
    return Delta({f"{TAIL}{name}": value.detach().numpy() for name, value in weights.items()})


def _every(tail: Tail) -> dict[str, Place]:
    layers = {layer.name: _place(tail, layer) for layer in tail.layers.values()}
    norms = {
        name: Place(name, "norm", tuple(tail.parameters[f"{name}.weight"].shape), bias=True) for name in tail.norms
    }
    return layers | norms


def _place(tail: Tail, layer: TailLayer) -> Place:
    shape = tuple(tail.parameters[f"{layer.name}.weight"].shape)
    spatial = len(shape) - 2
    return Place(
        layer.name,
        layer.kind,
        shape,
        bias=f"{layer.name}.bias" in tail.parameters,
        groups=layer.groups,
        stride=_each(layer.stride, spatial),
        padding=_each(layer.padding, spatial),
    )


def _each(numbers: tuple[int, ...], spatial: int) -> tuple[int, ...]:
    """One number for all dimensions is one for each."""
    return numbers * spatial if len(numbers) == 1 else numbers
