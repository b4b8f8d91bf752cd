"""The reference engine: the same graph in plain torch. Slow, simple, and what the others are compared with."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from edge_adapt.bundle import FULL, Bundle
from edge_adapt.engines.protocol import Observed
from edge_adapt.engines.torch_from_onnx import GraphModule
from edge_adapt.engines.twin import PLAIN, Key, observed, twin
from edge_adapt.graph import initializers
from edge_adapt.merge import LiveUpdate

Array = NDArray[Any]


Values = tuple[dict[str, torch.Tensor], "Array | None", object]
"""What replaces weights, by their name in full.onnx; the prompts; the tag of both."""


class TorchEngine:
    """full.onnx rebuilt as a torch module; its parameters are replaced as a whole, one reference at a time."""

    name: ClassVar[str] = "torch"

    def __init__(self, bundle: Bundle, *, threads: int = 1) -> None:
        self.bundle, self._threads = bundle, threads
        self._model = onnx.load(bundle.path / FULL)
        self._weights = initializers(self._model.graph)
        self._sites = {site.layer: bundle.slices[site.name] for site in bundle.manifest.sites}
        self._modules: dict[Key, GraphModule] = {}
        self._values: Values = {}, None, None
        self._lock = threading.Lock()

    @classmethod
    def probe(cls) -> str | None:
        return None

    @property
    def description(self) -> str:
        return f"torch {torch.__version__}, {self._threads} thread(s), weights replaced"

    def run(self, frames: Array) -> Array:
        return self._call(PLAIN, frames)[0][0]

    def observe(self, frames: Array, *, cut: bool = False, taps: bool = False, features: bool = False) -> Observed:
        key = (cut and not self.bundle.is_reference, taps, features)
        made, tag = self._call(key, frames)
        return replace(observed(self.bundle, key, frames if cut else None, made), tag=tag)

    def rehearse(
        self, update: LiveUpdate, frames: Array, *, cut: bool = False, taps: bool = False, features: bool = False
    ) -> Observed:
        key = (cut and not self.bundle.is_reference, taps, features)
        made, _ = self._call(key, frames, (self._changed(update), update.prompts, None))
        return observed(self.bundle, key, frames if cut else None, made)

    def apply(self, update: LiveUpdate, tag: object = None) -> None:
        changed = self._changed(update), update.prompts, tag
        with self._lock:
            self._values = changed

    def _changed(self, update: LiveUpdate) -> dict[str, torch.Tensor]:
        """Name in full.onnx -> value of everything that the update changes."""
        made: dict[str, Array] = {}
        for layer in self.bundle.manifest.layers:
            weight = update.weights.get(layer.name, self._weights[layer.weight])
            place = self._sites.get(layer.name)
            if place is not None:
                made[layer.weight] = weight * update.scale[place].reshape(-1, *(1,) * (weight.ndim - 1))
            elif layer.name in update.weights:
                made[layer.weight] = weight
            if layer.bias and place is not None:
                made[layer.bias] = update.bias[place]
            elif layer.bias and layer.name in update.biases:
                made[layer.bias] = update.biases[layer.name]
        return {name: torch.from_numpy(np.array(value)) for name, value in made.items()}

    def close(self) -> None:
        self._modules.clear()

    def _call(self, key: Key, frames: Array, other: Values | None = None) -> tuple[list[Array], object]:
        with self._lock:
            module, (values, prompts, tag) = self._module(key), other or self._values
        inputs = [torch.from_numpy(frames)]
        width = self.bundle.manifest.prompts
        if width:
            inputs.append(torch.zeros(0, width) if prompts is None else torch.from_numpy(prompts.copy()))
        replaced = {module.places[name]: value for name, value in values.items()}
        with torch.inference_mode():
            made = torch.func.functional_call(module, replaced, tuple(inputs))
        return [made.numpy()] if isinstance(made, torch.Tensor) else [tensor.numpy() for tensor in made], tag

    def _module(self, key: Key) -> GraphModule:
        if key not in self._modules:
            self._modules[key] = GraphModule(twin(self._model, self.bundle, key)).eval()
        return self._modules[key]
