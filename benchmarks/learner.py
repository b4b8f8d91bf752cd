"""How long a learning step takes, eager and as one graph, side by side in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.environment import environment
from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.errors import ConfigError
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.learner import Learner, LearnerState, Lesson
from edge_adapt.methods.protocol import Context
from edge_adapt.runtime.predictor import Predictor
from edge_adapt.tail import Tail

LEARNERS = "eager", "graph"


def learner(
    bundle: Bundle, *, method: str = "tent", batch_size: int = 1, rounds: int = 60, seed: int = 0
) -> dict[str, Any]:
    """Time one step of a method on random frames, forward to Adam, in turns.

    Returns: median milliseconds of both, their ratio, and the largest difference of the values after a step.
    Raises: ConfigError if the method has no step that can be compiled.
    """
    tail = Tail(bundle)
    methods = {name: _built(bundle, tail, method, name, batch_size, seed) for name in LEARNERS}
    engine = OnnxRuntimeEngine(bundle)
    predictor = Predictor(bundle, engine)
    frames = np.random.default_rng(seed).standard_normal((batch_size, *bundle.manifest.input.shape), np.float32)
    cut = torch.tensor(predictor.trunk(frames))
    ports = Delta.of_ports(np.full(bundle.channels, 0.9), np.full(bundle.channels, 0.1))
    lesson = Lesson(frames, cut, lambda h, values: tail(h, values, ports=ports), predictor.trunk, ports)
    state = methods["eager"].init()
    for _ in range(3):  # the first step of Adam has the size of the rate whatever the gradient
        state = methods["eager"].learn(state, lesson)[0]
    after = {name: made.learn(state, lesson)[0] for name, made in methods.items()}
    graph = methods["graph"]
    if graph.fallback is not None:
        raise ConfigError(f"{method} cannot run as a graph: {graph.fallback}", remedy="use tent or cotta")
    times: dict[str, list[float]] = {name: [] for name in LEARNERS}
    for _ in range(rounds):
        for name, made in methods.items():
            times[name].append(_timed(made.learn, state, lesson))
    engine.close()
    return {
        "method": method,
        "batch_size": batch_size,
        "median_ms": {name: median(values) for name, values in times.items()},
        "ratio": median(times["eager"]) / median(times["graph"]),
        "difference": max(
            float((after["eager"].student[name] - value).abs().max()) for name, value in after["graph"].student.items()
        ),
        "environment": environment(1, engine.description),
    }


def _built(bundle: Bundle, tail: Tail, method: str, kind: str, window: int, seed: int) -> Learner:
    settings = {"learner": kind, "window": window, "guards": False}
    made = build(method, Context(bundle, lambda: tail, seed, settings))
    if not isinstance(made, Learner):
        raise ConfigError(f"{method} takes no gradient steps", remedy="use tent or cotta")
    return made


def _timed(learn: Callable[[LearnerState, Lesson], object], state: LearnerState, lesson: Lesson) -> float:
    started = time.perf_counter()
    learn(state, lesson)
    return (time.perf_counter() - started) * 1e3
