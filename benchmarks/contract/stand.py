"""Where promises are checked: the tiny network behind an engine, frames, and words for what is broken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contract.tiny import made_tiny_data, made_tiny_net, tiny_bundle
from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.preprocess import Preprocess
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.streams.data import Dataset
from edge_adapt.tail import Tail

Array = NDArray[Any]
DEVICE, REFERENCE = "device", "reference"


class Broken(Exception):
    """A promise that is not kept; the text says which way."""


class Inapplicable(Exception):
    """A promise that cannot be asked of this part here; the text says why."""


@dataclass(frozen=True)
class Promise:
    """One thing that every part of a group keeps to."""

    name: str
    """A sentence, about the part."""
    check: Callable[[Stand, Any], None]
    """(stand, subject) -> nothing. Raises: Broken, Inapplicable, and whatever the part raises, which breaks it too."""

    def __str__(self) -> str:
        return self.name.replace(" ", "_")


def hold(kept: bool | np.bool_, text: str) -> None:
    """Raises: Broken with this text unless it is kept."""
    if not kept:
        raise Broken(text)


class Stand:
    """One bundle of the tiny network, and what a promise needs besides. Engine and tail are made when first used."""

    def __init__(self, bundle: Bundle, data: Dataset) -> None:
        self.bundle, self.data = bundle, data
        assert data.images is not None
        self.frames: Array = Preprocess(bundle.manifest.input)(data.images)

    @property
    def mode(self) -> str:
        """`device` or `reference`."""
        return REFERENCE if self.bundle.is_reference else DEVICE

    @cached_property
    def engine(self) -> OnnxRuntimeEngine:
        return OnnxRuntimeEngine(self.bundle)

    @cached_property
    def tail(self) -> Tail:
        return Tail(self.bundle)

    @property
    def shifted(self) -> Array:
        """[128, 3, 16, 16], another domain, so that methods have something to do; a copy."""
        return (self.frames * np.float32(0.5) + np.float32(0.8)).astype(np.float32)

    @contextmanager
    def predictor(self) -> Iterator[Predictor]:
        """With source in force, before and after."""
        made = Predictor(self.bundle, self.engine)
        self.engine.apply(made._merge(Delta.source()))
        try:
            yield made
        finally:
            made.apply(Delta.source())

    def close(self) -> None:
        """Let go of the engine."""
        if "engine" in self.__dict__:
            self.engine.close()


@contextmanager
def stands() -> Iterator[tuple[Stand, Stand]]:
    """Both modes, in a folder that is gone afterwards."""
    net = made_tiny_net()
    data = made_tiny_data(net)
    assert data.images is not None
    with TemporaryDirectory() as folder:
        cuts = {DEVICE: "block", REFERENCE: "input"}
        device, reference = (
            Stand(tiny_bundle(net, data.images, Path(folder) / mode, cut), data) for mode, cut in cuts.items()
        )
        try:
            yield device, reference
        finally:
            device.close()
            reference.close()


def pieces(value: Any) -> list[Any]:
    """All arrays, tensors and numbers inside a state, in order."""
    if isinstance(value, torch.Tensor):
        return [value.detach().numpy()]
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Delta)):
        return [piece for item in dataclasses.fields(value) for piece in pieces(getattr(value, item.name))]
    if hasattr(value, "items"):
        return [piece for key in sorted(value) for piece in (key, *pieces(value[key]))]
    if isinstance(value, (list, tuple)):
        return [piece for item in value for piece in pieces(item)]
    return [value]


def copied(value: Any) -> list[Any]:
    """The same, which stays as it is whatever becomes of the state."""
    return [np.array(piece) if isinstance(piece, np.ndarray) else piece for piece in pieces(value)]


def alike(first: list[Any], second: list[Any]) -> bool:
    """True if both are equal, bit for bit."""
    return len(first) == len(second) and all(
        np.array_equal(one, other, equal_nan=one.dtype.kind == "f") if isinstance(one, np.ndarray) else one == other
        for one, other in zip(first, second, strict=True)
    )


def size_of(value: Any) -> int:
    """Bytes, about."""
    return sum(piece.nbytes if isinstance(piece, np.ndarray) else 8 for piece in pieces(value))
