"""What an owner of a board measures: every engine that runs there, ports, taps, learning, memory and heat. JSON out.

Nothing here is extrapolated: an engine that cannot run is a row with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.environment import environment
from device_agents.host import read_host
from edge_adapt.bundle import Bundle
from edge_adapt.delta import Delta
from edge_adapt.engines.onnxruntime import OnnxRuntimeEngine
from edge_adapt.engines.protocol import Engine
from edge_adapt.engines.switching import settled
from edge_adapt.errors import ConfigError, EdgeAdaptError
from edge_adapt.far import tail_on
from edge_adapt.merge import Merger
from edge_adapt.methods.catalogue import build
from edge_adapt.methods.learner import Learner, Lesson
from edge_adapt.methods.protocol import Context
from edge_adapt.plugins import ENGINES, find, names

Array = NDArray[Any]
Tell = Callable[[str], None]

SCHEMA = 1
SLOW = ("torch",)
"""The reference engine is not measured unless it is asked for."""
BATCHES = (1, 16)
LESSON = 32
"""Frames of one learning step."""
PARITY_FRAMES = 32
WARM_UPS = 5


def device(
    bundle: Bundle,
    *,
    engines: Sequence[str] | None = None,
    rounds: int = 200,
    threads: int = 1,
    wait_s: float = 600.0,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Measure everything that runs here.

    Args:
        engines: their names; None for all that are installed, but for the reference.
        wait_s: how long a plan may take to build.
        tell: takes a line for each part.
    Raises: ConfigError for an unknown name.
    """
    before = dict(read_host())
    chosen = [name for name in names(ENGINES) if name not in SLOW] if engines is None else list(engines)
    rows = []
    for name in chosen:
        rows.append(engine_facts(bundle, name, rounds=rounds, threads=threads, wait_s=wait_s))
        tell(line_of(rows[-1]))
    learners = []
    for where in ("cpu", "cuda"):
        learners.append(learner_facts(bundle, where, rounds=max(5, rounds // 10)))
        tell(line_of(learners[-1]))
    return {
        "schema": SCHEMA,
        "bundle": {"name": bundle.manifest.name, "id": bundle.id, "precision": bundle.manifest.precision},
        "board": board(),
        "settings": {"rounds": rounds, "threads": threads, "batches": list(BATCHES)},
        "engines": rows,
        "learners": learners,
        "host": {"before": before, "after": dict(read_host())},
        "environment": environment(threads, "; ".join(row.get("description", row["name"]) for row in rows)),
    }


def board() -> dict[str, str | None]:
    """What this machine says it is; None where it does not tell."""
    facts: dict[str, str | None] = {"model": None, "gpu": None, "power_mode": None}
    for place in ("/proc/device-tree/model", "/sys/class/dmi/id/product_name"):
        with suppress(OSError):
            facts["model"] = facts["model"] or Path(place).read_text("utf-8", "replace").strip("\0\n ") or None
    with suppress(OSError):
        facts["power_mode"] = Path("/var/lib/nvpmodel/status").read_text("utf-8", "replace").strip()
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def engine_facts(bundle: Bundle, name: str, *, rounds: int, threads: int, wait_s: float) -> dict[str, Any]:
    """Latency of answers, changes of ports and taps, and parity with float32 on the CPU; or why there is none."""
    kind = find(ENGINES, name)
    reason = kind.probe()
    if reason is not None:
        return {"name": name, "status": "skipped", "why": reason}
    started = time.perf_counter()
    try:
        engine = settled(kind(bundle, threads=threads), wait_s)
    except EdgeAdaptError as error:
        return {"name": name, "status": "skipped", "why": error.what}
    try:
        ready_s = time.perf_counter() - started
        batches = {str(size): _latencies(bundle, engine, size, rounds) for size in BATCHES}
        return {
            "name": name,
            "status": "ok",
            "description": engine.description,
            "ready_s": round(ready_s, 2),
            "batches": batches,
            "parity": _parity(bundle, engine),
            "host": dict(read_host()),
        }
    except EdgeAdaptError as error:
        return {"name": name, "status": "failed", "why": error.what}
    finally:
        engine.close()


def _latencies(bundle: Bundle, engine: Engine, size: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of one call: answer, the same with new ports before it, and a look with taps."""
    frames = np.random.default_rng(0).standard_normal((size, *bundle.manifest.input.shape), np.float32)
    merge = Merger(bundle)
    updates = [merge(random_ports(bundle, seed)) for seed in range(4)]

    def changed(number: int) -> None:
        engine.apply(updates[number % len(updates)])
        engine.run(frames)

    cases: dict[str, Callable[[int], object]] = {
        "answer": lambda number: engine.run(frames),
        "ports": changed,
        "look": lambda number: engine.observe(frames, cut=True, taps=bool(bundle.manifest.sites)),
    }
    return {name: timed(case, rounds if name == "answer" else max(5, rounds // 4)) for name, case in cases.items()}


def timed(case: Callable[[int], object], rounds: int) -> dict[str, float]:
    """Milliseconds: p50, p95, p99."""
    spent = []
    for number in range(-WARM_UPS, rounds):
        started = time.perf_counter()
        case(number)
        if number >= 0:
            spent.append((time.perf_counter() - started) * 1e3)
    return {f"p{part}_ms": round(float(np.percentile(spent, part)), 4) for part in (50, 95, 99)}


def _parity(bundle: Bundle, engine: Engine) -> dict[str, float]:
    """Largest difference as a share of the output's scale, and % of equal answers; of source's and of other ports."""
    frames = np.random.default_rng(1).standard_normal((PARITY_FRAMES, *bundle.manifest.input.shape), np.float32)
    reference, merge = OnnxRuntimeEngine(bundle, quantised=False), Merger(bundle)
    found: dict[str, float] = {}
    for name, delta in (("source", Delta.source()), ("ports", random_ports(bundle, 9))):
        for each in (reference, engine):
            each.apply(merge(delta))
        expected, given = reference.run(frames), engine.run(frames)
        found[f"{name}_error"] = float(np.abs(given - expected).max() / max(float(np.abs(expected).max()), 1e-12))
        found[f"{name}_same"] = 100 * float((given.argmax(1) == expected.argmax(1)).mean())
    reference.close()
    return found


def learner_facts(bundle: Bundle, where: str, *, rounds: int, method: str = "tent") -> dict[str, Any]:
    """Milliseconds of one step of a method on the tail, forward to Adam; or why there is none."""
    name = f"{method} on {where}"
    try:
        tail = tail_on(bundle, where)  # type: ignore[arg-type]
        settings = {"window": LESSON, "guards": False}
        made = build(method, Context(bundle, lambda: tail, 0, settings))
    except EdgeAdaptError as error:
        return {"name": name, "status": "skipped", "why": error.what}
    if not isinstance(made, Learner):
        raise ConfigError(f"{method} takes no gradient steps", remedy="use tent or cotta")
    engine = OnnxRuntimeEngine(bundle)
    frames = np.random.default_rng(0).standard_normal((LESSON, *bundle.manifest.input.shape), np.float32)
    cut = engine.observe(frames, cut=True).cut
    engine.close()
    assert cut is not None
    ports = random_ports(bundle, 0)
    lesson = Lesson(
        frames, torch.tensor(cut), lambda h, values: tail(h, dict(values), ports=ports), lambda new: new, ports
    )
    state = made.init()
    taken = timed(lambda number: made.learn(state, lesson), rounds)
    return {"name": name, "status": "ok", "frames": LESSON, "step": taken}


def random_ports(bundle: Bundle, seed: int) -> Delta:
    """Other ports at every site."""
    rng = np.random.default_rng(seed)
    return Delta.of_ports(rng.uniform(0.8, 1.25, bundle.channels), rng.normal(0, 0.1, bundle.channels))


def line_of(row: Mapping[str, Any]) -> str:
    """One row of the table that is printed."""
    if row["status"] != "ok":
        return f"{row['name']:>22}  {row['status']}: {row['why']}"
    if "step" in row:
        return f"{row['name']:>22}  {row['step']['p50_ms']:9.3f} ms a step of {row['frames']} frames"
    one = row["batches"]["1"]
    cells = "  ".join(f"{name} {one[name]['p50_ms']:.3f}" for name in ("answer", "ports", "look"))
    many = row["batches"][str(BATCHES[-1])]["answer"]["p50_ms"] / BATCHES[-1]
    return (
        f"{row['name']:>22}  {cells} ms, p99 {one['answer']['p99_ms']:.3f}; {many:.3f} ms a frame of {BATCHES[-1]}; "
        f"error {row['parity']['source_error']:.1e}, with ports {row['parity']['ports_error']:.1e}"
    )
