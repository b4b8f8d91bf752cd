"""What the source domain looks like from inside: measured once, at export, with the engine that will run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.engines.protocol import Engine
from edge_adapt.routing import scores
from edge_adapt.routing.encoder import Encoder
from edge_adapt.taps import normalised

Array = NDArray[Any]
Progress = Callable[[int], None]

BATCH = 50
LARGE = 2_000_000
"""Numbers of class statistics that a bundle does without."""
ENCODED = 512
"""Frames that the encoder is fitted on."""
ENOUGH = 8
"""Frames of every class that its mean feature is worth keeping from."""


def source_statistics(bundle: Bundle, engine: Engine, images: Array, progress: Progress) -> dict[str, Array]:
    """Moments of every norm site over calibration frames, in units of the stored statistics.

    Args:
        images: preprocessed source frames, [N, ...].
        progress: called with the number of frames done.
    Returns:
        taps.mean, taps.second [channels]: E[x] and E[x^2] of the normalised input of each norm, over all positions.
        taps.frame_std [channels]: how much one frame's own mean varies over frames.
        prior [classes]: mean softmax output.
        taps.by_class [classes, 2, channels]: both moments for each class, as far as the model takes a frame for it;
        where that is not too much to keep (moments).
        cls.mean, cls.std [channels of the layer norms]: of the class token behind each, for a transformer (FOA).
        features.mean, features.std [D]: of what the linear head is given, for a network that ends in one (FOA).
        encoder.*: see `Encoder`, fitted on the first frames (router).
        ood.*: see `scores.fit`, what tells strange frames; not of a network that gives probabilities.
        class.mean [classes, D], class.std [D]: of the features of each predicted class, and about these means; where
        there are more than twice as many features as classes, and frames of every class (label_shift).
    """
    frames = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    sums: dict[str, Array] = {}
    count = 0
    kept: list[tuple[Array, Array]] = []
    answered: list[tuple[Array, Array | None]] = []
    has_head = bundle.manifest.head is not None
    keeps_classes = 2 * bundle.channels * bundle.manifest.outputs <= LARGE
    for batch in frames:
        seen = engine.observe(batch, cut=False, taps=True, features=has_head)
        if bundle.manifest.precision == "int8":  # looks are float32, answers are not
            answer = engine.observe(batch, features=has_head)
            seen = replace(seen, logits=answer.logits, features=answer.features)
        assert seen.taps is not None
        mean, second = normalised(bundle, seen.taps)
        shifted = seen.logits - seen.logits.max(axis=1, keepdims=True)
        probabilities = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
        answered.append((seen.logits, seen.features))
        if count < ENCODED:
            kept.append((mean, second))
        parts = {
            "mean": mean,
            "second": second,
            "mean_square": np.square(mean),
            **({} if seen.cls is None else _with_squares("cls", seen.cls)),
            **({} if seen.features is None else _with_squares("features", seen.features)),
            **({} if seen.features is None else {"of_class": _by_class(seen.features, seen.logits)}),
            "prior": seen.logits if bundle.manifest.output == "probabilities" else probabilities,
        }
        if keeps_classes:
            parts["by_class"] = np.tensordot(parts["prior"].astype(np.float64).T, np.stack([mean, second], 1), 1)[None]
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + part.astype(np.float64).sum(axis=0)
        count += len(batch)
        progress(len(batch))
    means = {name: total / count for name, total in sums.items()}
    spread = np.sqrt(np.maximum(means["mean_square"] - np.square(means["mean"]), 0))
    made = {
        "taps.mean": means["mean"],
        "taps.second": means["second"],
        "taps.frame_std": spread,
        "prior": means["prior"],
    }
    if bundle.manifest.sites:
        first, squares = (np.concatenate(part) for part in zip(*kept, strict=True))
        made |= Encoder.fitted((first, squares), [site.channels for site in bundle.manifest.sites]).stored()
    if bundle.manifest.output == "logits" and count >= scores.FEWEST:
        made |= _scores(answered)
    if keeps_classes:
        # One frame of the whole source for each class: a class that never came has the source's moments.
        whole = np.stack([means["mean"], means["second"]])
        seen_of = (means["prior"] * count)[:, None, None]
        made["taps.by_class"] = (means["by_class"] * count + whole) / (seen_of + 1)
    for name in ("cls", "features"):
        if name in means:
            made[f"{name}.mean"] = means[name]
            made[f"{name}.std"] = np.sqrt(np.maximum(means[f"{name}_square"] - np.square(means[name]), 0))
    if "of_class" in means:
        made |= _class_statistics(means["of_class"], means["features_square"], count)
    return {name: value if value.dtype == np.uint8 else np.asarray(value, np.float32) for name, value in made.items()}


def _scores(answered: list[tuple[Array, Array | None]]) -> dict[str, Array]:
    logits = np.concatenate([part for part, _ in answered])
    features = [part for _, part in answered if part is not None]
    return scores.fit(logits, np.concatenate(features) if features else None)


def _by_class(features: Array, logits: Array) -> Array:
    """[1, classes, 1 + D]: sums, over the frames predicted to be of each class, of one and of the features."""
    predicted = np.eye(logits.shape[1])[logits.argmax(axis=1)]
    made: Array = (predicted.T @ np.insert(features.astype(np.float64), 0, 1, axis=1))[None]
    return made


def _class_statistics(of_class: Array, square: Array, count: int) -> dict[str, Array]:
    """From shares of frames and features [classes, 1 + D]; empty where they say too little."""
    share, features = of_class[:, 0], of_class[:, 1:]
    if 2 * len(share) >= features.shape[1] or share.min() * count < ENOUGH:
        return {}
    mean = features / share[:, None]
    variance = square - share @ np.square(mean)
    return {"class.mean": mean, "class.std": np.sqrt(np.maximum(variance, 0))}


def _with_squares(name: str, values: Array) -> dict[str, Array]:
    wide = values.astype(np.float64)
    return {name: wide, f"{name}_square": np.square(wide)}
