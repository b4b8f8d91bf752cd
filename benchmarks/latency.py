"""What ports, taps and deltas cost: an engine against a bare ONNX Runtime session, interleaved in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.environment import environment
from edge_adapt.bundle import FULL, FULL_INT8, Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine, make_session
from edge_adapt.merge import Merger
from edge_adapt.methods.moments import MomentsConfig
from edge_adapt.methods.protocol import TAPS
from edge_adapt.runtime.predictor import Predictor

SCHEMA = 1
CASES = ("bare", "engine", "engine_port_change", "taps_duty", "predictor")
INT8_CASES = ("bare_int8",)
"""Of an INT8 bundle besides; its `bare` is float32, so that every ratio is one to float32."""


def latency(
    bundle: Bundle,
    *,
    batch_size: int = 1,
    rounds: int = 40,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Time every case once per round, in turn, and compare medians.

    bare: an ordinary session on full.onnx, told to use as many threads as the engine.
    bare_int8: the same on the INT8 graph, of a bundle that has one; the other cases then answer with it.
    engine: our engine on the same frames.
    engine_port_change: the same while a learner thread puts other ports in force for each batch; a round ends when
        batch and change are both done.
    taps_duty: `period` calls of which one goes through the tapped twin, divided by `period`.
    predictor: what answers a frame on a device: engine, with a delta of ports and tail norms merged, and the checks.
    """
    frames = np.random.default_rng(0).standard_normal((batch_size, *bundle.manifest.input.shape), np.float32)
    engine = OnnxRuntimeEngine(bundle, threads=threads)
    bare = make_session(bundle.path / FULL, threads)
    feeds = {bare.get_inputs()[0].name: frames}
    for extra in bare.get_inputs()[1:]:
        feeds[extra.name] = np.zeros((0, bundle.manifest.prompts or 0), np.float32)
    merger = Merger(bundle)
    deltas = [_random_delta(bundle, seed) for seed in range(4)]
    predictor = Predictor(bundle, OnnxRuntimeEngine(bundle, threads=threads))
    predictor.apply(deltas[0])
    period = MomentsConfig().period
    bare_int8 = make_session(bundle.path / FULL_INT8, threads) if bundle.manifest.quantised else None
    times: dict[str, list[float]] = {name: [] for name in (*CASES, *INT8_CASES * (bare_int8 is not None))}
    with ThreadPoolExecutor(1) as learner:

        def port_change(number: int) -> None:
            change = learner.submit(lambda: engine.apply(merger(deltas[number % len(deltas)])))
            engine.run(frames)
            change.result()

        def duty() -> None:
            engine.observe(frames, cut=False, taps=True)
            for _ in range(period - 1):
                engine.run(frames)

        cases: dict[str, Callable[[int], object]] = {
            "bare": lambda number: bare.run(None, feeds),
            "engine": lambda number: engine.run(frames),
            "engine_port_change": port_change,
            "taps_duty": lambda number: duty(),
            "predictor": lambda number: predictor.answer(frames),
        }
        if bare_int8 is not None:
            cases["bare_int8"] = lambda number: bare_int8.run(None, feeds)
        predictor.look(frames, frozenset({TAPS}))
        for number in range(-2, rounds):  # two rounds to warm up
            for name, case in cases.items():
                started = time.perf_counter()
                case(number)
                spent = (time.perf_counter() - started) * 1e3
                if number >= 0:
                    times[name].append(spent / (period if name == "taps_duty" else 1))
            progress(max(0, number + 1), rounds)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    # Each round's cases ran within moments of each other: their ratio is less noisy than a ratio of medians.
    ratios = {
        name: float(np.median(np.array(values) / np.array(times["bare"]))) for name, values in times.items()
    }
    description = engine.description
    engine.close()
    return {
        "schema": SCHEMA,
        "bundle": {"name": bundle.manifest.name, "id": bundle.id},
        "settings": {"batch_size": batch_size, "rounds": rounds, "threads": threads, "period": period},
        "median_ms": {name: round(value, 4) for name, value in medians.items()},
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
        "environment": environment(threads, description),
    }


def _random_delta(bundle: Bundle, seed: int) -> Delta:
    """Ports at every site, and another affine at the norms of the tail."""
    rng = np.random.default_rng(seed)
    ports = Delta.of_ports(rng.uniform(0.8, 1.25, bundle.channels), rng.normal(0, 0.1, bundle.channels))
    tail = {
        f"tail/{site.name}.{role}": bundle.source[f"{site.name}.{role}"] * np.float32(rng.uniform(0.9, 1.1))
        for site in bundle.manifest.sites
        if site.in_tail
        for role in ("weight", "bias")
    }
    return ports | tail
