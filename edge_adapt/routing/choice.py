"""Which adapter, and where: a score for every candidate from a few unlabelled frames, before any of them is trained.

With K = J J' the tangent kernel of a candidate's own parameters at the start, after the idea of choosing networks by
its spectrum (Chen et al., "Neural Architecture Search on ImageNet in Four GPU Hours", ICLR 2021), a score is a sum of
logarithms, each with a weight: of the effective rank of K, its condition, the candidate's parameters and activations,
and its reach, which is the sum of the absolute values of J' v for random v: how far one step of Adam, which moves every
parameter alike, takes the logits.

The spectrum alone, as it is used to choose whole networks, does not foretell what training an adapter gives; reach
and the number of parameters do (`edge-adapt bench choice`). Cost is therefore a matter of the budget, not of the
score. The order does not change with the scale of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.func import grad, vmap

from edge_adapt.adapters.protocol import Values
from edge_adapt.errors import ConfigError, DataError
from edge_adapt.methods.optim import leaves
from edge_adapt.routing.candidates import SMALL, Candidate, Cost, candidates, cost
from edge_adapt.tail import Ports, Tail

SAMPLES = 64
"""Frames that are looked at, at most."""
DIRECTIONS = 10
"""Kernels of so many directions of the logits are summed; a network with no more outputs has all of its own."""
DRAWS = 8
"""Random directions for the reach, and random moves of the parameters of a candidate where there are no gradients."""
TINY = 1e-12
MOST = 0.9
"""Share of the sum of the eigenvalues that counts for the condition; what lies beyond is mostly noise."""
Way = Literal["gradients", "forward"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a candidate may take; None is no bound."""

    parameters: int | None = None
    bytes: int | None = None
    """Of one learning step: activations of `frames` frames, and the parameters with what Adam keeps of them."""
    frames: int = 32

    def __post_init__(self) -> None:
        for name in ("parameters", "bytes", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, expected 1 or more", remedy="leave it out for no bound")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How much the logarithm of each number counts."""

    rank: float = 0.0
    condition: float = 0.0
    fisher: float = 0.0
    reach: float = 0.0
    parameters: float = 0.0
    bytes: float = 0.0


WEIGHTS: dict[Way, Weights] = {
    "gradients": Weights(rank=0.5, reach=1.0, parameters=1.0),
    "forward": Weights(rank=0.5, parameters=1.0),
}
"""`gradients`: fitted on two corruptions with ResNet-20, judged on a third; `forward` takes over what it can."""
SPECTRUM = Weights(rank=1.0, condition=-0.5)
"""The spectrum alone, to compare with."""


@dataclass(frozen=True)
class Measured:
    """What the score knows of a candidate. All zero: there is nothing that it could learn."""

    rank: float = 0.0
    """Effective rank, 1 to N: e to the entropy of the eigenvalues as shares of their sum."""
    condition: float = 0.0
    """The largest eigenvalue by that at which 90 % of their sum is reached."""
    fisher: float = 0.0
    """Scatter between the classes that the source network answers, by the scatter within them."""
    reach: float = 0.0
    """How far a small step takes the logits. With gradients: one that moves every parameter alike, as Adam does."""


@dataclass(frozen=True)
class Scored:
    """A row of the table."""

    candidate: Candidate
    score: float
    """Larger is better; -inf where nothing can be learned, or numbers are not finite."""
    cost: Cost
    measured: Measured = field(default_factory=Measured)


def choose(
    tail: Tail,
    h: Tensor,
    *,
    among: Sequence[Candidate] | None = None,
    budget: Budget | None = None,
    ports: Ports | None = None,
    weights: Weights | None = None,
    way: Way = "gradients",
    seed: int = 0,
) -> tuple[Scored, ...]:
    """The candidates that fit the budget, the best first.

    Args:
        h: tensor at the cut [N, ...] of unlabelled frames; up to 64 of them are used, spread evenly.
        among: candidates; None for all of `candidates(tail)`.
        ports: what was in force when `h` was measured; None for identity.
        weights: None for those of `WEIGHTS` of this way.
        way: `gradients` takes the tangent kernel; `forward` estimates one by moving parameters at random, and
            needs no backward pass.
    Raises: ConfigError if nothing fits, DataError if fewer than two frames are finite.
    """
    budget, weights = budget or Budget(), weights or WEIGHTS[way]
    h = _usable(h)
    given = candidates(tail) if among is None else among
    costs = [cost(tail, candidate, h, ports) for candidate in given]
    fitting = _fitting(given, costs, budget)
    with torch.no_grad():
        labels = tail(h, ports=ports).argmax(1)
    measure = _by_gradients if way == "gradients" else _by_moves
    rows = []
    for candidate, taken in fitting:
        measured = measure(tail, candidate, h, ports, labels, seed)
        rows.append(Scored(candidate, score(measured, taken, weights), taken, measured))
    return tuple(sorted(rows, key=lambda row: (-row.score, row.cost.parameters, row.candidate.name)))


def tangent_kernel(tail: Tail, candidate: Candidate, h: Tensor, ports: Ports | None = None, *, seed: int = 0) -> Tensor:
    """[N, N], J J' of the candidate's own parameters, summed over directions of the logits less their mean."""

    def along(values: Values, sample: Tensor, direction: Tensor) -> Tensor:
        logits = candidate.run(tail, values, sample[None], ports)[0]
        return logits @ direction

    values = candidate.stirred(seed)
    jacobian = vmap(grad(along), in_dims=(None, 0, None), chunk_size=32)
    kernel = torch.zeros(len(h), len(h))
    for direction in _directions(tail.bundle.manifest.outputs, seed):
        rows = torch.cat([part.reshape(len(h), -1) for part in jacobian(values, h, direction).values()], dim=1)
        kernel += rows @ rows.T
    return kernel


def reach(tail: Tail, candidate: Candidate, h: Tensor, ports: Ports | None = None, *, seed: int = 0) -> float:
    """Sum of absolute values of J' v, averaged over random v, one direction of the logits for each frame."""
    values = leaves(candidate.stirred(seed))
    generator = Generator().manual_seed(seed)
    with torch.enable_grad():
        logits = candidate.run(tail, values, h, ports)
        drawn = torch.randn(DRAWS, *logits.shape, generator=generator)
        drawn = (drawn - drawn.mean(2, keepdim=True)) / len(h)
        total = 0.0
        for direction in drawn:
            found = torch.autograd.grad(logits, list(values.values()), direction, retain_graph=True, allow_unused=True)
            total += sum(float(part.abs().sum()) for part in found if part is not None)
    return total / DRAWS


def forward_kernel(tail: Tail, candidate: Candidate, h: Tensor, ports: Ports | None = None, *, seed: int = 0) -> Tensor:
    """[N, N], about the tangent kernel, from passes with parameters moved at random and no backward pass."""
    generator = candidate.generator(seed)
    start = candidate.adapter.init(generator)
    kernel = torch.zeros(len(h), len(h))
    with torch.no_grad():
        before = candidate.run(tail, start, h, ports)
        for _ in range(DRAWS):
            moved = {
                name: value + SMALL * torch.randn(value.shape, generator=generator) for name, value in start.items()
            }
            rows = (candidate.run(tail, moved, h, ports) - before) / SMALL
            rows = rows - rows.mean(1, keepdim=True)
            kernel += rows @ rows.T / DRAWS
    return kernel


def _by_gradients(
    tail: Tail, candidate: Candidate, h: Tensor, ports: Ports | None, labels: Tensor, seed: int
) -> Measured:
    found = spectrum_of(tangent_kernel(tail, candidate, h, ports, seed=seed), labels)
    return replace(found, reach=reach(tail, candidate, h, ports, seed=seed)) if found.rank else found


def _by_moves(tail: Tail, candidate: Candidate, h: Tensor, ports: Ports | None, labels: Tensor, seed: int) -> Measured:
    kernel = forward_kernel(tail, candidate, h, ports, seed=seed)
    found = spectrum_of(kernel, labels)
    return replace(found, reach=math.sqrt(float(kernel.trace()))) if found.rank else found


def spectrum_of(kernel: Tensor, labels: Tensor) -> Measured:
    """What the score reads from a kernel [N, N], with classes [N] as the source network answers.

    All zero for a kernel that is zero or not finite.
    """
    kernel = kernel.double()
    if not bool(torch.isfinite(kernel).all()) or float(kernel.trace()) <= torch.finfo(torch.float32).tiny:
        return Measured()
    kernel = kernel / kernel.trace()
    shares = torch.linalg.eigvalsh(kernel).flip(0).clamp_min(0)
    shares = shares / shares.sum()
    entropy = -float((shares * shares.clamp_min(1e-300).log()).sum())
    most = min(int((shares.cumsum(0) < MOST).sum()), len(shares) - 1)
    return Measured(math.exp(entropy), float(shares[0] / shares[most]), _fisher(kernel, labels))


def score(measured: Measured, cost: Cost, weights: Weights) -> float:
    """Larger is better; -inf where nothing can be learned, or a number is not finite."""
    numbers = (
        (weights.rank, measured.rank),
        (weights.condition, measured.condition),
        (weights.fisher, measured.fisher + TINY),
        (weights.reach, measured.reach),
        (weights.parameters, max(1, cost.parameters)),
        (weights.bytes, max(1, cost.bytes_per_frame)),
    )
    if not all(math.isfinite(number) and number > 0 for _, number in numbers):
        return -math.inf
    return sum(weight * math.log(number) for weight, number in numbers)


def _usable(h: Tensor) -> Tensor:
    """Up to `SAMPLES` finite frames, spread evenly over those given."""
    finite = h[torch.isfinite(h).flatten(1).all(1)] if len(h) else h
    if len(finite) < 2:
        raise DataError(
            f"{len(finite)} of {len(h)} frames at the cut are finite, expected 2 or more",
            remedy=f"give {SAMPLES} frames of the domain that the adapter is for",
        )
    count = min(SAMPLES, len(finite))
    return finite[torch.linspace(0, len(finite) - 1, count).round().long()].detach()


def _fitting(given: Sequence[Candidate], costs: Sequence[Cost], budget: Budget) -> list[tuple[Candidate, Cost]]:
    """Raises: ConfigError that names the smallest candidate, if none fits."""

    def over(taken: Cost) -> bool:
        return (budget.parameters is not None and taken.parameters > budget.parameters) or (
            budget.bytes is not None and taken.step_bytes(budget.frames) > budget.bytes
        )

    pairs = list(zip(given, costs, strict=True))
    if not pairs:
        raise ConfigError("there is no candidate to choose from", remedy="give none for all that the tail bears")
    found = [(candidate, taken) for candidate, taken in pairs if not over(taken)]
    if found:
        return found
    candidate, taken = min(pairs, key=lambda pair: (pair[1].step_bytes(budget.frames), pair[1].parameters))
    raise ConfigError(
        f"no adapter fits {_bound(budget.parameters)} parameters and {_bound(budget.bytes)} bytes in a step on "
        f"{budget.frames} frames; the smallest, {candidate.name}, has {taken.parameters} parameters and takes "
        f"{taken.step_bytes(budget.frames)} bytes",
        remedy="allow more, learn from fewer frames at a time, or use a method without gradients, such as moments",
    )


def _bound(value: int | None) -> str:
    return "any number of" if value is None else str(value)


def _directions(outputs: int, seed: int) -> Tensor:
    """[D, K]: directions of the logits without their mean, which no class notices.

    All there are if `DIRECTIONS` suffices, else that many drawn at random.
    """
    if outputs <= DIRECTIONS:
        every = torch.eye(outputs)
    else:
        every = torch.randn(DIRECTIONS, outputs, generator=Generator().manual_seed(seed))
    return every - every.mean(1, keepdim=True)


def _fisher(kernel: Tensor, labels: Tensor) -> float:
    """Scatter between classes by scatter within, of points whose inner products are the kernel [N, N]."""
    member = torch.nn.functional.one_hot(labels).to(kernel)
    member = member[:, member.sum(0) > 0]
    centres = float((member.T @ kernel * (member / member.sum(0)).T).sum())
    between, within = centres - float(kernel.sum()) / len(kernel), float(kernel.trace()) - centres
    return max(between, 0.0) / max(within, TINY)
