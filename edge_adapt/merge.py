"""Delta -> live weights: everything in a delta that is linear in the weights, folded as export folded the norms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.delta import PORT_SCALE, PORT_SHIFT, PROMPTS, Delta
from edge_adapt.errors import StateError

Array = NDArray[Any]


@dataclass(frozen=True)
class LiveUpdate:
    """What an engine writes into its weights.

    A site's layer gets weight = base * scale[its channels], bias = bias[its channels], where base is the weight of
    full.onnx, or the one in `weights`. Layers without a site get `weights` and `biases` as they are.
    """

    scale: Array
    """[channels of all sites], a factor for each output channel."""
    bias: Array
    """[channels of all sites]."""
    weights: dict[str, Array] = field(default_factory=dict)
    """Layer -> another weight, in the layout of full.onnx, before `scale`."""
    biases: dict[str, Array] = field(default_factory=dict)
    """Layer without a site -> another bias."""
    prompts: Array | None = None
    """[P, width], tokens behind the class token; None for a network that takes none."""


class Merger:
    """Turns deltas into live weights for one bundle; the vectors it needs are prepared once."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.std, self.mean = bundle.packed("std"), bundle.packed("mean")
        self.weight, self.bias = bundle.packed("weight"), bundle.packed("bias")
        self.offset = bundle.packed("offset")
        self.site_of = {site.layer: site for site in bundle.manifest.sites}
        self.sites = {site.name: site for site in bundle.manifest.sites}
        self.layers = {layer.name: layer for layer in bundle.manifest.layers}

    def __call__(self, delta: Delta) -> LiveUpdate:
        """Raises: StateError if the delta names a parameter that no layer of the engine has."""
        bundle = self.bundle
        bundle.check_delta(delta)
        weight, bias, offset = self.weight, self.bias, self.offset
        scale = delta.get(PORT_SCALE, np.ones_like(weight))
        shift = delta.get(PORT_SHIFT, np.zeros_like(weight))
        if delta.tail:
            weight, bias, offset = weight.copy(), bias.copy(), offset.copy()
        weights: dict[str, Array] = {}
        biases: dict[str, Array] = {}
        for name, value in delta.tail.items():
            owner, _, role = name.rpartition(".")
            self._check(name, owner, role, value)
            if owner in self.sites and role in ("weight", "bias"):
                (weight if role == "weight" else bias)[bundle.slices[owner]] = value
            elif owner in self.layers and role == "weight":
                weights[owner] = value
            elif owner in self.layers and role == "bias":
                site = self.site_of.get(owner)
                if site is None:
                    biases[owner] = value
                else:
                    place = bundle.slices[site.name]
                    offset[place] = (value - self.mean[place]) / self.std[place]
            else:
                raise StateError(
                    f"the delta changes {name!r}, which is no live parameter of this bundle",
                    remedy="answer through the tail, or leave that parameter out",
                )
        factor = np.divide(weight, self.weight, out=np.ones_like(weight), where=self.weight != 0) * scale
        for owner in weights:
            site = self.site_of.get(owner)
            if site is not None:  # an unfolded weight: fold it whole, so that a zero in `weight` is no special case
                place = bundle.slices[site.name]
                factor[place] = weight[place] * scale[place] / self.std[place]
        return LiveUpdate(
            factor.astype(np.float32),
            (weight * (scale * offset + shift) + bias).astype(np.float32),
            weights,
            biases,
            self._prompts(delta),
        )

    def _prompts(self, delta: Delta) -> Array | None:
        width = self.bundle.manifest.prompts
        if width is None and PROMPTS in delta:
            raise StateError("the delta holds prompts, the network takes none", remedy="use a delta of this bundle")
        return None if width is None else delta.get(PROMPTS, np.zeros((0, width), np.float32))

    def _check(self, name: str, owner: str, role: str, value: Array) -> None:
        """Raises: StateError if a vector does not fit its site; NumPy would stretch it in silence."""
        site = self.sites.get(owner) or (self.site_of.get(owner) if role == "bias" else None)
        if site is not None and value.shape != (site.channels,):
            raise StateError(
                f"{name} has shape {value.shape}, the site {site.name} has {site.channels} channels",
                remedy="use a delta that was learned on this bundle",
            )
