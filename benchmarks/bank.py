"""What a bank takes: bytes of an entry, and memory over a stream that brings a new domain again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.memory import resident_mb
from edge_adapt.bundle import Bundle
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.protocol import Context, Observation, Step
from edge_adapt.preprocess import Preprocess
from edge_adapt.routing.bank import Bank, size
from edge_adapt.routing.router import NEW_DOMAIN, Router
from edge_adapt.runtime.loop import adapt
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail

Array = NDArray[Any]
Part = dict[str, Any]
Progress = Callable[[str, int, int], None]


def quiet(what: str, done: int, total: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    frames: int = 200_000
    every: int = 1000
    """Frames of each domain."""
    batch_size: int = 50
    seed: int = 0


def weighed(bundle: Bundle, images: Array, methods: tuple[str, ...], plan: Plan, progress: Progress = quiet) -> Part:
    """Bytes of the largest entry of each method, over a few domains. `images`: [N, H, W, C], shown changed.

    Raises: ConfigError for a bundle without an encoder.
    """
    rows = []
    for name in methods:
        seen = _played(bundle, name, images, 3, plan, progress)
        rows.append({"method": name, "bytes": max(seen.entry_bytes), "entries": seen.entries[-1]})
    return {"bundle": bundle.manifest.name, "id": bundle.id, "entries": rows}


def endless(bundle: Bundle, images: Array, method: str, plan: Plan, progress: Progress = quiet) -> Part:
    """A stream of ever new domains: what the bank grew to, and the process. Raises: as `weighed`."""
    seen = _played(bundle, method, images, plan.frames // plan.every, plan, progress)
    return {
        "bundle": bundle.manifest.name,
        "id": bundle.id,
        "method": method,
        "frames": len(seen.entries) * plan.every,
        "domains": len(seen.entries),
        "founded": seen.founded,
        "entries": max(seen.entries),
        "bytes": max(seen.bank_bytes),
        "resident_mb": seen.resident,
        "seconds": round(seen.seconds, 1),
    }


@dataclass
class _Seen:
    """After each domain: entries beside source, their bytes, the largest one's, and memory of the process."""

    entries: list[int] = field(default_factory=list)
    bank_bytes: list[int] = field(default_factory=list)
    entry_bytes: list[int] = field(default_factory=list)
    resident: list[float | None] = field(default_factory=list)
    founded: int = 0
    seconds: float = 0.0

    def after(self, bank: Bank) -> None:
        """With one more domain."""
        grown = bank.entries[1:]
        self.entries.append(len(grown))
        self.bank_bytes.append(size(grown))
        self.entry_bytes.append(max((size(entry) for entry in grown), default=0))
        self.resident.append(resident_mb())


class _Watched(Router):
    """A router whose bank can be seen from outside."""

    bank: Bank

    def step(self, state: Any, seen: Observation) -> Step[Any]:
        step = super().step(state, seen)
        self.bank = step.state.own.bank
        return step


def _played(bundle: Bundle, name: str, images: Array, domains: int, plan: Plan, progress: Progress) -> _Seen:
    tail = Tail(bundle)
    context = Context(bundle, lambda: tail, plan.seed)
    method, shape = _Watched(context, build(name, context)), Preprocess(bundle.manifest.input)
    seen, began = _Seen(), time.perf_counter()
    with closing(OnnxRuntimeEngine(bundle)) as engine:
        answers = adapt(Predictor(bundle, engine), method, _batches(images, domains, plan, shape))
        for number in range(domains):
            progress(f"{name}, a new domain every {plan.every} frames", number, domains)
            for _ in range(0, plan.every, plan.batch_size):
                seen.founded += next(answers).events.count(NEW_DOMAIN)
            seen.after(method.bank)
    seen.seconds = time.perf_counter() - began
    return seen


def _batches(images: Array, domains: int, plan: Plan, shape: Preprocess) -> Iterator[Array]:
    rng = np.random.default_rng(plan.seed)
    for number in range(domains):
        change = new_domain(rng)
        for start in range(0, plan.every, plan.batch_size):
            places = np.arange(number * plan.every + start, number * plan.every + start + plan.batch_size)
            yield shape(change(images[places % len(images)]))


def new_domain(rng: np.random.Generator) -> Callable[[Array], Array]:
    """A camera that nobody had before: a colour cast, a contrast, and noise of its own. Takes images [N, H, W, 3]."""
    gain, lift, sigma = rng.uniform(0.3, 1.2, 3), rng.uniform(-60, 90, 3), rng.choice([0.0, 10.0, 25.0, 50.0])

    def change(images: Array) -> Array:
        made = (images - 128.0) * gain + 128 + lift + rng.normal(0, sigma, images.shape)
        return np.clip(made, 0, 255).astype(np.uint8)

    return change
