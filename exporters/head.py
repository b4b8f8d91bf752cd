"""Another head on a zoo backbone: a linear layer for the user's own classes, fitted to labelled source frames."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edge_adapt.errors import ConfigError, DataError
from edge_adapt.preprocess import Preprocess
from edge_adapt.streams.data import Dataset
from exporters.export import Model, from_module

Array = NDArray[Any]

DECAY = 1e-3
"""Weight of half the squared norm of the head, on standardised features."""
STEPS = 200
BATCH = 32


def with_head(
    model: Model, data: Dataset, classes: Sequence[str] | None, progress: Callable[[int, int], None] = lambda a, b: None
) -> Model:
    """The model with its last linear layer exchanged for one that is fitted to `data`; the rest stays as it is.

    Args:
        data: source frames with labels 0..K-1, as in an archive.
        classes: their names, or None.
        progress: told (frames done, frames in all).
    Returns: another model, made by deterministic arithmetic: the same frames give the same head.
    Raises: ConfigError if the model has no linear layer at its end; DataError if labels are missing.
    """
    if data.images is None or data.labels is None:
        raise DataError(f"{data.name} has no labels to fit a head to", remedy="give labelled source frames")
    name, old = _last_linear(model)
    assert model.module is not None
    features = _features(model, old, data.images, progress)
    count = len(classes) if classes else int(data.labels.max()) + 1
    head = fit(features, torch.from_numpy(data.labels), count)
    parent, _, leaf = name.rpartition(".")
    module = copy.deepcopy(model.module)
    setattr(module.get_submodule(parent), leaf, head)
    provenance = {key: value for key, value in model.provenance.items() if key != "torch"}
    made = from_module(
        module, f"{model.name}-{data.name}", model.input, classes=classes, cut=model.cut, provenance=provenance
    )
    return replace(made, provenance={**made.provenance, "head": f"fitted to {len(features)} frames of {data.name}"})


def fit(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """Multinomial logistic regression [N, D] -> [N, K] with weight decay, by L-BFGS in float64."""
    z = features.double()
    mean, std = z.mean(dim=0), z.std(dim=0).clamp_min(1e-6)
    z = (z - mean) / std
    weight = torch.zeros(classes, z.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(z @ weight.T + bias, labels) + DECAY / 2 * weight.square().sum()
        torch.autograd.backward(value)
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    head = nn.Linear(z.shape[1], classes)
    with torch.no_grad():
        head.weight.copy_(weight / std)
        head.bias.copy_(bias - weight @ (mean / std))
    return head.eval()


def _last_linear(model: Model) -> tuple[str, nn.Linear]:
    found = [(name, part) for name, part in (model.module or nn.Module()).named_modules() if name]
    if not found or not isinstance(found[-1][1], nn.Linear):
        raise ConfigError(
            f"{model.name} is no torch module that ends in a linear layer", remedy="use zoo:NAME, or leave out --head"
        )
    name, layer = found[-1]
    assert isinstance(layer, nn.Linear)
    return name, layer


def _features(model: Model, head: nn.Linear, images: Array, progress: Callable[[int, int], None]) -> Tensor:
    """What the head is given for every frame, [N, D]."""
    assert model.module is not None
    preprocess, seen = Preprocess(model.input), []
    hook = head.register_forward_hook(lambda layer, given, made: seen.append(given[0]))
    try:
        with torch.no_grad():
            for start in range(0, len(images), BATCH):
                model.module(torch.from_numpy(np.asarray(preprocess(images[start : start + BATCH]))))
                progress(min(start + BATCH, len(images)), len(images))
    finally:
        hook.remove()
    return torch.cat(seen)
