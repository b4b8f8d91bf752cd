"""adapters/*.safetensors of a bundle: what a warm-up trained, as ViDA pairs.

A trained change of a weight becomes a pair: its best approximation of low rank, and the rest up to a high rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_adapt.adapters.label_shift import save as save_label_shift
from edge_adapt.adapters.protocol import Place, places
from edge_adapt.adapters.storage import save
from edge_adapt.adapters.vida import VidaPair
from edge_adapt.bundle import Bundle
from edge_adapt.engines.protocol import Engine
from edge_adapt.errors import ConfigError
from edge_adapt.preprocess import Preprocess
from edge_adapt.tail import Tail
from exporters.label_shift import train_label_shift

Array = NDArray[Any]

ADAPTERS = "adapters"
"""Folder in a bundle."""
VIDA = "vida.safetensors"
BATCH = 50
LABELLED = 5000
"""Source images, at most, that the label shift adapter is trained on."""


def write_pairs(bundle: Bundle, frozen: Mapping[str, Tensor], low: int, high: int) -> None:
    """Write the pairs that are merged into the tail of a bundle; nothing if its tail has no layer for one."""
    made = merged_pairs(Tail(bundle), frozen, low, high)
    if made is not None:
        folder = bundle.path / ADAPTERS
        folder.mkdir(exist_ok=True)
        save(folder / VIDA, *made, bundle)


def write_label_shift(bundle: Bundle, engine: Engine, images: Array, labels: Array, seed: int) -> None:
    """Train and write the label shift adapter; nothing for a model that does not end in a linear layer.

    Args:
        images: raw source images, as in an archive.
        labels: [N].
    Raises: DataError if a class has no image.
    """
    if bundle.manifest.head is None:
        return
    step = -(-len(images) // LABELLED)
    frames = Preprocess(bundle.manifest.input)(images[::step])
    parts = [
        engine.observe(frames[start : start + BATCH], cut=False, taps=False, features=True).features
        for start in range(0, len(frames), BATCH)
    ]
    features = np.concatenate([part for part in parts if part is not None])
    head = bundle.source["head.weight"], bundle.source["head.bias"]
    (bundle.path / ADAPTERS).mkdir(exist_ok=True)
    save_label_shift(bundle.path, train_label_shift(features, labels[::step], head, seed=seed))


def limit_rank(weights: Mapping[str, Tensor], frozen: Mapping[str, Tensor], rank: int) -> None:
    """Leave of each change of a weight, in place, what pairs of so high a rank together can hold.

    Args:
        weights: name -> weight, of which rows, or the first dimension, are outputs or inputs.
        frozen: the same without the change.
    """
    with torch.no_grad():
        for name, value in weights.items():
            if value.ndim > 1 and min(len(value), value[0].numel()) > rank:
                left, sizes, right = torch.linalg.svd((value - frozen[name]).flatten(1), full_matrices=False)
                kept = (left[:, :rank] * sizes[:rank]) @ right[:rank]
                value.copy_(frozen[name] + kept.reshape(value.shape))


def merged_pairs(
    tail: Tail, frozen: Mapping[str, Tensor], low: int, high: int
) -> tuple[VidaPair, dict[str, Tensor]] | None:
    """The pairs that are merged into a tail: its weights are those of `frozen` plus what these make at scale 1.

    Args:
        frozen: weight -> its value without the pair.
        low, high: ranks; the high one is lowered to what the largest layer needs.
    Returns: the adapter and its values, or None if the tail has no layer for one.
    """
    try:
        found = [place for place in places(tail) if f"{place.name}.weight" in frozen]
    except ConfigError:
        return None
    needed = [min(place.outputs, _rows(place, tail.parameters[f"{place.name}.weight"])[0].numel()) for place in found]
    high = max(1, min(high, max(needed, default=1) - low))
    values: dict[str, Tensor] = {}
    for place in found:
        name = f"{place.name}.weight"
        change = _rows(place, tail.parameters[name] - frozen[name])
        left, sizes, right = torch.linalg.svd(change, full_matrices=False)
        for role, part, rank in (("low", slice(low), low), ("high", slice(low, low + high), high)):
            root = sizes[part].sqrt()
            up, down = torch.zeros(place.outputs, rank), torch.zeros(rank, change.shape[1])
            up[:, : len(root)] = left[:, part] * root
            down[: len(root)] = root[:, None] * right[part]
            values[place.tensor(f"up_{role}")] = up
            values[place.tensor(f"down_{role}")] = down.reshape(rank, *place.receptive)
    return (VidaPair(tuple(found), low=low, high=high), values) if found else None


def _rows(place: Place, weight: Tensor) -> Tensor:
    """[out, what one output looks at]."""
    return (weight.T if place.kind == "matmul" else weight).flatten(1)
