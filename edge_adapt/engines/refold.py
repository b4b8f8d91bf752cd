"""The weights of a float graph, folded with an update: what a session is rebuilt from."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.merge import LiveUpdate

Array = NDArray[Any]


def refolded(
    bundle: Bundle, weights: Mapping[str, Array], update: LiveUpdate, *, without: Container[str] = ()
) -> dict[str, Array]:
    """Initialiser name -> value, for all live layers, in the layout of full.onnx.

    Args:
        weights: the initialisers of full.onnx.
        without: layers to leave out.
    """
    sites = {site.layer: bundle.slices[site.name] for site in bundle.manifest.sites}
    made: dict[str, Array] = {}
    for layer in bundle.manifest.layers:
        if layer.name in without:
            continue
        base = update.weights.get(layer.name, weights[layer.weight])
        place = sites.get(layer.name)
        if place is None:
            made[layer.weight] = base
            if layer.bias:
                made[layer.bias] = update.biases.get(layer.name, weights[layer.bias])
        else:
            made[layer.weight] = base * update.scale[place].reshape(-1, *(1,) * (base.ndim - 1))
            if layer.bias:
                made[layer.bias] = update.bias[place]
    return made
