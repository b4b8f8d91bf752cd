"""The errors a caller may want to catch. Each names the thing, the value, what was expected, and the way out."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class EdgeAdaptError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        what: what is wrong, with the name and the value of the thing.
        remedy: one sentence that says what to do about it.
    """

    def __init__(self, what: str, *, remedy: str) -> None:
        super().__init__(f"{what}\n  try: {remedy}")
        self.what = what
        self.remedy = remedy


class ConfigError(EdgeAdaptError):
    """A setting, an argument or a message is wrong; nothing was started."""


class ArtifactError(EdgeAdaptError):
    """A model, a bundle or a weights file is missing, damaged, stale, or made for something else."""


class DataError(EdgeAdaptError):
    """Images, labels or calibration samples have the wrong shape, type or values."""


class EngineError(EdgeAdaptError):
    """ONNX Runtime, TensorRT or torch refused; the original error is chained."""


class StateError(EdgeAdaptError):
    """A delta or a snapshot does not fit this method or this model."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: the nearest known ones, else the whole list."""
    options = sorted(known)
    near = get_close_matches(name, options, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(options) or 'none'}"
