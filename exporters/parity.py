"""The gate that every bundle passes or is not written: the engine against torch, on real samples, ports moved."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.protocol import Engine
from edge_adapt.errors import ArtifactError
from edge_adapt.merge import Merger
from edge_adapt.tail import Tail

Array = NDArray[Any]

TOLERANCE = 1e-4
"""Of the output's scale, for float32."""


def random_ports(bundle: Bundle, seed: int = 0) -> Delta:
    """Ports that move every site: scale 0.8 to 1.25, shift 0.1 standard deviations."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.8, 1.25, bundle.channels)
    return Delta.of_ports(scale.astype(np.float32), rng.normal(0, 0.1, bundle.channels).astype(np.float32))


def ported(module: nn.Module, bundle: Bundle, ports: Delta) -> nn.Module:
    """A copy of a torch model whose own norm layers hold what the ports say.

    Batch norm: other running statistics; layer norm: another affine. The model must have a norm module at the name of
    each site.
    """
    made = copy.deepcopy(module)
    for site in bundle.manifest.sites:
        norm = made.get_submodule(site.name)
        place = bundle.slices[site.name]
        scale = torch.from_numpy(ports["ports/scale"][place].copy())
        shift = torch.from_numpy(ports["ports/shift"][place].copy())
        with torch.no_grad():
            if site.kind == "batch_norm":
                mean = torch.from_numpy(bundle.source[f"{site.name}.mean"].copy())
                std = torch.from_numpy(bundle.source[f"{site.name}.std"].copy())
                epsilon = std.square() - norm.running_var  # type: ignore[operator]
                norm.running_mean.copy_(mean - shift * std / scale)  # type: ignore[operator]
                norm.running_var.copy_((std / scale).square() - epsilon)  # type: ignore[operator]
            else:
                weight = norm.weight.clone()  # type: ignore[operator]
                norm.bias.add_(weight * shift)  # type: ignore[operator]
                norm.weight.mul_(scale)  # type: ignore[operator]
    return made


def measure(bundle: Bundle, engine: Engine, module: nn.Module, frames: Array) -> dict[str, float]:
    """Largest difference between engine and torch, as a share of the largest output.

    Args:
        module: the torch model, images -> logits, with its norms named as the bundle's sites.
        frames: [N, ...] preprocessed.
    Returns: `identity_ports`, `random_ports`, and `tail`: the exported tail on the engine's own cut.
    """
    x = torch.from_numpy(frames)
    merger, ports = Merger(bundle), random_ports(bundle)
    tail = Tail(bundle)
    with torch.no_grad():
        identity = distance(engine.run(frames), module(x).numpy())
        engine.apply(merger(ports))
        try:
            random = distance(engine.run(frames), ported(module, bundle, ports)(x).numpy())
            seen = engine.observe(frames, cut=True, taps=False)
            assert seen.cut is not None
            tail_error = distance(seen.logits, _answer(tail, seen.cut, ports))
        finally:
            engine.apply(merger(Delta.source()))
    return {"identity_ports": identity, "random_ports": random, "tail": tail_error}


def compare_engines(bundle: Bundle, engine: Engine, rebuilt: Engine, frames: Array) -> dict[str, float]:
    """The live engine against one that is rebuilt, with ports moved; and the tail against the engine."""
    merger, ports, tail = Merger(bundle), random_ports(bundle), Tail(bundle)
    for each in (engine, rebuilt):
        each.apply(merger(ports))
    seen = engine.observe(frames, cut=True, taps=False)
    assert seen.cut is not None
    with torch.no_grad():
        answer = _answer(tail, seen.cut, ports)
    return {
        "random_ports": distance(seen.logits, rebuilt.run(frames)),
        "tail": distance(answer, seen.logits),
    }


def distance(found: Array, expected: Array) -> float:
    """Largest difference as a share of the output's scale; infinite if anything is not finite."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12))


def gate(errors: dict[str, float]) -> None:
    """Raises: ArtifactError if the engine and torch disagree."""
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise ArtifactError(
                f"parity gate: {name} differs by {error:.1e} of the output's scale, {TOLERANCE:.0e} is allowed",
                remedy="report the model: the engine and torch compute different things",
            )


def _answer(tail: Tail, cut: Array, ports: Delta) -> Array:
    """What the tail gives in the form that the engine does: the tail says probabilities as their logarithms."""
    made: Array = tail.with_delta(torch.from_numpy(cut), ports).numpy()
    return np.exp(made) if tail.bundle.manifest.output == "probabilities" else made
