"""A graph in torch that can be trained: parameters by their names in the graph, batch norms by batch statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from edge_adapt.engines.torch_from_onnx import GraphModule, batch_norm
from edge_adapt.graph import set_initializers

WEIGHTED = ("Conv", "Gemm", "MatMul")
NORMS = ("BatchNormalization", "LayerNormalization")


class Trainee:
    """A network whose parameters may change, normalised by stored statistics or by those of the batch.

    `norms` and `weights` map names of the graph to tensors: the affine of all norms; and the weights of convolutions
    and matrix products, with the biases of the latter. They are changed in place by whoever trains.
    """

    def __init__(self, network: onnx.ModelProto) -> None:
        self.network = network
        self.module = GraphModule(network).eval()
        self._probabilities = network.graph.node[-1].op_type == "Softmax"
        widths = [info.type.tensor_type.shape.dim[1].dim_value for info in network.graph.input[1:]]
        self._prompts = [torch.zeros(0, width) for width in widths]
        places = self.module.places
        norms = [*_inputs(network, NORMS, 1), *_inputs(network, NORMS, 2)]
        weights = [*_inputs(network, WEIGHTED, 1), *_inputs(network, ("Gemm",), 2)]
        self.norms = {name: self._tensor(places[name]) for name in norms if name in places}
        self.weights = {name: self._tensor(places[name]) for name in weights if name in places}
        self._statistics: dict[str, Tensor] = {}
        self._affines: dict[tuple[str, str], tuple[Tensor, Tensor, float]] = {}
        self._by_batch = False
        self._sums: dict[tuple[str, str], Tensor] | None = None
        for step in self.module.steps:
            if step.op is batch_norm:
                weight, bias, mean, variance = step.inputs[1:5]
                self._statistics |= {name: self._tensor(places[name]) for name in (mean, variance)}
                affine = self._tensor(places[weight]), self._tensor(places[bias])
                self._affines[mean, variance] = (*affine, step.attributes.get("epsilon", 1e-5))
                step.op = partial(self._normalise, (mean, variance))

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Everything that may be trained."""
        return {**self.norms, **self.weights}

    def logits(self, frames: Tensor, replaced: Mapping[str, Tensor] | None = None) -> Tensor:
        """[N, ...] as the network is fed them -> [N, K]; of a network that gives probabilities, their logarithms.

        Args:
            replaced: values for some parameters, by name; gradients reach them.
        """
        values = {self.module.places[name]: value for name, value in (replaced or {}).items()}
        inputs = (frames.contiguous(memory_format=torch.channels_last), *self._prompts)
        made: Tensor = torch.func.functional_call(self.module, values, inputs)
        return made.clamp_min(1e-12).log() if self._probabilities else made

    def shaken(self, generator: Generator, size: float) -> dict[str, Tensor]:
        """Weights, each with noise of so many of their own standard deviations, for `replaced`."""
        return {
            name: value + size * value.detach().std() * torch.randn(value.shape, generator=generator)
            for name, value in self.weights.items()
            if value.ndim > 2
        }

    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Copy values in, and let gradients reach them."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(False).copy_(values[name])
            parameter.requires_grad_(True)

    @contextmanager
    def batch_statistics(self) -> Iterator[None]:
        """Inside, every batch norm takes the statistics of its batch, as a device's ports do of a domain."""
        self._by_batch = True
        try:
            yield
        finally:
            self._by_batch = False

    def estimate_statistics(self, frames: Tensor, batch: int = 200) -> None:
        """Store the statistics that batch norms meet on these frames [N, ...], each batch normalised by its own."""
        with self.batch_statistics():
            found = self._measured(frames, batch)
        for (mean, variance), (new_mean, new_variance) in found.items():
            self._statistics[mean].copy_(new_mean)
            self._statistics[variance].copy_(new_variance)

    def centre(self, frames: Tensor, batch: int = 200) -> None:
        """Exchange stored statistics for those of these frames, and the affine so that the answers stay the same.

        Stored statistics are of training images, as they were cropped and padded. The device sees whole ones: if their
        statistics took the place of the stored ones as they are, that alone would cost a CIFAR ResNet-20 three points.
        """
        for site, (new_mean, new_variance) in self._measured(frames, batch).items():
            weight, bias, epsilon = self._affines[site]
            mean, variance = (self._statistics[name] for name in site)
            before, after = (variance + epsilon).sqrt(), (new_variance + epsilon).sqrt()
            with torch.no_grad():
                bias.add_(weight * (new_mean - mean) / before)
                weight.mul_(after / before)
            mean.copy_(new_mean)
            variance.copy_(new_variance)

    def to_network(self) -> onnx.ModelProto:
        """The graph with the values as they are now."""
        made = onnx.ModelProto()
        made.CopyFrom(self.network)
        values = self.parameters | self._statistics
        set_initializers(made.graph, {name: value.detach().contiguous().numpy() for name, value in values.items()})
        return made

    def _measured(self, frames: Tensor, batch: int) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
        """Names of stored mean and variance -> mean and variance of what the norm is given."""
        self._sums = {}
        with torch.no_grad():
            for part in torch.split(frames, batch):
                self.logits(part)
        sums, self._sums = self._sums, None
        means = {site: (first / count, second / count) for site, (count, first, second) in sums.items()}
        return {
            site: (mean.float(), (second - mean.square()).clamp_min(1e-8).float())
            for site, (mean, second) in means.items()
        }

    def _normalise(
        self, site: tuple[str, str], x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, **facts: Any
    ) -> Tensor:
        if self._sums is not None:
            over, wide = [0, *range(2, x.ndim)], x.double()
            count = torch.full((x.shape[1],), x.numel() / x.shape[1], dtype=wide.dtype)
            sums = torch.stack([count, wide.sum(over), wide.square().sum(over)])
            self._sums[site] = self._sums[site] + sums if site in self._sums else sums
        if self._by_batch:
            return F.batch_norm(x, None, None, weight, bias, True, 0.1, facts.get("epsilon", 1e-5))
        return batch_norm(x, weight, bias, mean, var, **facts)

    def _tensor(self, place: str) -> Tensor:
        path, _, leaf = place.rpartition(".")
        found: Tensor = getattr(self.module.get_submodule(path), leaf)
        return found


def _inputs(network: onnx.ModelProto, kinds: tuple[str, ...], place: int) -> list[str]:
    """Names of what such nodes are given at one place."""
    nodes = [node for node in network.graph.node if node.op_type in kinds]
    return [node.input[place] for node in nodes if len(node.input) > place and node.input[place]]
