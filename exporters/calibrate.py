"""What the source domain looks like from inside: measured once, at export, with the engine that will run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_adapt.bundle import FULL, Bundle
from edge_adapt.engines.onnxruntime import make_session
from edge_adapt.engines.protocol import Engine
from edge_adapt.graph import FULL_SIDE, TAPS, graft_taps
from edge_adapt.taps import normalised

Array = NDArray[Any]
Progress = Callable[[int], None]

BATCH = 50
FULL_SAMPLES = 500


def source_statistics(bundle: Bundle, engine: Engine, images: Array, progress: Progress) -> dict[str, Array]:
    """Moments of every norm site over calibration frames, in units of the stored statistics.

    Args:
        images: preprocessed source frames, [N, ...].
        progress: called with the number of frames done.
    Returns:
        taps.mean, taps.second [channels]: E[x] and E[x^2] of the normalised input of each norm, over all positions.
        taps.frame_std [channels]: how much one frame's own mean varies over frames.
        taps.full_mean, taps.full_second [channels]: the same moments over all positions of a map; a tap looks at some.
        prior [classes]: mean softmax output.
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
            "prior": seen.logits if bundle.manifest.output == "probabilities" else probabilities,
        }
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + part.astype(np.float64).sum(axis=0)
        count += len(batch)
        progress(len(batch))
    means = {name: total / count for name, total in sums.items()}
    spread = np.sqrt(np.maximum(means["mean_square"] - np.square(means["mean"]), 0))
    full_mean, full_second = _full_moments(bundle, frames[: FULL_SAMPLES // BATCH])
    made = {
        "taps.mean": means["mean"],
        "taps.second": means["second"],
        "taps.frame_std": spread,
        "taps.full_mean": full_mean,
        "taps.full_second": full_second,
        "prior": means["prior"],
    }
    return {name: value.astype(np.float32) for name, value in made.items()}


def _full_moments(bundle: Bundle, frames: list[Array]) -> tuple[Array, Array]:
    """The moments that the norms themselves would see, over every position; slow, and needed once."""
    sites = bundle.manifest.sites
    tokens = [site.tensor for site in sites if site.kind == "layer_norm"]
    model = onnx.load(bundle.path / FULL)
    graph = graft_taps(model, [site.tensor for site in sites], tokens=tokens, side=FULL_SIDE)
    session = make_session(graph, threads=1)
    feeds = {info.name: np.zeros((0, bundle.manifest.prompts or 0), np.float32) for info in model.graph.input[1:]}
    image = model.graph.input[0].name
    moments = [normalised(bundle, session.run([TAPS], {image: batch, **feeds})[0]) for batch in frames]
    mean = np.concatenate([mean for mean, _ in moments]).mean(axis=0)
    second = np.concatenate([second for _, second in moments]).mean(axis=0)
    return mean, second
