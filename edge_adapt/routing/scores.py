"""How strange a frame is to the source model: larger is stranger. Fitted at export, kept in the bundle.

The default adds two standardised scores: energy, which knows what is near to the classes, and the distance of the
features' signs to the nearest class, which knows what is far from all of them. Over the taps of all layers, as in
Wilson et al. (WACV 2023), the same distance tells domains, and hardly any foreign class, apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.errors import ConfigError, DataError, did_you_mean
from edge_adapt.routing.codes import packed, similarity
from edge_adapt.routing.encoder import unit

Array = NDArray[Any]
Kept = dict[str, Array]

DEFAULT = "hyperdimensional"
PREFIX = "ood."
WIDTH = 4096
"""Signs of a code of features."""
SHARE = 0.5
"""Weight of the distance of codes beside energy."""
NEIGHBOURS, REFERENCES = 5, 256
"""k of k-NN, and the frames it looks among."""
FEWEST = 4
"""Source frames to fit on."""
ACCEPTED = 0.95
"""Share of source frames below the threshold."""
LARGEST = 2_000_000
"""Numbers that a Mahalanobis distance may keep; without it beyond."""


class Score(Protocol):
    """One number a frame, from what the model answered with source weights."""

    name: ClassVar[str]

    @classmethod
    def fit(cls, logits: Array, features: Array | None, seed: int) -> Kept | None:
        """What to keep of source frames; None where it cannot be had from these."""
        ...

    def __init__(self, kept: Kept) -> None: ...

    def __call__(self, logits: Array, features: Array | None) -> Array:
        """logits [N, K], features [N, D] -> [N], larger is stranger; not finite where they are not."""
        ...


@dataclass(frozen=True)
class Judge:
    """A score with the threshold that was calibrated at export."""

    score: Score
    threshold: float

    def __call__(self, logits: Array, features: Array | None = None) -> Array:
        """[N], larger is stranger. Raises: DataError if features are needed and missing, or of another width."""
        return self.score(logits, features)

    def strange(self, logits: Array, features: Array | None = None) -> Array:
        """[N] bool; what is not finite is strange."""
        made: Array = ~(self(logits, features) <= self.threshold)
        return made


class Energy:
    """Liu et al., NeurIPS 2020: less the log of the summed exponentials."""

    name: ClassVar[str] = "energy"

    @classmethod
    def fit(cls, logits: Array, features: Array | None, seed: int) -> Kept | None:
        return {}

    def __init__(self, kept: Kept) -> None: ...

    def __call__(self, logits: Array, features: Array | None) -> Array:
        top = logits.max(axis=1).astype(np.float64)
        with np.errstate(invalid="ignore"):
            made: Array = -(top + np.log(np.exp(logits - top[:, None]).sum(axis=1)))
        return made


class MaxLogit:
    """Hendrycks et al., ICML 2022: less the largest logit."""

    name: ClassVar[str] = "max-logit"

    @classmethod
    def fit(cls, logits: Array, features: Array | None, seed: int) -> Kept | None:
        return {}

    def __init__(self, kept: Kept) -> None: ...

    def __call__(self, logits: Array, features: Array | None) -> Array:
        made: Array = -logits.max(axis=1).astype(np.float64)
        return made


class Mahalanobis:
    """Lee et al., NeurIPS 2018: squared distance to the nearest class mean, under one covariance for all."""

    name: ClassVar[str] = "mahalanobis"

    @classmethod
    def fit(cls, logits: Array, features: Array | None, seed: int) -> Kept | None:
        if features is None or len(features) < 2 * features.shape[1]:
            return None
        predicted = logits.argmax(axis=1)
        classes, place = np.unique(predicted, return_inverse=True)
        width = features.shape[1]
        if width * (width + len(classes)) > LARGEST:
            return None
        means = np.stack([features[place == index].mean(axis=0) for index in range(len(classes))])
        covariance = np.atleast_2d(np.cov((features - means[place]).T, bias=True))
        ridge = 1e-4 * max(float(np.trace(covariance)) / width, 1e-12)
        return {"means": means, "precision": np.linalg.inv(covariance + ridge * np.eye(width))}

    def __init__(self, kept: Kept) -> None:
        self.means, self.precision = (kept[name].astype(np.float64) for name in ("means", "precision"))

    def __call__(self, logits: Array, features: Array | None) -> Array:
        apart = _given(features, self.means.shape[1], self.name)[:, None] - self.means
        made: Array = np.einsum("nkd,de,nke->nk", apart, self.precision, apart, optimize=True).min(axis=1)
        return made


class Neighbours:
    """Sun et al., ICML 2022: less the cosine with the k-th nearest of some source frames."""

    name: ClassVar[str] = "knn"

    @classmethod
    def fit(cls, logits: Array, features: Array | None, seed: int) -> Kept | None:
        if features is None:
            return None
        drawn = np.random.default_rng(seed).permutation(len(features))[:REFERENCES]
        return {"references": unit(features[np.sort(drawn)])}

    def __init__(self, kept: Kept) -> None:
        self.references = kept["references"].astype(np.float64)

    def __call__(self, logits: Array, features: Array | None) -> Array:
        near = unit(_given(features, self.references.shape[1], self.name)) @ self.references.T
        made: Array = -np.sort(near, axis=1)[:, -min(NEIGHBOURS, near.shape[1])]
        return made


class Hyperdimensional:
    """Energy plus the distance of the features' signs to the nearest class, each standardised over source frames."""

    name: ClassVar[str] = DEFAULT

    @classmethod
    def fit(cls, logits: Array, features: Array | None, seed: int) -> Kept | None:
        if features is None:
            return None
        signs = np.where(features @ projection(features.shape[1], seed) > 0, 1, -1)
        predicted = logits.argmax(axis=1)
        classes = np.stack([signs[predicted == index].sum(axis=0) for index in np.unique(predicted)])
        kept = {"classes": packed(classes), "shape": np.array([features.shape[1], seed]), "scale": np.eye(2)}
        parts = cls(kept).parts(logits, features)
        return kept | {"scale": np.stack([parts.mean(axis=0), np.maximum(parts.std(axis=0), 1e-6)])}

    def __init__(self, kept: Kept) -> None:
        self.classes, self.scale = kept["classes"].astype(np.uint8), kept["scale"].astype(np.float64)
        self.size, self.seed = (int(value) for value in kept["shape"])
        self.energy = Energy({})

    def __call__(self, logits: Array, features: Array | None) -> Array:
        parts = (self.parts(logits, features) - self.scale[0]) / self.scale[1]
        made: Array = parts[:, 0] + SHARE * parts[:, 1]
        return made

    def parts(self, logits: Array, features: Array | None) -> Array:
        """[N, 2], energy and distance of codes, 0 to 2; NaN where the features are not finite."""
        given = _given(features, self.size, self.name)
        with np.errstate(invalid="ignore"):
            codes = packed(given @ self.projection)
        far = 1 - similarity(codes, self.classes, WIDTH).max(axis=1)
        far = np.where(np.isfinite(given).all(axis=1), far, np.nan)
        return np.stack([self.energy(logits, None), far], axis=1)

    @cached_property
    def projection(self) -> Array:
        return projection(self.size, self.seed)


