"""The tapped twin of a network: which outputs it has, and what they are called outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.engines.protocol import Observed
from edge_adapt.errors import EngineError
from edge_adapt.graph import graft_taps

Array = NDArray[Any]

Key = tuple[bool, bool, bool]
"""Which further outputs a twin has: the cut, the taps, the features."""
PLAIN: Key = (False, False, False)


def twin(model: onnx.ModelProto, bundle: Bundle, key: Key) -> onnx.ModelProto:
    """The graph with those outputs. Raises: EngineError if features are asked of a network without a linear head."""
    manifest, (cut, taps, _) = bundle.manifest, key
    sites = manifest.sites if taps else ()
    return graft_taps(
        model,
        [site.tensor for site in sites],
        tokens=[site.tensor for site in sites if site.kind == "layer_norm"],
        extra=[manifest.cut.tensor] * cut + _features(bundle, key),
        side=manifest.tap_side,
    )


def observed(bundle: Bundle, key: Key, frames: Array | None, made: Sequence[Array]) -> Observed:
    """Name the outputs of a twin.

    Args:
        frames: what the network was fed, if the cut was asked for; it is the cut in reference mode.
        made: outputs in the order of `twin`.
    """
    cut, taps, features = key
    tokens = taps and any(site.kind == "layer_norm" for site in bundle.manifest.sites)
    rest = list(made)
    logits = rest.pop(0)
    seen_taps = rest.pop(0) if taps else None
    cls = rest.pop(0) if tokens else None
    seen_cut = rest.pop(0) if cut else frames
    if not features:
        return Observed(logits, seen_cut, seen_taps, cls)
    return Observed(logits, seen_cut, seen_taps, cls, rest[0] if rest else seen_cut)  # a cut before the head is both


def _features(bundle: Bundle, key: Key) -> list[str]:
    if not key[2]:
        return []
    head = bundle.manifest.head
    if head is None:
        raise EngineError(
            f"bundle {bundle.manifest.name!r} has no linear head, and so no features",
            remedy="use a method that needs none, or export a model that ends in a linear layer",
        )
    return [head.features]
