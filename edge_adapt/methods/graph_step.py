"""`learner: graph`: a learner's step, forward, loss, backward and Adam, as one graph that needs no PyTorch to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from edge_adapt.delta import PORT_SCALE, PORT_SHIFT, Delta
from edge_adapt.methods.optim import AdamState, Tensors, count_backward

if TYPE_CHECKING:
    from edge_adapt.engines.step import CompiledStep
    from edge_adapt.tail import Norm, Tail

Loss = Callable[[Tensor, Tensors], Tensor]
"""Logits [N, K] and what else the loss is given -> a number."""
OUTPUTS = ("logits", "next_values", "next_first", "next_second")


class GraphStep:
    """One compiled step for one number of frames; values and moments travel as one vector each."""

    def __init__(
        self, tail: Tail, values: Tensors, loss: Loss, *, betas: tuple[float, float], norm: Norm | None, key: str
    ) -> None:
        self.tail, self.loss, self.betas, self.norm, self.key = tail, loss, betas, norm, key
        self.names = list(values)
        self.shapes = [value.shape for value in values.values()]
        self.sizes = [value.numel() for value in values.values()]
        self._compiled: dict[tuple[int, ...], CompiledStep] = {}

    def __call__(
        self, cut: Tensor, ports: Delta, values: Tensors, state: AdamState, *, lr: float, given: Tensors
    ) -> tuple[Tensor, dict[str, Tensor], AdamState]:
        """As eager: logits of before the step, values and Adam after it.

        Raises: EngineError if the step cannot be compiled.
        """
        steps = state.steps + 1
        channels = self.tail.bundle.channels
        vector = self._packed(values)
        zeros = torch.zeros_like(vector)
        feeds = {
            "cut": cut,
            "scale": torch.tensor(ports.get(PORT_SCALE, np.ones(channels, np.float32))),
            "shift": torch.tensor(ports.get(PORT_SHIFT, np.zeros(channels, np.float32))),
            "values": vector,
            "first": self._packed(state.first) if state.first else zeros,
            "second": self._packed(state.second) if state.second else zeros,
            "rate": torch.tensor(lr / (1 - self.betas[0] ** steps)),
            "correction": torch.tensor(1 - self.betas[1] ** steps),
            "epsilon": torch.tensor(1e-8),  # a constant of this size is lost on the way to ONNX
            **{f"given_{name}": value for name, value in given.items()},
        }
        shape = tuple(cut.shape)
        if shape not in self._compiled:
            self._compiled[shape] = self._compile(feeds)
        count_backward()
        made = self._compiled[shape]({name: value.numpy() for name, value in feeds.items()})
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in made.items()}
        moved = AdamState(self._unpacked(tensors["next_first"]), self._unpacked(tensors["next_second"]), steps)
        return tensors["logits"], self._unpacked(tensors["next_values"]), moved

    def _compile(self, feeds: dict[str, Tensor]) -> CompiledStep:
        from edge_adapt.engines.step import compiled

        extra = [name for name in feeds if name.startswith("given_")]
        keep_first, keep_second = self.betas

        def step(
            cut: Tensor,
            scale: Tensor,
            shift: Tensor,
            values: Tensor,
            first: Tensor,
            second: Tensor,
            rate: Tensor,
            correction: Tensor,
            epsilon: Tensor,
            *given: Tensor,
        ) -> tuple[Tensor, ...]:
            named = {name.removeprefix("given_"): value for name, value in zip(extra, given, strict=True)}

            def loss(vector: Tensor) -> tuple[Tensor, Tensor]:
                logits = self.tail(cut, self._unpacked(vector), ports=(scale, shift), norm=self.norm)
                return self.loss(logits, named), logits

            gradient, logits = torch.func.grad(loss, has_aux=True)(values)
            first = keep_first * first + (1 - keep_first) * gradient
            second = keep_second * second + (1 - keep_second) * gradient.square()
            moved = values - rate * first / ((second / correction).sqrt() + epsilon)
            return logits, moved, first, second

        with torch.no_grad():  # whatever the tail loads when first used cannot be loaded while it is traced
            self.tail(feeds["cut"], norm=self.norm)
        shape = tuple(feeds["cut"].shape)
        return compiled(step, feeds, OUTPUTS, key=f"{self.tail.bundle.id} {self.key} {shape} {self.betas}")

    def _packed(self, values: Tensors) -> Tensor:
        return torch.cat([values[name].reshape(-1) for name in self.names])

    def _unpacked(self, vector: Tensor) -> dict[str, Tensor]:
        parts = zip(self.names, torch.split(vector, self.sizes), self.shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in parts}
