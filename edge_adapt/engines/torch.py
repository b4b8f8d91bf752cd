"""The reference engine: the same graph in plain torch. Slow, simple, and what the others are compared with."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from edge_adapt.bundle import FULL, Bundle
from edge_adapt.engines.protocol import Observed
from edge_adapt.engines.torch_from_onnx import GraphModule
from edge_adapt.graph import graft_taps, initializers
from edge_adapt.merge import LiveUpdate

Array = NDArray[Any]


class TorchEngine:
    """full.onnx rebuilt as a torch module; its parameters are replaced as a whole, one reference at a time."""

    name: ClassVar[str] = "torch"

    def __init__(self, bundle: Bundle, *, threads: int = 1) -> None:
        self.bundle, self._threads = bundle, threads
        self._model = onnx.load(bundle.path / FULL)
        self._weights = initializers(self._model.graph)
        self._tokens = [site.tensor for site in bundle.manifest.sites if site.kind == "layer_norm"]
        self._sites = {site.layer: bundle.slices[site.name] for site in bundle.manifest.sites}
        self._modules: dict[tuple[bool, bool], GraphModule] = {}
        self._values: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    @classmethod
    def probe(cls) -> str | None:
        return None

    @property
    def description(self) -> str:
        return f"torch {torch.__version__}, {self._threads} thread(s), weights replaced"

    def run(self, frames: Array) -> Array:
        return self._call((False, False), frames)[0]

    def observe(self, frames: Array, *, cut: bool, taps: bool) -> Observed:
        key = (cut and not self.bundle.is_reference, taps)
        made = self._call(key, frames)
        h = (frames if self.bundle.is_reference else made[-1]) if cut else None
        return Observed(made[0], h, made[1] if taps else None, made[2] if taps and self._tokens else None)

    def apply(self, update: LiveUpdate) -> None:
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
        with self._lock:
            self._values = {name: torch.from_numpy(np.array(value)) for name, value in made.items()}

    def close(self) -> None:
        self._modules.clear()

    def _call(self, key: tuple[bool, bool], frames: Array) -> list[Array]:
        with self._lock:
            module, values = self._module(key), self._values
        inputs = [torch.from_numpy(frames)]
        if self.bundle.manifest.prompts:
            inputs.append(torch.zeros(0, self.bundle.manifest.prompts))
        replaced = {module.places[name]: value for name, value in values.items()}
        with torch.inference_mode():
            made = torch.func.functional_call(module, replaced, tuple(inputs))
        return [made.numpy()] if isinstance(made, torch.Tensor) else [tensor.numpy() for tensor in made]

    def _module(self, key: tuple[bool, bool]) -> GraphModule:
        if key not in self._modules:
            cut, taps = key
            sites = self.bundle.manifest.sites if taps else ()
            tokens = self._tokens if taps else []
            extra = [self.bundle.manifest.cut.tensor] if cut else []
            tensors, side = [site.tensor for site in sites], self.bundle.manifest.tap_side
            graph = graft_taps(self._model, tensors, tokens=tokens, extra=extra, side=side)
            self._modules[key] = GraphModule(graph).eval()
        return self._modules[key]
