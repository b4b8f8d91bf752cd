"""What the source domain looks like from inside: measured once, at export, with the engine that will run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.engines.protocol import Engine
from edge_adapt.taps import normalised

Array = NDArray[Any]
Progress = Callable[[int], None]

BATCH = 50


def source_statistics(bundle: Bundle, engine: Engine, images: Array, progress: Progress) -> dict[str, Array]:
    """Moments of every norm site over calibration frames, in units of the stored statistics.

    Args:
        images: preprocessed source frames, [N, ...].
        progress: called with the number of frames done.
    Returns:
        taps.mean, taps.second [channels]: E[x] and E[x^2] of the normalised input of each norm, over all positions.
        taps.frame_std [channels]: how much one frame's own mean varies over frames.
        prior [classes]: mean softmax output.
        cls.mean, cls.std [channels of the layer norms]: of the class token behind each, for a transformer (FOA).
    """
    frames = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    sums: dict[str, Array] = {}
    count = 0
    for batch in frames:
        seen = engine.observe(batch, cut=False, taps=True)
        assert seen.taps is not None
        mean, second = normalised(bundle, seen.taps)
        shifted = seen.logits - seen.logits.max(axis=1, keepdims=True)
        probabilities = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
        parts = {
            "mean": mean,
            "second": second,
            "mean_square": np.square(mean),
            **({} if seen.cls is None else {"cls": seen.cls, "cls_square": np.square(seen.cls)}),
            "prior": seen.logits if bundle.manifest.output == "probabilities" else probabilities,
        }
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
    if "cls" in means:
        made["cls.mean"] = means["cls"]
        made["cls.std"] = np.sqrt(np.maximum(means["cls_square"] - np.square(means["cls"]), 0))
    return {name: value.astype(np.float32) for name, value in made.items()}
