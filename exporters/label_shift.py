"""Train the hypernetwork of the label shift adapter, at export, from features of the source and their labels.

Loss: the generalised logit-adjusted one of Park et al., ICCV 2023. With a prior pi drawn for each sample,
-log softmax_y(f(x; pi) / T + log pi_s - log pi): it is least where f(x; pi) is right for a stream with that prior.

A network is far too sure of images that it was trained on, and a correction that suits them is too weak for a device.
So features are mixed with those of other images until the head errs about as often as it will under a shift; how sure
it may then be, T, is measured first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from edge_adapt.adapters.label_shift import LEAST, LabelShiftNet, change, inputs, is_balanced, shapes
from edge_adapt.errors import DataError

Array = NDArray[Any]
Progress = Callable[[int, int], None]
"""Told (steps done, steps in all)."""

STEPS, BATCH, RATE = 600, 256, 3e-3
HARD = 0.25
"""Share of errors that features are mixed to: what CIFAR ResNets reach at severity 5 with corrected statistics."""
TEMPERATURES = np.arange(1.0, 8.01, 0.25)
LARGEST_MIX = 0.9


def train_label_shift(
    features: Array,
    labels: Array,
    head: tuple[Array, Array],
    *,
    seed: int = 0,
    steps: int = STEPS,
    progress: Progress = lambda done, total: None,
) -> LabelShiftNet:
    """Train it; seconds on one core. `edge_adapt.adapters.label_shift.save` puts it into a bundle.

    Args:
        features: z [N, D], what the head is given for source images; clean ones do.
        labels: [N] integers, true classes; how often each comes is taken as the source prior.
        head: W [K, D] and b [K], frozen.
        seed: of everything random; the same one gives the same network.
    Raises: DataError if a class has no sample, or something is not finite.
    """
    weight, bias = (np.asarray(part, np.float64) for part in head)
    z, y = np.asarray(features, np.float64), np.asarray(labels, np.int64)
    source = _prior_of(z, y, len(weight))
    rng = np.random.default_rng(seed)
    temperature = fitted_temperature(mixed(z, y, (weight, bias), rng) @ weight.T + bias, y)
    generator = Generator().manual_seed(seed)
    values = initial(len(weight), z.shape[1], source, generator)
    for value in values.values():
        value.requires_grad_()
    adam = torch.optim.Adam(list(values.values()), lr=RATE)
    w = torch.tensor(weight, dtype=torch.float32)
    told_of_source = torch.tensor(inputs(source[None], source), dtype=torch.float32)
    hard = mixed(z, y, (weight, bias), rng)
    for step in range(steps):
        if step % 50 == 0:
            hard = mixed(z, y, (weight, bias), rng)
            progress(step, steps)
        chosen = rng.integers(0, len(z), BATCH)
        priors = drawn_priors(source, BATCH, rng)
        part = torch.tensor(hard[chosen], dtype=torch.float32)
        told = torch.tensor(inputs(priors, source), dtype=torch.float32)
        logits = part @ w.T + torch.tensor(bias, dtype=torch.float32) + change(values, w, part, told, told_of_source)
        loss = gla_loss(logits / temperature, torch.tensor(y[chosen]), priors, source)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in adam.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        adam.step()
    progress(steps, steps)
    made = {name: value.detach().numpy().astype(np.float64) for name, value in values.items()}
    return LabelShiftNet(made, weight, source, temperature)


def initial(classes: int, width: int, source: Array, generator: Generator) -> dict[str, Tensor]:
    """Values before training: every output is 0, so that any prior gives the source model."""
    told = classes if is_balanced(source) else 1
    made = {name: torch.zeros(shape) for name, shape in shapes(classes, width, told).items()}
    for name in ("hidden.weight", "left", "right"):
        rows = made[name].shape[1]
        made[name] = torch.randn(made[name].shape, generator=generator) / rows**0.5
    return made


def gla_loss(logits: Tensor, labels: Tensor, priors: Array, source: Array) -> Tensor:
    """Generalised logit-adjusted loss, for logits [N, K] given for priors [N, K]; cross-entropy if they are source."""
    offset = np.log(source) - np.log(np.maximum(priors, LEAST))
    return cross_entropy(logits + torch.tensor(offset, dtype=logits.dtype), labels)


def drawn_priors(source: Array, count: int, rng: np.random.Generator) -> Array:
    """[count, K]: the source, uniform, its inverse, long tails in any order, Dirichlet draws, almost one class alone.

    For a source with a degree of imbalance: those that lie between it, uniform and its inverse.
    """
    classes = len(source)
    if not is_balanced(source):
        powers = rng.uniform(-1.5, 1.5, (count, 1))
        return _shares(source[None] ** powers)
    ranks = rng.random((count, classes)).argsort(axis=1) / max(1, classes - 1)
    tails = 100.0 ** (-rng.uniform(0, 1.2, (count, 1)) * ranks)
    spread = rng.gamma(rng.choice([0.1, 0.3, 1.0], (count, 1)), size=(count, classes)) + LEAST
    alone = np.eye(classes)[rng.integers(0, classes, count)] + 10 ** rng.uniform(-3, -1, (count, 1))
    kinds = np.stack([_shares(part) for part in (tails, spread, alone)])
    chosen = kinds[rng.choice(3, count, p=[0.5, 0.3, 0.2]), np.arange(count)]
    even = rng.choice([0.0, 0.05, 0.5], (count, 1), p=[0.5, 0.3, 0.2])
    return _shares((1 - even) * chosen + even * source)


def _shares(weights: Array) -> Array:
    made: Array = weights / weights.sum(axis=1, keepdims=True)
    return made


def mixed(features: Array, labels: Array, head: tuple[Array, Array], rng: np.random.Generator) -> Array:
    """Features, each with a random share of another's, the share such that the head errs in `HARD` of them."""
    other = features[rng.permutation(len(features))]
    share = rng.random((len(features), 1))

    def at(largest: float) -> Array:
        made: Array = features + largest * share * (other - features)
        return made

    low, high = 0.0, LARGEST_MIX
    for _ in range(8):
        middle = (low + high) / 2
        error = ((at(middle) @ head[0].T + head[1]).argmax(axis=1) != labels).mean()
        low, high = (middle, high) if error < HARD else (low, middle)
    return at((low + high) / 2)


def fitted_temperature(logits: Array, labels: Array) -> float:
    """The one, from 1 to 8, under which the labels are likeliest."""
    losses = [-log_softmax(logits / t, axis=1)[np.arange(len(labels)), labels].mean() for t in TEMPERATURES]
    return float(TEMPERATURES[int(np.argmin(losses))])


def _prior_of(features: Array, labels: Array, classes: int) -> Array:
    if features.ndim != 2 or len(features) != len(labels) or not np.isfinite(features).all():
        raise DataError(
            f"features have shape {features.shape} for {len(labels)} labels, or are not finite",
            remedy="give one row of finite features for each label",
        )
    counts = np.bincount(labels, minlength=classes)
    if len(counts) > classes or counts.min() == 0:
        raise DataError(
            f"labels go from {labels.min()} to {labels.max()}, and some of {classes} classes have no sample",
            remedy="give source data with samples of every class",
        )
    made: Array = counts / counts.sum()
    return made
