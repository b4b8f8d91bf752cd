"""Optimisers as functions: dicts of tensors in, dicts of tensors out, so that a method's state stays a value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass
class Tally:
    """What was counted so far."""

    backward: int = 0
    """Passes backward through the tail."""


_tally: ContextVar[Tally | None] = ContextVar("backward passes", default=None)


@contextmanager
def tallied() -> Iterator[Tally]:
    """Count the backward passes of this thread."""
    tally = Tally()
    token = _tally.set(tally)
    try:
        yield tally
    finally:
        _tally.reset(token)


def count_backward() -> None:
    """Tell whoever counts that a backward pass was made."""
    tally = _tally.get()
    if tally is not None:
        tally.backward += 1


@dataclass(frozen=True)
class AdamState:
    """Both moments of every gradient; empty before the first step."""

    first: Tensors = field(default_factory=dict)
    second: Tensors = field(default_factory=dict)
    steps: int = 0


def adam(
    values: Tensors,
    gradients: Tensors,
    state: AdamState,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[dict[str, Tensor], AdamState]:
    """One step of Adam (Kingma & Ba, ICLR 2015, algorithm 1), without weight decay.

    m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2;
    value <- value - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    """
    steps = state.steps + 1
    keep_first, keep_second = betas
    correct_first, correct_second = 1 - keep_first**steps, 1 - keep_second**steps
    moved: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, value in values.items():
            gradient = gradients[name]
            zero = torch.zeros_like(gradient)
            first[name] = keep_first * state.first.get(name, zero) + (1 - keep_first) * gradient
            second[name] = keep_second * state.second.get(name, zero) + (1 - keep_second) * gradient.square()
            width = (second[name] / correct_second).sqrt() + eps
            moved[name] = value.detach() - lr / correct_first * first[name] / width
    return moved, AdamState(first, second, steps)


def sgd(
    values: Tensors, gradients: Tensors, state: AdamState, *, lr: float, momentum: float = 0.9
) -> tuple[dict[str, Tensor], AdamState]:
    """One step of gradient descent with heavy-ball momentum, no Nesterov, no weight decay.

    v <- momentum v + g; value <- value - lr v. `first` of the state is v; `second` stays empty.
    """
    moved: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, value in values.items():
            gradient = gradients[name]
            first[name] = momentum * state.first.get(name, torch.zeros_like(gradient)) + gradient
            moved[name] = value.detach() - lr * first[name]
    return moved, AdamState(first, {}, state.steps + 1)


def gradients_of(loss: Tensor, values: Tensors) -> dict[str, Tensor]:
    """d loss / d value for every value; zero where the loss does not depend on it."""
    names = list(values)
    count_backward()
    found = torch.autograd.grad(loss, [values[name] for name in names], allow_unused=True)
    return {
        name: torch.zeros_like(values[name]) if gradient is None else gradient
        for name, gradient in zip(names, found, strict=True)
    }


def leaves(values: Tensors) -> dict[str, Tensor]:
    """The same numbers, ready for `gradients_of`; the originals are not touched."""
    return {name: value.detach().requires_grad_() for name, value in values.items()}


def mix(values: Tensors, others: Tensors, share: float) -> dict[str, Tensor]:
    """value + share (other - value): an EMA, or a pull."""
    return {name: value + share * (others[name] - value) for name, value in values.items()}


def all_finite(*groups: Tensors) -> bool:
    """False if any number is NaN or infinite."""
    return all(bool(torch.isfinite(value).all()) for group in groups for value in group.values())