SCORES: dict[str, type[Score]] = {
    score.name: score for score in (Hyperdimensional, Energy, MaxLogit, Mahalanobis, Neighbours)
}


def projection(size: int, seed: int) -> Array:
    """[size, WIDTH], fixed Gaussian directions. The features' mean stays in: its direction tells noise from images."""
    made: Array = np.random.default_rng([seed, size]).standard_normal((size, WIDTH)).astype(np.float32)
    return made


def fit(logits: Array, features: Array | None, *, seed: int = 0) -> Kept:
    """`ood.<score>.<what>` and `ood.<score>.threshold` from source frames answered with source weights.

    Fitted on every second frame, thresholds from the others: a frame is no stranger to what was fitted on it.

    Args:
        logits: [N, K].
        features: [N, D], what the head was given; None leaves out the scores that need them.
    Raises: DataError for fewer than `FEWEST` frames.
    """
    if len(logits) < FEWEST:
        raise DataError(
            f"{len(logits)} frames to fit scores on, expected {FEWEST} or more", remedy="give more source frames"
        )
    made: Kept = {}
    even, odd = slice(0, None, 2), slice(1, None, 2)
    for name, score in SCORES.items():
        kept = score.fit(logits[even], None if features is None else features[even], seed)
        if kept is None:
            continue
        values = score(kept)(logits[odd], None if features is None else features[odd])
        made |= {f"{PREFIX}{name}.{what}": value for what, value in kept.items()}
        made[f"{PREFIX}{name}.threshold"] = np.array([np.quantile(values, ACCEPTED)])
    return made


def load(bundle: Bundle, name: str = DEFAULT) -> Judge:
    """A score as it was fitted at export. Raises: ConfigError if there is none of that name, or not in this bundle."""
    if name not in SCORES:
        raise ConfigError(f"there is no score {name!r}", remedy=did_you_mean(name, SCORES))
    start = f"{PREFIX}{name}."
    kept = {key.removeprefix(start): value for key, value in bundle.source.items() if key.startswith(start)}
    if "threshold" not in kept:
        raise ConfigError(
            f"bundle {bundle.manifest.name!r} has no fitted score {name!r}",
            remedy="export it again with --calibration, or use energy if the network has no linear head",
        )
    return Judge(SCORES[name](kept), float(kept["threshold"][0]))


def best(bundle: Bundle) -> Judge | None:
    """The best score that was fitted for the bundle, or none."""
    for name in (DEFAULT, Energy.name):
        if f"{PREFIX}{name}.threshold" in bundle.source:
            return load(bundle, name)
    return None


def _given(features: Array | None, width: int, name: str) -> Array:
    if features is None or features.shape[1] != width:
        found = "none" if features is None else f"{features.shape[1]} a frame"
        raise DataError(f"the score {name} reads {width} features a frame, got {found}", remedy="ask for `features`")
    return features
