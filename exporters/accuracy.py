"""What accuracy is to be told by on a device, fitted at export to source frames under augmentation.

AugMix makes domains that hold no corruption of any benchmark. On each of them the source weights answer, and so does
the network with ports that were set from its frames; the truth is what source answers to the plain frames. Since labels
may come in any mix, and a network may collapse, windows with other mixes and with a bias on the head are drawn besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.protocol import Engine
from edge_adapt.methods.moments import Moments
from edge_adapt.methods.protocol import FEATURES, TAPS, Context, Observation
from edge_adapt.monitor.accuracy import COVERAGE, MEMORY, WEIGHTS, WORTH, Signals, ambiguity, bounds, without_dissent
from edge_adapt.runtime.predictor import Predictor
from exporters.augmix import AugMix
from exporters.warm_up import Images

Array = NDArray[Any]
Progress = Callable[[int, int], None]
"""Told (domains done, domains in all)."""

ENOUGH = 256
"""Calibration frames below which nothing is fitted."""
DOMAINS, FRAMES, BATCH = 40, 128, 64
"""Domains, frames of each, frames in a pass."""
SEED = 0
RECIPES = ((1, 3.0, 3, 1), (1, 10.0, 3, 1), (3, 10.0, 1, 1), (4, 10.0, 1, 2), (2, 10.0, 3, 3))
"""(share of the domains, severity, width, times) of AugMix; two domains more are plain."""
USUAL, RARE = 30.0, 1.0
"""Weight of a window with the labels as they come, and of one with another mix, or of a collapse."""
DECAY = 3e-3
"""Weight of the squared coefficients, beside the mean loss."""
FOLDS, ROUNDS = 5, 30
WORTHS = np.exp(np.linspace(np.log(4), np.log(1000), 40))
"""How many labels an estimate may be worth."""


@dataclass(frozen=True)
class Domain:
    """Answers to the frames of one domain, with source weights and with ports that were set from them."""

    truth: Array
    """[n] classes."""
    source: Observation
    adapted: Observation


@dataclass(frozen=True)
class Cases:
    """Windows to fit to."""

    signals: Array
    """[cases, signals]."""
    accuracy: Array
    weight: Array
    domain: Array
    """[cases] numbers of the domains."""

    def __getitem__(self, chosen: Array) -> Cases:
        return Cases(self.signals[chosen], self.accuracy[chosen], self.weight[chosen], self.domain[chosen])


def can_be_fitted(bundle: Bundle, images: Array) -> bool:
    """True for enough images in 8 bits, and a network that ends in a linear layer."""
    spec = bundle.manifest.input
    is_image = spec.layout != "NCW" and len(spec.shape) == 3 and spec.channels in (1, 3)
    return is_image and bundle.manifest.head is not None and len(images) >= ENOUGH and images.dtype == np.uint8


def accuracy_entries(
    bundle: Bundle, engine: Engine, images: Array, progress: Progress = lambda done, total: None
) -> dict[str, Array]:
    """What `edge_adapt.monitor.accuracy` needs of a bundle; minutes for a large network.

    Args:
        bundle: with source statistics; one that `can_be_fitted`.
        images: raw source images, uint8.
    Returns: entries of source.safetensors.
    """
    return fitted(cases(bundle, list(domains(bundle, engine, images, progress))))


def domains(bundle: Bundle, engine: Engine, images: Array, progress: Progress) -> Iterator[Domain]:
    """Each with other frames, drawn at random."""
    spec, rng, generator = bundle.manifest.input, np.random.default_rng(SEED), torch.Generator().manual_seed(SEED)
    predictor = Predictor(bundle, engine)
    moments = Moments(Context(bundle, _no_tail)) if bundle.manifest.sites else None
    plan = _plan()
    for number, (severity, width, times) in enumerate(plan):
        chosen = Images(spec, images[np.sort(rng.choice(len(images), min(FRAMES, len(images)), replace=False))])
        plain = mixed = chosen[:]
        for _ in range(times):
            mixed = AugMix(severity=severity, width=width)(mixed, generator, shared=True)
        frames = _fed(chosen, mixed)
        truth = _answers(predictor, _fed(chosen, plain), Delta.source())
        source = _answers(predictor, frames, Delta.source())
        adapted = source if moments is None else _answers(predictor, frames, _ports(predictor, moments, frames))
        assert truth.logits is not None
        yield Domain(truth.logits.argmax(axis=1), source, adapted)
        progress(number + 1, len(plan))


def _plan() -> list[tuple[float, int, int]]:
    """(severity, width, times) of every domain, the plain one first."""
    total = sum(share for share, *_ in RECIPES)
    made = [(3.0, 3, 0)] * 2
    for share, severity, width, times in RECIPES:
        made += [(severity, width, times)] * max(2, round(share * DOMAINS / total))
    return made


def _fed(chosen: Images, images: torch.Tensor) -> Array:
    made: Array = np.ascontiguousarray(chosen.fed(images).numpy(), np.float32)
    return made


def _answers(predictor: Predictor, frames: Array, delta: Delta) -> Observation:
    """Logits and features of all frames."""
    parts = [
        predictor.rehearse(frames[start : start + BATCH], delta, frozenset((FEATURES,)))
        for start in range(0, len(frames), BATCH)
    ]
    logits, features = (np.concatenate([getattr(part, name) for part in parts]) for name in ("logits", "features"))
    return Observation(frames[:0].copy(), logits, features=features)  # a view would keep all frames alive


def _ports(predictor: Predictor, moments: Moments, frames: Array) -> Delta:
    """What `moments` sets after these frames."""
    state, done = moments.init(), 0
    while done < len(frames):
        count = max(1, moments.look(state, len(frames) - done, MEMORY))
        seen = predictor.rehearse(frames[done : done + count], moments.delta(state), frozenset((TAPS,)))
        state, done = moments.step(state, seen).state, done + count
    return moments.delta(state)


def _no_tail() -> Any:
    raise AssertionError("moments needs no tail")


def cases(bundle: Bundle, found: list[Domain]) -> Cases:
    """Windows of each domain, of both networks: with labels as they come, with other mixes, and after a collapse."""
    signals, rng = Signals(bundle), np.random.default_rng(SEED)
    rows: list[tuple[Array, float, float, int]] = []
    for number, domain in enumerate(found):
        assert domain.source.logits is not None
        for place, shares in enumerate(_mixes(rng, bundle.manifest.outputs)):
            chosen = _drawn(rng, domain.truth, shares)
            for network in (domain.source, domain.adapted):
                assert network.logits is not None and network.features is not None
                bias = _bias(rng, network.logits) if shares is not None and place == 1 else 0.0
                logits = network.logits[chosen] + bias
                seen = signals.after(signals.init(), logits, network.features[chosen], domain.source.logits[chosen])
                accuracy = float((logits.argmax(axis=1) == domain.truth[chosen]).mean())
                rows.append((signals.of(seen.whole), accuracy, RARE if shares is not None else USUAL, number))
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return Cases(*columns)


def _mixes(rng: np.random.Generator, classes: int) -> Iterator[Array | None]:
    """Class frequencies [K]; None is as they come. The second one is of all classes alike, for a collapse."""
    yield None
    yield np.full(classes, 1 / classes)
    tail = 100.0 ** (-rng.permutation(classes) / max(1, classes - 1))
    yield tail / tail.sum()
    yield rng.dirichlet(np.full(classes, 0.3))
    yield np.eye(classes)[rng.integers(classes)]


def _drawn(rng: np.random.Generator, truth: Array, shares: Array | None) -> Array:
    """Places of a window of `MEMORY` frames, with these classes as far as there are any."""
    weight = np.ones(len(truth))
    if shares is not None:
        weight = shares[truth] / np.bincount(truth, minlength=len(shares))[truth]
        weight = weight / max(weight.sum(), 1e-30) + 1e-9 / len(truth)
    return rng.choice(len(truth), MEMORY, p=weight / weight.sum())


def _bias(rng: np.random.Generator, logits: Array) -> Array:
    """Of a head that leans to one class: up to what makes it the only one."""
    margin = float(np.median(logits.max(axis=1) - np.median(logits, axis=1)))
    made: Array = np.eye(logits.shape[1])[rng.integers(logits.shape[1])] * margin * rng.uniform(0.3, 1.5)
    return made


def fitted(made: Cases) -> dict[str, Array]:
    """Coefficients with dissent and without it, and what estimates are worth, by domains that were not fitted to."""
    weights, worths = [], []
    for row in range(2):
        part = made if row == 0 else replace(made, signals=without_dissent(made.signals))
        weights.append(regression(part))
        worths.append(_worth(part))
    return {WEIGHTS: np.array(weights, np.float32), WORTH: np.array(worths, np.float32)}


def regression(made: Cases) -> Array:
    """[signals + 1], of the logit of accuracy, by the likelihood of shares; the constant is last."""
    middle, size = made.signals.mean(axis=0), made.signals.std(axis=0)
    size = np.where(size > 1e-9, size, np.inf)
    inputs = np.column_stack([(made.signals - middle) / size, np.ones(len(made.signals))])
    weight = made.weight / made.weight.sum()
    decay = DECAY * np.append(np.ones(len(middle)), 0.0)
    found = np.zeros(len(decay))
    for _ in range(ROUNDS):
        expected = expit(inputs @ found)
        slope = inputs.T @ (weight * (made.accuracy - expected)) - decay * found
        curve = (inputs.T * (weight * expected * (1 - expected))) @ inputs + np.diag(decay + 1e-9)
        found = found + np.linalg.solve(curve, slope)
    scaled = found[:-1] / size
    coefficients: Array = np.append(scaled, found[-1] - scaled @ middle)
    return coefficients


def _worth(made: Cases) -> Array:
    """[2], for `worth_of`: so that intervals hold the truth as often as they say, on domains that were not fitted to.

    A fifth of the domains at a time, easy and hard ones, is left out.
    """
    count = int(made.domain.max()) + 1
    ease = np.array([made.accuracy[(made.domain == number) & (made.weight == USUAL)].mean() for number in range(count)])
    fold = (ease.argsort().argsort() % FOLDS)[made.domain]
    value = np.zeros(len(made.accuracy))
    for number in range(FOLDS):
        out = fold == number
        coefficients = regression(made[~out])
        value[out] = expit(np.clip(made.signals[out] @ coefficients[:-1] + coefficients[-1], -9, 9))
    doubtful = ambiguity(made.signals)
    usual = made.weight == USUAL
    first = _covering(value[usual], made.accuracy[usual])
    middle = float(doubtful[usual].mean())
    wide = ~usual & (doubtful > np.median(doubtful[~usual]))
    second = _covering(value[wide], made.accuracy[wide])
    far = float(doubtful[wide].mean())
    slope = min(0.0, (np.log(second) - np.log(first)) / max(far - middle, 1e-3))
    return np.array([np.log(first) - slope * middle, slope])


def _covering(value: Array, truth: Array) -> float:
    """The largest number of labels at which intervals about `value` hold `truth` often enough."""
    for worth in WORTHS[::-1]:
        low, high = bounds(value * worth, (1 - value) * worth)
        if ((low <= truth) & (truth <= high)).mean() >= COVERAGE:
            return float(worth)
    return float(WORTHS[0])
